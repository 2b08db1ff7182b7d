"""Quality against cost, over the configurations of a sweep.

Each function of (configs, measure) returns (figure, points), or None if the runs have nothing to show. A
point is (panel, x, y, text under the pointer).
"""

from nanochat.report import plotting
from nanochat.report.configurations import Configuration, finished, run_seed, run_value
from nanochat.report.summaries import (
    COSTS,
    LOSS_LABELS,
    MEASURES,
    baseline,
    best_by_key,
    frontier,
    hover_text,
    memory_key,
    run_points,
    same_machine,
)
from nanochat.units import COUNT, choose_unit


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
        size, unit = choose_unit(max((c.mean(x_key) for c in shown), default=0), ladder)
        panel.set_xlabel(plotting.with_unit(words, unit))
        plotting.tidy(panel)
        plotting.draw_band(panel, base.values(y_key) if base else [])
        depends_on_machine = x_key in (memory, "total_training_time")
        if not shown:
            plotting.write_in_middle(panel, "not recorded")
        elif depends_on_machine and not same_machine(configs):
            plotting.write_in_middle(panel, f"different machines:\n{words} is not comparable")
        else:
            seeds = {c.name: plotting.scaled(run_points(c, x_key, y_key), size) for c in shown}
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
        labelled = list(means)
        if len(means) > plotting.LABELLED:
            labelled = list(dict.fromkeys([*front, *([base.name] if base else [])]))
        plotting.label_points(panel, [(*means[name], texts[name]) for name in labelled], covered)
    return fig, points


def obstacles(panel, seeds: dict[str, list], base: Configuration | None, y_key: str) -> list[tuple]:
    """Points that labels should not cover: the baseline's line, and the means and error bars of `seeds`."""
    covered = plotting.points_on_level(panel, base.mean(y_key)) if base else []
    for points in seeds.values():
        covered += plotting.points_on_error_bars(points)
    return covered


def draw_loss_parameters(configs: list[Configuration], measure: str):
    """Loss against parameters: each configuration's mean with its label, and its seeds.

    Of many configurations, only the best of each size is labelled.
    """
    y_key = "val/loss" if measure == "loss" else "val/bpb"
    shown = [c for c in configs if run_points(c, "params/total", y_key)]
    if len({c.mean("params/total") for c in shown}) < 2:
        return None
    styles = plotting.configuration_styles(shown)
    base = baseline(shown, y_key)
    size, unit = choose_unit(max(c.mean("params/total") for c in shown), COUNT)
    fig = plotting.new_figure(9.5, 6.4)
    panel = fig.subplots()
    points = []
    seeds = {}
    means = {}
    for c in shown:
        seeds[c.name] = plotting.scaled(run_points(c, "params/total", y_key), size)
        means[c.name] = plotting.draw_point(panel, seeds[c.name], styles[c.name], opacity=0.55)
        if len(seeds[c.name]) > 1:
            points += [(panel, x, y, text) for x, y, text in seed_texts(c, y_key, LOSS_LABELS[measure], size)]
        points.append((panel, *means[c.name], hover_text(c, measure)))
    plotting.draw_band(panel, base.values(y_key) if base else [])
    panel.set_xlabel(plotting.with_unit("parameters", unit))
    panel.set_ylabel(LOSS_LABELS[measure])
    plotting.tidy(panel)
    plotting.log_if_wide(panel.xaxis, [x for x, _ in means.values()])
    panel.margins(x=0.14)
    levels = [base.mean(y_key)] if base else []
    plotting.limit_height(panel, [c.values(y_key) for c in shown], levels)
    handles = plotting.rank_handles(panel, shown, styles)
    plotting.legend_below(fig, handles + ([plotting.baseline_handle()] if base else []))

    labelled = shown
    if len(shown) > plotting.LABELLED:
        labelled = list(best_by_key(shown, lambda c: c.mean("params/total"), y_key).values())
    fig.draw_without_rendering()
    texts = plotting.short_labels(shown)
    covered = obstacles(panel, seeds, base, y_key) + [point for c in shown for point in seeds[c.name]]
    plotting.label_points(panel, [(*means[c.name], texts[c.name]) for c in labelled], covered)
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
