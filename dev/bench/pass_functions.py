"""The Python functions of this package that run in one training pass: those that a reader has to know.

    python dev/bench/pass_functions.py            # a table; exit code 1 if a count is above its limit
    python dev/bench/pass_functions.py --names    # and the functions

A function counts once, however often it runs. Its file is in nanochat/, and it starts after the call of
GPT.forward (with targets) and before the end of the backward pass, in any thread. So the backward passes of
autograd functions count, and recomputation too. A comprehension is a part of its function.

The GPU's path needs no GPU: the pass runs on the CPU, but every tensor reports a GPU as its device. Code that
depends on the device then takes the GPU's branch (see `PretendGPU`).
"""

import sys
import threading
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # works without an installation

import torch
from torch.overrides import TorchFunctionMode

import nanochat.gpt
from nanochat import common
from nanochat.arguments import ArgumentParser, whole_number
from nanochat.gpt import GPT, GPTConfig

PACKAGE = Path(nanochat.gpt.__file__).parent
FUNCTION_LIMITS = {"cuda": 15, "cpu": 25}
MODELS = {
    "full rank": {},
    "low rank": {"attn_ranks": (8, 8), "mlp_ranks": (8, 8)},
}


class PretendGPU(TorchFunctionMode):
    """Tensors report a GPU as their device. Tensors that are made on it, or moved to it, stay on the CPU."""

    gpu = torch.device("cuda", 0)
    cpu = torch.device("cpu")
    answers = {
        torch.Tensor.device.__get__: gpu,
        torch.Tensor.is_cuda.__get__: True,
        torch.Tensor.is_cpu.__get__: False,
    }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.answers:
            return self.answers[function]
        args = [self.on_cpu(value) for value in args]
        kwargs = {name: self.on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*args, **kwargs)

    def on_cpu(self, value):
        return self.cpu if isinstance(value, torch.device) and value == self.gpu else value


class CalledFunctions:
    """A context that collects the code objects that start to run in it, in all threads."""

    def __enter__(self):
        self.codes = set()
        threading.setprofile(self.note)  # for threads that start later
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        threading.setprofile(None)

    def note(self, frame, event, _):
        if event == "call":
            self.codes.add(frame.f_code)

    def functions_by_file(self) -> dict[str, list[str]]:
        """{file of the package: its functions, each as name:line}"""
        result = defaultdict(list)
        for code in self.codes:
            path = Path(code.co_filename)
            if path.is_relative_to(PACKAGE) and not code.co_name.endswith(("comp>", "genexpr>")):
                result[str(path.relative_to(PACKAGE))].append(f"{code.co_name}:{code.co_firstlineno}")
        return {file: sorted(names) for file, names in sorted(result.items())}


def training_pass(device: str, ranks: dict) -> CalledFunctions:
    """The functions of a forward and a backward pass of a small model.

    device: cpu (float32) or cuda (bfloat16).
    """
    T = 96  # attention on a CPU works on blocks of 64 queries: the last one is padded here
    config = GPTConfig(sequence_len=T, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, **ranks)
    model = GPT(config)
    model.init_weights()
    tokens = torch.zeros(2, T, dtype=torch.long)
    # not loss.backward(): within a tensor's method PretendGPU is off, so it would leave the GPU's path
    if device == "cpu":
        with CalledFunctions() as called:
            torch.autograd.backward(model(tokens, tokens))
    else:
        with PretendGPU(), CalledFunctions() as called:
            torch.autograd.backward(model(tokens, tokens, torch.bfloat16))
    return called


def forget_cached_results():
    """Empty the lru_caches of the package: a function whose result is cached would not run."""
    for name, module in list(sys.modules.items()):
        if name.startswith("nanochat."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def count(device: str, ranks: dict) -> dict[str, list[str]]:
    """{file: its functions that run in a pass}. device: cpu or cuda; ranks: of a GPTConfig of two layers."""
    training_pass(device, ranks)  # the first pass may import modules, which does not count
    forget_cached_results()
    return training_pass(device, ranks).functions_by_file()


def main(argv=None):
    parser = ArgumentParser("The package's Python functions in one training pass, forward and backward.")
    add = parser.add_argument
    add("--device", choices=["both", "cpu", "cuda"], default="both", help="path to count; cuda needs no GPU")
    add(
        "--cuda-limit",
        type=whole_number(0),
        default=FUNCTION_LIMITS["cuda"],
        help="largest number of functions on a GPU's path",
    )
    add(
        "--cpu-limit",
        type=whole_number(0),
        default=FUNCTION_LIMITS["cpu"],
        help="largest number of functions on a CPU's path",
    )
    add("--names", action="store_true", help="list the functions, each with its line")
    args = parser.parse_args(argv)

    limits = {"cuda": args.cuda_limit, "cpu": args.cpu_limit}
    devices = list(limits) if args.device == "both" else [args.device]
    print("| path | model | functions | limit | | by file |\n|---|---|---:|---:|---|---|")
    listings = []
    exceeded = False
    for device in devices:
        limit = limits[device]
        for model, ranks in MODELS.items():
            functions = count(device, ranks)
            total = sum(map(len, functions.values()))
            exceeded |= total > limit
            result = "too many" if total > limit else "kept"
            files = ", ".join(f"{file} {len(names)}" for file, names in functions.items())
            print(f"| {device} | {model} | {total} | {limit} | {result} | {files} |")
            listings += [f"{device}, {model}, {file}: {' '.join(names)}" for file, names in functions.items()]
    if args.names:
        print("\n" + "\n".join(listings))
    if exceeded:
        sys.exit(1)


if __name__ == "__main__":
    common.run_script(main)
