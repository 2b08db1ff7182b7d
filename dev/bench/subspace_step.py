"""A training step in a random subspace against the dense one: time and memory, in turn in one process.

    python dev/bench/subspace_step.py     # 4 layers, width 256, 4096 tokens; with a target for d = 5

A round is one step of each model. Times are medians over the rounds; ratios to dense are medians of the
rounds' ratios. Peak: the most bytes that a step allocates beside the model and its optimizer, by torch's own
record (see train_step.py). The peak of a basis must not grow with d.
"""

import numpy as np
import torch
import train_step
from train_step import RATES, Subject, allocated, noise_rows  # before nanochat: it sets the path

from nanochat import common, devices, processes
from nanochat.arguments import ArgumentParser, whole_number
from nanochat.dataloader import training_batches
from nanochat.errors import InputError
from nanochat.flag_types import DEEPEST, LONGEST, WIDEST
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import build_optimizers
from nanochat.processes import World
from nanochat.subspace.config import SubspaceConfig
from nanochat.subspace.model import attach
from nanochat.subspace.trainable import adamw_settings

TARGET = 2.0  # largest ratio of a basis's time to the dense one's
DIM = 5  # d of the basis with the target
PEAK_DIMS = (1, 5, 50)  # d of the bases whose peaks are compared


def make_subject(
    name: str, config: GPTConfig, subspace: SubspaceConfig | None, batch_size: int, device, dtype
) -> Subject:
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(config)
        model.init_weights()
    if subspace:
        attach(model, subspace)
    rows = noise_rows(config.vocab_size, config.sequence_len)
    extra = adamw_settings(subspace, 0.01, 0.1) if subspace else None
    return Subject(
        name,
        model,
        build_optimizers(model, RATES, extra=extra),
        training_batches(rows, 0, batch_size, World(device)),
        dtype,
    )


def peak_mib(subject: Subject, device) -> float:
    return max(allocated(subject.step, device).values()) / 2**20


def flag_parser():
    parser = ArgumentParser("Training steps in random subspaces against the dense step.")
    add = parser.add_argument
    add("--depth", type=whole_number(1, DEEPEST), default=4)
    add("--model-dim", type=whole_number(64, WIDEST), default=256)
    add("--vocab-size", type=whole_number(2, LONGEST), default=4096)
    add("--max-seq-len", type=whole_number(2, LONGEST), default=512)
    add("--device-batch-size", type=whole_number(1, LONGEST), default=8)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--device-type", choices=["", "cuda", "cpu"], default="", help="'' = cuda where there is one")
    add("--repeats", type=whole_number(1), default=5)
    return parser


def measure_steps(subjects: list[Subject], repeats: int, device) -> dict[str, list[float]]:
    """{name: [seconds, one for each round]}. The first round does not count."""
    seconds = {subject.name: [] for subject in subjects}
    for turn in range(repeats + 1):
        for subject in subjects:
            step_seconds = train_step.timed_step(subject, device)["step"]
            if turn:
                seconds[subject.name].append(step_seconds)
    return seconds


def main(argv=None):
    args = flag_parser().parse_args(argv)
    if args.model_dim % 64:
        raise InputError(f"--model-dim {args.model_dim}: not a multiple of 64")
    device = processes.init_process(args.device_type).device
    dtype = getattr(torch, args.dtype)
    heads = args.model_dim // 64
    config = GPTConfig(
        args.max_seq_len, args.vocab_size, args.depth, heads, heads, args.model_dim, window_pattern="L"
    )

    def make(name, subspace):
        return make_subject(name, config, subspace, args.device_batch_size, device, dtype)

    basis = f"basis, d = {DIM}"
    subspaces = {
        "dense": None,
        basis: SubspaceConfig("basis", DIM),
        f"basis, d = {DIM} a layer": SubspaceConfig("basis", DIM, "layer"),
        "fastfood, d = 1000": SubspaceConfig("fastfood", 1000),
        "fft-fastfood, d = 1000": SubspaceConfig("fft-fastfood", 1000),
        "lora-random, r = 4": SubspaceConfig("lora-random", rank=4),
        "none": SubspaceConfig("none"),
    }
    subjects = [make(name, subspace) for name, subspace in subspaces.items()]
    seconds = measure_steps(subjects, args.repeats, device)
    print(
        f"{devices.device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} thread(s), "
        f"{args.dtype}; {args.depth} layers, width {args.model_dim}, vocabulary {args.vocab_size}, batch "
        f"{args.device_batch_size} x {args.max_seq_len}, {args.repeats} rounds\n\n"
        "| | step, ms | ratio | peak, MiB | target | |\n|---|---:|---:|---:|---|---|"
    )
    for subject in subjects:
        name = subject.name
        ratio = np.median(np.array(seconds[name]) / seconds["dense"])
        milliseconds = np.median(seconds[name]) * 1e3
        target = " | "
        if name == basis:
            target = f"<= {TARGET:g} | {'reached' if ratio <= TARGET else 'not reached'}"
        peak = f"{peak_mib(subject, device):,.0f}"
        print(f"| {name} | {milliseconds:.0f} | {ratio:.2f} | {peak} | {target} |", flush=True)
    del subjects, subject
    peaks = []
    for d in PEAK_DIMS:
        peak = peak_mib(make("", SubspaceConfig("basis", d)), device)
        peaks.append(f"d = {d}: {peak:,.1f}")
    print("\npeak of a basis, MiB: " + ", ".join(peaks))


if __name__ == "__main__":
    common.run_script(main)
