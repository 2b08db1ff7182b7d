"""Runs that train only a part of their parameters (adapters, subspaces): a section of the page and its
figures.

A figure is drawn as (figure, points), where each point is (panel, x, y, text that is shown under the
pointer).
"""

import math
from collections import Counter
from statistics import fmean

from nanochat.history import series
from nanochat.naming import line_name, method
from nanochat.report import plotting
from nanochat.report.configurations import Configuration, finished, run_seed, run_value
from nanochat.report.statistics import d90, loss_at_start, rank_grid, rank_shares, spearman, spearman_interval
from nanochat.report.summaries import baseline, hover_text, mean_over_runs, outcome, rank_words
from nanochat.units import COUNT, human, is_finite, unit_of

BITS = [(1, "bit"), (1e3, "kbit"), (1e6, "Mbit"), (1e9, "Gbit")]
ADAPTER_CURVES = 12  # whose curves are drawn in colour; the others are faint
RANK_GRIDS = 4  # AdaLoRA configurations whose ranks are drawn
ADAPTER_CAPTIONS = {
    "trained.png": "Final loss against the trained parameters and against the bits to store. Circles are "
    "trained from scratch. Squares are adapters of a trained model: only what is stored beside that model "
    "counts, not the model and not its training. Uniform and unigram: the loss of equal probabilities for "
    "all tokens, and of the tokens' frequencies alone.",
    "subspace.png": "Final loss against the dimension of the random subspace. Dashed: all weights trained, "
    "with the spread over seeds. Dotted: 90% of the way from the untrained model's loss to that one.",
    "adalora_ranks.png": "AdaLoRA's final ranks, means over seeds; bars: sums by layer and by matrix. For an "
    "encoder fine-tuned on language understanding, Zhang et al. (arXiv 2303.10512) found the most rank in "
    "upper layers and in the MLP.",
    "untrained.png": "Does a layer map's perplexity before any training predict the perplexity after its "
    "adapter is trained? A point is a layer map.",
    "adapted.png": "Validation loss of adapters, means over seeds. Step 0 is the base model with its layer "
    "map, before the adapter is trained.",
}
SUBSPACE_WORDS = (
    "d90: the smallest dimension whose loss closes 90% of the way from the untrained model's loss to that of "
    "all weights trained under the same seed. It is interpolated in the logarithm between the dimensions "
    "tried. ≤: the smallest one tried is already enough."
)
INTERVAL_WORDS = (
    "The interval is a percentile bootstrap over the maps: it leaves out the spread between seeds, and with "
    "few maps it is rough."
)


def adapter_section(configs: list[Configuration], measure: str) -> tuple[list[tuple], dict]:
    """(blocks of the page, {file name: (PNG bytes, hotspots)}) of the finished runs.

    Both are empty where every run trains all its parameters. measure: "loss" where losses may be compared;
    else only ranks are shown.
    """
    configs = [c for c in configs if any(map(finished, c.runs))]
    if not any(c.method for c in configs):
        return [], {}
    makers = [draw_final_ranks]
    if measure == "loss":
        makers = [draw_trained, draw_subspaces, draw_untrained, draw_adapter_curves, draw_final_ranks]
    blocks = [("heading", "What is trained")]
    figures = {}
    for maker in makers:
        made = maker(configs)  # (file name, (figure, points), blocks below it), or None
        if made:
            name, figure, below = made
            figures[name] = plotting.png_with_hotspots(*figure)
            blocks += [("figure", name, ADAPTER_CAPTIONS[name]), *below]
    return (blocks, figures) if figures else ([], {})


# ---- loss against what is trained and stored ---------------------------------------------------------------


def trained_parameters(run) -> float | None:
    return run_value(run, "params/trained") or run_value(run, "params/total")


def stored_bits(run) -> float | None:
    total = run_value(run, "params/total")
    return run_value(run, "params/stored_bits") or (32 * total if total else None)


def trained_in_blocks(run) -> float | None:
    """Trained parameters besides those of embedding and head, which a subspace does not cover."""
    trained = trained_parameters(run)
    flags = run.config.get("flags", {})
    if trained is None or flags.get("adapter") or flags.get("freeze_embeddings"):
        return trained
    return max(0, trained - sum(run_value(run, key) or 0 for key in ("params/embedding", "params/lm_head")))


def kind(config: Configuration) -> str:
    """'LoRA', 'basis', 'low rank', 'low rank and tied layers', 'full rank': the legend of trained.png."""
    parts = []
    if config.low_rank:
        parts.append("low rank")
    if is_tied(config):
        parts.append("tied layers")
    return method(config.settings) or " and ".join(parts) or "full rank"


def is_tied(config: Configuration) -> bool:
    return bool(layer_map(config)) and not config.method


def layer_map(config: Configuration) -> str:
    return config.settings.get("layer_map") or ""


def short_label(config: Configuration) -> str:
    label = rank_words(config)
    if is_tied(config):
        label += f", {len(layer_map(config).split(','))} positions"
    return label


def draw_trained(configs: list[Configuration]):
    """Final loss against what is trained (with subspaces also: in the blocks) and against what is stored."""
    with_loss = [c for c in configs if c.values("val/loss")]
    shown = [c for c in with_loss if mean_over_runs(c, trained_parameters) and mean_over_runs(c, stored_bits)]
    if len(shown) < 2 or all(mean_over_runs(c, trained_parameters) == c.mean("params/total") for c in shown):
        return None
    quantities = [(trained_parameters, "trained parameters", COUNT), (stored_bits, "stored bits", BITS)]
    if any(c.settings.get("subspace") for c in shown):
        in_blocks = (trained_in_blocks, "trained parameters, without embedding and head", COUNT)
        quantities.insert(0, in_blocks)
    kinds = sorted(dict.fromkeys(map(kind, shown)), key=lambda name: name == "full rank")
    colours = {name: plotting.BRIGHT[i % len(plotting.BRIGHT)] for i, name in enumerate(kinds)}
    colours["full rank"] = plotting.BLACK

    fig = plotting.new_figure(5.6 * len(quantities), 6)
    panels = fig.subplots(1, len(quantities), sharey=True)
    points = []
    for panel, quantity in zip(panels, quantities):
        points += draw_loss_against(panel, shown, quantity, colours)
    draw_references(panels, reference_losses(configs))
    panels[0].set_ylabel("validation loss (nats/token)")
    handles = []
    for name in kinds:
        handles += panels[0].plot([], [], color=colours[name], marker="o", linestyle="none", label=name)
    plotting.legend_below(fig, handles)
    fig.draw_without_rendering()
    for panel, (quantity, _, _) in zip(panels, quantities):
        obstacles = [(x, y) for drawn_in, x, y, _ in points if drawn_in is panel]
        for c in shown:
            if not mean_over_runs(c, quantity):
                obstacles += plotting.points_on_level(panel, c.mean("val/loss"))
        plotting.label_points(panel, best_labels(shown, quantity), obstacles)
    return "trained.png", (fig, points), [trained_table(shown)]


def draw_loss_against(panel, configs: list[Configuration], quantity: tuple, colours: dict) -> list[tuple]:
    """A point a configuration, on a logarithmic axis: zero, which has no place there, is a dotted line."""
    count, words, ladder = quantity
    points = []
    for c in configs:
        x = mean_over_runs(c, count)
        loss = c.mean("val/loss")
        colour = colours[kind(c)]
        if x:
            style = {
                "color": colour,
                "marker": "s" if c.settings.get("adapter") else "o",
                "linestyle": "none",
            }
            plotting.draw_line(panel, [(x, c.values("val/loss"))], **style)
            points.append((panel, x, loss, f"{hover_text(c, 'loss')}\n{words} {x:,.0f}"))
        else:
            panel.axhline(loss, color=colour, linewidth=1, linestyle=":", zorder=0.5)
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8.5}
            panel.annotate(f"0: {short_label(c)}", (0, loss), (4, 2), **place)
    if points:
        xs = [x for _, x, _, _ in points]
        plotting.log_axis(panel.xaxis, ticks=(1,) if max(xs) > 100 * min(xs) else (1, 2, 5))
        panel.xaxis.set_major_formatter(lambda x, _: tick_text(x, ladder))
    panel.margins(x=0.15)
    panel.set_xlabel(words)
    plotting.tidy(panel)
    return points


def tick_text(number: float, ladder: list) -> str:
    size, unit = unit_of(number, ladder)
    return f"{number / size:g} {unit}".rstrip()


def best_labels(configs: list[Configuration], count) -> list[tuple]:
    """(x, loss, label), of points with one x and one label the best alone."""
    best = {}
    for c in configs:
        x = mean_over_runs(c, count)
        key = x, short_label(c)
        if x and (key not in best or c.mean("val/loss") < best[key]):
            best[key] = c.mean("val/loss")
    return [(x, loss, label) for (x, label), loss in best.items()]


def trained_table(configs: list[Configuration]) -> tuple:
    header = [
        "configuration",
        "trained",
        "without embedding and head",
        "stored",
        "validation loss",
        "perplexity",
    ]
    rows = []
    for c in sorted(configs, key=lambda c: (mean_over_runs(c, trained_parameters), c.mean("val/loss"))):
        trained = f"{mean_over_runs(c, trained_parameters):,.0f}"
        in_blocks = f"{mean_over_runs(c, trained_in_blocks):,.0f}"
        stored = human(mean_over_runs(c, stored_bits), BITS)
        rows.append([c.name, trained, in_blocks, stored, f"{c.mean('val/loss'):.4f}", outcome(c, "val/ppl")])
    return ("table", header, rows, "numbers")


def reference_losses(configs: list[Configuration]) -> dict[str, float]:
    """{"uniform", "unigram": nats per token}, as the first run that has them on record says."""
    records = [run.config.get("reference_losses") for c in configs for run in c.runs]
    losses = next(filter(None, records), {})
    return {name: loss for name, loss in losses.items() if is_finite(loss)}


def draw_references(panels, levels: dict[str, float]):
    """Dashed lines; those far above all points, which they would squeeze together, in words."""
    low, high = panels[0].get_ylim()
    height = high - low
    near = {name: level for name, level in levels.items() if level <= high + 0.6 * height}
    far = [f"{name} {level:.2f}" for name, level in levels.items() if name not in near]
    high = max([high, *(level + 0.05 * height for level in near.values())])
    if far:
        plotting.write_in_corner(panels[-1], f"above the frame: {', '.join(far)}")
        high += 0.05 * (high - low)
    panels[0].set_ylim(low, high)
    for panel in panels:
        for name, level in near.items():
            panel.axhline(level, color=plotting.GREY, linewidth=1, linestyle="--", zorder=0.5)
            plotting.write_on_level(panel, level, f"{name} {level:.2f}")


# ---- loss against the dimension of a subspace --------------------------------------------------------------


def draw_subspaces(configs: list[Configuration]):
    lines = subspace_lines(configs)
    if not any(len(line) > 1 for line in lines.values()):
        return None
    full = baseline(configs, "val/ppl")
    fig = plotting.new_figure(8.5, 5.6)
    panel = fig.subplots()
    points = []
    handles = []
    for i, (name, line) in enumerate(lines.items()):
        colour = plotting.BRIGHT[i % len(plotting.BRIGHT)]
        style = {"color": colour, "marker": plotting.marker(i), "linestyle": plotting.line_style(i)}
        plotting.draw_line(panel, [(c.settings["subspace_dim"], c.values("val/loss")) for c in line], **style)
        handles += panel.plot([], [], **style, label=name)
        points += [
            (panel, c.settings["subspace_dim"], c.mean("val/loss"), hover_text(c, "loss")) for c in line
        ]
    plotting.log_axis(panel.xaxis, ticks=(1,))
    if full:
        plotting.draw_band(panel, full.values("val/loss"))
        draw_90_percent(panel, [run for line in lines.values() for c in line for run in c.runs], full)
    panel.set_xlabel("dimension of the subspace")
    panel.set_ylabel("validation loss (nats/token)")
    plotting.tidy(panel)
    plotting.legend_below(fig, handles, handlelength=3.2)
    rows = d90_rows(lines, full)
    words = "No d90: no finished run trains all weights under one of these seeds."
    blocks = [("paragraph", words)]
    if rows:
        header = ["method", "seed", "loss at the start", "all weights", "wanted", "d90"]
        blocks = [("paragraph", SUBSPACE_WORDS), ("table", header, rows, "numbers")]
    return "subspace.png", (fig, points), blocks


def subspace_lines(configs: list[Configuration]) -> dict[str, list[Configuration]]:
    """{method: its configurations by dimension}, of the subspaces that have a dimension."""
    lines = {}
    for c in configs:
        dimension = c.settings.get("subspace_dim")
        has_dimension = c.settings.get("subspace") not in (None, "", "none", "lora-random")
        if has_dimension and is_finite(dimension) and dimension > 0 and c.values("val/loss"):
            lines.setdefault(line_name(c.settings), []).append(c)
    return {name: sorted(line, key=lambda c: c.settings["subspace_dim"]) for name, line in lines.items()}


def draw_90_percent(panel, runs: list, full: Configuration):
    """A dotted line where 90% of the way from the untrained model's loss to full rank's is gone."""
    starts = [start for start in map(loss_at_start, runs) if start]
    if starts:
        level = fmean(starts) - 0.9 * (fmean(starts) - full.mean("val/loss"))
        panel.axhline(level, color=plotting.GREY, linewidth=1, linestyle=":")
        plotting.write_on_level(panel, level, "90%")


def d90_rows(lines: dict[str, list[Configuration]], full: Configuration | None) -> list[list[str]]:
    """A row for each method and seed that full rank has too."""
    full_losses = {}
    for run in full.runs if full else ():
        if finished(run) and run_value(run, "val/loss") is not None:
            full_losses[run_seed(run)] = run_value(run, "val/loss")
    rows = []
    for name, line in lines.items():
        runs = [(c.settings["subspace_dim"], run) for c in line for run in c.runs if finished(run)]
        runs = [(dimension, run) for dimension, run in runs if run_value(run, "val/loss") is not None]
        for s in sorted({run_seed(run) for _, run in runs} & full_losses.keys()):
            points = [
                (dimension, run_value(run, "val/loss")) for dimension, run in runs if run_seed(run) == s
            ]
            start = loss_at_start(next(run for _, run in runs if run_seed(run) == s))
            if start is not None:
                losses = [start, full_losses[s], start - 0.9 * (start - full_losses[s])]
                rows.append(
                    [name, str(s), *(f"{loss:.4f}" for loss in losses), d90_words(points, *losses[:2])]
                )
    return rows


def d90_words(points: list[tuple[float, float]], start: float, full: float) -> str:
    """'631', '≤ 10', or that it was not reached. points: (dimension, loss)."""
    dimension = d90(points, start, full)
    if dimension is None:
        return f"not reached (largest tried: {max(points)[0]:,.0f})"
    bound = "≤ " if dimension == min(points)[0] else ""
    return f"{bound}{dimension:,.0f}"


# ---- layer maps before and after ---------------------------------------------------------------------------


def draw_untrained(configs: list[Configuration]):
    """A panel for each group of adapters that differ in their layer map alone, of three maps and more."""
    groups = {}
    for c in configs:
        if c.settings.get("adapter") and mean_over_runs(c, perplexity_at_start) and c.values("val/ppl"):
            others = {
                k: str(v) for k, v in c.settings.items() if k not in ("layer_map", "layer_kinds", "depth")
            }
            groups.setdefault(tuple(sorted(others.items())), []).append(c)
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
    if len(coloured) > ADAPTER_CURVES:  # evenly from the best to the worst
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
    panel.set_ylabel("validation loss (nats/token)")
    plotting.tidy(panel)
    plotting.legend_below(fig, handles, handlelength=3.2)
    return "adapted.png", (fig, points), []


def without_common_parts(names: list[str]) -> dict[str, str]:
    """{name: the name without those parts, behind the first, that most names have}."""
    counts = Counter(part for name in names for part in name.split(", "))
    labels = {}
    for name in names:
        first, *others = name.split(", ")
        labels[name] = ", ".join([first, *(part for part in others if counts[part] <= len(names) / 2)])
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
        above, corner = panels[2 * i]
        panel, beside = panels[2 * i + 1]
        corner.axis("off")
        draw_rank_grid(panel, layers, matrices, grid)
        draw_rank_sums(panel, above, beside, grid)
        above.set_title(plotting.plain(name, 60), fontsize=10.5, loc="left")
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


def draw_rank_sums(panel, above, beside, grid: list[list[float]]):
    """The grid's sums as bars: by layer in the panel above it, by matrix in the one beside it."""
    by_layer = [sum(filter(is_finite, column)) for column in zip(*grid)]
    by_matrix = [sum(filter(is_finite, row)) for row in grid]
    bars = above.bar(range(len(by_layer)), by_layer, color=plotting.GREY, width=0.8)
    above.bar_label(bars, fmt="%.3g", fontsize=8.5)
    above.set(xlim=panel.get_xlim(), ylim=(0, 1.25 * max(by_layer) or 1))
    bars = beside.barh(range(len(by_matrix)), by_matrix, color=plotting.GREY, height=0.8)
    beside.bar_label(bars, fmt="%.3g", fontsize=8.5)
    beside.set(ylim=panel.get_ylim(), xlim=(0, 1.4 * max(by_matrix) or 1))
    for bare in (above, beside):
        bare.set(xticks=[], yticks=[])
        bare.spines[:].set_visible(False)
