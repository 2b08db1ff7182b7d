"""Runs side by side, seed by seed: what has to be alike in two runs before their difference means rank, and how sure it is.

The difference of a pair is one of logarithms, so its exponential is a ratio. The interval is Student's, over the pairs.
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit  # the t quantile alone; scipy.stats takes a second to import

from nanochat.flag_types import Role
from nanochat.flags import flag_names
from nanochat.report.configurations import MACHINE, Configuration, finished, run_seed, run_value

# The data and their order (a function of text, tokenizer, length and seed), the number of tokens, the schedule, the arithmetic.
CORPUS = ("train_fingerprint", "val_fingerprint", "tokenizer_hash", "val_tokens")
CONTEXT = (*CORPUS, *flag_names(Role.CONTEXT), "dtype", "materialized_from")
FAMILY = flag_names(Role.FAMILY)
SHAPE = (*flag_names(Role.SHAPE), "layer_kinds", *FAMILY)
RANK = flag_names(Role.GROUP_RANK, Role.RANK)
COST = (*MACHINE, *flag_names(Role.COST))  # change time and memory, not what is learned
LEARNING = set(flag_names(Role.RATE))  # change what is learned, not time and memory
NO_TUNING = {*CONTEXT, *SHAPE, *RANK, *COST, *flag_names(Role.OTHER)}
MOST = 100  # more seeds than that are no advice


def key(config: Configuration, names) -> tuple:
    return tuple(config.settings.get(name) for name in names)


def tuning(config: Configuration) -> tuple:
    """What was tried beside text, shape and rank: learning rates and all other settings that two runs of a pair may differ in."""
    return tuple(sorted((k, str(v)) for k, v in config.settings.items() if k not in NO_TUNING))


def grouped(configs: list[Configuration], key_of) -> list[list[Configuration]]:
    groups = {}
    for config in configs:
        groups.setdefault(key_of(config), []).append(config)
    return list(groups.values())


def ended(run) -> bool:
    """Finished, and on all of its tokens: --stop-at-ppl ends a run at a perplexity, which then says nothing."""
    derived = run.config.get("derived", {})
    return finished(run) and run.summary.get("total_tokens", math.inf) >= derived.get("tokens", 0)


# ---- one value a seed -----------------------------------------------------------------------------------------------


def by_seed(configs: list[Configuration], quantity, usable=finished) -> dict[int, float]:
    """{seed: mean logarithm} of a positive quantity (a summary key, or a function of a run) over all usable runs of that seed."""
    found = {}
    for run in (run for config in configs for run in config.runs if usable(run)):
        number = quantity(run) if callable(quantity) else run_value(run, quantity)
        if number is not None and number > 0:
            found.setdefault(run_seed(run), []).append(math.log(number))
    return {s: fmean(logs) for s, logs in sorted(found.items())}


@dataclass(frozen=True)
class Tuned:
    """One side of a comparison, each seed at its best setting."""

    fair: dict[int, float]  # {seed: value}: the setting was chosen without this seed
    peeked: dict[int, float]  # it could only be chosen on this very seed, which flatters it
    tried: int  # settings with a value


def tuned(points: list[dict[int, float]]) -> Tuned:
    """The best of several settings, each {seed: value}, smaller is better.

    For each seed the setting is the one that is best, on average, on the other seeds (those that all its candidates have): to choose on
    the seed that is then compared would count luck as skill, more so the more settings were tried. A seed with one candidate has no choice.
    """
    points = [p for p in points if p]
    fair = {}
    peeked = {}
    for s in sorted({s for p in points for s in p}):
        candidates = [p for p in points if s in p]
        others = sorted(set.intersection(*map(set, candidates)) - {s})
        if len(candidates) == 1 or others:
            fair[s] = min(candidates, key=lambda p: fmean(p[o] for o in others) if others else 0)[s]
        else:
            peeked[s] = min(p[s] for p in candidates)
    return Tuned(fair, peeked, len(points))


# ---- pairs to an interval -------------------------------------------------------------------------------------------


def differences(low: dict[int, float], full: dict[int, float]) -> dict[int, float]:
    """{seed: low − full} of the seeds in both."""
    return {s: low[s] - full[s] for s in sorted(low.keys() & full.keys())}


def half_width(sd: float, n: int, confidence: float) -> float:
    """Of the two-sided Student interval of a mean: t(n − 1) · sd / √n."""
    return float(stdtrit(n - 1, (1 + confidence) / 2)) * sd / math.sqrt(n)


def interval(values: list[float], confidence: float) -> tuple[float, float] | None:
    """Bounds of the mean; None for fewer than two values, which have no spread."""
    if len(values) < 2:
        return None
    middle = fmean(values)
    half = half_width(stdev(values), len(values), confidence)
    return middle - half, middle + half


def seeds_to_settle(values: list[float], limit: float, confidence: float) -> int | None:
    """The smallest number of pairs whose half-width, at the present mean and spread, is below the distance to the limit.

    2 where there is no spread yet; None if that takes more than MOST: the mean lies too near to the limit.
    """
    if len(values) < 2:
        return 2
    distance = abs(fmean(values) - limit)
    sd = stdev(values)
    return next((n for n in range(2, MOST + 1) if half_width(sd, n, confidence) < distance), None)


# ---- why not --------------------------------------------------------------------------------------------------------


def unlike(config: Configuration, others: list[Configuration], names) -> str:
    """How the nearest of the others differs, in words."""
    if not others:
        return "there is no finished full-rank run"
    near = min(others, key=lambda other: sum(a != b for a, b in zip(key(config, names), key(other, names))))
    differing = [
        f"{n.replace('_', ' ')} ({a} here, {b} there)"
        for n, a, b in zip(names, key(config, names), key(near, names))
        if a != b
    ]
    return f"no full-rank run is like it; the nearest, {near.name}, differs in {', '.join(differing)}"
