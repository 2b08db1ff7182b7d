"""The figures of a sweep, configurations in, PNG bytes and hover texts out."""

from nanochat.report import plotting
from nanochat.report.configurations import Configuration, finished
from nanochat.report.cost_figures import draw_frontier, draw_loss_parameters
from nanochat.report.run_figures import draw_memory, draw_parameters
from nanochat.report.setting_figures import draw_depth_rank, draw_learning_rates
from nanochat.report.summaries import MEASURES, error_bar_caption, representatives
from nanochat.report.time_figures import draw_loss_time, draw_thresholds

BARS = 24  # shapes that bars are drawn for
SWEEP_CAPTIONS = {
    "frontier.png": "Final quality against cost: down and to the left is better. A large point is the mean "
    "of a configuration over its seeds; a faint one is a seed. The grey line is the Pareto frontier of the "
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
    """{file name: (PNG bytes, [(x, y, text)])}: the figures for which the finished runs have enough settings.

    x, y: place of a point, as fractions of the picture's width and height from the top left. measure: "loss"
    if perplexities may be compared, else "bpb".
    """
    with_finished = [c for c in configs if any(map(finished, c.runs))]
    configs = [c for c in with_finished if c.values(MEASURES[measure][0])]
    results = {}
    if len(configs) > 1:
        results = {
            "frontier.png": draw_frontier(configs, measure),
            "loss_parameters.png": draw_loss_parameters(configs, measure),
            "depth_rank.png": draw_depth_rank(configs, measure),
            "learning_rate.png": draw_learning_rates(with_finished, measure),
            "threshold_rank.png": draw_thresholds(configs, measure),
            "loss_time.png": draw_loss_time(configs, measure),
        }
    figures = {name: plotting.png_with_hotspots(*result) for name, result in results.items() if result}
    shapes = representatives(configs)
    if 1 < len(shapes) <= BARS:
        figures["parameters.png"] = plotting.png(draw_parameters(shapes)), []
        figures["memory.png"] = plotting.png(draw_memory(shapes)), []
    return figures


def figure_caption(name: str, configs: list[Configuration]) -> str:
    """What a figure shows, and what its error bars mean."""
    caption = SWEEP_CAPTIONS[name]
    has_error_bars = name not in ("loss_time.png", "parameters.png", "memory.png")
    return f"{caption} {error_bar_caption(configs)}" if has_error_bars else caption
