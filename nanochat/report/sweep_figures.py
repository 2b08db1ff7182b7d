"""The pictures of a study, runs over several axes and seeds: configurations in, PNG bytes and hover texts out."""

import math
import re
from dataclasses import replace
from statistics import fmean

from nanochat.history import series
from nanochat.report.configurations import Configuration, finished, rank_name, run_seed, run_value
from nanochat.report.plotting import (
    BLACK,
    COLOURS,
    FEW,
    GREY,
    LINES,
    MARKERS,
    across,
    cut_above,
    draw_band,
    draw_line,
    draw_point,
    draw_stairs,
    fences,
    finish,
    key_below,
    label_points,
    legend_below,
    log_axis,
    log_if_wide,
    looks,
    mark_at_top,
    new_figure,
    plain,
    png,
    say_empty,
    short_labels,
    tidy,
)
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
CURVES = 6  # loss curves in colour; the others are faint
CAPTIONS = {
    "frontier.png": "Where each configuration ends against what it costs: down and to the left is better. A point is a configuration's mean over "
    "its seeds, the faint ones are the seeds. The grey line is the Pareto frontier of the means: no configuration below it costs "
    "as little. The band is the full-rank baseline and its spread over seeds, or of several full-rank configurations the best. "
    "“Rank 64” means both attention and MLP.",
    "loss_parameters.png": "Evaluation loss against parameters: a point a configuration, its seeds as a cluster. The band is the full-rank "
    "baseline and its spread over seeds.",
    "depth_rank.png": "Depth × rank; darker is better. Of several configurations in one cell the one that ended best is shown, which flatters "
    "cells where more were tried.",
    "learning_rate.png": "Learning rates: a line a rank and depth. The ring marks the best rate tried, a × at the top a rate at which a run "
    "diverged. Along a line nothing else varies, not the seeds either where its rates have some in common; of several lines at one "
    "rank and depth the one with most rates is shown.",
    "threshold_rank.png": "Training time to a perplexity, interpolated between the evaluations around it. Dashed: full rank at the same depth, with "
    "its spread. A × at the top: not every seed got there. Of several configurations at one rank the one that ended "
    "best is shown.",
    "loss_time.png": "Validation loss against training time, means over seeds: in colour the baseline and the frontier of loss against "
    "time. The reading compares the baseline with the fastest of all low-rank configurations, chosen after the fact.",
    "parameters.png": "Parameters by group.",
    "memory.png": "Memory by part, of one run of each shape. The diamond is the measured peak: on CUDA what torch allocated; on CPU the whole "
    "process, Python and libraries included.",
}


def study_figures(configs: list[Configuration], measure: str) -> dict:
    """{file name: (PNG bytes, [(x, y, text)])}: the figures that the axes call for, of the finished runs.

    x, y: where a point lies, as fractions of the picture's width and height from the top left. measure: "loss" where perplexity may be
    compared, else "bpb".
    """
    done = [c for c in configs if any(map(finished, c.runs))]
    configs = [c for c in done if c.values(MEASURES[measure][0])]  # of the others all seeds diverged
    drawn = {}
    if len(configs) > 1:
        drawn = {
            "frontier.png": draw_frontier(configs, measure),
            "loss_parameters.png": draw_clusters(configs, measure),
            "depth_rank.png": draw_depth_rank(configs, measure),
            "learning_rate.png": draw_learning_rates(done, measure),
            "threshold_rank.png": draw_thresholds(configs, measure),
            "loss_time.png": draw_loss_time(configs, measure),
        }
    found = {name: finish(*figure) for name, figure in drawn.items() if figure}
    shapes = representatives(configs)
    if 1 < len(shapes) <= BARS:
        found |= {
            "parameters.png": (png(draw_parameters(shapes)), []),
            "memory.png": (png(draw_memory(shapes)), []),
        }
    return found


def caption(name: str, configs: list[Configuration]) -> str:
    """What a figure shows, and what its error bars are."""
    return CAPTIONS[name] + (
        "" if name in ("loss_time.png", "parameters.png", "memory.png") else " " + error_bar_caption(configs)
    )


# ---- quality against cost -------------------------------------------------------------------------------------------


def draw_frontier(configs: list[Configuration], measure: str):
    """Four panels, one a cost: points with error bars, the Pareto frontier of the means, the baseline's band."""
    y_key, y_words = MEASURES[measure]
    style = looks(configs)
    names = short_labels(configs)
    base = baseline(configs, y_key)
    memory = memory_key(configs)
    fig = new_figure(11.5, 9)
    spots = []
    labels = []
    panels = fig.subplots(2, 2, sharey=True)
    costs = [
        cost
        for cost in COSTS
        if cost[0] in ("params/total", memory, "total_training_time", "total_training_flops")
    ]
    for panel, (x_key, words, ladder) in zip(panels.flat, costs):
        shown = [c for c in configs if run_points(c, x_key, y_key)]
        size, unit = unit_of(max((c.mean(x_key) for c in shown), default=0), ladder)
        panel.set_xlabel(f"{words} ({unit})" if unit else words)
        tidy(panel)
        draw_band(panel, base.values(y_key) if base else [])
        if not shown or not same_machine(configs) and x_key in (memory, "total_training_time"):
            say_empty(panel, f"different machines:\n{words} is not comparable" if shown else "not recorded")
            continue
        points = {c.name: draw_point(panel, c, x_key, y_key, size, style[c.name]) for c in shown}
        spots += [(panel, *points[c.name], hover_text(c, measure)) for c in shown]
        log_if_wide(panel.xaxis, [x for x, _ in points.values()])
        panel.margins(x=0.1)
        front = [c.name for c in frontier(shown, x_key, y_key)]
        stairs = draw_stairs(panel, [points[name] for name in front]) if front else []
        chosen = (
            points
            if len(shown) <= FEW
            else [*front, *([base.name] if base and base.name not in front else [])]
        )
        bars = [dot for c in shown for dot in fences(c, x_key, y_key, size)]
        obstacles = [*points.values(), *stairs, *bars, *across(panel, base and base.mean(y_key))]
        labels.append((panel, [(*points[name], names[name]) for name in chosen], obstacles))
    cut_above(panels[0, 0], [c.values(y_key) for c in configs], [base.mean(y_key)] if base else [])
    for panel in panels[:, 0]:
        panel.set_ylabel(y_words)
    line = fig.axes[0].plot([], [], color=GREY, linewidth=1.3, label="Pareto frontier")
    legend_below(fig, configs, style, base, line)
    fig.draw_without_rendering()
    for panel, points, obstacles in labels:
        label_points(fig, panel, points, obstacles)
    return fig, spots


def draw_clusters(configs: list[Configuration], measure: str):
    """Loss against parameters: every configuration's name beside its mean, and its seeds. Of many, the best of each size is named."""
    y_key, y_words = ("val/loss", "validation loss (nats/token)") if measure == "loss" else MEASURES[measure]
    shown = [c for c in configs if run_points(c, "params/total", y_key)]
    if len({c.mean("params/total") for c in shown}) < 2:
        return None
    style = looks(shown)
    names = short_labels(shown)
    base = baseline(shown, y_key)
    fig = new_figure(9.5, 6.4)
    spots = []
    obstacles = []
    panel = fig.subplots()
    size, unit = unit_of(max(c.mean("params/total") for c in shown), COUNT)
    points = {
        c.name: draw_point(panel, c, "params/total", y_key, size, style[c.name], opacity=0.55) for c in shown
    }
    for c in shown:
        seeds = [
            (run, run_value(run, "params/total") / size, run_value(run, y_key))
            for run in c.runs
            if finished(run) and run_value(run, y_key) is not None
        ]
        obstacles += [(x, y) for _, x, y in seeds] + fences(c, "params/total", y_key, size)
        if len(seeds) > 1:
            spots += [
                (panel, x, y, f"{run.name}\n{c.name}, seed {run_seed(run)}\n{y_words} {y:.4f}")
                for run, x, y in seeds
            ]
        spots.append((panel, *points[c.name], hover_text(c, measure)))
    draw_band(panel, base.values(y_key) if base else [])
    panel.set_xlabel(f"parameters ({unit})" if unit else "parameters")
    panel.set_ylabel(y_words)
    tidy(panel)
    log_if_wide(panel.xaxis, [x for x, _ in points.values()])
    panel.margins(x=0.14)
    cut_above(panel, [c.values(y_key) for c in shown], [base.mean(y_key)] if base else [])
    legend_below(fig, shown, style, base)
    named = (
        shown if len(shown) <= FEW else best_by_key(shown, lambda c: c.mean("params/total"), y_key).values()
    )
    fig.draw_without_rendering()
    obstacles += [*points.values(), *across(panel, base and base.mean(y_key))]
    label_points(fig, panel, [(*points[c.name], names[c.name]) for c in named], obstacles)
    return fig, spots


# ---- one axis at a time ---------------------------------------------------------------------------------------------


def draw_depth_rank(configs: list[Configuration], measure: str):
    """Rows: depth, columns: rank; the mean and its spread in each cell."""
    y_key, y_words = MEASURES[measure]
    configs = [c for c in configs if not c.method]
    cells = best_by_key(configs, lambda c: (depth(c), rank_words(c)), y_key)
    rows = sorted({layers for layers, _ in cells})
    columns = ranks_in_order(configs)
    if sum(sum(layers == row for layers, _ in cells) > 1 for row in rows) < 2:
        return None  # not a grid: at most one depth at which the rank varies
    fig = new_figure(2.6 + 1.15 * len(columns), 1.9 + 0.62 * len(rows))
    spots = []
    panel = fig.subplots()
    grid = [
        [cells[row, column].mean(y_key) if (row, column) in cells else math.nan for column in columns]
        for row in rows
    ]
    means = sorted(c.mean(y_key) for c in cells.values())
    top = min(means[-1], means[0] + 3 * (means[len(means) // 2] - means[0])) if len(means) > 2 else means[-1]
    image = panel.imshow(
        grid, cmap="cividis", vmin=means[0], vmax=max(top, means[0] * 1.0001), aspect="auto", origin="lower"
    )
    for (row, column), c in cells.items():
        x = columns.index(column)
        y = rows.index(row)
        shade = image.norm(c.mean(y_key))
        panel.text(
            x,
            y,
            outcome(c, y_key).replace(" ± ", "\n± ").replace(" to ", "\nto ")
            + (" †" if any_diverged(c, y_key) else ""),
            ha="center",
            va="center",
            fontsize=8.5,
            color="white" if shade < 0.55 else "black",
        )
        spots.append((panel, x, y, hover_text(c, measure)))
    panel.set_xticks(
        range(len(columns)), [plain(column.removeprefix("rank ")).replace(", ", "\n") for column in columns]
    )
    panel.set_yticks(range(len(rows)), rows)
    panel.set_xlabel(
        "rank"
        + (
            " († a seed diverged and is left out)"
            if any(any_diverged(c, y_key) for c in cells.values())
            else ""
        )
    )
    panel.set_ylabel("layers")
    panel.spines[:].set_visible(False)
    fig.colorbar(image, ax=panel, label=y_words, extend="max" if means[-1] > top else "neither")
    return fig, spots


def draw_learning_rates(configs: list[Configuration], measure: str):
    """A panel for each rate that varies while all else stays; a line for each rank and depth: of several the one with most rates."""
    y_key, y_words = MEASURES[measure]
    flags = sorted({key for c in configs for key in c.settings if key.endswith("_lr")})
    scans = {flag: lines for flag in flags if (lines := rate_lines(configs, flag, y_key))}
    if not scans:
        return None
    style = looks(configs)
    depths = sorted({depth(c) for c in configs})
    spots = []
    fig = new_figure(min(12, 3 + 4.5 * len(scans)), 4.9)
    panels = fig.subplots(1, len(scans), sharey=True, squeeze=False)[0]
    for panel, (flag, lines) in zip(panels, scans.items()):
        for line in lines:
            look = {**style[line[0].name], "linestyle": LINES[depths.index(depth(line[0])) % len(LINES)]}
            draw_line(panel, [(c.settings[flag], c.values(y_key)) for c in line if c.values(y_key)], **look)
            mark_at_top(panel, [c.settings[flag] for c in line if any_diverged(c, y_key)], look["color"])
            if best := min(
                (c for c in line if not any_diverged(c, y_key)), key=lambda c: c.mean(y_key), default=None
            ):
                panel.plot(
                    best.settings[flag],
                    best.mean(y_key),
                    marker="o",
                    markersize=13,
                    markerfacecolor="none",
                    color=look["color"],
                    zorder=4,
                )
            spots += [
                (panel, c.settings[flag], c.mean(y_key), hover_text(c, measure))
                for c in line
                if c.values(y_key)
            ]
        log_axis(panel.xaxis)
        rates = sorted({c.settings[flag] for line in lines for c in line})
        if len(rates) <= 8:
            panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
            panel.set_xticks([], minor=True)
        panel.set_xlabel(f"--{flag.replace('_', '-')}")
        tidy(panel)
    shown = [c for lines in scans.values() for line in lines for c in line]
    cut_above(panels[0], [c.values(y_key) for c in shown if c.values(y_key)])
    panels[0].set_ylabel(y_words)
    legend_below(fig, shown, style)
    return fig, spots


def rate_lines(configs: list[Configuration], flag: str, y_key: str) -> list[list[Configuration]]:
    """Configurations that differ in this rate alone, by rate: for each rank and depth the line of most rates, then the one with the best."""
    lines = {}
    for c in configs:
        if is_finite(c.settings.get(flag)) and c.settings[flag] > 0:
            rest = tuple(sorted((k, str(v)) for k, v in c.settings.items() if k != flag))
            lines.setdefault(rest, []).append(c)
    chosen = {}
    for line in lines.values():
        of = rank_words(line[0]), depth(line[0])
        worth = len(line), -min((c.mean(y_key) for c in line if c.values(y_key)), default=math.inf)
        if len(line) > 1 and worth[1] > -math.inf and (of not in chosen or worth > chosen[of][0]):
            chosen[of] = worth, sorted(line, key=lambda c: c.settings[flag])
    return [over_common_seeds(line) for _, line in chosen.values()]


def over_common_seeds(line: list[Configuration]) -> list[Configuration]:
    """The same over the seeds that all of them finished, if there are any: where a rate tuned on one seed is run on others, rates would else compare seeds."""
    common = set.intersection(*({run_seed(run) for run in c.runs if finished(run)} for c in line))
    return (
        [replace(c, runs=tuple(run for run in c.runs if run_seed(run) in common)) for c in line]
        if common
        else line
    )


def draw_thresholds(configs: list[Configuration], measure: str):
    """A panel a threshold (the hardest three): time to it against rank, a line for each depth and what is factored, full rank dashed.

    Without models in which matrices have ranks of their own, which have no one rank, or an activation between the factors.
    """
    configs = [
        c
        for c in configs
        if not c.settings.get("matrix_ranks") and c.settings.get("factor_act", "none") == "none"
    ]
    chosen = list(
        best_by_key(
            configs, lambda c: (factored_groups(c), depth(c), rank_words(c)), MEASURES[measure][0]
        ).values()
    )
    low = [c for c in chosen if c.low_rank]
    full = {depth(c): c for c in chosen if c.full_rank}
    asked = [
        p
        for p in thresholds_of(chosen)
        if sum(bool(times_to_perplexity(c, p)) for c in chosen) > 1
        and any(times_to_perplexity(c, p) for c in low)
    ][-3:]
    if measure != "loss" or not asked or len({mean_rank(c) for c in low}) < 2 or not same_machine(configs):
        return None
    series = {}
    for c in sorted(low, key=lambda c: (factored_groups(c), depth(c), mean_rank(c))):
        series.setdefault((factored_groups(c), depth(c)), []).append(c)
    references = [layers for layers in full if layers in {depth(c) for c in low}]
    size, unit = unit_of(
        max(fmean(times_to_perplexity(c, p)) for c in chosen for p in asked if times_to_perplexity(c, p)),
        TIME,
    )
    fig = new_figure(max(6, 4 * len(asked)), 4.7)
    spots = []
    panels = fig.subplots(1, len(asked), squeeze=False)[0]
    for panel, p in zip(panels, asked):
        colours = {}  # of each depth: that of its first line
        for i, ((parts, layers), line) in enumerate(series.items()):
            color = COLOURS[i % len(COLOURS)]
            colours.setdefault(layers, color if len(references) > 1 else BLACK)
            reached = [c for c in line if times_to_perplexity(c, p)]
            draw_line(
                panel,
                [(mean_rank(c), [t / size for t in times_to_perplexity(c, p)]) for c in reached],
                color=color,
                marker=MARKERS[i % len(MARKERS)],
            )
            mark_at_top(panel, [mean_rank(c) for c in line if c not in reached], color)
            spots += [
                (panel, mean_rank(c), fmean(times_to_perplexity(c, p)) / size, describe_time(c, p))
                for c in reached
            ]
        for layers in references:
            draw_band(panel, [t / size for t in times_to_perplexity(full[layers], p)], colours[layers])
        panel.set_title(f"to perplexity {p:g}", fontsize=10.5)
        one_rank = all(len(ranks := ranks_of(c)) == 1 and is_finite(*ranks) for c in low)
        panel.set_xlabel("rank" if one_rank else "mean rank of the factored layers")
        panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
        tidy(panel)
    panels[0].set_ylabel(f"training time ({unit})")
    handles = [
        panels[0].plot(
            [],
            [],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            label=series_name(*of, series),
        )[0]
        for i, of in enumerate(series)
    ]
    if references:
        handles += panels[0].plot(
            [], [], color=GREY, linestyle="--", linewidth=1, label="full rank, same depth"
        )
    key_below(fig, handles)
    return fig, spots


def describe_time(config: Configuration, threshold: float) -> str:
    times = times_to_perplexity(config, threshold)
    lines = [
        f"seed {run_seed(run)}: {human(t, TIME)}" for run, t in zip(filter(finished, config.runs), times)
    ]
    return "\n".join([config.name, f"perplexity {threshold:g} after {human(fmean(times), TIME)}", *lines])


def thresholds_of(configs: list[Configuration]) -> list[float]:
    """Perplexities that some run reached, easiest first."""
    found = {
        match[1]
        for c in configs
        for run in c.runs
        for key in run.summary
        if (match := re.fullmatch(r"time_to_ppl/([\d.]+)/seconds", key))
    }
    return sorted(map(float, found), reverse=True)


def ranks_of(config: Configuration) -> set:
    """What the factored ones of attention and MLP have: a number, or words where it varies over depth."""
    return {config.settings.get(key) for key in ("attn_rank", "mlp_rank")} - {0, None}


def series_name(parts: tuple, layers: int, series: dict) -> str:
    """What tells this line from the others."""
    words = " and ".join(word for word, is_low in zip(("attention", "MLP", "head"), parts) if is_low)
    words = words if len({p for p, _ in series}) > 1 else "low rank"
    return words + (f", {layers} layers" if len({d for _, d in series}) > 1 else "")


# ---- loss against time ----------------------------------------------------------------------------------------------


def draw_loss_time(configs: list[Configuration], measure: str):
    """Curves of the baseline and the frontier of time, the others faint; how much sooner the fastest low-rank one reaches a perplexity."""
    y_key = MEASURES[measure][0]
    base = baseline(configs, MEASURES[measure][0])
    key = "val/" + measure
    curves = {c.name: points for c in configs if len(points := mean_curve(c, key)) > 1}
    configs = [c for c in configs if c.name in curves]
    if len(configs) < 2 or not same_machine(configs):
        return None
    base = base if base and base.name in curves else None
    reading = sooner(configs, base) if base and measure == "loss" else None
    wanted = [
        base,
        reading and reading[1],
        *reversed(frontier(configs, "total_training_time", y_key)),
        *configs[:CURVES],
    ]
    chosen = list({c.name: c for c in wanted if c}.values())[:CURVES]
    size, unit = unit_of(max(curves[c.name][-1][0] for c in chosen), TIME)
    fig = new_figure(9, 5.6)
    spots = []
    handles = []
    names = {c.name: c.name.replace(rank_name(c.settings), rank_words(c)) for c in configs}
    panel = fig.subplots()
    for c in configs:
        if c.name not in [other.name for other in chosen]:
            panel.plot(
                [t / size for t, _ in curves[c.name]],
                [loss for _, loss in curves[c.name]],
                color="#bbbbbb",
                linewidth=0.7,
                zorder=1,
            )
    for i, c in enumerate(chosen):
        times = [t / size for t, _ in curves[c.name]]
        losses = [loss for _, loss in curves[c.name]]
        handles += panel.plot(
            times,
            losses,
            color=BLACK if c is base else COLOURS[i % (len(COLOURS) - 1)],
            linestyle=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4.5,
            linewidth=1.6,
            label=plain(names[c.name], 60) + (" (baseline)" if c is base else ""),
        )
        for t, loss in zip(times, losses):
            reached = f"perplexity {math.exp(loss):.2f}" if measure == "loss" else f"{loss:.4f} bits per byte"
            spots.append((panel, t, loss, f"{c.name}\nafter {human(t * size, TIME)}: {reached}"))
    if limits := loss_limits([run for c in chosen for run in c.runs if finished(run)], [key]):
        low, high = limits
        panel.set_ylim(low, max(high, math.log(reading[0]) + 0.1 * (high - low)) if reading else high)
    panel.set_xlim(0, 1.02 * max(curves[c.name][-1][0] for c in chosen) / size)
    if reading:
        p, fastest, ours, theirs = reading
        level = math.log(p)
        ratio = theirs / ours
        panel.axhline(level, color=GREY, linewidth=0.9, linestyle=":", zorder=1)
        panel.annotate(
            "",
            (ours / size, level),
            (theirs / size, level),
            arrowprops={"arrowstyle": "->", "color": BLACK, "linewidth": 1.4},
        )
        words = f"{three_digits(ratio)}× sooner" if ratio >= 1 else f"{three_digits(1 / ratio)}× later"
        panel.annotate(
            f"{plain(names[fastest.name], 60)}\nreaches perplexity {p:g}\n{words} than the baseline",
            (1, level),
            (-4, 8),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=9.5,
            ha="right",
            va="bottom",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )
    if len(configs) > len(chosen):
        handles += panel.plot(
            [], [], color="#bbbbbb", linewidth=0.7, label=f"{len(configs) - len(chosen)} others"
        )
    panel.set_xlabel(f"training time ({unit})")
    panel.set_ylabel("validation loss (nats/token)" if measure == "loss" else "validation bits per byte")
    tidy(panel)
    key_below(fig, handles, handlelength=3.2)
    return fig, spots


def mean_curve(config: Configuration, key: str) -> list[tuple[float, float]]:
    """[(seconds, loss)]: means over the finished runs, of the evaluations that all of them have."""
    runs = []
    for run in filter(finished, config.runs):
        evaluations = series(run.history, "step", "total_training_time", key)
        finite = [row for row in evaluations if is_finite(row[1]) and is_finite(row[2])]
        runs.append({step: (time, loss) for step, time, loss in finite})
    common = sorted(set.intersection(*map(set, runs))) if runs else []
    return [(fmean(run[step][0] for run in runs), fmean(run[step][1] for run in runs)) for step in common]


def sooner(configs: list[Configuration], base: Configuration) -> tuple | None:
    """(perplexity, configuration, its seconds, the baseline's): the fastest low-rank one to the hardest threshold that both reach."""
    for p in reversed(thresholds_of(configs)):
        reached = [
            (fmean(times), c.name, c) for c in configs if c.low_rank and (times := times_to_perplexity(c, p))
        ]
        if reached and times_to_perplexity(base, p):
            ours, _, fastest = min(reached)
            return p, fastest, ours, fmean(times_to_perplexity(base, p))
    return None
