"""The report's pictures: Run objects in, PNG bytes out. Matplotlib without pyplot: no global state, no window, Agg only."""

import dataclasses
import math
from itertools import product

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nanochat.history import series, thinned
from nanochat.report.plotting import (
    COLOURS,
    LABEL_SIDES,
    LINES,
    colour_and_marker,
    new_figure,
    plain,
    png,
    say_empty,
    tidy,
)
from nanochat.units import BYTES, COUNT, FLOP, TIME, human, is_finite, unit_of

LABEL_DISTANCES = (9, 20, 34, 50, 70)  # points
TRAIN_LOSS_UP_TO = 4  # runs; the noisy training losses of more than these hide the curves that matter

PARAMETER_PARTS = [
    ("params/attention", "attention", "#0072B2"),
    ("params/mlp", "MLP", "#56B4E9"),
    ("params/embedding", "embedding", "#E69F00"),
    ("params/lm_head", "lm_head", "#009E73"),
    ("params/other", "other", "#999999"),
]
MEMORY_PARTS = [
    ("mem/weights_bytes", "weights", "#0072B2"),
    ("mem/grads_bytes", "gradients", "#56B4E9"),
    ("mem/optimizer_bytes", "optimizer state", "#E69F00"),
]


def draw_all(runs: list, measure: str) -> dict[str, bytes]:
    """File name -> PNG. `measure` is "loss" (curves of loss, points of perplexity) or "bpb" (both in bits per byte)."""
    return {
        "loss.png": png(draw_loss(runs, measure)),
        "parameters.png": png(draw_parameters(runs)),
        "memory.png": png(draw_memory(runs)),
        "perplexity.png": png(draw_quality(runs, measure)),
    }


def label(run) -> str:
    return plain(run.name) + ("" if run.summary.get("status") == "finished" else " (unfinished)")


# ---- loss curves ----------------------------------------------------------------------------------------------------


def curve(run, x_key: str, y_key: str) -> tuple[list, list]:
    """The run's (x, y) wherever both were logged and are finite."""
    points = [(x, y) for x, y in series(run.history, x_key, y_key) if is_finite(x) and is_finite(y)]
    return [x for x, _ in points], [y for _, y in points]


def loss_limits(runs: list, keys: list[str]) -> tuple[float, float] | None:
    """A y-range that the first fifth of a run (the fall from ln(vocabulary)) and diverged runs do not stretch."""
    settled = []
    starts = []
    for run in runs:
        for key in keys:
            tokens, losses = curve(run, "total_tokens", key)
            settled += [y for x, y in zip(tokens, losses) if x >= 0.2 * tokens[-1]]
            starts += losses[:1]
    if not settled:
        return None
    low = min(settled)
    high = max(low, min(max(settled), max(starts)))
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1
    return low - margin, high + margin


def draw_loss(runs: list, measure: str) -> Figure:
    """Validation (and, for a few runs, faint training) loss against tokens, training time and FLOPs, one shared y-axis."""
    y_key = "val/" + measure
    keys = [y_key] + (["train/loss"] if measure == "loss" and len(runs) <= TRAIN_LOSS_UP_TO else [])
    runs = [dataclasses.replace(run, history=thinned(run.history, keys)) for run in runs]
    names = [label(run) for run in runs]
    columns = max(1, min(len(runs), 140 // (max(map(len, names)) + 8)))
    fig = new_figure(11, 4.0 + 0.2 * math.ceil(len(runs) / columns))
    panels = fig.subplots(1, 3, sharey=True)
    few = len(runs) <= TRAIN_LOSS_UP_TO
    handles = []
    for panel, x_key, what, ladder in zip(
        panels,
        ("total_tokens", "total_training_time", "total_training_flops"),
        ("training tokens", "training time", "training compute"),
        (COUNT, TIME, FLOP),
    ):
        curves = [[curve(run, x_key, key) for key in keys] for run in runs]
        largest = max((xs[-1] for run_curves in curves for xs, _ in run_curves if xs), default=0)
        size, unit = unit_of(largest, ladder)
        for i, run_curves in enumerate(curves):
            for key, (xs, ys) in zip(keys, run_curves):
                xs = [x / size for x in xs]
                if key == "train/loss":
                    panel.plot(xs, ys, color=COLOURS[i % len(COLOURS)], linewidth=0.8, alpha=0.3, zorder=1)
                    continue
                every = max(1, len(xs) // 8)  # staggered, so that markers of neighbouring curves stay apart
                handles += panel.plot(
                    xs,
                    ys,
                    **colour_and_marker(i),
                    linestyle=LINES[i % len(LINES)],
                    linewidth=1.6 if few else 1.2,
                    markersize=5 if few else 4,
                    markevery=(i % every, every),
                )
        if not largest:
            say_empty(panel, "nothing logged yet")
        panel.set_xlabel(f"{what} ({unit})" if unit else what)
        panel.set_xlim(left=0)
        tidy(panel)
    limits = loss_limits(runs, keys)
    if limits:
        panels[0].set_ylim(*limits)
    panels[0].set_ylabel("validation loss (nats/token)" if measure == "loss" else "validation bits per byte")
    handles = handles[: len(runs)]
    if "train/loss" in keys:
        handles += panels[0].plot([], [], color="#999999", linewidth=0.8)
        names.append("faint: training loss")
    fig.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=columns + len(names) - len(runs),
        frameon=False,
        handlelength=3.2,
        fontsize=10,
    )
    return fig


# ---- stacked bars ---------------------------------------------------------------------------------------------------


def draw_bars(runs: list, parts: list, ladder: list, what: str, peaks: list) -> Figure:
    """One stacked horizontal bar a run, the first run on top; `peaks` (same units, None where unknown) become diamonds."""
    fig = new_figure(9, 1.5 + 0.42 * len(runs))
    panel = fig.subplots()
    rows = list(range(len(runs)))
    values = [
        [run.summary.get(key) if is_finite(run.summary.get(key)) else 0 for run in runs]
        for key, _, _ in parts
    ]
    ends = [sum(column) for column in zip(*values)]
    reach = max([*ends, *(p for p in peaks if p is not None)])
    size, unit = unit_of(reach, ladder)
    left = [0.0] * len(runs)
    handles = []
    for (_, name, colour), widths in zip(parts, values):
        handles.append(
            panel.barh(
                rows,
                [w / size for w in widths],
                left=[x / size for x in left],
                height=0.62,
                color=colour,
                edgecolor="white",
                linewidth=0.8,
                label=name,
            )
        )
        for row, x, width in zip(rows, left, widths):
            if width > 0.12 * reach:  # narrower segments cannot hold the number
                panel.text(
                    (x + width / 2) / size,
                    row,
                    human(width, ladder),
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if colour in ("#0072B2", "#009E73") else "black",
                )
        left = [x + w for x, w in zip(left, widths)]
    known = [(peak / size, row) for row, peak in enumerate(peaks) if peak is not None]
    if known:
        handles += panel.plot(
            *zip(*known),
            linestyle="none",
            marker="D",
            markersize=7,
            color="#D55E00",
            markeredgecolor="white",
            label="peak",
        )
    for row, end, peak in zip(rows, ends, peaks):
        numbers = [end] if peak is None else [peak] if peak - end < 0.18 * reach else [end, peak]
        for value in numbers:  # the sum of the parts only where the peak's number does not stand there
            panel.text(
                value / size, row, f"   {human(value, ladder)}" if value else "  –", va="center", fontsize=9
            )
    panel.set_yticks(rows, [label(run) for run in runs])
    panel.set_ylim(len(runs) - 0.5, -0.5)
    panel.set_xlim(0, (reach or 1) / size * 1.14)
    panel.set_xlabel(f"{what} ({unit})" if unit else what)
    tidy(panel)
    panel.grid(axis="y", visible=False)
    fig.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False, fontsize=9.5)
    return fig


def draw_parameters(runs: list) -> Figure:
    return draw_bars(runs, PARAMETER_PARTS, COUNT, "parameters", [None] * len(runs))


def draw_memory(runs: list) -> Figure:
    peaks = [
        run.summary.get("mem/peak_bytes") if is_finite(run.summary.get("mem/peak_bytes")) else None
        for run in runs
    ]
    return draw_bars(runs, MEMORY_PARTS, BYTES, "memory", peaks)


# ---- perplexity against parameters ----------------------------------------------------------------------------------


def draw_quality(runs: list, measure: str) -> Figure:
    """One labelled point a run: final perplexity (or bits per byte) against total parameters."""
    y_key = "val/ppl" if measure == "loss" else "val/bpb"
    fig = new_figure(7.5, 5)
    panel = fig.subplots()
    points = [
        (i, run.summary["params/total"], run.summary[y_key])
        for i, run in enumerate(runs)
        if is_finite(run.summary.get("params/total")) and is_finite(run.summary.get(y_key))
    ]
    size, unit = unit_of(max((x for _, x, _ in points), default=0), COUNT)
    for i, x, y in points:
        panel.plot([x / size], [y], linestyle="none", **colour_and_marker(i), markersize=9)
    panel.set_xlabel(f"parameters ({unit})" if unit else "parameters")
    panel.set_ylabel("validation perplexity" if measure == "loss" else "validation bits per byte")
    tidy(panel)
    panel.margins(0.18)
    if not points:
        say_empty(panel, "no evaluation yet")
        return fig
    for axis, scale, values in (
        (panel.xaxis, panel.set_xscale, [x for _, x, _ in points]),
        (panel.yaxis, panel.set_yscale, [y for _, _, y in points]),
    ):
        if min(values) > 0 and max(values) > 10 * min(
            values
        ):  # below a factor of ten, linear ticks read better
            scale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_formatter(NullFormatter())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    place_labels(fig, panel, [(x / size, y, label(runs[i])) for i, x, y in points])
    return fig


def place_labels(fig: Figure, panel, points: list):
    """Write each (x, y, text) beside its point, at the nearest place where it covers no point and no other text."""
    fig.draw_without_rendering()  # fixes the layout, so that pixels mean something
    renderer = fig.canvas.get_renderer()
    box = panel.get_window_extent()
    dots = [panel.transData.transform((x, y)) for x, y, _ in points]
    placed = []
    for x, y, text in points:
        note = panel.annotate(
            text,
            (x, y),
            (0, 0),
            textcoords="offset points",
            fontsize=9.5,
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.6},
        )
        best = None
        for distance, (dx, dy, ha, va) in product(LABEL_DISTANCES, LABEL_SIDES):
            where = {"position": (dx * distance, dy * distance), "ha": ha, "va": va}
            note.set(**where)
            note.update_positions(renderer)
            area = Text.get_window_extent(
                note, renderer
            )  # the annotation's own extent would include its leader line
            faults = sum(area.overlaps(other) for other in placed) + sum(
                area.padded(6).contains(*dot) for dot in dots
            )
            outside = box.x0 > area.x0 or area.x1 > box.x1 or box.y0 > area.y0 or area.y1 > box.y1
            faults += 5 * outside  # worse than covering something
            if best is None or faults < best[0]:
                best = faults, area, where, distance
            if faults == 0:
                break
        _, area, where, distance = best
        note.set(**where)
        note.arrow_patch.set_visible(distance > LABEL_DISTANCES[0])
        placed.append(area)
