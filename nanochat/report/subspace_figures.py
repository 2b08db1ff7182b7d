"""Loss against the dimension of a random subspace.

Each function of `configs` alone that draws returns (file name, (figure, points), blocks below the figure), or
None if the runs have nothing to show. A point is (panel, x, y, text under the pointer).
"""

from statistics import fmean

from nanochat.naming import line_name
from nanochat.report import plotting
from nanochat.report.configurations import Configuration, finished, run_seed, run_value
from nanochat.report.statistics import d90, loss_at_start
from nanochat.report.summaries import LOSS_LABELS, baseline, hover_text
from nanochat.units import is_finite

SUBSPACE_WORDS = (
    "d90: the smallest dimension whose loss closes 90% of the way from the untrained model's loss to that of "
    "all weights trained under the same seed. It is interpolated in the logarithm between the dimensions "
    "tried. ≤: the smallest one tried is already enough."
)


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
        for c in line:
            points.append((panel, c.settings["subspace_dim"], c.mean("val/loss"), hover_text(c, "loss")))
    plotting.log_axis(panel.xaxis, ticks=(1,))
    if full:
        plotting.draw_band(panel, full.values("val/loss"))
        draw_90_percent(panel, [run for line in lines.values() for c in line for run in c.runs], full)
    panel.set_xlabel("dimension of the subspace")
    panel.set_ylabel(LOSS_LABELS["loss"])
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
    """A dotted line at 90% of the way from the untrained model's loss to that of full rank."""
    starts = [start for start in map(loss_at_start, runs) if start]
    if starts:
        level = fmean(starts) - 0.9 * (fmean(starts) - full.mean("val/loss"))
        panel.axhline(level, color=plotting.GREY, linewidth=1, linestyle=":")
        plotting.write_on_level(panel, level, "90%")


def d90_rows(lines: dict[str, list[Configuration]], full: Configuration | None) -> list[list[str]]:
    """A row for each method and seed. A seed without a full-rank run has none."""
    full_losses = {}
    for run in full.runs if full else ():
        if finished(run) and run_value(run, "val/loss") is not None:
            full_losses[run_seed(run)] = run_value(run, "val/loss")
    rows = []
    for name, line in lines.items():
        runs = [(c.settings["subspace_dim"], run) for c in line for run in c.runs if finished(run)]
        runs = [(dimension, run) for dimension, run in runs if run_value(run, "val/loss") is not None]
        for seed in sorted({run_seed(run) for _, run in runs} & full_losses.keys()):
            same_seed = [(dimension, run) for dimension, run in runs if run_seed(run) == seed]
            points = [(dimension, run_value(run, "val/loss")) for dimension, run in same_seed]
            start = loss_at_start(same_seed[0][1])
            if start is not None:
                full_loss = full_losses[seed]
                losses = [start, full_loss, start - 0.9 * (start - full_loss)]
                texts = [f"{loss:.4f}" for loss in losses]
                rows.append([name, str(seed), *texts, d90_words(points, start, full_loss)])
    return rows


def d90_words(points: list[tuple[float, float]], start: float, full: float) -> str:
    """d90 in words: '631', '≤ 10', or 'not reached (…)'. points: (dimension, loss)."""
    dimension = d90(points, start, full)
    if dimension is None:
        return f"not reached (largest tried: {max(points)[0]:,.0f})"
    bound = "≤ " if dimension == min(points)[0] else ""
    return f"{bound}{dimension:,.0f}"
