"""Memory and time of the output head's loss: in chunks against the plain formula.

    python dev/bench/loss_memory.py     # vocabulary 32768, batch 8 x 1024, width 256, float32; with targets

Each round computes the loss and the gradients of x and of the weight once by each way. Time is the median
over the rounds, its ratio the median of the rounds' ratios. Peak: see train_step.py; with x, the weight and
their gradients.
"""

import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from train_step import allocated, shown  # before nanochat: train_step puts the checkout on the path

from nanochat import common, processes
from nanochat.arguments import ArgumentParser, whole_number
from nanochat.benchmark import machine_description, spread, synchronize
from nanochat.files import check_out, write_atomic
from nanochat.flag_types import LONGEST, WIDEST
from nanochat.ops import SOFTCAP, CrossEntropy, rows_at_once
from nanochat.step_metrics import tensor_bytes

MEMORY_TARGET = 0.4
TIME_TARGET = 1.10


def plain_loss(x, weight, targets):
    logits = F.linear(x, weight).float()  # (N, V)
    return F.cross_entropy(SOFTCAP * torch.tanh(logits / SOFTCAP), targets)


WAYS = {
    "plain": plain_loss,
    "chunked": CrossEntropy.apply,
}


def loss_and_gradients(way, x, weight, targets):
    loss = WAYS[way](x, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


def make_inputs(N: int, C: int, V: int, device, dtype) -> tuple:
    """(x, weight, targets): (N, C), (V, C), (N,)"""
    torch.manual_seed(0)
    x = torch.randn(N, C, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, C, device=device) / C**0.5).to(dtype).requires_grad_()
    return x, weight, torch.randint(V, (N,), device=device)


def measure(N: int, C: int, V: int, device, dtype, repeats: int) -> dict:
    x, weight, targets = make_inputs(N, C, V, device, dtype)
    inputs = tensor_bytes((x, weight, targets))

    def run(way, boundary):
        boundary("loss")
        loss_and_gradients(way, x, weight, targets)
        boundary("end")

    results = {way: loss_and_gradients(way, x, weight, targets) for way in WAYS}
    names = ("loss", "gradient of x", "gradient of the weight")
    error = {}
    for name, a, b in zip(names, results["chunked"], results["plain"]):
        error[name] = ((a - b).float().norm() / b.float().norm()).item()
    del results
    seconds = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            synchronize(device)
            started = time.perf_counter()
            loss_and_gradients(way, x, weight, targets)
            synchronize(device)
            seconds[way].append(time.perf_counter() - started)
    peak = {way: inputs + allocated(partial(run, way), device)["loss"] for way in WAYS}
    return {
        "seconds": {way: spread(seconds[way]) for way in WAYS},
        "peak bytes": peak,
        "relative difference": error,
        "time ratio": spread(np.array(seconds["chunked"]) / seconds["plain"]),
        "peak ratio": peak["chunked"] / peak["plain"],
    }


def measure_chunks(inputs: tuple, rows: list[int], chunk_loss, repeats: int) -> dict:
    """{rows of a chunk: seconds, peak bytes, and whether compiled training takes it} of loss and gradients.

    inputs: of `make_inputs`. chunk_loss: `compiler.chunk_loss`, compiled or not.
    """
    x, weight, targets = inputs
    chosen = rows_at_once(x, len(weight), compiled=True)
    seconds = {n: [] for n in rows}

    def run(n, boundary):
        boundary("loss")
        loss = CrossEntropy.apply(*inputs, chunk_loss, n)
        torch.autograd.grad(loss, (x, weight))
        boundary("end")

    for turn in range(repeats + 1):
        for n in rows:
            synchronize(x.device)
            started = time.perf_counter()
            run(n, lambda part: None)
            synchronize(x.device)
            if turn:  # the first one compiles
                seconds[n].append(time.perf_counter() - started)
    results = {}
    for n in rows:
        peak = tensor_bytes(inputs) + allocated(partial(run, n), x.device)["loss"]
        results[n] = {"seconds": spread(seconds[n]), "peak bytes": peak, "chosen": n == chosen}
    return results


def main(argv=None):
    parser = ArgumentParser("The output head's loss in chunks against the plain formula.")
    add = parser.add_argument
    add("--vocab-size", type=whole_number(2, LONGEST), default=32768)
    add("--device-batch-size", type=whole_number(1, LONGEST), default=8)
    add("--max-seq-len", type=whole_number(1, LONGEST), default=1024)
    add("--model-dim", type=whole_number(1, WIDEST), default=256)
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--device-type", choices=["", "cuda", "cpu"], default="", help="'' = cuda where there is one")
    add("--repeats", type=whole_number(1), default=5)
    add("--out", type=Path, default=None, help="JSON file")
    args = parser.parse_args(argv)
    if args.out:
        check_out("--out", args.out, is_file=True)
    device = processes.init_process(args.device_type).device
    dtype = getattr(torch, args.dtype)
    tokens = args.device_batch_size * args.max_seq_len
    result = measure(tokens, args.model_dim, args.vocab_size, device, dtype, args.repeats)
    result = {"machine": machine_description(device, dtype) | {"compiled": False}, **result}

    print(
        f"{result['machine']['device']}, torch {torch.__version__}, {args.dtype}; vocabulary "
        f"{args.vocab_size}, batch {args.device_batch_size} x {args.max_seq_len}, width {args.model_dim}, "
        f"{args.repeats} rounds\n\n"
        "| | plain | chunked | ratio | target | |\n|---|---:|---:|---:|---:|---|"
    )
    for label, unit, key, ratio, target in (
        ("loss and gradients, ms", 1e3, "seconds", result["time ratio"], TIME_TARGET),
        ("peak, MB", 1e-6, "peak bytes", result["peak ratio"], MEMORY_TARGET),
    ):
        reached = (ratio["median"] if isinstance(ratio, dict) else ratio) <= target
        plain = shown(result[key]["plain"], unit)
        chunked = shown(result[key]["chunked"], unit)
        verdict = "reached" if reached else "not reached"
        print(f"| {label} | {plain} | {chunked} | {shown(ratio, 1, 3)} | <= {target} | {verdict} |")
    differences = [f"{name} {value:.1e}" for name, value in result["relative difference"].items()]
    print(f"\nrelative difference: {', '.join(differences)}")
    if args.out:
        write_atomic(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    common.run_script(main)
