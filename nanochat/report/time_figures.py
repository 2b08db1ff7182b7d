"""Training time over the configurations of a sweep: time to a perplexity, and loss against time.

Each function of (configs, measure) returns (figure, points), or None if the runs have nothing to show. A
point is (panel, x, y, text under the pointer).
"""

import math
import re
from statistics import fmean

from nanochat.history import series
from nanochat.report import plotting
from nanochat.report.configurations import Configuration, finished, rank_name, run_seed
from nanochat.report.run_figures import loss_limits
from nanochat.report.summaries import (
    LOSS_LABELS,
    MEASURES,
    baseline,
    best_by_key,
    depth,
    factored_groups,
    frontier,
    mean_rank,
    rank_words,
    same_machine,
    times_to_perplexity,
)
from nanochat.units import TIME, choose_unit, human, is_finite, three_digits

COLOURED_CURVES = 6  # the others are faint


# ---- time to a perplexity ----------------------------------------------------------------------------------


def draw_thresholds(configs: list[Configuration], measure: str):
    """A panel for each of the hardest three thresholds: time to it against rank.

    A line for each depth and combination of factored matrices; full rank is dashed. Left out: models with
    several ranks, or with an activation between the factors. None if too few configurations can be compared.
    """
    y_key = MEASURES[measure][0]
    configs = [c for c in configs if has_one_rank(c)]
    shapes = best_by_key(configs, lambda c: (factored_groups(c), depth(c), rank_words(c)), y_key)
    low = [c for c in shapes.values() if c.low_rank]
    full = {depth(c): c for c in shapes.values() if c.full_rank}
    thresholds = [p for p in reached_thresholds(configs) if is_compared(p, list(shapes.values()))][-3:]
    too_few = not thresholds or len({mean_rank(c) for c in low}) < 2
    if measure != "loss" or too_few or not same_machine(configs):
        return None
    lines = {}
    for c in sorted(low, key=lambda c: (factored_groups(c), depth(c), mean_rank(c))):
        lines.setdefault((factored_groups(c), depth(c)), []).append(c)
    low_depths = {depth(c) for c in low}
    references = {layers: config for layers, config in full.items() if layers in low_depths}
    times = [times_to_perplexity(c, threshold) for c in shapes.values() for threshold in thresholds]
    size, unit = choose_unit(max(map(fmean, filter(None, times))), TIME)

    fig = plotting.new_figure(max(6, 4 * len(thresholds)), 4.7)
    panels = fig.subplots(1, len(thresholds), squeeze=False)[0]
    ranks = [distinct_ranks(c) for c in low]
    has_one_number = all(len(distinct) == 1 and is_finite(*distinct) for distinct in ranks)
    points = []
    for panel, threshold in zip(panels, thresholds):
        points += draw_times_to(panel, threshold, lines, references, size)
        panel.set_title(f"to perplexity {threshold:g}", fontsize=10.5)
        panel.set_xlabel("rank" if has_one_number else "mean rank of the factored layers")
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
    """Whether its factors are linear, and no single matrix has a rank of its own."""
    return not config.settings.get("matrix_ranks") and config.settings.get("factor_act", "none") == "none"


def is_compared(threshold: float, configs: list[Configuration]) -> bool:
    """Whether two configurations reached the perplexity on every seed, one of them of low rank."""
    reached = [c for c in configs if times_to_perplexity(c, threshold)]
    return len(reached) > 1 and any(c.low_rank for c in reached)


def draw_times_to(panel, threshold: float, lines: dict, references: dict, size: float) -> list[tuple]:
    """Time to one perplexity: the lines, and full rank at each depth. Returns the points."""
    colours = {}  # of the full-rank lines: each has the colour of the first line of its depth
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


def reached_thresholds(configs: list[Configuration]) -> list[float]:
    """Perplexities that some run reached, easiest first."""
    keys = {key for c in configs for run in c.runs for key in run.summary}
    matches = [re.fullmatch(r"time_to_ppl/([\d.]+)/seconds", key) for key in keys]
    return sorted((float(match[1]) for match in matches if match), reverse=True)


def distinct_ranks(config: Configuration) -> set:
    """The ranks of attention and MLP, if factored: numbers, or text for a rank that varies over depth."""
    return {config.settings.get(key) for key in ("attn_rank", "mlp_rank")} - {0, None}


def line_label(line: tuple, lines: list[tuple]) -> str:
    """What distinguishes a line (factored matrices, layers) from the other lines."""
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
    size, unit = choose_unit(longest, TIME)
    curves = {c.name: plotting.scaled(curves[c.name], size) for c in configs}
    labels = {c.name: c.name.replace(rank_name(c.settings), rank_words(c)) for c in configs}

    fig = plotting.new_figure(9, 5.6)
    panel = fig.subplots()
    faint = [c for c in configs if c not in coloured]
    for c in faint:
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
    if faint:
        handles += panel.plot([], [], color=plotting.PALE_GREY, linewidth=0.7, label=f"{len(faint)} others")
    panel.set_xlabel(plotting.with_unit("training time", unit))
    panel.set_ylabel(LOSS_LABELS[measure])
    plotting.tidy(panel)
    plotting.legend_below(fig, handles, handlelength=3.2)
    return fig, points


def quality_words(loss: float, measure: str) -> str:
    return f"perplexity {math.exp(loss):.2f}" if measure == "loss" else f"{loss:.4f} bits per byte"


def draw_speedup(panel, speedup: tuple, label: str, size: float):
    """An arrow from the baseline's time to that of the fastest low-rank configuration, with words.

    speedup: see fastest_low_rank.
    """
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
    """(perplexity, configuration, its seconds, baseline's seconds) at the hardest threshold of both."""
    for threshold in reversed(reached_thresholds(configs)):
        reached = [c for c in configs if c.low_rank and times_to_perplexity(c, threshold)]
        if reached and times_to_perplexity(base, threshold):
            fastest = min(reached, key=lambda c: (fmean(times_to_perplexity(c, threshold)), c.name))
            seconds = [fmean(times_to_perplexity(c, threshold)) for c in (fastest, base)]
            return threshold, fastest, *seconds
    return None
