"""Loss against what a run trains and stores.

Each function of `configs` alone that draws returns (file name, (figure, points), blocks below the figure), or
None if the runs have nothing to show. A point is (panel, x, y, text under the pointer).
"""

from nanochat.naming import method
from nanochat.report import plotting
from nanochat.report.configurations import Configuration, run_value
from nanochat.report.summaries import LOSS_LABELS, hover_text, layer_map, mean_over_runs, outcome, rank_words
from nanochat.units import COUNT, choose_unit, human, is_finite

BITS = [(1, "bit"), (1e3, "kbit"), (1e6, "Mbit"), (1e9, "Gbit")]


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


def short_label(config: Configuration) -> str:
    label = rank_words(config)
    if is_tied(config):
        label += f", {len(layer_map(config).split(','))} positions"
    return label


def draw_trained(configs: list[Configuration]):
    """Final loss against trained parameters and against stored bits.

    With subspaces there is a third panel: the parameters that are trained in the blocks.
    """
    with_loss = [c for c in configs if c.values("val/loss")]
    shown = [c for c in with_loss if mean_over_runs(c, trained_parameters) and mean_over_runs(c, stored_bits)]
    if len(shown) < 2 or all(mean_over_runs(c, trained_parameters) == c.mean("params/total") for c in shown):
        return None
    quantities = [(trained_parameters, "trained parameters", COUNT), (stored_bits, "stored bits", BITS)]
    if any(c.settings.get("subspace") for c in shown):
        words = "trained parameters, without embedding and head"
        quantities.insert(0, (trained_in_blocks, words, COUNT))
    kinds = sorted(dict.fromkeys(map(kind, shown)), key=lambda name: name == "full rank")
    colours = {name: plotting.BRIGHT[i % len(plotting.BRIGHT)] for i, name in enumerate(kinds)}
    colours["full rank"] = plotting.BLACK

    fig = plotting.new_figure(5.6 * len(quantities), 6)
    panels = fig.subplots(1, len(quantities), sharey=True)
    points = []
    for panel, quantity in zip(panels, quantities):
        points += draw_loss_against(panel, shown, quantity, colours)
    draw_references(panels, reference_losses(configs))
    panels[0].set_ylabel(LOSS_LABELS["loss"])
    handles = []
    for name in kinds:
        handles += panels[0].plot([], [], color=colours[name], marker="o", linestyle="none", label=name)
    plotting.legend_below(fig, handles)
    fig.draw_without_rendering()
    for panel, (quantity, _, _) in zip(panels, quantities):
        obstacles = [(x, y) for point_panel, x, y, _ in points if point_panel is panel]
        for c in shown:
            if not mean_over_runs(c, quantity):
                obstacles += plotting.points_on_level(panel, c.mean("val/loss"))
        plotting.label_points(panel, best_labels(shown, quantity), obstacles)
    return "trained.png", (fig, points), [trained_table(shown)]


def draw_loss_against(panel, configs: list[Configuration], quantity: tuple, colours: dict) -> list[tuple]:
    """A point for each configuration, on a logarithmic axis. Zero has no place there: it is a dotted line."""
    count, words, ladder = quantity
    points = []
    for c in configs:
        x = mean_over_runs(c, count)
        loss = c.mean("val/loss")
        colour = colours[kind(c)]
        if x:
            marker = "s" if c.settings.get("adapter") else "o"
            points_only = {"color": colour, "marker": marker, "linestyle": "none"}
            plotting.draw_line(panel, [(x, c.values("val/loss"))], **points_only)
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
    size, unit = choose_unit(number, ladder)
    return f"{number / size:g} {unit}".rstrip()


def best_labels(configs: list[Configuration], count) -> list[tuple]:
    """(x, loss, label). Of the points that share x and label, only the best."""
    best = {}
    for c in configs:
        x = mean_over_runs(c, count)
        key = x, short_label(c)
        if x and (key not in best or c.mean("val/loss") < best[key]):
            best[key] = c.mean("val/loss")
    return [(x, loss, label) for (x, label), loss in best.items()]


def trained_table(configs: list[Configuration]) -> tuple:
    header = ["configuration", "trained", "without embedding and head", "stored"]
    rows = []
    for c in sorted(configs, key=lambda c: (mean_over_runs(c, trained_parameters), c.mean("val/loss"))):
        trained = f"{mean_over_runs(c, trained_parameters):,.0f}"
        blocks = f"{mean_over_runs(c, trained_in_blocks):,.0f}"
        stored = human(mean_over_runs(c, stored_bits), BITS)
        rows.append([c.name, trained, blocks, stored, f"{c.mean('val/loss'):.4f}", outcome(c, "val/ppl")])
    return ("table", [*header, "validation loss", "perplexity"], rows, "numbers")


def reference_losses(configs: list[Configuration]) -> dict[str, float]:
    """{"uniform", "unigram": nats per token}, from the first run that recorded them."""
    records = [run.config.get("reference_losses") for c in configs for run in c.runs]
    losses = next(filter(None, records), {})
    return {name: loss for name, loss in losses.items() if is_finite(loss)}


def draw_references(panels, levels: dict[str, float]):
    """Dashed lines. A level far above all points would squeeze them together: it becomes words."""
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
