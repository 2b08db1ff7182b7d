"""The figures of a few runs side by side: Run objects in, PNG bytes out."""

import dataclasses
import math
import re

from matplotlib.figure import Figure

from nanochat.history import series, thin_history
from nanochat.report import plotting
from nanochat.report.configurations import Configuration, finished, rank_name, run_value
from nanochat.report.summaries import LOSS_LABELS, MEASURES, rank_words
from nanochat.units import BYTES, COUNT, FLOP, TIME, choose_unit, human, is_finite

TRAIN_LOSS_UP_TO = 4  # runs; the noisy training losses of more runs would hide the curves that matter
LONGEST_LABEL = 40  # characters of a run's label in words; instead of a longer one the tag is shown

LOSS_AXES = [  # (key in the history, label, units)
    ("total_tokens", "training tokens", COUNT),
    ("total_training_time", "training time", TIME),
    ("total_training_flops", "training compute", FLOP),
]
PARAMETER_PARTS = [  # (key in the summary, label, colour)
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
DARK = ("#0072B2", "#009E73")  # colours of parts on which white text is read better than black
RUN_CAPTIONS = {
    "loss.png": "Loss against tokens, training time and compute. The first fifth of each run, where loss "
    "falls from ln(vocabulary), may leave the frame at the top.",
    "parameters.png": "Parameters by group.",
    "memory.png": "Memory by part. The diamond is the measured peak: on CUDA what torch allocated; on CPU "
    "the whole process, Python and libraries included.",
    "perplexity.png": "Final quality against model size: down and to the left is better.",
}


def draw_run_figures(runs: list, measure: str) -> dict[str, bytes]:
    """{file name: PNG}; the runs' names become the labels.

    measure: "loss" (curves of loss, points of perplexity) or "bpb" (both in bits per byte).
    """
    return {
        "loss.png": plotting.png(draw_loss(runs, measure)),
        "parameters.png": plotting.png(draw_parameters(runs)),
        "memory.png": plotting.png(draw_memory(runs)),
        "perplexity.png": plotting.png(draw_quality(runs, measure)),
    }


# ---- the runs' labels --------------------------------------------------------------------------------------


def labels_in_words(configs: list[Configuration]) -> dict[str, str]:
    """{run's name: "full rank", "low rank, r = d/4", "low rank, attn 85"}, of configurations of one run each.

    Runs whose words are long, or the same as another run's, keep their names.
    """
    words = {c.runs[0].name: name_in_words(c) for c in configs}
    texts = list(words.values())
    for name, text in words.items():
        if len(text) > LONGEST_LABEL or texts.count(text) > 1:
            words[name] = name
    return words


def name_in_words(config: Configuration) -> str:
    """The configuration's name. One rank of attention and MLP becomes a share of the model's width d."""
    name = config.name.replace(rank_name(config.settings), rank_words(config))
    if not config.low_rank:
        return name
    match = re.match(r"rank (\d+)(?=,|$)", name)
    if not match:
        return f"low rank, {name}"
    rank = int(match[1])
    width = config.settings.get("model_dim") or 0
    size = f"d/{width // rank}" if width and width % rank == 0 else f"{rank}"
    return f"low rank, r = {size}{name[match.end() :]}"


def run_label(run) -> str:
    return plotting.plain(run.name) + ("" if finished(run) else " (unfinished)")


# ---- loss curves -------------------------------------------------------------------------------------------


def draw_loss(runs: list, measure: str) -> Figure:
    """Validation loss against tokens, time and FLOPs, on one y-axis; for a few runs training loss, faint."""
    has_training_loss = measure == "loss" and len(runs) <= TRAIN_LOSS_UP_TO
    keys = ["val/" + measure] + (["train/loss"] if has_training_loss else [])
    runs = [dataclasses.replace(run, history=thin_history(run.history, keys)) for run in runs]
    width = 11
    rows = math.ceil(len(runs) / plotting.legend_columns([run_label(run) for run in runs], width))
    fig = plotting.new_figure(width, 4 + 0.2 * rows)
    panels = fig.subplots(1, 3, sharey=True)
    for panel, x_axis in zip(panels, LOSS_AXES):
        handles = draw_curves(panel, runs, keys, x_axis)
    limits = loss_limits(runs, keys)
    if limits:
        panels[0].set_ylim(*limits)
    panels[0].set_ylabel(LOSS_LABELS[measure])
    if has_training_loss:
        handles += panels[0].plot([], [], color="#999999", linewidth=0.8, label="faint: training loss")
    plotting.legend_below(fig, handles, handlelength=3.2, fontsize=10)
    return fig


def draw_curves(panel, runs: list, keys: list[str], x_axis: tuple) -> list:
    """Each run's values of the keys against x. Returns the handles of the curves of the first key."""
    x_key, quantity, ladder = x_axis
    curves = {(i, key): curve(run, x_key, key) for i, run in enumerate(runs) for key in keys}
    largest = max((xs[-1] for xs, _ in curves.values() if xs), default=0)
    size, unit = choose_unit(largest, ladder)
    thick = len(runs) <= TRAIN_LOSS_UP_TO
    handles = []
    for i, run in enumerate(runs):
        style = plotting.colour_and_marker(i)
        xs, ys = curves[i, keys[0]]
        every = max(1, len(xs) // 8)  # staggered, so that markers of neighbouring curves stay apart
        handles += panel.plot(
            [x / size for x in xs],
            ys,
            **style,
            label=run_label(run),
            linestyle=plotting.line_style(i),
            linewidth=1.6 if thick else 1.2,
            markersize=5 if thick else 4,
            markevery=(i % every, every),
        )
        for key in keys[1:]:
            xs, ys = curves[i, key]
            faint_style = {"color": style["color"], "linewidth": 0.8, "alpha": 0.3, "zorder": 1}
            panel.plot([x / size for x in xs], ys, **faint_style)
    if not largest:
        plotting.write_in_middle(panel, "nothing logged yet")
    panel.set_xlabel(plotting.with_unit(quantity, unit))
    panel.set_xlim(left=0)
    plotting.tidy(panel)
    return handles


def curve(run, x_key: str, y_key: str) -> tuple[list, list]:
    """The run's (x, y) wherever both were logged and are finite."""
    points = [(x, y) for x, y in series(run.history, x_key, y_key) if is_finite(x) and is_finite(y)]
    return [x for x, _ in points], [y for _, y in points]


def loss_limits(runs: list, keys: list[str]) -> tuple[float, float] | None:
    """A y-range that neither diverged runs nor the starts of the runs stretch."""
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


# ---- stacked bars ------------------------------------------------------------------------------------------


def draw_parameters(runs: list) -> Figure:
    return draw_bars(runs, PARAMETER_PARTS, "parameters", COUNT)


def draw_memory(runs: list) -> Figure:
    return draw_bars(runs, MEMORY_PARTS, "memory", BYTES, peak_key="mem/peak_bytes")


def draw_bars(runs: list, parts: list, quantity: str, ladder: list, peak_key: str = "") -> Figure:
    """One stacked horizontal bar a run, the first run on top; a measured peak is a diamond."""
    fig = plotting.new_figure(9, 1.5 + 0.42 * len(runs))
    panel = fig.subplots()
    rows = list(range(len(runs)))
    totals = [0.0] * len(runs)
    for key, _, _ in parts:
        totals = [total + (run_value(run, key) or 0) for total, run in zip(totals, runs)]
    peaks = [run_value(run, peak_key) for run in runs]
    longest = max([*totals, *(peak for peak in peaks if peak is not None)])
    size, unit = choose_unit(longest, ladder)

    starts = [0.0] * len(runs)
    handles = []
    for key, label, colour in parts:
        values = [run_value(run, key) or 0 for run in runs]
        widths = [number / size for number in values]
        style = {"height": 0.62, "color": colour, "edgecolor": "white", "linewidth": 0.8}
        handles.append(panel.barh(rows, widths, left=starts, label=label, **style))
        middle = {"ha": "center", "va": "center", "color": "white" if colour in DARK else "black"}
        for row in rows:
            if values[row] > 0.12 * longest:  # a narrower segment cannot hold its number
                x = starts[row] + widths[row] / 2
                panel.text(x, row, human(values[row], ladder), fontsize=9, **middle)
        starts = [start + width for start, width in zip(starts, widths)]
    diamonds = [(peak / size, row) for row, peak in enumerate(peaks) if peak is not None]
    if diamonds:
        style = {"marker": "D", "markersize": 7, "color": "#D55E00", "markeredgecolor": "white"}
        handles += panel.plot(*zip(*diamonds), linestyle="none", label="peak", **style)
    for row in rows:
        numbers = end_numbers(totals[row], peaks[row], 0.18 * longest)
        for number in numbers:
            text = f"   {human(number, ladder)}" if number else "  –"
            panel.text(number / size, row, text, va="center", fontsize=9)

    panel.set_yticks(rows, [run_label(run) for run in runs])
    panel.set_ylim(len(runs) - 0.5, -0.5)
    panel.set_xlim(0, (longest or 1) / size * 1.14)
    panel.set_xlabel(plotting.with_unit(quantity, unit))
    plotting.tidy(panel)
    panel.grid(axis="y", visible=False)
    fig.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False, fontsize=9.5)
    return fig


def end_numbers(total: float, peak: float | None, room: float) -> list[float]:
    """The numbers at the end of a bar: the peak, and the sum if there is room for it before the peak."""
    if peak is None:
        return [total]
    return [peak] if peak - total < room else [total, peak]


# ---- quality against parameters ----------------------------------------------------------------------------


def draw_quality(runs: list, measure: str) -> Figure:
    """One labelled point a run: final perplexity (or bits per byte) against total parameters."""
    y_key, y_label = MEASURES[measure]
    fig = plotting.new_figure(7.5, 5)
    panel = fig.subplots()
    sizes = [run_value(run, "params/total") for run in runs]
    qualities = [run_value(run, y_key) for run in runs]
    shown = [i for i in range(len(runs)) if sizes[i] is not None and qualities[i] is not None]
    size, unit = choose_unit(max((sizes[i] for i in shown), default=0), COUNT)
    points = []
    for i in shown:
        x = sizes[i] / size
        panel.plot([x], [qualities[i]], linestyle="none", markersize=9, **plotting.colour_and_marker(i))
        points.append((x, qualities[i], run_label(runs[i])))
    panel.set_xlabel(plotting.with_unit("parameters", unit))
    panel.set_ylabel(y_label)
    plotting.tidy(panel)
    panel.margins(0.18)
    if not points:
        plotting.write_in_middle(panel, "no evaluation yet")
        return fig
    plotting.log_if_wide(panel.xaxis, [x for x, _, _ in points])
    plotting.log_if_wide(panel.yaxis, [y for _, y, _ in points])
    fig.draw_without_rendering()
    plotting.label_points(panel, points, [(x, y) for x, y, _ in points], fontsize=9.5)
    return fig
