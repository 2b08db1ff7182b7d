"""A training step on one GPU: correctness, time and memory, as JSON and markdown. gpu.sh says how to run it.

    python dev/bench/gpu.py --out gpu_bench
    python dev/bench/gpu.py --out gpu_bench --device-type cpu --tiny     # on any machine, in a minute

First it checks that the device computes the same as the CPU. Then it makes train_step.py's comparison at the
widths of d20 and d12: full rank, and four low ranks with and without recomputation, three models in turn at a
time. The files are written after every comparison, so no result is lost if the time ends. Comparisons for
which there was no time are listed as skipped.
"""

import copy
import gc
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import train_step
from loss_memory import measure as measure_loss
from train_step import RATES, compare, make_subject, noise_rows, shown  # before nanochat: it sets the path

from nanochat import common, devices, processes
from nanochat.arguments import ArgumentParser, whole_number
from nanochat.benchmark import machine_description
from nanochat.files import check_out, write_atomic
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import build_optimizers

FRACTIONS = {"d/4": 1 / 4, "d/3": 1 / 3, "d/2": 1 / 2, "d/8": 1 / 8}  # the most important first
LARGEST_BATCH = 64
# largest relative differences from the CPU in float32: (first loss, gradients, loss after the steps). After
# the steps they are larger, since Muon orthogonalises in bfloat16 on a GPU
TOLERANCES = {"float32": (1e-4, 1e-3, 0.02), "bfloat16": (1e-2, 0.05, 0.05)}


@dataclass
class Setting:
    """Device, dtype, compilation and rounds of all comparisons."""

    device: torch.device
    dtype: torch.dtype
    compiled: bool
    repeats: int


class Report:
    """The results up to now, and their files."""

    def __init__(self, folder: Path, start_time: float):
        self.folder = folder
        self.start_time = start_time
        self.entries = {}

    def save(self):
        self.entries["seconds"] = time.monotonic() - self.start_time
        write_atomic(self.folder / "gpu.json", json.dumps(self.entries, indent=1) + "\n")
        write_atomic(self.folder / "gpu.md", markdown(self.entries))


# ---- correctness -------------------------------------------------------------------------------------------


def small_model(rank: int) -> GPT:
    """A model in which no matrix is zero, so that every gradient is a test."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            sequence_len=128,
            vocab_size=1024,
            n_layer=2,
            n_head=2,
            n_kv_head=2,
            n_embd=128,
            attn_ranks=(rank,) * 2,
            mlp_ranks=(rank,) * 2,
        )
    )
    model.init_weights()
    blocks = [layer for block in model.blocks for layer in (block.attn.o, block.mlp.down)]
    for linear in (*blocks, model.lm_head):
        linear.init()
    return model


def train_steps(model: GPT, device, dtype, steps: int = 5):
    """(first loss, its gradients, loss after the steps) on one random batch."""
    model = copy.deepcopy(model).to(device)
    optimizers = build_optimizers(model, RATES)
    tokens = torch.randint(1024, (4, 129), generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    for step in range(steps):
        loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), dtype)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return losses[0], gradient, losses[-1]


def smoke(device) -> list[dict]:
    """An entry for each model and dtype: the relative differences of the device from the CPU in float32."""
    entries = []
    for name, rank in (("full rank", 0), ("low rank", 32)):
        model = small_model(rank)
        first, gradient, last = train_steps(model, torch.device("cpu"), torch.float32)
        for dtype_name, limits in TOLERANCES.items():
            device_values = train_steps(model, device, getattr(torch, dtype_name))
            differences = {
                "first loss": abs(device_values[0] / first - 1),
                "gradients": ((device_values[1] - gradient).norm() / gradient.norm()).item(),
                "loss after steps": abs(device_values[2] / last - 1),
            }
            entries.append(
                {
                    "what": f"{name}, {dtype_name}",
                    **differences,
                    "ok": all(d <= limit for d, limit in zip(differences.values(), limits)),
                }
            )
    return entries


def loss_check(device, tiny: bool) -> list[dict]:
    """The loss in chunks against the plain one: agreement, time, peak."""
    entries = []
    N, C, V = (256, 32, 512) if tiny else (8192, 768, 32768)
    for dtype_name, limit in (("float32", 1e-4), ("bfloat16", 0.02)):
        result = measure_loss(N, C, V, device, getattr(torch, dtype_name), repeats=3)
        entries.append(
            {
                "what": f"chunked loss, {dtype_name}, {N} x {C}, vocabulary {V}",
                **result,
                "ok": max(result["relative difference"].values()) <= limit,
            }
        )
    return entries


# ---- the comparisons ---------------------------------------------------------------------------------------


def sizes(tiny: bool) -> dict[str, GPTConfig]:
    """{name: dense model}. Attention sees the whole context: torch's flash attention takes no mask."""
    if tiny:
        return {"tiny": GPTConfig(64, 512, 2, 2, 2, 64, window_pattern="L")}
    configs = {}
    for depth in (20, 12):
        heads = depth // 2
        configs[f"d{depth}"] = GPTConfig(2048, 65536, depth, heads, heads, 64 * depth, window_pattern="L")
    return configs


def low_rank(config: GPTConfig, fraction: float) -> GPTConfig:
    """The config with ranks in multiples of 8, as tensor cores need them."""
    rank = 8 * round(fraction * config.n_embd / 8)
    return replace(config, attn_ranks=(rank,) * config.n_layer, mlp_ranks=(rank,) * config.n_layer)


def fits(configs, rows, batch_size: int, device, dtype) -> bool:
    """Whether all models fit together. They make uncompiled steps, which need more than compiled ones."""
    try:
        subjects = [make_subject("", config, rows, batch_size, device, dtype, False) for config in configs]
        for _ in range(2):  # the second step has optimizer state
            for subject in subjects:
                subject.step(lambda part: None)
        return True
    except torch.OutOfMemoryError:
        return False


def release(device):
    gc.collect()  # models and batch generators refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest_batch(config: GPTConfig, rows, start: int, device, dtype) -> int:
    """The largest power of two up to `start` that fits."""
    batch_size = start
    low = low_rank(config, FRACTIONS["d/2"])
    models = [config, low, low]  # as many as in a comparison
    while batch_size > 1 and not fits(models, rows, batch_size, device, dtype):
        release(device)
        batch_size //= 2
    release(device)
    return batch_size


def measure_size(
    size: str,
    config: GPTConfig,
    batch_size: int,
    rows,
    deadline: float,
    report: Report,
    setting: Setting,
):
    """Make all comparisons of one size. Those that fail, or have no time left, are listed as skipped."""
    comparisons = {}
    report.entries["sizes"][size] = {"batch": batch_size, "comparisons": comparisons}
    skipped = report.entries["skipped"]
    device = setting.device

    def make(name, config):
        return make_subject(name, config, rows, batch_size, device, setting.dtype, setting.compiled)

    dense = None
    longest = 0.0
    for label, fraction in FRACTIONS.items():
        started = time.monotonic()
        if started + longest > deadline:
            skipped.append(f"{size}, rank {label}: no time left")
            continue
        try:
            dense = dense or make("dense", config)
            factored = low_rank(config, fraction)
            lows = [
                make(f"r = {label}", factored),
                make(f"r = {label}, recompute", replace(factored, recompute="bottleneck")),
            ]
            controls = {low.name: "dense" for low in lows}
            comparisons[label] = compare([dense, *lows], controls, batch_size, device, setting.repeats)
        except RuntimeError as e:  # out of memory, or an error of the compiler: the other comparisons go on
            first_line = (str(e).splitlines() or [""])[0][:200]
            skipped.append(f"{size}, rank {label}: {type(e).__name__}: {first_line}")
        lows = None
        release(device)
        longest = max(longest, time.monotonic() - started)
        report.save()


# ---- the report --------------------------------------------------------------------------------------------


def size_table(measured: dict, peak: float | None) -> list[str]:
    lines = [
        "| | rank | parameters, M | tokens/s | step, ms | data | forward | backward | optimizer "
        "| / dense: step | FLOPs | step / FLOPs | MFU, % | of matmul ceiling, % | peak, GB | / dense |",
        "|---|" + "---:|" * 15,
    ]
    for number, result in enumerate(measured["comparisons"].values()):
        for name, model in result["models"].items():
            if name == "dense" and number:
                continue  # each comparison has it; the first is enough here
            seconds = model["seconds"]
            time_ratios = ["", "", ""]
            peak_ratio = ""
            if ratio := result["ratios"].get(name):
                values = (ratio["seconds"]["step"], ratio["flops"], ratio["step over flops"])
                time_ratios = [shown(value, 1, 3) for value in values]
                peak_ratio = shown(ratio["memory"]["peak"], 1, 3)
            cells = [
                name,
                str(max(model["config"]["mlp_ranks"], default=0) or "full"),
                shown(model["accounting"]["params/total"], 1e-6),
                f"{model['tokens per second']['median']:,.0f}",
                shown(seconds["step"], 1e3),
                *(shown(seconds[part]["median"], 1e3, 3) for part in train_step.PARTS),
                *time_ratios,
                shown(model["flops per second"]["median"], 100 / peak, 3) if peak else "",
                shown(model["share of ceiling"]["median"], 100, 3),
                shown(model["memory"]["peak"], 1e-9),
                peak_ratio,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def target_lines(report: dict) -> list[str]:
    """Aims for one H100 or H200, and whether they are reached."""
    result = report["sizes"].get("d20", {}).get("comparisons", {}).get("d/4")
    if not result:
        return []
    aims = []
    if report["peak flops"]:
        mfu = result["models"]["dense"]["flops per second"]["median"] / report["peak flops"]
        aims.append(("full rank, MFU", f"{100 * mfu:.1f}%", ">= 50%", mfu >= 0.5))
    for name, ratio in result["ratios"].items():
        step = ratio["seconds"]["step"]["median"]
        peak = ratio["memory"]["peak"]
        aims += [
            (f"{name}, step / dense", f"{step:.3f}", "<= 0.6", step <= 0.6),
            (f"{name}, peak / dense", f"{peak:.3f}", "<= 0.6", peak <= 0.6),
        ]
    lines = []
    for quantity, figure, aim, is_reached in aims:
        lines.append(f"| {quantity} | {figure} | {aim} | {'reached' if is_reached else 'not reached'} |")
    return ["## Aims at d20", "", "| | figure | aim | |", "|---|---:|---:|---|", *lines, ""]


def agreement_lines(report: dict) -> list[str]:
    lines = [
        "## Agreement with the CPU in float32",
        "",
        "| | first loss | gradients | loss after steps | |",
        "|---|---:|---:|---:|---|",
    ]
    for entry in report["smoke"]:
        cells = [f"{entry[key]:.1e}" for key in ("first loss", "gradients", "loss after steps")]
        lines.append(f"| {entry['what']} | {' | '.join(cells)} | {'ok' if entry['ok'] else 'DIFFERS'} |")
    lines += [
        "",
        "| against the plain loss | loss | gradient of x | gradient of the weight | time | peak | |",
        "|---|" + "---:|" * 5 + "---|",
    ]
    for entry in report["loss"]:
        cells = [f"{difference:.1e}" for difference in entry["relative difference"].values()]
        cells += [shown(entry["time ratio"], 1, 3), f"{entry['peak ratio']:.3f}"]
        lines.append(f"| {entry['what']} | {' | '.join(cells)} | {'ok' if entry['ok'] else 'DIFFERS'} |")
    return lines


def markdown(report: dict) -> str:
    machine = report["machine"]
    lines = [
        "# A training step on one device",
        "",
        f"{machine['device']}, torch {machine['torch']}, {machine['dtype']}, "
        f"{'compiled' if machine['compiled'] else 'eager'}. Medians over interleaved rounds, quartiles in "
        "brackets. Factored layers: attention and MLP. How it is measured: dev/bench/train_step.py.",
        "",
    ]
    for size, measured in report["sizes"].items():
        if measured["comparisons"]:
            first = next(iter(measured["comparisons"].values()))
            config = first["models"]["dense"]["config"]
            ceiling = shown(first["ceiling flops per second"], 1e-12)
            lines += [
                f"## {size}",
                "",
                f"{config['n_layer']} layers, width {config['n_embd']}, vocabulary {config['vocab_size']}, "
                f"batch {measured['batch']} x {config['sequence_len']}; matmul ceiling {ceiling} TFLOP/s",
                "",
                *size_table(measured, report["peak flops"]),
                "",
            ]
    lines += target_lines(report) + agreement_lines(report)
    skipped = "; ".join(report["skipped"]) or "nothing"
    lines += ["", f"Skipped: {skipped}. Whole run: {report['seconds']:.0f} s.", ""]
    return "\n".join(lines)


def flag_parser():
    parser = ArgumentParser("Correctness and speed of one device, dense and low rank.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    add("--device-type", choices=["cuda", "cpu"], default="cuda", help="the device to measure")
    add(
        "--tiny",
        action="store_true",
        help="a small model in float32, uncompiled, to try this program in a minute",
    )
    add(
        "--seconds",
        type=whole_number(1),
        default=420,
        help="start no comparison that would probably end later than this",
    )
    return parser


def main(argv=None):
    args = flag_parser().parse_args(argv)
    check_out("--out", args.out)
    start_time = time.monotonic()
    device = processes.init_process(args.device_type).device
    if args.tiny:
        setting = Setting(device, torch.float32, compiled=False, repeats=2)
    else:
        setting = Setting(device, torch.bfloat16, compiled=True, repeats=10)
    report = Report(args.out, start_time)
    machine = machine_description(device, setting.dtype) | {"compiled": setting.compiled}
    report.entries = {
        "machine": machine,
        "peak flops": devices.peak_flops(devices.device_name(device)),  # for MFU
        "smoke": [],
        "loss": [],
        "sizes": {},
        "skipped": [],
    }

    if device.type == "cuda":  # for correctness, float32 without TF32
        torch.set_float32_matmul_precision("highest")
    report.entries["smoke"] = smoke(device)
    report.entries["loss"] = loss_check(device, args.tiny)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as init_process sets it
    report.save()

    configs = sizes(args.tiny)
    for number, (size, config) in enumerate(configs.items(), 1):
        now = time.monotonic()
        share = 1.0 if number == len(configs) else 0.6  # of the remaining time
        deadline = now + share * (start_time + args.seconds - now)
        rows = noise_rows(config.vocab_size, config.sequence_len)
        batch_size = largest_batch(config, rows, 4 if args.tiny else LARGEST_BATCH, device, setting.dtype)
        measure_size(size, config, batch_size, rows, deadline, report, setting)
        torch._dynamo.reset()  # the next size compiles anew
        release(device)
    report.entries["seconds"] = time.monotonic() - start_time
    print(markdown(report.entries), flush=True)  # first, so that it is seen even if writing fails
    report.save()


if __name__ == "__main__":
    common.run_script(main)
