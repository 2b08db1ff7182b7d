"""Adapters: layer maps before and after training, curves of loss, and AdaLoRA's ranks.

Each function of `configs` alone that draws returns (file name, (figure, points), blocks below the figure), or
None if the runs have nothing to show. A point is (panel, x, y, text under the pointer).
"""

import math
from collections import Counter
from statistics import fmean

from nanochat.history import series
from nanochat.naming import method
from nanochat.report import plotting
from nanochat.report.configurations import Configuration, finished
from nanochat.report.statistics import rank_grid, rank_shares, spearman, spearman_interval
from nanochat.report.summaries import LOSS_LABELS, hover_text, layer_map, mean_over_runs
from nanochat.units import is_finite

ADAPTER_CURVES = 12  # curves in colour; the others are faint
MAP_SETTINGS = ("layer_map", "layer_kinds", "depth")  # they follow from the layer map
RANK_GRIDS = 4  # AdaLoRA configurations whose ranks are drawn
INTERVAL_WORDS = (
    "The interval is a percentile bootstrap over the maps: it leaves out the spread between seeds, and with "
    "few maps it is rough."
)


# ---- layer maps before and after ---------------------------------------------------------------------------


def draw_untrained(configs: list[Configuration]):
    """A panel for each group of adapters that differ in their layer map alone, from three maps on."""
    groups = {}
    for c in configs:
        if c.settings.get("adapter") and mean_over_runs(c, perplexity_at_start) and c.values("val/ppl"):
            rest = [(k, str(v)) for k, v in c.settings.items() if k not in MAP_SETTINGS]
            groups.setdefault(tuple(sorted(rest)), []).append(c)
    groups = [group for group in groups.values() if len(set(map(layer_map, group))) > 2][:3]
    if not groups:
        return None
    fig = plotting.new_figure(6.5 * len(groups) if len(groups) > 1 else 8, 5.4)
    panels = fig.subplots(1, len(groups), squeeze=False)[0]
    points = []
    sentences = []
    for panel, group in zip(panels, groups):
        places = [(mean_over_runs(c, perplexity_at_start), c.mean("val/ppl")) for c in group]
        for c, (x, y) in zip(group, places):
            style = {"color": plotting.PALETTE[0], "markeredgecolor": "white"}
            panel.plot([x], [y], marker="o", linestyle="none", **style)
            points.append((panel, x, y, f"{hover_text(c, 'loss')}\nuntrained {x:.2f}"))
        plotting.log_axis(panel.xaxis)
        panel.margins(0.12)
        name = f"{method(group[0].settings)} on {group[0].settings.get('base')}"
        correlation = f"Spearman's rank correlation {rho_words(places)}"
        panel.set_title(f"{name}\n{correlation}", fontsize=10)
        sentences.append(f"{name}: {correlation}.")
        panel.set_xlabel("perplexity of the map, untrained")
        panel.set_ylabel("perplexity with its adapter")
        plotting.tidy(panel)
    fig.draw_without_rendering()
    for panel, group in zip(panels, groups):
        labels = [layer_map(c) or "as it is" for c in group]
        places = [(mean_over_runs(c, perplexity_at_start), c.mean("val/ppl")) for c in group]
        plotting.label_points(panel, [(*place, label) for place, label in zip(places, labels)], places)
    return "untrained.png", (fig, points), [("list", sentences), ("paragraph", INTERVAL_WORDS)]


def perplexity_at_start(run) -> float | None:
    """Perplexity of an adapter's run before its first step."""
    first = run.history[0] if run.history else {}
    return first.get("val/ppl") if first.get("step") == 0 and is_finite(first.get("val/ppl")) else None


def rho_words(points: list[tuple[float, float]]) -> str:
    """'0.86 (95% 0.52 to 0.97), 12 maps'"""
    x, y = zip(*points)
    if math.isnan(spearman(x, y)):
        return f"undefined, of {len(points)} maps all end alike"
    bounds = spearman_interval(x, y)
    interval = f"95% {bounds[0]:.2f} to {bounds[1]:.2f}" if bounds else "too few for an interval"
    return f"{spearman(x, y):.2f} ({interval}), {len(points)} maps"


# ---- curves of adapters ------------------------------------------------------------------------------------


def draw_adapter_curves(configs: list[Configuration]):
    curves = {c.name: mean_steps(c) for c in configs if c.settings.get("adapter")}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return None
    coloured = sorted(curves, key=lambda name: curves[name][-1][1])
    if len(coloured) > ADAPTER_CURVES:  # an even choice from the best to the worst
        stride = (len(coloured) - 1) / (ADAPTER_CURVES - 1)
        coloured = [coloured[round(i * stride)] for i in range(ADAPTER_CURVES)]
    labels = without_common_parts(list(curves))
    fig = plotting.new_figure(9.5, 5 + 0.12 * len(coloured))
    panel = fig.subplots()
    for name in [name for name in curves if name not in coloured]:
        plotting.draw_faint_line(panel, curves[name])
    points = []
    handles = []
    for i, name in enumerate(coloured):
        handles += panel.plot(
            *zip(*curves[name]),
            **plotting.colour_and_marker(i),
            linestyle=plotting.line_style(i),
            markersize=4,
            linewidth=1.5,
            label=plotting.plain(labels[name].replace("layer map", "map"), 48),
        )
        for step, loss in curves[name]:
            text = f"{name}\nstep {step:,}: loss {loss:.4f}, perplexity {math.exp(loss):.2f}"
            points.append((panel, step, loss, text))
    if len(curves) > len(coloured):
        label = f"{len(curves) - len(coloured)} others"
        handles += panel.plot([], [], color=plotting.PALE_GREY, linewidth=0.7, label=label)
    panel.set_xlabel("step")
    panel.set_ylabel(LOSS_LABELS["loss"])
    plotting.tidy(panel)
    plotting.legend_below(fig, handles, handlelength=3.2)
    return "adapted.png", (fig, points), []


def without_common_parts(names: list[str]) -> dict[str, str]:
    """{name: a shorter name}: the first part, and of the others those that at most half of the names have."""
    counts = Counter(part for name in names for part in name.split(", "))
    labels = {}
    for name in names:
        first, *parts = name.split(", ")
        labels[name] = ", ".join([first, *(part for part in parts if counts[part] <= len(names) / 2)])
    return labels


def mean_steps(config: Configuration) -> list[tuple[int, float]]:
    """[(step, loss)]: means over the finished runs, at the evaluations that all of them have."""
    evaluations = []
    for run in filter(finished, config.runs):
        losses = dict(series(run.history, "step", "val/loss"))
        evaluations.append({step: loss for step, loss in losses.items() if is_finite(loss)})
    curve = []
    for step in sorted(set.intersection(*map(set, evaluations))) if evaluations else []:
        curve.append((step, fmean(losses[step] for losses in evaluations)))
    return curve


# ---- AdaLoRA's ranks ---------------------------------------------------------------------------------------


def draw_final_ranks(configs: list[Configuration]):
    grids = {c.name: rank_grid(filter(finished, c.runs)) for c in configs}
    grids = {name: grid for name, grid in grids.items() if grid[0]}
    if not grids:
        return None
    shown = dict(list(grids.items())[:RANK_GRIDS])
    width = 0.55 * max(len(layers) for layers, _, _ in shown.values())
    heights = [0.9 + 0.36 * len(matrices) for _, matrices, _ in shown.values()]
    fig = plotting.new_figure(4.2 + width, 0.6 + sum(height + 0.9 for height in heights))
    ratios = [ratio for height in heights for ratio in (0.9, height)]
    sizes = {"height_ratios": ratios, "width_ratios": [width, 1.3]}
    panels = fig.subplots(2 * len(shown), 2, squeeze=False, gridspec_kw=sizes)
    for i, (name, (layers, matrices, grid)) in enumerate(shown.items()):
        top, corner = panels[2 * i]
        panel, side = panels[2 * i + 1]
        corner.axis("off")
        draw_rank_grid(panel, layers, matrices, grid)
        draw_rank_sums(panel, top, side, grid)
        top.set_title(plotting.plain(name, 60), fontsize=10.5, loc="left")
    rows = []
    for name, grid in grids.items():
        late, mlp = rank_shares(*grid)
        rows.append([name, f"{100 * late:.0f}%", f"{100 * mlp:.0f}%"])
    header = ["configuration", "of all ranks in the later half of the layers", "in the MLP"]
    return "adalora_ranks.png", (fig, []), [("table", header, rows, "numbers")]


def draw_rank_grid(panel, layers: list[int], matrices: list[str], grid: list[list[float]]):
    """Layers across, matrices down; the rank in each cell."""
    image = panel.imshow(grid, cmap="cividis", aspect="auto", vmin=0)
    for y, row in enumerate(grid):
        for x, rank in enumerate(row):
            if is_finite(rank):
                text = f"{rank:g}" if rank == round(rank) else f"{rank:.1f}"
                colour = "white" if image.norm(rank) < 0.55 else "black"
                panel.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour)
    panel.set_xticks(range(len(layers)), layers)
    panel.set_yticks(range(len(matrices)), matrices)
    panel.set_xlabel("layer")
    panel.spines[:].set_visible(False)


def draw_rank_sums(panel, top, side, grid: list[list[float]]):
    """The sums of the grid in `panel` as bars: of each layer in the panel `top`, of each matrix in `side`."""
    layer_sums = [sum(filter(is_finite, column)) for column in zip(*grid)]
    matrix_sums = [sum(filter(is_finite, row)) for row in grid]
    bars = top.bar(range(len(layer_sums)), layer_sums, color=plotting.GREY, width=0.8)
    top.bar_label(bars, fmt="%.3g", fontsize=8.5)
    top.set(xlim=panel.get_xlim(), ylim=(0, 1.25 * max(layer_sums) or 1))
    bars = side.barh(range(len(matrix_sums)), matrix_sums, color=plotting.GREY, height=0.8)
    side.bar_label(bars, fmt="%.3g", fontsize=8.5)
    side.set(ylim=panel.get_ylim(), xlim=(0, 1.4 * max(matrix_sums) or 1))
    for bar_panel in (top, side):
        bar_panel.set(xticks=[], yticks=[])
        bar_panel.spines[:].set_visible(False)
