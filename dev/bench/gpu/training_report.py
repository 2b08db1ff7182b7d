"""Call 2 in words."""

import numpy as np
from train_step import shown

from gpu.report import machine_lines, result, section_lines, status_lines, table
from gpu.training import FULL, NARROW, RECIPE

STEPS_SHOWN = (1, 2, 3, 5, 10, 20, 30, 40)


def markdown(entries: dict) -> str:
    lines = ["# The ladder, call 2: training on one card", "", *machine_lines(entries), ""]
    sections = {
        "The first losses": first_loss_lines,
        "Kill and resume": resume_lines,
        "Three models": training_lines,
    }
    if tokens := result(entries, "tokenise"):
        rate = tokens["tokens"] / tokens["seconds"]
        place = f"{tokens['files']} files on {tokens['cores']} cores"
        lines += [f"Text: {tokens['tokens']:,} tokens, made at {rate:,.0f} a second from {place}.", ""]
    lines += [*section_lines(entries, sections), *status_lines(entries)]
    return "\n".join(lines) + "\n"


def first_loss_lines(entries: dict) -> list[str]:
    losses = result(entries, "first losses")
    if not losses:
        return []
    if not losses["same start"]:
        return ["This machine draws other weights than the CPU did, so these losses cannot be compared.", ""]
    dtypes = [key for key in ("float32", "bfloat16") if key in losses]
    rows = []
    for step in STEPS_SHOWN:
        if step <= len(losses["cpu"]):
            values = [losses[key][step - 1] for key in ("cpu", *dtypes)]
            rows.append([str(step), *(f"{value:.4f}" for value in values)])
    lines = table(["step", "CPU, float32", *(f"card, {key}" for key in dtypes)], rows)
    for key in dtypes:
        differences = np.abs(np.array(losses[key]) - np.array(losses["cpu"]))
        lines.append(f"Largest difference in {key}: {differences.max():.4f} nats.")
    return [*lines, ""]


def resume_lines(entries: dict) -> list[str]:
    rows = []
    for name, run in (result(entries, "kill and resume") or {}).items():
        difference = run["largest difference"]
        cells = [
            str(run["ended by"]),
            str(len(run["losses"])),
            "" if difference is None else f"{difference:.5f}",
        ]
        rows.append([name, *cells, "ok" if run["ok"] else "DIFFERS"])
    heads = ["", "exit code when it ended first", "steps in the record", "largest difference, nats", ""]
    return table(heads, rows) if rows else []


# ---- the three models --------------------------------------------------------------------------------------


def finished_runs(entries: dict) -> dict[str, dict[str, dict]]:
    """{seed: {model: its record}} of the seeds of which all models reached the last step."""
    seeds = {}
    for name, item in entries["items"].items():
        runs = item.get("result")
        if not name.startswith("training, ") or not runs:
            continue
        if all(run["steps"] == entries["steps"] and run["validation"] for run in runs.values()):
            seeds[name.removeprefix("training, ")] = runs
    return seeds


def training_lines(entries: dict) -> list[str]:
    seeds = finished_runs(entries)
    if not seeds:
        return []
    tokens = entries["steps"] * entries["batch"]
    share = f"{tokens / entries['full rank parameters']:.1f} tokens for each parameter of the full-rank model"
    lines = [f"{entries['steps']:,} steps of {entries['batch']:,} tokens: {share}.", ""]
    rows = []
    for model in (FULL, RECIPE, NARROW):
        runs = [seed[model] for seed in seeds.values()]
        finals = [run["validation"][-1] for run in runs]
        rate = np.mean([run["tokens per second"]["median"] for run in runs])
        rows.append(
            [
                model,
                shown(runs[0]["parameters"], 1e-6),
                shown(runs[0]["flops per token"], 1e-6),
                " ".join(f"{loss:.4f}" for _, loss, _ in finals),
                mean_and_spread([loss for _, loss, _ in finals]),
                mean_and_spread([bpb for _, _, bpb in finals]),
                f"{rate:,.0f}",
            ]
        )
    heads = [
        "",
        "parameters, M",
        "MFLOPs a token",
        f"validation loss, {', '.join(seeds)}",
        "mean ± deviation",
    ]
    lines += table([*heads, "bits per byte", "tokens/s"], rows)
    for other in (FULL, NARROW):
        pairs = [(seed[RECIPE], seed[other]) for seed in seeds.values()]
        gaps = [a["validation"][-1][1] - b["validation"][-1][1] for a, b in pairs]
        lines.append(f"The recipe's loss minus that of {other}, by seed: {mean_and_spread(gaps)} nats.")
    return [*lines, ""]


def mean_and_spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
