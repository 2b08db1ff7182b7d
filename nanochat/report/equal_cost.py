"""At equal cost: what other models end at for the tokens, the FLOPs or the training time that the largest full-rank model took."""

import math
from statistics import fmean

from nanochat.report.configurations import Configuration
from nanochat.report.pairing import (
    CONTEXT,
    FAMILY,
    RANK,
    SHAPE,
    by_seed,
    differences,
    ended,
    grouped,
    interval,
    key,
    tuned,
    tuning,
)
from nanochat.report.verdict import common_name

COSTS = [
    ("total_tokens", "tokens"),
    ("total_training_flops", "FLOPs"),
    ("total_training_time", "training time"),
]
ALIKE = tuple(name for name in (*CONTEXT, *FAMILY) if name != "num_iterations")
MODEL = (*SHAPE, *RANK)
NEAR = math.log(1.02)  # costs within 2 % of one another are equal


def equal_cost_table(configs: list[Configuration]) -> list[tuple]:
    """Blocks of nanochat/report/page.py: differences of loss to the control, in nats, with 95 % intervals over seeds. Nothing without a control."""
    models = grouped(
        [c for c in configs if not c.method and c.values("val/ppl")], lambda c: key(c, (*ALIKE, *MODEL))
    )
    control = largest(models)
    if not control:
        return []
    rows = []
    for model in sorted(models, key=lambda model: -share(model, control, parameters_of_blocks)):
        cells = [difference(model, control, cost) for cost, _ in COSTS]
        if key(model[0], ALIKE) == key(control[0], ALIKE) and model[0] is not control[0] and any(cells):
            sizes = [
                f"× {ratio:.3f}"
                for ratio in (
                    share(model, control, parameters_of_blocks),
                    share(model, control, "flops/per_token"),
                )
            ]
            rows.append([model_name(model), *sizes, *(in_words(cell) for cell in cells)])
    if not rows:
        return []
    words = (
        f"Loss minus that of {model_name(control)}, in nats (× {math.e:.3f} in perplexity for each), mean over the seeds of both and 95 % interval, not corrected for "
        "the number of lines. Each seed at the settings that are best on the other seeds. Where a model was trained for several "
        "lengths, its loss at the control's cost is interpolated between them, linearly in the logarithm of the cost; every length has its "
        "own learning rate schedule. A line without a cell was not trained up to, or from, that cost."
    )
    return [
        ("subheading", "At equal cost"),
        ("paragraph", words),
        (
            "table",
            ["model", "block parameters", "FLOPs a token", *(f"at equal {words}" for _, words in COSTS)],
            rows,
            "numbers",
        ),
    ]


def largest(models: list[list[Configuration]]) -> list[Configuration]:
    """Of the full-rank models with the most seeds, the one of most parameters, at its shortest length."""
    full = [
        [c for c in model if key(c, ("num_iterations",)) == min(key(c, ("num_iterations",)) for c in model)]
        for model in models
        if model[0].full_rank
    ]
    seeds = max((len(losses(model)) for model in full), default=0)
    return max(
        (model for model in full if len(losses(model)) == seeds),
        key=lambda model: model[0].mean("params/total") or 0,
        default=[],
    )


def losses(model: list[Configuration]) -> dict[int, float]:
    """{seed: loss in nats} at the best settings; where these could only be chosen on the seed itself, it is left out, unless all were."""
    found = tuned([by_seed(group, "val/ppl", ended) for group in grouped(model, tuning)])
    return found.fair or found.peeked


def difference(model: list[Configuration], control: list[Configuration], cost: str) -> dict[int, float]:
    """{seed: loss of the model at the control's cost − loss of the control}, of the seeds where the model's lengths reach it."""
    lengths = [
        (by_seed(group, cost, ended), losses(group))
        for group in grouped(model, lambda c: key(c, ("num_iterations",)))
    ]
    found = {}
    for seed, wanted in by_seed(control, cost, ended).items():
        points = sorted(
            (costs[seed], loss[seed]) for costs, loss in lengths if seed in costs and seed in loss
        )
        at = interpolated(points, wanted)
        if at is not None:
            found[seed] = at
    return differences(found, losses(control))


def interpolated(points: list[tuple[float, float]], x: float) -> float | None:
    """y at x between two neighbours of the (x, y), or of one that is NEAR; None outside of them."""
    near = min(points, key=lambda point: abs(point[0] - x), default=(math.inf, None))
    if abs(near[0] - x) <= NEAR:
        return near[1]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 < x < x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None


def parameters_of_blocks(run) -> float:
    return run.summary.get("params/attention", math.nan) + run.summary.get("params/mlp", math.nan)


def share(model, control, quantity) -> float:
    ours, theirs = (
        fmean(by_seed(side, quantity).values()) if by_seed(side, quantity) else math.nan
        for side in (model, control)
    )
    return math.exp(ours - theirs)


def model_name(model: list[Configuration]) -> str:
    """What the names of its lengths and settings share, without a length or a rate that happens to be the same in all of them."""
    parts = common_name(model).split(", ")
    return ", ".join(part for part in parts if not part.startswith(("num iterations", "matrix lr")))


def in_words(found: dict[int, float]) -> str:
    """ "−0.142 ± 0.011 (3)"; without an interval where there is one seed."""
    if not found:
        return "–"
    bounds = interval(list(found.values()), 0.95)
    half = f" ± {(bounds[1] - bounds[0]) / 2:.3f}" if bounds else ""
    return f"{fmean(found.values()):+.3f}{half} ({len(found)})".replace("-", "−")
