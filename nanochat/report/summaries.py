"""A configuration over its seeds, in numbers and words; baseline and frontier of many configurations."""

import dataclasses
import math
from statistics import fmean, stdev

from nanochat.metrics import Run
from nanochat.report.configurations import (
    MACHINE,
    RANKS,
    Configuration,
    finished,
    rank_name,
    resolved_ranks,
    run_seed,
    run_value,
)
from nanochat.units import BYTES, COUNT, FLOP, TIME, human

MEASURED_PEAK = "mem/peak_bytes"
PREDICTED_PEAK = "mem/predicted_peak_bytes"
COSTS = [
    ("params/total", "parameters", COUNT),
    (MEASURED_PEAK, "peak memory", BYTES),
    (PREDICTED_PEAK, "predicted peak memory", BYTES),
    ("total_training_time", "training time", TIME),
    ("step_time", "time per step", TIME),
    ("total_training_flops", "training compute", FLOP),
]
# how a report measures quality -> (summary key, label)
MEASURES = {"loss": ("val/ppl", "validation perplexity"), "bpb": ("val/bpb", "validation bits per byte")}
LOSS_LABELS = {"loss": "validation loss (nats/token)", "bpb": "validation bits per byte"}


# ---- one configuration in numbers --------------------------------------------------------------------------


def spread(values: list[float]) -> tuple[float, float]:
    """(low, high): mean ± standard deviation (n - 1); of two values their range; of one value it, twice."""
    if len(values) < 3:
        return min(values), max(values)
    return fmean(values) - stdev(values), fmean(values) + stdev(values)


def whiskers(values: list[float]) -> list[list[float]]:
    """The spread of one point, as matplotlib's errorbar takes it."""
    low, high = spread(values)
    return [[fmean(values) - low], [high - fmean(values)]]


def run_points(config: Configuration, x_key: str, y_key: str) -> list[tuple[float, float]]:
    """(x, y) of the finished runs that have both."""
    points = [(run_value(run, x_key), run_value(run, y_key)) for run in config.runs if finished(run)]
    return [(x, y) for x, y in points if x is not None and y is not None]


def mean_over_runs(config: Configuration, quantity) -> float | None:
    """The mean of quantity(run) over the finished runs for which it is not None."""
    values = [quantity(run) for run in config.runs if finished(run)]
    values = [value for value in values if value is not None]
    return fmean(values) if values else None


def any_diverged(config: Configuration, key: str) -> bool:
    """Whether a finished run has no finite value: the mean over the other seeds looks too good."""
    return any(finished(run) and run_value(run, key) is None for run in config.runs)


def times_to_perplexity(config: Configuration, threshold: float) -> list[float]:
    """Seconds of training until each finished run reached a perplexity; empty unless all of them did.

    Interpolated between two evaluations if the run recorded that.
    """
    key = f"time_to_ppl/{threshold:g}/seconds"
    runs = filter(finished, config.runs)
    times = [run_value(run, f"{key}_interpolated") or run_value(run, key) for run in runs]
    return [] if None in times else times


def depth(config: Configuration) -> int:
    return config.settings.get("depth") or 0


def layer_map(config: Configuration) -> str:
    return config.settings.get("layer_map") or ""


def mean_rank(config: Configuration) -> float:
    """The mean over the low-rank layers of attention and MLP; infinity for full rank and other methods."""
    if config.method:
        return math.inf
    model = config.runs[0].config.get("derived", {}).get("model", {})
    attention = resolved_ranks(model.get("attn_ranks") or [], model, "attn_rank")
    mlp = resolved_ranks(model.get("mlp_ranks") or [], model, "mlp_rank")
    ranks = [rank for rank in attention + mlp if rank]
    return fmean(ranks) if ranks else math.inf


def factored_groups(config: Configuration) -> tuple:
    """Whether attention, MLP and head have low rank: three booleans. For another method, then its name."""
    if config.method:
        return (*(False for _ in RANKS), config.method)
    return tuple(bool(config.settings.get(key)) for key in RANKS)


# ---- one configuration in words ----------------------------------------------------------------------------


def outcome(config: Configuration, y_key: str) -> str:
    """ "23.11 ± 0.20"; of two seeds "22.9 to 23.3"."""
    values = config.values(y_key)
    form = ".2f" if y_key == "val/ppl" else ".4f"
    if len(values) == 1:
        return format(values[0], form)
    if len(values) == 2:
        return f"{min(values):{form}} to {max(values):{form}}"
    return f"{fmean(values):{form}} ± {stdev(values):{form}}"


def hover_text(config: Configuration, measure: str) -> str:
    """What a figure shows when the pointer is on a configuration."""
    y_key, label = MEASURES[measure]
    seeds = [str(run_seed(run)) for run in config.runs if finished(run)]
    noun = "run" if len(seeds) == 1 else "runs"
    lines = [
        config.name,
        f"{label} {outcome(config, y_key)}",
        f"{len(seeds)} {noun}, seed {', '.join(seeds)}",
    ]
    missing = len(seeds) - len(config.values(y_key))
    if missing > 0:
        lines.append(f"{missing} of them not finite: left out")
    for key, words, ladder in COSTS:
        mean = config.mean(key)
        if mean is not None:
            lines.append(f"{words} {human(mean, ladder)}")
    return "\n".join(lines)


def rank_words(config: Configuration) -> str:
    """The ranks as in the configuration's name, but "rank 64" if attention and MLP have the same."""
    settings = config.settings
    rank = settings.get("attn_rank")
    if config.method or not rank or rank != settings.get("mlp_rank") or settings.get("lm_head_rank"):
        return rank_name(settings)
    return rank_name({**settings, "mlp_rank": 0}).replace("attn", "rank")


# ---- many configurations -----------------------------------------------------------------------------------


def baseline(configs: list[Configuration], y_key: str) -> Configuration | None:
    """The best of the full-rank configurations with the most seeds."""
    full = [config for config in configs if config.full_rank]
    most_seeds = max((len(config.values(y_key)) for config in full), default=0)
    candidates = [config for config in full if len(config.values(y_key)) == most_seeds]
    return min(candidates, key=lambda config: config.mean(y_key), default=None)


def frontier(configs: list[Configuration], x_key: str, y_key: str) -> list[Configuration]:
    """The configurations whose means no other equals or beats in both, cheapest first.

    One that diverged on a seed is not among them.
    """
    usable = [c for c in configs if c.values(x_key) and c.values(y_key) and not any_diverged(c, y_key)]
    means = [(config.mean(x_key), config.mean(y_key)) for config in usable]
    return [usable[i] for i in pareto_front(means)]


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point equals or beats in both coordinates (smaller is better).

    They are ordered by the first coordinate. Of points that coincide, the first is kept. A point that is not
    finite is never on the front.
    """
    front = []
    best = math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if all(map(math.isfinite, points[i])) and points[i][1] < best:
            front.append(i)
            best = points[i][1]
    return front


def memory_key(configs: list[Configuration]) -> str:
    """The memory by which the verdict decides: on a CPU the predicted peak, elsewhere the measured one.

    A CPU's resident set also holds Python and freed memory that the allocator did not return.
    """
    on_cpu = all(config.settings.get("device_type") == "cpu" for config in configs)
    predicted = all(config.values(PREDICTED_PEAK) for config in configs)
    return PREDICTED_PEAK if on_cpu and predicted else MEASURED_PEAK


def same_machine(configs: list[Configuration]) -> bool:
    machines = set()
    for config in configs:
        machines.add(tuple(config.settings.get(key) for key in MACHINE))
    return len(machines) == 1


def best_by_key(configs: list[Configuration], key, y_key: str) -> dict:
    """{key(config): the best configuration of this key}, in the order of first appearance."""
    best = {}
    for config in configs:
        group = key(config)
        if group not in best or config.mean(y_key) < best[group].mean(y_key):
            best[group] = config
    return best


def ranks_in_order(configs: list[Configuration]) -> list[str]:
    """The distinct rank_words: low ranks by factored matrices and size, then full rank, other methods."""
    order = {rank_words(c): (not c.low_rank, factored_groups(c), mean_rank(c)) for c in configs}
    return sorted(order, key=order.get)


def representatives(configs: list[Configuration]) -> list[Run]:
    """One Run for each shape of model, named after the shape; by depth, then by rank."""
    ranks = ranks_in_order(configs)
    config_of_shape = {}
    for config in sorted(configs, key=lambda config: (depth(config), ranks.index(rank_words(config)))):
        model = config.runs[0].config.get("derived", {}).get("model", {})
        config_of_shape.setdefault(repr(model), config)
    one_depth = len({depth(config) for config in configs}) == 1
    names = []
    for config in config_of_shape.values():
        words = rank_words(config)
        names.append(words if one_depth else f"{words}, {depth(config)} layers")
    return [
        dataclasses.replace(config.runs[0], name=name if names.count(name) == 1 else config.name)
        for config, name in zip(config_of_shape.values(), names)
    ]


def error_bar_caption(configs: list[Configuration]) -> str:
    counts = set()
    for config in configs:
        counts.add(len([run for run in config.runs if finished(run)]))
    counts.discard(0)
    if not counts:
        return ""
    parts = []
    if max(counts) > 2:
        parts.append("± one standard deviation over seeds")
    if 2 in counts:
        parts.append("from one to the other where there are two seeds")
    if 1 in counts:
        parts.append("none where there is one seed")
    seeds = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"Error bars and spreads: {', '.join(parts)}; n = {seeds} seeds a configuration."
