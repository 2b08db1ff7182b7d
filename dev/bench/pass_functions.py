"""How many of our own Python functions run in one training pass: what one has to read to follow the model.

    python dev/bench/pass_functions.py            # a table; exit code 1 where a count is above its limit
    python dev/bench/pass_functions.py --names    # and the functions

A function counts once, however often it runs. It counts if its file lies in nanochat/ and if it starts after
the call of GPT.forward (with targets) and before the end of the backward pass, in any thread. So the backward
passes of autograd functions count, and so does recomputation. A comprehension is a part of its function.

The GPU's path needs no GPU. The pass runs on the CPU while every tensor says that it is on a GPU. So all code
that asks a tensor for its device takes the GPU's branch (see `PretendGPU`).
"""

import sys
import threading
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # a bare checkout will do: nothing need be installed

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
    """Tensors report a GPU as their device, and what is made or moved there stays on the CPU."""

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
    """A context that collects the code objects that start running in it, in all threads."""

    def __enter__(self):
        self.codes = set()
        threading.setprofile(self.note)  # of threads that start from now on
        sys.setprofile(self.note)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        threading.setprofile(None)

    def note(self, frame, event, _):
        if event == "call":
            self.codes.add(frame.f_code)

    def by_file(self) -> dict[str, list[str]]:
        """{file of the package: its functions, each as name:line}"""
        result = defaultdict(list)
        for code in self.codes:
            path = Path(code.co_filename)
            if path.is_relative_to(PACKAGE) and not code.co_name.endswith(("comp>", "genexpr>")):
                result[str(path.relative_to(PACKAGE))].append(f"{code.co_name}:{code.co_firstlineno}")
        return {file: sorted(names) for file, names in sorted(result.items())}


def training_pass(device: str, ranks: dict) -> CalledFunctions:
    """What a forward and a backward pass of a small model call. device: cpu (float32) or cuda (bfloat16)."""
    T = 96  # attention on a CPU works on blocks of 64 queries: the last one is padded here
    config = GPTConfig(sequence_len=T, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, **ranks)
    model = GPT(config)
    model.init_weights()
    tokens = torch.zeros(2, T, dtype=torch.long)
    # Not loss.backward(): a tensor's method would leave PretendGPU, and with it the GPU's path.
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
    training_pass(device, ranks)  # the first one may import modules, which is no part of a pass
    forget_cached_results()
    return training_pass(device, ranks).by_file()


def main(argv=None):
    parser = ArgumentParser("Our own Python functions in one training pass, forward and backward.")
    add = parser.add_argument
    add("--device", choices=["both", "cpu", "cuda"], default="both", help="whose path; cuda needs no GPU")
    add(
        "--cuda-limit",
        type=whole_number(0),
        default=FUNCTION_LIMITS["cuda"],
        help="most functions on a GPU's path",
    )
    add(
        "--cpu-limit",
        type=whole_number(0),
        default=FUNCTION_LIMITS["cpu"],
        help="most functions on a CPU's path",
    )
    add("--names", action="store_true", help="list the functions, each with its line")
    args = parser.parse_args(argv)

    limits = {"cuda": args.cuda_limit, "cpu": args.cpu_limit}
    devices = list(limits) if args.device == "both" else [args.device]
    print("| path | model | functions | limit | | by file |\n|---|---|---:|---:|---|---|")
    lists = []
    exceeded = False
    for device in devices:
        limit = limits[device]
        for model, ranks in MODELS.items():
            functions = count(device, ranks)
            total = sum(map(len, functions.values()))
            exceeded |= total > limit
            word = "too many" if total > limit else "kept"
            files = ", ".join(f"{file} {len(names)}" for file, names in functions.items())
            print(f"| {device} | {model} | {total} | {limit} | {word} | {files} |")
            lists += [f"{device}, {model}, {file}: {' '.join(names)}" for file, names in functions.items()]
    if args.names:
        print("\n" + "\n".join(lists))
    if exceeded:
        sys.exit(1)


if __name__ == "__main__":
    common.run_script(main)
