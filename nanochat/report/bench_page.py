"""The parts that the pages of scripts.layer_bench and scripts.infer_bench share: numbers, lines, files."""

import json
from pathlib import Path

from nanochat.files import write_atomic
from nanochat.report import plotting
from nanochat.report.page import to_markdown


def digits(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def with_quartiles(values: dict) -> str:
    """'1.50 (1.20-1.60)': median and quartiles of a `benchmark.spread`."""
    return f"{values['median']:.2f} ({values['low']:.2f}-{values['high']:.2f})"


def mib(count: int) -> str:
    return digits(count / 2**20)


def draw_spreads(panel, xs: list, spreads: list[dict], i: int, label: str):
    """A line through the medians of spreads (`benchmark.spread`). Bars: quartiles. i: colour and marker."""
    medians = [values["median"] for values in spreads]
    lower = [values["median"] - values["low"] for values in spreads]
    upper = [values["high"] - values["median"] for values in spreads]
    style = {"linewidth": 1.5, "markersize": 5, "elinewidth": 1, **plotting.colour_and_marker(i)}
    panel.errorbar(xs, medians, [lower, upper], label=label, **style)


def write_result(folder: Path, name: str, result: dict, figure, page: list[tuple]):
    """NAME.json, NAME.png and NAME.md."""
    write_atomic(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_atomic(folder / f"{name}.png", plotting.png(figure))
    write_atomic(folder / f"{name}.md", to_markdown(page))
    print(f"written: {folder / f'{name}.md'}, .json, .png")
