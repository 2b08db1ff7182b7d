"""Pairs of runs that differ in rank alone: which settings must be equal, and how certain the difference is.

The difference of a pair is one of logarithms, so its exponential is a ratio. The interval over the pairs is
Student's.
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit  # the t quantile alone: scipy.stats takes a second to import

from nanochat.flag_types import Role
from nanochat.flags import flag_names
from nanochat.report.configurations import MACHINE, Configuration, finished, run_seed, run_value

# The loss depends on these besides the model: the data and their order (a function of text, tokenizer, length
# and seed), the number of tokens, the schedule and the arithmetic.
CORPUS = ("train_fingerprint", "val_fingerprint", "tokenizer_hash", "val_tokens")
CONTEXT = (*CORPUS, *flag_names(Role.CONTEXT), "dtype", "materialized_from")
FAMILY = flag_names(Role.FAMILY)
SHAPE = (*flag_names(Role.SHAPE), "layer_kinds", *FAMILY)
RANK_SETTINGS = flag_names(Role.GROUP_RANK, Role.RANK)
# they change time and memory, but not the loss
COST_SETTINGS = (*MACHINE, *flag_names(Role.COST))
# they change the loss, but neither time nor memory
OPTIMIZER_SETTINGS = set(flag_names(Role.RATE))
NOT_TUNED = {*CONTEXT, *SHAPE, *RANK_SETTINGS, *COST_SETTINGS, *flag_names(Role.OTHER)}
MAX_SEEDS = 100  # nobody could follow the advice to run more seeds


def values_of(config: Configuration, names) -> tuple:
    return tuple(config.settings.get(name) for name in names)


def tuned_settings(config: Configuration) -> tuple:
    """((flag, text), ...) of the settings other than rank that may differ within a pair: learning rates, …"""
    return tuple(sorted((flag, str(v)) for flag, v in config.settings.items() if flag not in NOT_TUNED))


def group_by(configs: list[Configuration], key) -> list[list[Configuration]]:
    """Groups of equal key(config), in the order of their first appearance."""
    groups = {}
    for config in configs:
        groups.setdefault(key(config), []).append(config)
    return list(groups.values())


def trained_in_full(run) -> bool:
    """Whether the run finished on all of its tokens; with --stop-at-ppl it may end early."""
    derived = run.config.get("derived", {})
    return finished(run) and run.summary.get("total_tokens", math.inf) >= derived.get("tokens", 0)


# ---- one value for each seed -------------------------------------------------------------------------------


def mean_logs(configs: list[Configuration], quantity, usable=finished) -> dict[int, float]:
    """{seed: mean logarithm} of a positive quantity over all usable runs of that seed.

    quantity: a summary key, or a function of a run.
    """
    logs = {}
    for config in configs:
        for run in filter(usable, config.runs):
            value = quantity(run) if callable(quantity) else run_value(run, quantity)
            if value is not None and value > 0:
                logs.setdefault(run_seed(run), []).append(math.log(value))
    return {seed: fmean(values) for seed, values in sorted(logs.items())}


@dataclass(frozen=True)
class BestSettings:
    """One side of a comparison, each seed at its best setting. Both tables are {seed: value}."""

    unbiased: dict[int, float]  # the setting was chosen without this seed
    biased: dict[int, float]  # the setting could only be chosen on this very seed, which makes it look better
    count: int  # settings that have a value

    @property
    def by_seed(self) -> dict[int, float]:
        return self.unbiased | self.biased


def best_settings(settings: list[dict[int, float]]) -> BestSettings:
    """The best of several settings for each seed; a setting is {seed: value}, smaller is better.

    A seed's setting is the one that is best, on average, on the other seeds (those that all its candidates
    have). A choice made on the compared seed itself would count luck as skill, and the more so the more
    settings were tried. With a single candidate there is no choice.
    """
    settings = [setting for setting in settings if setting]
    unbiased = {}
    biased = {}
    for seed in sorted(set().union(*settings)):
        candidates = [setting for setting in settings if seed in setting]
        other_seeds = sorted(set.intersection(*map(set, candidates)) - {seed})
        if len(candidates) == 1:
            unbiased[seed] = candidates[0][seed]
        elif other_seeds:
            best = min(candidates, key=lambda candidate: fmean(candidate[other] for other in other_seeds))
            unbiased[seed] = best[seed]
        else:
            biased[seed] = min(candidate[seed] for candidate in candidates)
    return BestSettings(unbiased, biased, len(settings))


# ---- from pairs to an interval -----------------------------------------------------------------------------


def seed_differences(low: dict[int, float], full: dict[int, float]) -> dict[int, float]:
    """{seed: low − full}, for the seeds in both."""
    return {seed: low[seed] - full[seed] for seed in sorted(low.keys() & full.keys())}


def half_width(sd: float, n: int, confidence: float) -> float:
    """Half the two-sided Student interval of a mean: t(n − 1) · sd / √n."""
    return float(stdtrit(n - 1, (1 + confidence) / 2)) * sd / math.sqrt(n)


def interval(values: list[float], confidence: float) -> tuple[float, float] | None:
    """Bounds of the mean; None for fewer than two values, which have no spread."""
    if len(values) < 2:
        return None
    mean = fmean(values)
    half = half_width(stdev(values), len(values), confidence)
    return mean - half, mean + half


def seeds_to_settle(values: list[float], limit: float, confidence: float) -> int | None:
    """The smallest number of pairs whose interval excludes the limit if mean and spread stay the same.

    2 while there is no spread. None if it is more than MAX_SEEDS: the mean is too near to the limit.
    """
    if len(values) < 2:
        return 2
    distance = abs(fmean(values) - limit)
    sd = stdev(values)
    return next((n for n in range(2, MAX_SEEDS + 1) if half_width(sd, n, confidence) < distance), None)


# ---- why there is no pair ----------------------------------------------------------------------------------


def mismatch(config: Configuration, candidates: list[Configuration], names) -> str:
    """In which of the named settings the most similar full-rank configuration differs, in words."""
    if not candidates:
        return "there is no finished full-rank run"
    nearest = min(candidates, key=lambda candidate: len(unequal(config, candidate, names)))
    differing = [
        f"{name.replace('_', ' ')} ({config.settings.get(name)} here, {nearest.settings.get(name)} there)"
        for name in unequal(config, nearest, names)
    ]
    return f"no full-rank run is like it; the nearest, {nearest.name}, differs in {', '.join(differing)}"


def unequal(config: Configuration, other: Configuration, names) -> list[str]:
    return [name for name in names if config.settings.get(name) != other.settings.get(name)]
