"""What a sweep costs: parameters, FLOPs, memory and time of each run, and of all of them together."""

import statistics
import time
from dataclasses import replace

import torch

from nanochat import devices
from nanochat.accounting import account
from nanochat.errors import InputError
from nanochat.gpt import GPT, GPTConfig
from nanochat.peak import execution, predict_peak
from nanochat.run_files import read_summary
from nanochat.sweep.experiment import Point, Sweep
from nanochat.sweep.local import places
from nanochat.units import BYTES, COUNT, FLOP, TIME, human

HEADER = ["run", "status", "parameters", "FLOPs/token", "tokens", "FLOPs", "peak memory", "time"]
MEASURED_LAYERS = 2
MEASURED_SECONDS = 1.5
# FLOPs of a measured pass on a CPU: about half a second on one core
CPU_PASS_FLOPS = 3e10


def print_costs(sweep: Sweep, most: int | None):
    """A line for each run, then sums and notes. most: how many runs at once (-j), see `places`."""
    first = sweep.points[0].args
    device_type = devices.pick_device_type(first.device_type)
    itemsize = devices.compute_dtype(first.dtype, device_type, training=True).itemsize
    rate, source = finished_rate(sweep) or measured_rate(sweep.points[0], device_type)
    if device_type == "cuda":
        rate *= sweep.processes
    if sweep.question:
        print(sweep.question)
    if sweep.cost:
        print(f"cost, as the file has it: {sweep.cost}")
    print_table([HEADER, *(cost_row(point, rate, itemsize) for point in sweep.points)])

    total = sum(total_flops(point) for point in sweep.points)
    remaining = sum(total_flops(point) for point in sweep.points if point.status() != "finished")
    at_once = min(count_places(sweep, most), len(sweep.points)) if device_type == "cuda" else 1
    print(
        f"\n{len(sweep.points)} runs, {human(total, FLOP)}; left to do: {human(remaining, FLOP)}, "
        f"an estimated {human(remaining / rate / at_once, TIME)} of training on this machine, "
        f"{at_once} at a time; starts, evaluations and checkpoints come on top"
    )
    print(
        f"rate: {human(rate, FLOP)}/s a run, {source}; "
        f"memory: the tensors of one process of a run, {itemsize * 8}-bit"
    )
    print_notes(sweep)


def print_notes(sweep: Sweep):
    if any(point.base for point in sweep.points):
        print(
            "note: a run that starts from another counts as its base with every weight trained: "
            "parameters and FLOPs are an upper bound"
        )
    for label, original in sweep.duplicates:
        print(f"note: {label} is the same run as {original}: it runs once")
    if len({point.plan["tokens"] for point in sweep.points}) > 1:
        print(
            "note: not all runs see the same number of tokens; "
            "fix it with num-iterations and total-batch-size if it is not what varies"
        )


def cost_row(point: Point, rate: float, itemsize: int) -> list[str]:
    """The cells of one run. rate: FLOP/s of a run; itemsize: bytes of a number in its computations."""
    cost = account(point.config)
    peak = predicted_peak(point, itemsize)
    return [
        point.tag,
        point.status(),
        human(cost["params/total"], COUNT),
        human(cost["flops/per_token"], FLOP),
        human(point.plan["tokens"], COUNT),
        human(total_flops(point), FLOP),
        human(peak, BYTES) if peak else "–",
        human(total_flops(point) / rate, TIME),
    ]


def print_table(rows: list[list[str]]):
    """Columns of equal width: the first two begin at the left, numbers end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            cells.append(cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i]))
        print("  ".join(cells))


def total_flops(point: Point) -> float:
    return point.plan["tokens"] * account(point.config)["flops/per_token"]


def predicted_peak(point: Point, itemsize: int) -> int | None:
    """Bytes. None for a run that starts from another: its frozen weights have no gradients to count."""
    if point.base:
        return None
    args = point.args
    device_type = devices.pick_device_type(args.device_type)
    run = execution(args, point.plan, device_type, itemsize, point.processes)
    return predict_peak(point.config, run)["mem/predicted_peak_bytes"]


def count_places(sweep: Sweep, most: int | None) -> int:
    try:
        return len(places(sweep, most))
    except InputError:  # too few GPUs here: the sweep is meant for another machine
        return 1


# ---- speed -------------------------------------------------------------------------------------------------


def finished_rate(sweep: Sweep) -> tuple[float, str] | None:
    """(FLOP/s of one process, its source in words) over the finished runs of this sweep; None without any."""
    finished = [read_summary(point.folder) for point in sweep.points if point.status() == "finished"]
    flops = sum(summary["total_training_flops"] for summary in finished)
    seconds = sum(summary["total_training_time"] for summary in finished) * sweep.processes
    return (flops / seconds, f"as in {len(finished)} finished run(s)") if seconds else None


def measured_rate(point: Point, device_type: str) -> tuple[float, str]:
    """(FLOP/s, how it was measured): forward and backward through two layers, for a second or two."""
    config = first_layers(point.config, MEASURED_LAYERS)
    flops_per_token = account(config)["flops/per_token"]
    rows = point.plan["device_batch_size"]
    T = config.sequence_len
    if device_type == "cpu":  # a part of a batch
        tokens = max(128, int(CPU_PASS_FLOPS / flops_per_token))
        rows = max(1, min(rows, tokens // T))
        T = min(T, tokens)
    dtype = devices.compute_dtype(point.args.dtype, device_type, training=True)
    with torch.device(device_type):
        model = GPT(config)
        model.init_weights()
        x = torch.randint(config.vocab_size, (rows, T))
    times = []
    while len(times) < 2 or sum(times) < MEASURED_SECONDS:
        start_time = time.perf_counter()
        loss = model(x, x, dtype)
        loss.backward()
        loss.item()  # waits for a GPU
        times.append(time.perf_counter() - start_time)
    seconds = statistics.median(times[1:])  # the first pass warms up
    threads = f", {torch.get_num_threads()} thread(s)" if device_type == "cpu" else ""
    source = (
        f"measured on {config.n_layer} layers of width {config.n_embd}, forward and backward of "
        f"{x.numel():,} tokens, without the optimizer{threads}: an estimate"
    )
    return x.numel() * flops_per_token / seconds, source


def first_layers(config: GPTConfig, count: int) -> GPTConfig:
    """The model with at most `count` layers, without its layer map."""
    layers = min(count, config.n_layer)
    return replace(
        config,
        n_layer=layers,
        layer_map=(),
        attn_ranks=config.attn_ranks[:layers],
        mlp_ranks=config.mlp_ranks[:layers],
        matrix_ranks={name: ranks[:layers] for name, ranks in config.matrix_ranks.items()},
    )
