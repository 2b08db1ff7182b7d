"""The figures of a sweep, runs over several axes and seeds: configurations in, PNG bytes and hover texts out.

A figure is drawn as (figure, points), where each point is (panel, x, y, text that is shown under the
pointer).
"""

import math
import re
from collections import Counter
from dataclasses import replace
from statistics import fmean, median_high

from nanochat.history import series
from nanochat.report import plotting
from nanochat.report.configurations import Configuration, finished, rank_name, run_seed, run_value
from nanochat.report.run_figures import draw_memory, draw_parameters, loss_limits
from nanochat.report.summaries import (
    COSTS,
    MEASURES,
    any_diverged,
    baseline,
    best_by_key,
    depth,
    error_bar_caption,
    factored_groups,
    frontier,
    hover_text,
    mean_rank,
    memory_key,
    outcome,
    rank_words,
    ranks_in_order,
    representatives,
    run_points,
    same_machine,
    times_to_perplexity,
)
from nanochat.units import COUNT, TIME, human, is_finite, three_digits, unit_of

BARS = 24  # shapes that bars are drawn for
COLOURED_CURVES = 6  # the others are faint
LOSS_WORDS = {"loss": "validation loss (nats/token)", "bpb": "validation bits per byte"}
SWEEP_CAPTIONS = {
    "frontier.png": "Final quality against cost: down and to the left is better. A large point is the mean "
    "of a configuration over its seeds, a faint one a seed. The grey line is the Pareto frontier of the "
    "means: no configuration is better at the same cost or less. The band is the full-rank baseline and its "
    "spread over seeds; of several full-rank configurations, the best. “Rank 64” means both attention and "
    "MLP.",
    "loss_parameters.png": "Validation loss against parameters: a large point is a configuration, the small "
    "ones around it are its seeds. The band is the full-rank baseline and its spread over seeds.",
    "depth_rank.png": "Quality by depth and rank; darker is better. Of several configurations in one cell "
    "the best is shown, which flatters cells where more were tried.",
    "learning_rate.png": "Quality against learning rate: one line for each rank and depth. A ring marks the "
    "best rate that was tried, a × at the top a rate at which a run diverged. Along a line nothing else "
    "varies: its rates are compared over the seeds that all of them have, if there are any. Of several "
    "lines at one rank and depth the one with the most rates is shown.",
    "threshold_rank.png": "Training time until a perplexity is reached, interpolated between the two "
    "evaluations around it. Dashed: full rank at the same depth, with its spread. A × at the top: not every "
    "seed reached it. Of several configurations at one rank the best is shown.",
    "loss_time.png": "Validation loss against training time, means over seeds. In colour: the baseline, and "
    "the configurations on the frontier of loss against time. An arrow compares the baseline with the "
    "low-rank configuration that reached the perplexity first, chosen after the fact.",
    "parameters.png": "Parameters by group.",
    "memory.png": "Memory by part, of one run of each shape. The diamond is the measured peak: on CUDA what "
    "torch allocated; on CPU the whole process, Python and libraries included.",
}


def draw_sweep_figures(configs: list[Configuration], measure: str) -> dict:
    """{file name: (PNG bytes, [(x, y, text)])}: the figures that the axes call for, of the finished runs.

    x, y: where a point lies, as fractions of the picture's width and height from the top left. measure:
    "loss" where perplexity may be compared, else "bpb".
    """
    with_finished = [c for c in configs if any(map(finished, c.runs))]
    configs = [c for c in with_finished if c.values(MEASURES[measure][0])]  # without those that only diverged
    drawn = {}
    if len(configs) > 1:
        drawn = {
            "frontier.png": draw_frontier(configs, measure),
            "loss_parameters.png": draw_loss_parameters(configs, measure),
            "depth_rank.png": draw_depth_rank(configs, measure),
            "learning_rate.png": draw_learning_rates(with_finished, measure),
            "threshold_rank.png": draw_thresholds(configs, measure),
            "loss_time.png": draw_loss_time(configs, measure),
        }
    figures = {name: plotting.png_with_hotspots(*figure) for name, figure in drawn.items() if figure}
    shapes = representatives(configs)
    if 1 < len(shapes) <= BARS:
        figures["parameters.png"] = plotting.png(draw_parameters(shapes)), []
        figures["memory.png"] = plotting.png(draw_memory(shapes)), []
    return figures


def figure_caption(name: str, configs: list[Configuration]) -> str:
    """What a figure shows, and what its error bars are."""
    caption = SWEEP_CAPTIONS[name]
    has_error_bars = name not in ("loss_time.png", "parameters.png", "memory.png")
    return f"{caption} {error_bar_caption(configs)}" if has_error_bars else caption


# ---- quality against cost ----------------------------------------------------------------------------------


def draw_frontier(configs: list[Configuration], measure: str):
    """Four panels, one a cost: points with error bars, the Pareto frontier of the means, the baseline."""
    y_key, y_words = MEASURES[measure]
    styles = plotting.configuration_styles(configs)
    base = baseline(configs, y_key)
    memory = memory_key(configs)
    shown_costs = ("params/total", memory, "total_training_time", "total_training_flops")
    costs = [cost for cost in COSTS if cost[0] in shown_costs]
    fig = plotting.new_figure(11.5, 9)
    panels = fig.subplots(2, 2, sharey=True)
    points = []
    labels = []
    for panel, (x_key, words, ladder) in zip(panels.flat, costs):
        shown = [c for c in configs if run_points(c, x_key, y_key)]
        size, unit = unit_of(max((c.mean(x_key) for c in shown), default=0), ladder)
        panel.set_xlabel(plotting.with_unit(words, unit))
        plotting.tidy(panel)
        plotting.draw_band(panel, base.values(y_key) if base else [])
        depends_on_machine = x_key in (memory, "total_training_time")
        if not shown:
            plotting.write_in_middle(panel, "not recorded")
        elif depends_on_machine and not same_machine(configs):
            plotting.write_in_middle(panel, f"different machines:\n{words} is not comparable")
        else:
            seeds = {c.name: scaled(run_points(c, x_key, y_key), size) for c in shown}
            means = {name: plotting.draw_point(panel, seeds[name], styles[name]) for name in seeds}
            points += [(panel, *means[c.name], hover_text(c, measure)) for c in shown]
            plotting.log_if_wide(panel.xaxis, [x for x, _ in means.values()])
            panel.margins(x=0.1)
            front = [c.name for c in frontier(shown, x_key, y_key)]
            stairs = plotting.draw_stairs(panel, [means[name] for name in front]) if front else []
            labels.append((panel, means, front, [*stairs, *obstacles(panel, seeds, base, y_key)]))
    levels = [base.mean(y_key)] if base else []
    plotting.limit_height(panels[0, 0], [c.values(y_key) for c in configs], levels)
    for panel in panels[:, 0]:
        panel.set_ylabel(y_words)
    handles = plotting.rank_handles(panels[0, 0], configs, styles)
    handles += panels[0, 0].plot([], [], color=plotting.GREY, linewidth=1.3, label="Pareto frontier")
    plotting.legend_below(fig, handles + ([plotting.baseline_handle()] if base else []))

    fig.draw_without_rendering()
    texts = plotting.short_labels(configs)
    for panel, means, front, covered in labels:
        named = list(means)
        if len(means) > plotting.LABELLED:
            named = list(dict.fromkeys([*front, *([base.name] if base else [])]))
        plotting.label_points(panel, [(*means[name], texts[name]) for name in named], covered)
    return fig, points


def scaled(seeds: list[tuple[float, float]], size: float) -> list[tuple[float, float]]:
    """x in units of `size`."""
    return [(x / size, y) for x, y in seeds]


def obstacles(panel, seeds: dict[str, list], base: Configuration | None, y_key: str) -> list[tuple]:
    """What labels should not cover: means and error bars of the configurations, the baseline's line."""
    covered = plotting.points_on_level(panel, base.mean(y_key)) if base else []
    for points in seeds.values():
        covered += plotting.points_on_error_bars(points)
    return covered


def draw_loss_parameters(configs: list[Configuration], measure: str):
    """Loss against parameters: each configuration's mean with its label, and its seeds.

    Of many, the best of each size is labelled.
    """
    y_key = "val/loss" if measure == "loss" else "val/bpb"
    shown = [c for c in configs if run_points(c, "params/total", y_key)]
    if len({c.mean("params/total") for c in shown}) < 2:
        return None
    styles = plotting.configuration_styles(shown)
    base = baseline(shown, y_key)
    size, unit = unit_of(max(c.mean("params/total") for c in shown), COUNT)
    fig = plotting.new_figure(9.5, 6.4)
    panel = fig.subplots()
    points = []
    seeds = {}
    means = {}
    for c in shown:
        seeds[c.name] = scaled(run_points(c, "params/total", y_key), size)
        means[c.name] = plotting.draw_point(panel, seeds[c.name], styles[c.name], opacity=0.55)
        if len(seeds[c.name]) > 1:
            points += [(panel, x, y, text) for x, y, text in seed_texts(c, y_key, LOSS_WORDS[measure], size)]
        points.append((panel, *means[c.name], hover_text(c, measure)))
    plotting.draw_band(panel, base.values(y_key) if base else [])
    panel.set_xlabel(plotting.with_unit("parameters", unit))
    panel.set_ylabel(LOSS_WORDS[measure])
    plotting.tidy(panel)
    plotting.log_if_wide(panel.xaxis, [x for x, _ in means.values()])
    panel.margins(x=0.14)
    levels = [base.mean(y_key)] if base else []
    plotting.limit_height(panel, [c.values(y_key) for c in shown], levels)
    handles = plotting.rank_handles(panel, shown, styles)
    plotting.legend_below(fig, handles + ([plotting.baseline_handle()] if base else []))

    named = shown
    if len(shown) > plotting.LABELLED:
        named = list(best_by_key(shown, lambda c: c.mean("params/total"), y_key).values())
    fig.draw_without_rendering()
    texts = plotting.short_labels(shown)
    covered = obstacles(panel, seeds, base, y_key) + [point for c in shown for point in seeds[c.name]]
    plotting.label_points(panel, [(*means[c.name], texts[c.name]) for c in named], covered)
    return fig, points


def seed_texts(config: Configuration, y_key: str, y_words: str, size: float) -> list[tuple]:
    """(x, y, hover text) of each seed that has both numbers."""
    texts = []
    for run in filter(finished, config.runs):
        x = run_value(run, "params/total")
        y = run_value(run, y_key)
        if x is not None and y is not None:
            text = f"{run.name}\n{config.name}, seed {run_seed(run)}\n{y_words} {y:.4f}"
            texts.append((x / size, y, text))
    return texts


# ---- one axis at a time ------------------------------------------------------------------------------------


def draw_depth_rank(configs: list[Configuration], measure: str):
    """Rows: depth, columns: rank; each cell has the mean and its spread.

    None unless several depths have several ranks.
    """
    y_key, y_words = MEASURES[measure]
    configs = [c for c in configs if not c.method]
    cells = best_by_key(configs, lambda c: (depth(c), rank_words(c)), y_key)
    ranks_by_depth = Counter(layers for layers, _ in cells)
    if len([count for count in ranks_by_depth.values() if count > 1]) < 2:
        return None
    rows = sorted(ranks_by_depth)
    columns = ranks_in_order(configs)
    grid = [[math.nan] * len(columns) for _ in rows]
    for (layers, rank), c in cells.items():
        grid[rows.index(layers)][columns.index(rank)] = c.mean(y_key)
    means = [c.mean(y_key) for c in cells.values()]
    best = min(means)
    worst = max(means)
    top = min(worst, best + 3 * (median_high(means) - best)) if len(means) > 2 else worst

    fig = plotting.new_figure(2.6 + 1.15 * len(columns), 1.9 + 0.62 * len(rows))
    panel = fig.subplots()
    colours = {"cmap": "cividis", "vmin": best, "vmax": max(top, best * 1.0001)}
    image = panel.imshow(grid, aspect="auto", origin="lower", **colours)
    points = []
    for (layers, rank), c in cells.items():
        x = columns.index(rank)
        y = rows.index(layers)
        text = outcome(c, y_key).replace(" ± ", "\n± ").replace(" to ", "\nto ")
        text += " †" if any_diverged(c, y_key) else ""
        colour = "white" if image.norm(c.mean(y_key)) < 0.55 else "black"
        panel.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour)
        points.append((panel, x, y, hover_text(c, measure)))
    ticks = [plotting.plain(rank.removeprefix("rank ")).replace(", ", "\n") for rank in columns]
    panel.set_xticks(range(len(columns)), ticks)
    panel.set_yticks(range(len(rows)), rows)
    has_diverged = any(any_diverged(c, y_key) for c in cells.values())
    panel.set_xlabel("rank († a seed diverged and is left out)" if has_diverged else "rank")
    panel.set_ylabel("layers")
    panel.spines[:].set_visible(False)
    fig.colorbar(image, ax=panel, label=y_words, extend="max" if worst > top else "neither")
    return fig, points


def draw_learning_rates(configs: list[Configuration], measure: str):
    """A panel for each rate that varies while all else stays, and in it a line for each rank and depth."""
    y_key, y_words = MEASURES[measure]
    flags = sorted({key for c in configs for key in c.settings if key.endswith("_lr")})
    scans = {flag: rate_lines(configs, flag, y_key) for flag in flags}
    scans = {flag: lines for flag, lines in scans.items() if lines}
    if not scans:
        return None
    styles = plotting.configuration_styles(configs)
    depths = sorted({depth(c) for c in configs})
    points = []
    fig = plotting.new_figure(min(12, 3 + 4.5 * len(scans)), 4.9)
    panels = fig.subplots(1, len(scans), sharey=True, squeeze=False)[0]
    for panel, (flag, lines) in zip(panels, scans.items()):
        for line in lines:
            line_style = plotting.line_style(depths.index(depth(line[0])))
            draw_rate_line(panel, line, flag, y_key, {**styles[line[0].name], "linestyle": line_style})
            evaluated = [c for c in line if c.values(y_key)]
            points += [(panel, c.settings[flag], c.mean(y_key), hover_text(c, measure)) for c in evaluated]
        plotting.log_axis(panel.xaxis)
        rates = sorted({c.settings[flag] for line in lines for c in line})
        if len(rates) <= 8:
            panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
            panel.set_xticks([], minor=True)
        panel.set_xlabel(f"--{flag.replace('_', '-')}")
        plotting.tidy(panel)
    shown = [c for lines in scans.values() for line in lines for c in line]
    plotting.limit_height(panels[0], [c.values(y_key) for c in shown if c.values(y_key)])
    panels[0].set_ylabel(y_words)
    plotting.legend_below(fig, plotting.rank_handles(panels[0], shown, styles))
    return fig, points


def draw_rate_line(panel, line: list[Configuration], flag: str, y_key: str, style: dict):
    """The line, a ring around its best rate, and a × for each rate at which a seed diverged."""
    evaluated = [(c.settings[flag], c.values(y_key)) for c in line if c.values(y_key)]
    plotting.draw_line(panel, evaluated, **style)
    plotting.mark_missing(panel, [c.settings[flag] for c in line if any_diverged(c, y_key)], style["color"])
    stable = [c for c in line if not any_diverged(c, y_key)]
    if stable:
        best = min(stable, key=lambda c: c.mean(y_key))
        ring = {"marker": "o", "markersize": 13, "markerfacecolor": "none", "zorder": 4}
        panel.plot(best.settings[flag], best.mean(y_key), color=style["color"], **ring)


def rate_lines(configs: list[Configuration], flag: str, y_key: str) -> list[list[Configuration]]:
    """Lines of configurations that differ in this rate alone, sorted by it.

    For each rank and depth the line with the most rates, and of several such the one with the best result.
    """
    lines = {}
    for c in configs:
        if is_finite(c.settings.get(flag)) and c.settings[flag] > 0:
            others = tuple(sorted((key, str(setting)) for key, setting in c.settings.items() if key != flag))
            lines.setdefault(others, []).append(c)
    chosen = {}  # {(rank, depth): ((number of rates, -best result), line)}
    for line in lines.values():
        means = [c.mean(y_key) for c in line if c.values(y_key)]
        if len(line) > 1 and means:
            shape = rank_words(line[0]), depth(line[0])
            merit = len(line), -min(means)
            if shape not in chosen or merit > chosen[shape][0]:
                chosen[shape] = merit, sorted(line, key=lambda c: c.settings[flag])
    return [over_common_seeds(line) for _, line in chosen.values()]


def over_common_seeds(line: list[Configuration]) -> list[Configuration]:
    """The line over the seeds that all its configurations finished; as it is where there are none.

    Where a rate was tuned on one seed and then run on others, rates would else compare seeds.
    """
    common = set.intersection(*map(finished_seeds, line))
    if not common:
        return line
    return [with_seeds(c, common) for c in line]


def finished_seeds(config: Configuration) -> set[int]:
    return {run_seed(run) for run in config.runs if finished(run)}


def with_seeds(config: Configuration, seeds: set[int]) -> Configuration:
    return replace(config, runs=tuple(run for run in config.runs if run_seed(run) in seeds))


# ---- time to a perplexity ----------------------------------------------------------------------------------


def draw_thresholds(configs: list[Configuration], measure: str):
    """A panel a threshold (the hardest three): time to it against rank. None where too little is comparable.

    A line for each depth and combination of factored matrices; full rank is dashed. Left out: models in which
    matrices have ranks of their own, so not one rank, and those with an activation between the factors.
    """
    y_key = MEASURES[measure][0]
    configs = [c for c in configs if has_one_rank(c)]
    shapes = best_by_key(configs, lambda c: (factored_groups(c), depth(c), rank_words(c)), y_key)
    low = [c for c in shapes.values() if c.low_rank]
    full = {depth(c): c for c in shapes.values() if c.full_rank}
    thresholds = [p for p in thresholds_of(configs) if is_compared(p, list(shapes.values()))][-3:]
    too_few = not thresholds or len({mean_rank(c) for c in low}) < 2
    if measure != "loss" or too_few or not same_machine(configs):
        return None
    lines = {}
    for c in sorted(low, key=lambda c: (factored_groups(c), depth(c), mean_rank(c))):
        lines.setdefault((factored_groups(c), depth(c)), []).append(c)
    low_depths = {depth(c) for c in low}
    references = {layers: config for layers, config in full.items() if layers in low_depths}
    times = [times_to_perplexity(c, threshold) for c in shapes.values() for threshold in thresholds]
    size, unit = unit_of(max(map(fmean, filter(None, times))), TIME)

    fig = plotting.new_figure(max(6, 4 * len(thresholds)), 4.7)
    panels = fig.subplots(1, len(thresholds), squeeze=False)[0]
    ranks = [ranks_of(c) for c in low]
    one_number = all(len(distinct) == 1 and is_finite(*distinct) for distinct in ranks)
    points = []
    for panel, threshold in zip(panels, thresholds):
        points += draw_times_to(panel, threshold, lines, references, size)
        panel.set_title(f"to perplexity {threshold:g}", fontsize=10.5)
        panel.set_xlabel("rank" if one_number else "mean rank of the factored layers")
        panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
        plotting.tidy(panel)
    panels[0].set_ylabel(plotting.with_unit("training time", unit))
    handles = []
    for i, line in enumerate(lines):
        label = line_label(line, list(lines))
        handles += panels[0].plot([], [], label=label, **plotting.colour_and_marker(i))
    if references:
        style = {"color": plotting.GREY, "linestyle": "--", "linewidth": 1}
        handles += panels[0].plot([], [], label="full rank, same depth", **style)
    plotting.legend_below(fig, handles)
    return fig, points


def has_one_rank(config: Configuration) -> bool:
    """Linear factors, of ranks that are not set matrix by matrix."""
    return not config.settings.get("matrix_ranks") and config.settings.get("factor_act", "none") == "none"


def is_compared(threshold: float, configs: list[Configuration]) -> bool:
    """Whether two configurations reached the perplexity on every seed, one of them of low rank."""
    reached = [c for c in configs if times_to_perplexity(c, threshold)]
    return len(reached) > 1 and any(c.low_rank for c in reached)


def draw_times_to(panel, threshold: float, lines: dict, references: dict, size: float) -> list[tuple]:
    """Time to one perplexity: the lines, and full rank at each depth. Returns the points."""
    colours = {}  # of each depth's reference: that of its first line
    points = []
    for i, ((_, layers), line) in enumerate(lines.items()):
        style = plotting.colour_and_marker(i)
        colours.setdefault(layers, style["color"] if len(references) > 1 else plotting.BLACK)
        reached = [c for c in line if times_to_perplexity(c, threshold)]
        times = [scaled_times(c, threshold, size) for c in reached]
        ranks = [mean_rank(c) for c in reached]
        plotting.draw_line(panel, list(zip(ranks, times)), **style)
        missing = [mean_rank(c) for c in line if c not in reached]
        plotting.mark_missing(panel, missing, style["color"])
        texts = [describe_times(c, threshold) for c in reached]
        points += [(panel, x, fmean(y), text) for x, y, text in zip(ranks, times, texts)]
    for layers, config in references.items():
        plotting.draw_band(panel, scaled_times(config, threshold, size), colours[layers])
    return points


def scaled_times(config: Configuration, threshold: float, size: float) -> list[float]:
    """Times to a perplexity in units of `size` seconds."""
    return [seconds / size for seconds in times_to_perplexity(config, threshold)]


def describe_times(config: Configuration, threshold: float) -> str:
    """Hover text: the mean time, and each seed's."""
    times = times_to_perplexity(config, threshold)
    runs = filter(finished, config.runs)
    lines = [f"seed {run_seed(run)}: {human(seconds, TIME)}" for run, seconds in zip(runs, times)]
    return "\n".join([config.name, f"perplexity {threshold:g} after {human(fmean(times), TIME)}", *lines])


def thresholds_of(configs: list[Configuration]) -> list[float]:
    """Perplexities that some run reached, easiest first."""
    keys = {key for c in configs for run in c.runs for key in run.summary}
    matches = [re.fullmatch(r"time_to_ppl/([\d.]+)/seconds", key) for key in keys]
    return sorted((float(match[1]) for match in matches if match), reverse=True)


def ranks_of(config: Configuration) -> set:
    """The ranks of attention and MLP where they are factored: numbers, or text if one varies over depth."""
    return {config.settings.get(key) for key in ("attn_rank", "mlp_rank")} - {0, None}


def line_label(line: tuple, lines: list[tuple]) -> str:
    """What tells a line, (what is factored, layers), from the others."""
    matrices, layers = line
    label = "low rank"
    if len({other for other, _ in lines}) > 1:
        names = zip(("attention", "MLP", "head"), matrices)
        label = " and ".join(name for name, is_factored in names if is_factored)
    if len({other for _, other in lines}) > 1:
        label += f", {layers} layers"
    return label


# ---- loss against time -------------------------------------------------------------------------------------


def draw_loss_time(configs: list[Configuration], measure: str):
    """Curves of the baseline and of the frontier of time; the others are faint.

    An arrow shows how much sooner the fastest low-rank configuration reaches a perplexity.
    """
    y_key = MEASURES[measure][0]
    key = "val/" + measure
    curves = {c.name: mean_curve(c, key) for c in configs}
    base = baseline(configs, y_key)
    configs = [c for c in configs if len(curves[c.name]) > 1]
    if len(configs) < 2 or not same_machine(configs):
        return None
    base = base if base in configs else None
    speedup = fastest_low_rank(configs, base) if base and measure == "loss" else None
    fastest = speedup[1] if speedup else None
    front = frontier(configs, "total_training_time", y_key)
    candidates = [base, fastest, *reversed(front), *configs[:COLOURED_CURVES]]
    coloured = list({c.name: c for c in candidates if c}.values())[:COLOURED_CURVES]
    longest = max(curves[c.name][-1][0] for c in coloured)
    size, unit = unit_of(longest, TIME)
    curves = {c.name: scaled(curves[c.name], size) for c in configs}
    labels = {c.name: c.name.replace(rank_name(c.settings), rank_words(c)) for c in configs}

    fig = plotting.new_figure(9, 5.6)
    panel = fig.subplots()
    others = [c for c in configs if c not in coloured]
    for c in others:
        plotting.draw_faint_line(panel, curves[c.name])
    handles = []
    points = []
    for i, c in enumerate(coloured):
        label = plotting.plain(labels[c.name], 60) + (" (baseline)" if c is base else "")
        colour = plotting.BLACK if c is base else plotting.BRIGHT[i % len(plotting.BRIGHT)]
        style = {"color": colour, "linestyle": plotting.line_style(i), "marker": plotting.marker(i)}
        handles += panel.plot(*zip(*curves[c.name]), label=label, markersize=4.5, linewidth=1.6, **style)
        for x, loss in curves[c.name]:
            text = f"{c.name}\nafter {human(x * size, TIME)}: {quality_words(loss, measure)}"
            points.append((panel, x, loss, text))
    limits = loss_limits([run for c in coloured for run in c.runs if finished(run)], [key])
    if limits:
        panel.set_ylim(*limits)
    panel.set_xlim(0, 1.02 * longest / size)
    if speedup:
        draw_speedup(panel, speedup, labels[fastest.name], size)
    if others:
        handles += panel.plot([], [], color=plotting.PALE_GREY, linewidth=0.7, label=f"{len(others)} others")
    panel.set_xlabel(plotting.with_unit("training time", unit))
    panel.set_ylabel(LOSS_WORDS[measure])
    plotting.tidy(panel)
    plotting.legend_below(fig, handles, handlelength=3.2)
    return fig, points


def quality_words(loss: float, measure: str) -> str:
    return f"perplexity {math.exp(loss):.2f}" if measure == "loss" else f"{loss:.4f} bits per byte"


def draw_speedup(panel, speedup: tuple, label: str, size: float):
    """An arrow from the baseline's time to that of the fastest low-rank configuration, and what it says."""
    threshold, _, low_rank_seconds, baseline_seconds = speedup
    level = math.log(threshold)
    low, high = panel.get_ylim()
    panel.set_ylim(low, max(high, level + 0.1 * (high - low)))
    panel.axhline(level, color=plotting.GREY, linewidth=0.9, linestyle=":", zorder=1)
    arrow = {"arrowstyle": "->", "color": plotting.BLACK, "linewidth": 1.4}
    panel.annotate("", (low_rank_seconds / size, level), (baseline_seconds / size, level), arrowprops=arrow)
    ratio = baseline_seconds / low_rank_seconds
    words = f"{three_digits(ratio)}× sooner" if ratio >= 1 else f"{three_digits(1 / ratio)}× later"
    panel.annotate(
        f"{plotting.plain(label, 60)}\nreaches perplexity {threshold:g}\n{words} than the baseline",
        (1, level),
        (-4, 8),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=9.5,
        ha="right",
        va="bottom",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )


def mean_curve(config: Configuration, key: str) -> list[tuple[float, float]]:
    """[(seconds, loss)]: means over the finished runs, at the evaluations that all of them have."""
    evaluations = []
    for run in filter(finished, config.runs):
        rows = series(run.history, "step", "total_training_time", key)
        finite = [row for row in rows if is_finite(row[1]) and is_finite(row[2])]
        evaluations.append({step: (time, loss) for step, time, loss in finite})
    curve = []
    for step in sorted(set.intersection(*map(set, evaluations))) if evaluations else []:
        times, losses = zip(*[run[step] for run in evaluations])
        curve.append((fmean(times), fmean(losses)))
    return curve


def fastest_low_rank(configs: list[Configuration], base: Configuration) -> tuple | None:
    """(perplexity, configuration, its seconds, the baseline's): at the hardest threshold that both reach."""
    for threshold in reversed(thresholds_of(configs)):
        reached = [c for c in configs if c.low_rank and times_to_perplexity(c, threshold)]
        if reached and times_to_perplexity(base, threshold):
            fastest = min(reached, key=lambda c: (fmean(times_to_perplexity(c, threshold)), c.name))
            seconds = [fmean(times_to_perplexity(c, threshold)) for c in (fastest, base)]
            return threshold, fastest, *seconds
    return None
