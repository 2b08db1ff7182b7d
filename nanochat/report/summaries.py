"""What a configuration comes to over its seeds, in numbers and in words; and which of many configurations stands for the others."""

import dataclasses
import math
from statistics import fmean, stdev

from nanochat.metrics import Run
from nanochat.report.configurations import (
    MACHINE,
    RANKS,
    Configuration,
    finished,
    pareto_front,
    rank_name,
    resolved_ranks,
    run_seed,
    run_value,
)
from nanochat.units import BYTES, COUNT, FLOP, TIME, human

PEAK = "mem/peak_bytes"
PREDICTED = "mem/predicted_peak_bytes"
COSTS = [
    ("params/total", "parameters", COUNT),
    (PEAK, "peak memory", BYTES),
    (PREDICTED, "predicted peak memory", BYTES),
    ("total_training_time", "training time", TIME),
    ("step_time", "time per step", TIME),
    ("total_training_flops", "training compute", FLOP),
]
MEASURES = {"loss": ("val/ppl", "validation perplexity"), "bpb": ("val/bpb", "validation bits per byte")}


def spread(values: list[float]) -> tuple[float, float]:
    """(low, high): mean ± standard deviation (n - 1) of three and more values; all of two; of one, itself twice."""
    if len(values) < 3:
        return min(values), max(values)
    return fmean(values) - stdev(values), fmean(values) + stdev(values)


def whiskers(values: list[float]) -> list[list[float]]:
    """The spread as matplotlib's errorbar takes it, for one point."""
    low, high = spread(values)
    return [[fmean(values) - low], [high - fmean(values)]]


def outcome(config: Configuration, y_key: str) -> str:
    """ "23.11 ± 0.20"; "22.9 to 23.3" of two seeds."""
    values = config.values(y_key)
    form = ".2f" if y_key == "val/ppl" else ".4f"
    if len(values) == 1:
        return format(values[0], form)
    return (
        f"{fmean(values):{form}} ± {stdev(values):{form}}"
        if len(values) > 2
        else f"{min(values):{form}} to {max(values):{form}}"
    )


def hover_text(config: Configuration, measure: str) -> str:
    """The hover text of a configuration."""
    y_key, what = MEASURES[measure]
    runs = [run for run in config.runs if finished(run)]
    lines = [
        config.name,
        f"{what} {outcome(config, y_key)}",
        f"{len(runs)} run{'s' * (len(runs) > 1)}, seed {', '.join(str(run_seed(run)) for run in runs)}",
    ]
    if len(config.values(y_key)) < len(runs):
        lines.append(f"{len(runs) - len(config.values(y_key))} of them not finite: left out")
    lines += [
        f"{words} {human(mean, ladder)}"
        for key, words, ladder in COSTS
        if (mean := config.mean(key)) is not None
    ]
    return "\n".join(lines)


def baseline(configs: list[Configuration], y_key: str) -> Configuration | None:
    """Of the full-rank configurations with the most seeds, the one that ended best."""
    full = [c for c in configs if c.full_rank]
    most = max((len(c.values(y_key)) for c in full), default=0)
    return min((c for c in full if len(c.values(y_key)) == most), key=lambda c: c.mean(y_key), default=None)


def run_points(config: Configuration, x_key: str, y_key: str) -> list[tuple[float, float]]:
    """(x, y) of the finished runs that have both."""
    found = [(run_value(run, x_key), run_value(run, y_key)) for run in config.runs if finished(run)]
    return [(x, y) for x, y in found if x is not None and y is not None]


def mean_over_runs(config: Configuration, quantity) -> float | None:
    """The mean of a function of a run over the finished runs for which it is not None."""
    found = [number for run in config.runs if finished(run) and (number := quantity(run)) is not None]
    return fmean(found) if found else None


def any_diverged(config: Configuration, key: str) -> bool:
    """Whether a finished run has no finite value: a mean over the other seeds flatters."""
    return any(finished(run) and run_value(run, key) is None for run in config.runs)


def frontier(configs: list[Configuration], x_key: str, y_key: str) -> list[Configuration]:
    """Those whose means no other configuration's equal or beat in both, cheapest first. One that diverged on a seed is not among them."""
    able = [c for c in configs if c.values(x_key) and c.values(y_key) and not any_diverged(c, y_key)]
    return [able[i] for i in pareto_front([(c.mean(x_key), c.mean(y_key)) for c in able])]


def times_to_perplexity(config: Configuration, threshold: float) -> list[float]:
    """Seconds of training to a perplexity, a value a finished run, interpolated where it can be; empty unless all of them got there."""
    key = f"time_to_ppl/{threshold:g}/seconds"
    found = [
        run_value(run, key + "_interpolated") or run_value(run, key) for run in config.runs if finished(run)
    ]
    return [] if None in found else found


def memory_key(configs: list[Configuration]) -> str:
    """What the verdict decides by too: on a CPU, whose resident set holds Python and what the allocator kept, the predicted peak."""
    on_cpu = all(c.settings.get("device_type") == "cpu" for c in configs)
    return PREDICTED if on_cpu and all(c.values(PREDICTED) for c in configs) else PEAK


def same_machine(configs: list[Configuration]) -> bool:
    return len({tuple(c.settings.get(key) for key in MACHINE) for c in configs}) == 1


def mean_rank(config: Configuration) -> float:
    """Over the factored layers of attention and MLP; infinity for full rank, and for other methods."""
    if config.method:
        return math.inf
    model = config.runs[0].config.get("derived", {}).get("model", {})
    ranks = [
        r
        for group in ("attn_rank", "mlp_rank")
        for r in resolved_ranks(model.get(f"{group}s") or [], model, group)
        if r
    ]
    return fmean(ranks) if ranks else math.inf


def rank_words(config: Configuration) -> str:
    """As in the configuration's name, but "rank 64" where attention and MLP have the same."""
    s = config.settings
    same = (
        not config.method
        and s.get("attn_rank")
        and s.get("attn_rank") == s.get("mlp_rank")
        and not s.get("lm_head_rank")
    )
    return rank_name({**s, "mlp_rank": 0}).replace("attn", "rank") if same else rank_name(s)


def factored_groups(config: Configuration) -> tuple:
    return (
        *(not config.method and bool(config.settings.get(key)) for key in RANKS),
        *filter(None, [config.method]),
    )


def best_by_key(configs: list[Configuration], key, y_key: str) -> dict:
    """{key(config): the configuration that ended best among those of this key}, in order of first appearance."""
    best = {}
    for c in configs:
        if key(c) not in best or c.mean(y_key) < best[key(c)].mean(y_key):
            best[key(c)] = c
    return best


def ranks_in_order(configs: list[Configuration]) -> list[str]:
    """The distinct rank descriptions, what is factored together, from low to high, full rank last."""
    order = {
        rank_words(c): (not c.low_rank, factored_groups(c), mean_rank(c)) for c in configs
    }  # other methods come after full rank
    return sorted(order, key=order.get)


def depth(config: Configuration) -> int:
    return config.settings.get("depth") or 0


def representatives(configs: list[Configuration]) -> list[Run]:
    """One Run for each shape of model, named by it; by depth, then rank."""
    shapes = {}
    ranks = ranks_in_order(configs)
    for c in sorted(configs, key=lambda c: (depth(c), ranks.index(rank_words(c)))):
        model = c.runs[0].config.get("derived", {}).get("model", {})
        shapes.setdefault(repr(model), c)
    depths = len({depth(c) for c in configs}) > 1
    names = [rank_words(c) + (f", {depth(c)} layers" if depths else "") for c in shapes.values()]
    return [
        dataclasses.replace(c.runs[0], name=name if names.count(name) == 1 else c.name)
        for c, name in zip(shapes.values(), names)
    ]


def error_bar_caption(configs: list[Configuration]) -> str:
    counts = sorted({len([run for run in c.runs if finished(run)]) for c in configs} - {0})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "0"
    meaning = [
        words
        for holds, words in (
            (counts and counts[-1] > 2, "± one standard deviation over seeds"),
            (2 in counts, "from one to the other where there are two seeds"),
            (1 in counts, "none where there is one seed"),
        )
        if holds
    ]
    return f"Error bars and spreads: {', '.join(meaning)}; n = {n} seeds a configuration." if counts else ""
