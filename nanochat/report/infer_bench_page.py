"""The tables and the figure of scripts.infer_bench. result: the content of infer_bench.json."""

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nanochat.report import plotting
from nanochat.report.bench_page import digits, draw_spreads, mib, with_quartiles

FORWARD_OVER_STEP = (
    "Forward over step: how many times as long a token takes if what was computed for the prompt is not kept."
)
GROWING = (
    "One step after so many tokens. In the first round a GPU makes a CUDA graph for each part of the cache; "
    "eager means without graphs."
)


def inverse(ratio: dict) -> dict:
    """The `benchmark.spread` of 1 / ratio."""
    return {"median": 1 / ratio["median"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}


def verdict(ratio: dict, phase: str) -> str:
    """Which form is faster, in words. A difference counts if both quartiles show it.

    ratio: `benchmark.spread` of factored over dense; above 1 factored is faster. phase: decoding or prefill.
    """
    if ratio["low"] > 1:
        return f"{phase}: factored is faster, {with_quartiles(ratio)} times dense"
    if ratio["high"] < 1:
        return f"{phase}: dense is faster, {with_quartiles(inverse(ratio))} times factored"
    return f"{phase}: no difference seen, factored is {with_quartiles(ratio)} times dense"


def verdicts(case: dict) -> str:
    factored = case["forms"]["factored"]
    decoding = verdict(factored["tokens/s / dense"], "decoding")
    prefill = verdict(inverse(factored["prefill time / dense"]), "prefill")
    return f"Batch {case['batch']}: {decoding}; {prefill}."


def infer_tables(result: dict) -> list[tuple]:
    """Blocks of nanochat/report/page.py: weights, which form is faster, then times and memory."""
    factored = [case for case in result["cases"] if "factored" in case["forms"]]
    words = [verdicts(case) for case in factored]
    if not words:
        words = ["The model has no low-rank layer: there is nothing to compare."]
    return [
        ("subheading", "Weights"),
        weights_table(result["forms"]),
        ("subheading", "Which is faster"),
        *(("paragraph", sentence) for sentence in words),
        ("subheading", "Time and memory"),
        ("paragraph", FORWARD_OVER_STEP),
        time_table(result["cases"]),
        ("subheading", "As the cache grows"),
        ("paragraph", GROWING),
        growing_table(result["cases"]),
    ]


def weights_table(forms: dict) -> tuple:
    header = ["form", "parameters", "MiB", "in the blocks, MiB", "/ dense", "blocks / dense"]
    dense = forms["dense"]
    rows = []
    for name, form in forms.items():
        rows.append(
            [
                name,
                f"{form['parameters']:,}",
                mib(form["weights_bytes"]),
                mib(form["blocks_bytes"]),
                f"{form['weights_bytes'] / dense['weights_bytes']:.2f}",
                f"{form['blocks_bytes'] / dense['blocks_bytes']:.2f}",
                mib(form["cache_bytes_of_a_full_context"]),
            ]
        )
    return ("table", [*header, "cache of one full context, MiB"], rows, "numbers")


def time_table(cases: list[dict]) -> tuple:
    rows = []
    for case in cases:
        for name, form in case["forms"].items():
            columns = {
                "batch": str(case["batch"]),
                "form": name,
                "prefill, ms": digits(1e3 * form["prefill seconds"]["median"]),
                "prefill / dense (quartiles)": with_quartiles(form["prefill time / dense"]),
                "step, ms": digits(1e3 * form["step seconds"]["median"]),
                "tokens/s": digits(form["tokens/s"]["median"]),
                "tokens/s / dense (quartiles)": with_quartiles(form["tokens/s / dense"]),
                "forward / step (quartiles)": with_quartiles(form["forward / step"]),
                "cache, MiB": mib(form["cache_bytes"]),
                "peak, MiB": mib(form["peak_bytes"]),
            }
            rows.append(list(columns.values()))
    return ("table", list(columns), rows, "numbers")


def growing_table(cases: list[dict]) -> tuple:
    rows = []
    for case in cases:
        for name, steps in case["growing"].items():
            lengths = steps["lengths"]
            later = steps["later"]
            columns = {
                "batch": str(case["batch"]),
                "form": name,
                f"after {lengths[0]:,}, ms": digits(1e3 * later[0]),
                f"after {lengths[-1]:,}, ms": digits(1e3 * later[-1]),
                f"all {len(lengths)} lengths: tokens/s": digits(case["batch"] * len(later) / sum(later)),
                "s": digits(sum(later)),
                "first round, s": digits(sum(steps["first"])),
            }
            rows.append(list(columns.values()))
    return ("table", list(columns), rows, "numbers")


def draw_inference(result: dict):
    """Tokens a second, prefill time and the parts of the memory's peak, against batch size."""
    fig = plotting.new_figure(13, 4.2)
    speed, latency, memory = fig.subplots(1, 3)
    draw_times(speed, result, "tokens/s", 1, "decoding: tokens/s of the batch")
    draw_times(latency, result, "prefill seconds", 1e3, "prefill: ms")
    speed.legend(frameon=False, fontsize=9.5)
    draw_memory(memory, result)
    return fig


def draw_times(panel, result: dict, key: str, scale: float, title: str):
    """`scale` times the value of `key` against batch size, both axes logarithmic."""
    batches = [case["batch"] for case in result["cases"]]
    for i, name in enumerate(result["forms"]):
        spreads = []
        for case in result["cases"]:
            values = case["forms"][name][key]
            spreads.append({quartile: scale * value for quartile, value in values.items()})
        draw_spreads(panel, batches, spreads, i, name)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xticks(batches, map(str, batches))
    panel.set_xlabel("batch size")
    panel.set_title(title, fontsize=10.5)
    plotting.tidy(panel)


def draw_memory(panel, result: dict):
    """Stacked bars of weights, cache and activations, one for each batch size and form."""
    labels = []
    parts = {"weights": [], "cache": [], "activations": []}
    for case in result["cases"]:
        for name, form in case["forms"].items():
            weights = result["forms"][name]["weights_bytes"]
            labels.append(f"{name}, {case['batch']}")
            parts["weights"].append(weights / 2**20)
            parts["cache"].append(form["cache_bytes"] / 2**20)
            parts["activations"].append(max(0, form["peak_bytes"] - weights - form["cache_bytes"]) / 2**20)
    bottom = np.zeros(len(labels))
    for (part, heights), colour in zip(parts.items(), (plotting.PALETTE[0], plotting.PALETTE[4], "#999999")):
        panel.bar(range(len(labels)), heights, bottom=bottom, color=colour, label=part, width=0.75)
        bottom += heights
    panel.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8.5)
    panel.set_title("memory at the peak: MiB, by form and batch size", fontsize=10.5)
    panel.legend(frameon=False, fontsize=9.5)
    plotting.tidy(panel)
