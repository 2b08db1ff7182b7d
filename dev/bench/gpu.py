"""Everything one GPU can tell about a training step, in one JSON and one markdown file. Run by gpu.sh, which says more.

    python dev/bench/gpu.py --out gpu_bench
    python dev/bench/gpu.py --out gpu_bench --device-type cpu --tiny     # the same program on any machine, in a minute

First whether the device computes the same as the CPU, then train_step.py's comparison at the widths of d20 and d12: full
rank, and low rank of four ranks with and without recomputation, three models in turn at a time. The files are rewritten after
every comparison, so that what was measured is kept if the time runs out; what did not fit into it is listed as skipped.
"""

import copy
import gc
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
import train_step
from loss_memory import measure as measure_loss
from train_step import (  # first: it finds nanochat in a bare checkout
    RATES,
    compare,
    machine,
    make_subject,
    noise_rows,
    shown,
)

from nanochat import common, metrics
from nanochat.common import ArgumentParser, whole_number
from nanochat.files import check_out, write_atomic
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import build_optimizers

FRACTIONS = {"d/4": 1 / 4, "d/3": 1 / 3, "d/2": 1 / 2, "d/8": 1 / 8}  # the most telling first
LARGEST_BATCH = 64
# relative difference from the CPU in float32 that is still agreement: (first loss, gradients, loss after the steps). The steps
# differ more, for Muon orthogonalises in bfloat16 on a GPU
AGREE = {"float32": (1e-4, 1e-3, 0.02), "bfloat16": (1e-2, 0.05, 0.05)}


# ---- correctness ----------------------------------------------------------------------------------------------------


def small_model(rank: int) -> GPT:
    """With nothing at zero, so that every gradient has something to say."""
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
    for linear in (
        *(layer for block in model.blocks for layer in (block.attn.o, block.mlp.down)),
        model.lm_head,
    ):
        linear.init()
    return model


def trained(model: GPT, device, dtype, steps: int = 5):
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
    """One entry for each model and dtype: how far the device is from the CPU in float32."""
    found = []
    for name, rank in (("full rank", 0), ("low rank", 32)):
        model = small_model(rank)
        first, gradient, last = trained(model, torch.device("cpu"), torch.float32)
        for dtype_name, limits in AGREE.items():
            here = trained(model, device, getattr(torch, dtype_name))
            differences = {
                "first loss": abs(here[0] / first - 1),
                "gradients": ((here[1] - gradient).norm() / gradient.norm()).item(),
                "loss after steps": abs(here[2] / last - 1),
            }
            found.append(
                {
                    "what": f"{name}, {dtype_name}",
                    **differences,
                    "ok": all(d <= limit for d, limit in zip(differences.values(), limits)),
                }
            )
    return found


def loss_check(device, tiny: bool) -> list[dict]:
    """The chunked loss beside the plain one: agreement, time, peak."""
    found = []
    N, C, V = (256, 32, 512) if tiny else (8192, 768, 32768)
    for dtype_name, limit in (("float32", 1e-4), ("bfloat16", 0.02)):
        result = measure_loss(N, C, V, device, getattr(torch, dtype_name), repeats=3)
        found.append(
            {
                "what": f"chunked loss, {dtype_name}, {N} x {C}, vocabulary {V}",
                **result,
                "ok": max(result["relative difference"].values()) <= limit,
            }
        )
    return found


# ---- the comparisons ------------------------------------------------------------------------------------------------


def sizes(tiny: bool) -> dict[str, GPTConfig]:
    if tiny:
        return {
            "tiny": GPTConfig(
                sequence_len=64,
                vocab_size=512,
                n_layer=2,
                n_head=2,
                n_kv_head=2,
                n_embd=64,
                window_pattern="L",
            )
        }
    return {
        f"d{depth}": GPTConfig(
            sequence_len=2048,
            vocab_size=65536,
            n_layer=depth,
            n_head=depth // 2,
            n_kv_head=depth // 2,
            n_embd=64 * depth,
            window_pattern="L",
        )  # whole context: torch's flash attention takes no mask
        for depth in (20, 12)
    }


def low_rank(config: GPTConfig, fraction: float) -> GPTConfig:
    """Ranks in multiples of 8: tensor cores want them."""
    rank = 8 * round(fraction * config.n_embd / 8)
    return replace(config, attn_ranks=(rank,) * config.n_layer, mlp_ranks=(rank,) * config.n_layer)


def fits(configs, rows, batch_size: int, device, dtype) -> bool:
    """Whether each model makes an uncompiled step (which needs more than a compiled one) with the others beside it."""
    try:
        subjects = [make_subject("", config, rows, batch_size, device, dtype, False) for config in configs]
        for _ in range(2):  # from the second on there is optimizer state
            for subject in subjects:
                subject.step(lambda part: None)
        return True
    except torch.OutOfMemoryError:
        return False


def release(device):
    gc.collect()  # models and batch generators hold each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest_batch(config: GPTConfig, rows, start: int, device, dtype) -> int:
    """The largest power of two up to `start` that fits."""
    batch_size, together = (
        start,
        [config] + 2 * [low_rank(config, FRACTIONS["d/2"])],
    )  # as many as will be compared at a time
    while batch_size > 1 and not fits(together, rows, batch_size, device, dtype):
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
    report: dict,
    save,
    device,
    dtype,
    compiled: bool,
    repeats: int,
):
    """Fill report["sizes"][size] comparison by comparison; what cannot be done goes to report["skipped"]."""
    here = report["sizes"][size] = {"batch": batch_size, "comparisons": {}}
    dense = None
    longest = 0.0
    for label, fraction in FRACTIONS.items():
        started = time.monotonic()
        if started + longest > deadline:
            report["skipped"].append(f"{size}, rank {label}: no time left")
            continue
        try:
            dense = dense or make_subject("dense", config, rows, batch_size, device, dtype, compiled)
            factored = low_rank(config, fraction)
            lows = [
                make_subject(
                    name, replace(factored, recompute=mode), rows, batch_size, device, dtype, compiled
                )
                for name, mode in ((f"r = {label}", "none"), (f"r = {label}, recompute", "bottleneck"))
            ]
            here["comparisons"][label] = compare(
                [dense, *lows], {low.name: "dense" for low in lows}, batch_size, device, repeats
            )
        except RuntimeError as e:  # out of memory, or a compiler that gave up: the other rows go on
            report["skipped"].append(
                f"{size}, rank {label}: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"
            )
        lows = None
        release(device)
        longest = max(longest, time.monotonic() - started)
        save()


# ---- the report -----------------------------------------------------------------------------------------------------


def peak_flops(device) -> float | None:
    """The data sheet's peak of this device in bfloat16, for MFU."""
    table = getattr(metrics, "PEAK_FLOPS", {})
    return next((flops for name, flops in table.items() if name in common.device_name(device)), None)


def size_table(here: dict, peak: float | None) -> list[str]:
    lines = [
        "| | rank | parameters, M | tokens/s | step, ms | data | forward | backward | optimizer | / dense: step | FLOPs "
        "| step / FLOPs | MFU, % | of matmul ceiling, % | peak, GB | / dense |",
        "|---|" + "---:|" * 15,
    ]
    for number, result in enumerate(here["comparisons"].values()):
        for name, model in result["models"].items():
            if name == "dense" and number:
                continue  # measured again beside each rank; the first will do here, all are in the JSON
            ratio = result["ratios"].get(name)
            seconds = model["seconds"]
            cells = [
                name,
                str(max(model["config"]["mlp_ranks"], default=0) or "full"),
                shown(model["accounting"]["params/total"], 1e-6),
                f"{model['tokens per second']['median']:,.0f}",
                shown(seconds["step"], 1e3),
            ]
            cells += [shown(seconds[part]["median"], 1e3, 3) for part in train_step.PARTS]
            cells += (
                [
                    shown(value, 1, 3)
                    for value in (ratio["seconds"]["step"], ratio["flops"], ratio["step over flops"])
                ]
                if ratio
                else ["", "", ""]
            )
            cells += [
                shown(model["flops per second"]["median"], 100 / peak, 3) if peak else "",
                shown(model["share of ceiling"]["median"], 100, 3),
                shown(model["memory"]["peak"], 1e-9),
                shown(ratio["memory"]["peak"], 1, 3) if ratio else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def target_lines(report: dict) -> list[str]:
    """The aims for one H100 or H200."""
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
    lines = [
        f"| {what} | {figure} | {aim} | {'reached' if ok else 'not reached'} |"
        for what, figure, aim, ok in aims
    ]
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
        cells = [f"{d:.1e}" for d in entry["relative difference"].values()] + [
            shown(entry["time ratio"], 1, 3),
            f"{entry['peak ratio']:.3f}",
        ]
        lines.append(f"| {entry['what']} | {' | '.join(cells)} | {'ok' if entry['ok'] else 'DIFFERS'} |")
    return lines


def markdown(report: dict) -> str:
    about = report["machine"]
    lines = [
        "# A training step on one device",
        "",
        f"{about['device']}, torch {about['torch']}, {about['dtype']}, {'compiled' if about['compiled'] else 'eager'}. Medians over "
        "interleaved rounds, quartiles in brackets. Factored layers: attention and MLP. How it is measured: dev/bench/train_step.py.",
        "",
    ]
    for size, here in report["sizes"].items():
        if here["comparisons"]:
            first = next(iter(here["comparisons"].values()))
            config = first["models"]["dense"]["config"]
            ceiling = shown(first["ceiling flops per second"], 1e-12)
            lines += [
                f"## {size}",
                "",
                f"{config['n_layer']} layers, width {config['n_embd']}, vocabulary {config['vocab_size']}, batch "
                f"{here['batch']} x {config['sequence_len']}; matmul ceiling {ceiling} TFLOP/s",
                "",
                *size_table(here, report["peak flops"]),
                "",
            ]
    lines += target_lines(report) + agreement_lines(report)
    return "\n".join(
        [
            *lines,
            "",
            f"Skipped: {'; '.join(report['skipped']) or 'nothing'}. Whole run: {report['seconds']:.0f} s.",
            "",
        ]
    )


def main(argv=None):
    parser = ArgumentParser("Correctness and speed of one device, dense and low rank.")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    add("--device-type", choices=["cuda", "cpu"], default="cuda")
    add(
        "--tiny",
        action="store_true",
        help="a model of seconds, float32 and uncompiled, to try the program itself",
    )
    add(
        "--seconds",
        type=whole_number(1),
        default=420,
        help="no comparison is begun that would probably end later than this",
    )
    args = parser.parse_args(argv)
    check_out("--out", args.out)
    began = time.monotonic()
    device = common.init_process(args.device_type).device
    dtype, compiled, repeats, start = (
        (torch.float32, False, 2, 4) if args.tiny else (torch.bfloat16, True, 10, LARGEST_BATCH)
    )
    report = {
        "machine": machine(device, dtype, compiled),
        "peak flops": peak_flops(device),
        "smoke": [],
        "loss": [],
        "sizes": {},
        "skipped": [],
        "seconds": 0.0,
    }

    def save():
        report["seconds"] = time.monotonic() - began
        write_atomic(args.out / "gpu.json", json.dumps(report, indent=1) + "\n")
        write_atomic(args.out / "gpu.md", markdown(report))

    if device.type == "cuda":
        torch.set_float32_matmul_precision(
            "highest"
        )  # the smoke compares float32 with float32, not with TF32
    report["smoke"], report["loss"] = smoke(device), loss_check(device, args.tiny)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as init_process has it
    save()

    left = sizes(args.tiny)
    for number, (size, config) in enumerate(left.items()):
        now = time.monotonic() - began
        share = (
            0.6 if number < len(left) - 1 else 1.0
        )  # of the time that is left; the last size may have all of it
        deadline = began + now + share * (args.seconds - now)
        rows = noise_rows(config.vocab_size, config.sequence_len)
        batch_size = largest_batch(config, rows, start, device, dtype)
        measure_size(size, config, batch_size, rows, deadline, report, save, device, dtype, compiled, repeats)
        torch._dynamo.reset()  # the next size compiles anew
        release(device)
    report["seconds"] = time.monotonic() - began
    print(markdown(report), flush=True)  # before the file is written: it is shown also where that fails
    save()


if __name__ == "__main__":
    common.run_script(main)
