"""Quality by the settings that a sweep varies: depth and rank, learning rates.

Each function of (configs, measure) returns (figure, points), or None if the runs have nothing to show. A
point is (panel, x, y, text under the pointer).
"""

import math
from collections import Counter
from dataclasses import replace
from statistics import median_high

from nanochat.report import plotting
from nanochat.report.configurations import Configuration, finished, run_seed
from nanochat.report.summaries import (
    MEASURES,
    any_diverged,
    best_by_key,
    depth,
    hover_text,
    outcome,
    rank_words,
    ranks_in_order,
)
from nanochat.units import is_finite


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
    """A panel for each rate that varies alone. In it a line for each rank and depth."""
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

    Of several lines at one rank and depth, the one with the most rates; then the one with the best result.
    """
    lines = {}
    for c in configs:
        if is_finite(c.settings.get(flag)) and c.settings[flag] > 0:
            rest = tuple(sorted((key, str(setting)) for key, setting in c.settings.items() if key != flag))
            lines.setdefault(rest, []).append(c)
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
    """The line over the seeds that all its configurations finished; unchanged if there are no such seeds.

    Often one rate is tuned on one seed and then run on others. Over different seeds, the line would compare
    seeds and not rates.
    """
    common = set.intersection(*map(finished_seeds, line))
    if not common:
        return line
    return [with_seeds(c, common) for c in line]


def finished_seeds(config: Configuration) -> set[int]:
    return {run_seed(run) for run in config.runs if finished(run)}


def with_seeds(config: Configuration, seeds: set[int]) -> Configuration:
    return replace(config, runs=tuple(run for run in config.runs if run_seed(run) in seeds))
