"""The loss of each model at the tokens, FLOPs or training time of the largest full-rank model."""

import math
from statistics import fmean

from nanochat.report.comparisons import common_name
from nanochat.report.configurations import Configuration
from nanochat.report.pairing import (
    CONTEXT,
    FAMILY,
    RANK_SETTINGS,
    SHAPE,
    best_settings,
    group_by,
    interval,
    mean_logs,
    seed_differences,
    trained_in_full,
    tuned_settings,
    values_of,
)

BUDGETS = [
    ("total_tokens", "tokens"),
    ("total_training_flops", "FLOPs"),
    ("total_training_time", "training time"),
]
SAME_TRAINING = tuple(name for name in (*CONTEXT, *FAMILY) if name != "num_iterations")
ARCHITECTURE = (*SHAPE, *RANK_SETTINGS)
EQUAL_COST = math.log(1.02)  # costs within 2 % of each other are equal

# The configurations of one architecture: one or more for each number of training steps.
Model = list[Configuration]


def equal_cost_table(configs: list[Configuration]) -> list[tuple]:
    """Differences of loss to the control, in nats, with 95 % intervals over seeds.

    Returns blocks of nanochat/report/page.py; none if there is no control or nothing to compare with it.
    """
    usable = [config for config in configs if not config.method and config.values("val/ppl")]
    models = group_by(usable, lambda config: values_of(config, (*SAME_TRAINING, *ARCHITECTURE)))
    control = choose_control(models)
    if not control:
        return []
    rows = []
    for model in sorted(models, key=lambda model: -share(model, control, block_parameters)):
        same_training = values_of(model[0], SAME_TRAINING) == values_of(control[0], SAME_TRAINING)
        if model[0] is control[0] or not same_training:
            continue
        differences = [loss_differences(model, control, cost) for cost, _ in BUDGETS]
        if any(differences):
            parameters = f"× {share(model, control, block_parameters):.3f}"
            flops = f"× {share(model, control, 'flops/per_token'):.3f}"
            rows.append([model_name(model), parameters, flops, *map(difference_text, differences)])
    if not rows:
        return []
    explanation = (
        f"Loss minus that of {model_name(control)}, in nats (1 nat is a factor of {math.e:.3f} in "
        "perplexity): the mean over the seeds that both have, with its 95 % interval, which is not "
        "corrected for the number of rows. Each seed is taken at the settings that are best on the other "
        "seeds. If a model was trained for several lengths, its loss at the control's cost is interpolated "
        "between them, linearly in the logarithm of the cost; each length has its own learning rate "
        "schedule. “–”: the model was not trained for so much, or for so little."
    )
    budgets = [f"at equal {words}" for _, words in BUDGETS]
    header = ["model", "block parameters", "FLOPs a token", *budgets]
    return [
        ("subheading", "At equal cost"),
        ("paragraph", explanation),
        ("table", header, rows, "numbers"),
    ]


def choose_control(models: list[Model]) -> Model:
    """The largest of the full-rank models with the most seeds, at its shortest length of training."""
    full = [shortest_length(model) for model in models if model[0].full_rank]
    most_seeds = max((len(best_losses(model)) for model in full), default=0)
    candidates = [model for model in full if len(best_losses(model)) == most_seeds]
    return max(candidates, key=lambda model: model[0].mean("params/total") or 0, default=[])


def shortest_length(model: Model) -> Model:
    shortest = min(values_of(config, ("num_iterations",)) for config in model)
    return [config for config in model if values_of(config, ("num_iterations",)) == shortest]


def best_losses(model: Model) -> dict[int, float]:
    """{seed: loss in nats} at the best settings.

    A seed on which the settings had to be chosen is left out, unless that holds for all seeds.
    """
    groups = group_by(model, tuned_settings)
    best = best_settings([mean_logs(group, "val/ppl", trained_in_full) for group in groups])
    return best.unbiased or best.biased


def loss_differences(model: Model, control: Model, cost: str) -> dict[int, float]:
    """{seed: loss of the model at the control's cost − loss of the control}, for seeds with that cost."""
    lengths = [
        (mean_logs(group, cost, trained_in_full), best_losses(group))
        for group in group_by(model, lambda config: values_of(config, ("num_iterations",)))
    ]
    at_cost = {}
    for seed, control_cost in mean_logs(control, cost, trained_in_full).items():
        usable = [(costs, losses) for costs, losses in lengths if seed in costs and seed in losses]
        points = sorted((costs[seed], losses[seed]) for costs, losses in usable)
        loss = interpolate(points, control_cost)
        if loss is not None:
            at_cost[seed] = loss
    return seed_differences(at_cost, best_losses(control))


def interpolate(points: list[tuple[float, float]], x: float) -> float | None:
    """y at x: of a point at equal cost, or between the neighbours of x; None outside of the points."""
    nearest = min(points, key=lambda point: abs(point[0] - x), default=(math.inf, None))
    if abs(nearest[0] - x) <= EQUAL_COST:
        return nearest[1]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 < x < x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def block_parameters(run) -> float:
    """Parameters of attention and MLP, which ranks change."""
    return run.summary.get("params/attention", math.nan) + run.summary.get("params/mlp", math.nan)


def share(model: Model, control: Model, quantity) -> float:
    """The model's geometric mean over the control's; NaN if either is unknown."""
    model_logs = mean_logs(model, quantity).values()
    control_logs = mean_logs(control, quantity).values()
    if not (model_logs and control_logs):
        return math.nan
    return math.exp(fmean(model_logs) - fmean(control_logs))


def model_name(model: Model) -> str:
    """The common name of the configurations, without a length or learning rate that all of them share."""
    parts = common_name(model).split(", ")
    return ", ".join(part for part in parts if not part.startswith(("num iterations", "matrix lr")))


def difference_text(differences: dict[int, float]) -> str:
    """ "−0.142 ± 0.011 (3)": mean, half the interval, number of seeds. One seed has no interval."""
    if not differences:
        return "–"
    values = list(differences.values())
    bounds = interval(values, 0.95)
    half = f" ± {(bounds[1] - bounds[0]) / 2:.3f}" if bounds else ""
    return f"{fmean(values):+.3f}{half} ({len(values)})".replace("-", "−")
