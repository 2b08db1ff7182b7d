"""Memory: how much a machine has, whether a training step fits, and what is said where it did not."""

import contextlib
import functools
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from nanochat.accounting import account, on_meta
from nanochat.arguments import LARGEST_INTEGER
from nanochat.common import is_of_gpu, memory_shortage, out_of_memory
from nanochat.devices import compute_dtype
from nanochat.errors import InputError
from nanochat.gpt import GPTConfig
from nanochat.peak import execution, predict_peak
from nanochat.processes import print0

ERROR = 0.1  # of the prediction, at most: as measured (dev/LOG.md)
CARDS = {24: 22.0, 40: 39.4, 80: 79.1, 141: 139.8}  # GB in the names of cards: GiB that the least of them has
CUDA_GIB = 1.0  # of CUDA itself, of its libraries, and of gaps between tensors


def memory_bytes(device_type: str) -> int:
    """All the memory of a GPU, of the machine, or of this container. A batch system may allow less."""
    if device_type == "cuda":
        if not torch.cuda.is_available():  # `init_process` explains that to the user
            return LARGEST_INTEGER
        return torch.cuda.get_device_properties(0).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit, which reads "max"
        return machine


def training_costs(
    config: GPTConfig, args, plan: dict, device_type: str, dtype_bytes: int, processes: int
) -> dict:
    """`accounting.account`, and the peak of a training step on this device."""
    model = on_meta(config)
    costs = account(model)
    run = execution(args, plan, device_type, dtype_bytes, processes)
    return costs | predict_peak(model, run, costs)


def check_memory(args, accounting: dict, device_type: str):
    """InputError if the training can never fit into this machine's memory.

    What may fit is tried. Half of the activations count where the predicted peak is only an upper bound: in a
    subspace, and under a budget that repeats products.
    """
    needed = (1 - ERROR) * accounting["mem/predicted_peak_bytes"]
    if args.subspace or args.activation_budget < 0.7:
        needed = accounting["mem/weights_bytes"] + accounting["mem/grads_bytes"]
        needed += accounting["mem/activations_bytes"] // 2
    available = memory_bytes(device_type)
    if needed > available:
        flags = "--depth, --model-dim, --vocab-size, --max-seq-len, --device-batch-size"
        if args.subspace:
            flags += ", --subspace-dim"
        raise InputError(
            f"{flags}: weights, gradients and activations need at least {needed / 2**30:,.1f} "
            f"GiB, and there are {available / 2**30:,.1f} GiB; give less of one of them"
        )


def print_cards(config: GPTConfig, args, plan: dict, processes: int):
    """On which GPUs the training fits, and with how many rows a pass at most. Nothing of a subspace."""
    if args.subspace:
        return
    dtype = compute_dtype(args.dtype, "cuda", training=True)
    run = execution(args, plan, "cuda", dtype.itemsize, processes)
    rows_of_step = run.rows * plan["grad_accum_steps"]
    model = on_meta(config)
    costs = account(model)

    @functools.cache
    def peak_gib(rows: int) -> float:
        passes = replace(run, rows=rows, accumulated=rows < rows_of_step)
        return predict_peak(model, passes, costs)["mem/predicted_peak_bytes"] / 2**30

    largest = {}
    for card, size in CARDS.items():
        if has_what_flags_need(card, args):
            largest[f"{card} GB"] = most_rows(peak_gib, rows_of_step, size)
    fits = " and ".join(card for card, rows in largest.items() if rows >= run.rows)
    rows_by_card = ", ".join(f"{rows or 'none'} on {card}" for card, rows in largest.items())
    print0(
        f"on a GPU ({str(dtype).removeprefix('torch.')}{', compiled' if run.compiled else ''}): peak "
        f"{peak_gib(run.rows):.1f} GiB, fits on {fits or 'no single card'}; "
        f"largest --device-batch-size: {rows_by_card}"
    )


def has_what_flags_need(card: int, args) -> bool:
    """Whether there are cards of so many GB that can run these flags. The one of 40 GB is an A100."""
    if args.mlp_kernel == "fused":  # see `mlp_kernel.SHARED_MEMORY`
        return card >= 80
    return not (args.fp8 and card == 40)


def most_rows(peak_gib: Callable, rows_of_step: int, available_gib: float) -> int:
    """The most rows a pass that divide a step and certainly fit; 0 where one row is too many."""
    most = 0
    too_many = rows_of_step + 1
    while too_many - most > 1:
        rows = (most + too_many) // 2
        if (1 + ERROR) * peak_gib(rows) + CUDA_GIB <= available_gib:
            most = rows
        else:
            too_many = rows
    smaller = [rows for rows in range(1, math.isqrt(rows_of_step) + 1) if rows_of_step % rows == 0]
    divisors = [*smaller, *(rows_of_step // rows for rows in smaller)]
    return max((rows for rows in divisors if rows <= most), default=0)


@contextlib.contextmanager
def flags_in_errors(args):
    """In this block, too little memory of a GPU is an InputError that names the flags to change."""
    try:
        yield
    except RuntimeError as e:
        if not (out_of_memory(e) and is_of_gpu(e)):
            raise
        remedies = ["a smaller --device-batch-size"]
        if args.recompute != "block":
            remedies.append("--recompute block")
        if args.activation_budget == 1 and args.recompute == "none" and args.compile != "off":
            remedies.append("--activation-budget 0.7")
        rows = args.device_batch_size
        raise InputError(
            f"--device-batch-size {rows}: {memory_shortage(e)}; give {' or '.join(remedies)}"
        ) from None
