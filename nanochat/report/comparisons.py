"""The comparisons behind each hypothesis: which runs form pairs, in which quantities, and which are left out.

A case is one low-rank configuration beside its full-rank baseline. For a configuration without a baseline,
the report says why it has none.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from nanochat.report.configurations import Configuration, run_value
from nanochat.report.pairing import (
    CONTEXT,
    COST_SETTINGS,
    FAMILY,
    OPTIMIZER_SETTINGS,
    RANK_SETTINGS,
    SHAPE,
    BestSettings,
    best_settings,
    group_by,
    mean_logs,
    mismatch,
    seed_differences,
    trained_in_full,
    tuned_settings,
    values_of,
)

STATE_BYTES = ("mem/weights_bytes", "mem/grads_bytes", "mem/optimizer_bytes")
SPARES_NOTHING = 0.99  # a rank that leaves this share of the parameters or more says nothing about low rank


@dataclass(frozen=True)
class Comparison:
    """One quantity of a low-rank configuration over the same of its baseline, seed by seed."""

    quantity: str
    differences: dict[int, float]  # {seed: difference of logarithms}
    limit: float | None = None  # the ratio must lie below it; None: for information only
    # a measurement beside a prediction that decides: if it clearly contradicts, nothing is decided
    cross_check: bool = False
    # the settings were chosen on the compared seeds, or a seed diverged: an estimate without an interval
    biased: bool = False


@dataclass(frozen=True)
class Case:
    """One low-rank configuration, its baseline, and the comparisons between them."""

    name: str
    baseline: str
    comparisons: list[Comparison]
    notes: list[str] = field(default_factory=list)


# the cases, and a line on each configuration that could not be compared
Cases = tuple[list[Case], list[str]]


# ---- H1: time and memory -----------------------------------------------------------------------------------


def cost_cases(
    low: list[Configuration], full: list[Configuration], time_limit: float, memory_limit: float
) -> Cases:
    """Runs of one seed at several learning rates count as their mean: neither quantity depends on them."""
    names = (*CONTEXT, *SHAPE, *COST_SETTINGS)
    cases = []
    excluded = []
    for group in group_by(low, settings_of_cost):
        partners = same_settings(full, group[0], names)
        if not partners:
            excluded.append(f"{common_name(group)}: {mismatch(group[0], full, names)}")
            continue
        comparisons = cost_comparisons(group, partners, time_limit, memory_limit)
        if any(comparison.differences for comparison in comparisons):
            shown = [comparison for comparison in comparisons if comparison.limit or comparison.differences]
            cases.append(Case(common_name(group), common_name(partners), shown))
        else:
            excluded.append(f"{common_name(group)}: {no_common_seed(group, partners)}")
    return cases, excluded


def settings_of_cost(config: Configuration) -> tuple:
    """The settings that can change time or memory."""
    return tuple(sorted((k, str(v)) for k, v in config.settings.items() if k not in OPTIMIZER_SETTINGS))


def cost_comparisons(group, partners, time_limit: float, memory_limit: float) -> list[Comparison]:
    """Time and memory. The measured peak decides on a GPU, the predicted one on a CPU."""
    time = compare(group, partners, "step_time")
    peak = compare(group, partners, "mem/peak_bytes")
    predicted = compare(group, partners, "mem/predicted_peak_bytes")
    state = compare(group, partners, state_bytes)
    if predicted and group[0].settings.get("device_type") != "cuda":
        memory = [
            Comparison("predicted peak memory", predicted, memory_limit),
            Comparison("peak resident set", peak, cross_check=True),
        ]
    else:
        memory = [
            Comparison("measured peak memory", peak, memory_limit),
            Comparison("predicted peak memory", predicted),
        ]
    return [
        Comparison("time per step", time, time_limit),
        *memory,
        Comparison("weights, gradients, optimizer", state),
    ]


def compare(group, partners, quantity) -> dict[int, float]:
    return seed_differences(mean_logs(group, quantity), mean_logs(partners, quantity))


def state_bytes(run) -> float:
    """Weights, gradients and optimizer state; NaN if one of them is not recorded."""
    return sum(run.summary.get(key, math.nan) for key in STATE_BYTES)


# ---- H2: perplexity at the same shape ----------------------------------------------------------------------


def perplexity_cases(low: list[Configuration], full: list[Configuration], limit: float) -> Cases:
    """Each rank that spares parameters against full rank of the same shape, both at their best settings."""
    names = (*CONTEXT, *SHAPE)
    cases = []
    excluded = []
    for group in group_by(low, lambda config: values_of(config, (*names, *RANK_SETTINGS))):
        name = common_name(group)
        partners = same_settings(full, group[0], names)
        if not partners:
            excluded.append(f"{name}: {mismatch(group[0], full, names)}")
            continue
        baseline = common_name(partners)
        share = parameter_share(group[0], partners[0])
        if share and share >= SPARES_NOTHING:
            excluded.append(f"{name}: spares nothing, it has × {share:.3f} the parameters of {baseline}")
            continue
        comparison, notes = compare_best(group, partners, limit)
        if not comparison:
            excluded.append(f"{name}: {no_common_seed(group, partners)}")
            continue
        if share:
            baseline += f", parameters × {share:.3f}"
        cases.append(Case(name, baseline, [comparison], notes))
    return cases, excluded


def has_low_rank(config: Configuration, group: str, matrices: Iterable[str]) -> bool:
    """Whether the group, "attn" or "mlp", or at least one of its matrices has a rank."""
    if config.settings.get(f"{group}_rank"):
        return True
    parts = [part for part in (config.settings.get("matrix_ranks") or "").split(",") if part]
    ranks_by_matrix = dict(part.split("=") for part in parts)
    for matrix in matrices:
        ranks = ranks_by_matrix.get(matrix, "0").split("/")  # one a layer: "64/64/0"
        if any(rank not in ("0", "full") for rank in ranks):
            return True
    return False


# ---- H3: deeper at equal parameters ------------------------------------------------------------------------


def deeper_cases(low: list[Configuration], full: list[Configuration], tolerance: float) -> Cases:
    """Each deeper low-rank shape against the best full-rank shape that has as many parameters.

    tolerance: the share by which two numbers of parameters may differ and count as equal.
    """
    cases = []
    excluded = []
    for group in group_by(low, lambda config: values_of(config, (*CONTEXT, *SHAPE, *RANK_SETTINGS))):
        same_training = same_settings(full, group[0], (*CONTEXT, *FAMILY))
        shallower = [c for c in same_training if executed_layers(c) < executed_layers(group[0])]
        shares = {config.name: parameter_share(group[0], config) for config in shallower}
        shares = {name: share for name, share in shares.items() if share is not None}
        equal = [c for c in shallower if abs(shares.get(c.name, math.inf) - 1) <= tolerance + 1e-9]
        case = best_shape_case(group, equal, shares)
        if case:
            cases.append(case)
        elif equal:
            excluded.append(f"{common_name(group)}: {no_common_seed(group, equal)}")
        elif shares:
            nearest = min(shares, key=lambda name: abs(shares[name] - 1))
            share = f"× {shares[nearest]:.3f} the parameters of {nearest}"
            excluded.append(f"{common_name(group)}: deeper, but with {share}")
    return cases, excluded


def best_shape_case(group, equal: list[Configuration], shares: dict[str, float]) -> Case | None:
    """The case against the full-rank shape of the lowest perplexity: the hardest baseline among the runs."""
    cases = []
    perplexities = []
    for partners in group_by(equal, lambda config: values_of(config, SHAPE)):
        comparison, notes = compare_best(group, partners, 1.0)
        if comparison:
            baseline = f"{common_name(partners)}, parameters × {shares[partners[0].name]:.3f}"
            cases.append(Case(common_name(group), baseline, [comparison], notes))
            means = [config.mean("val/ppl") for config in partners]
            perplexities.append(min((mean for mean in means if mean is not None), default=math.inf))
    if not cases:
        return None
    case = cases[perplexities.index(min(perplexities))]
    if len(cases) > 1:
        case.notes.append(f"the best of {len(cases)} full-rank shapes of as many parameters is the baseline")
    return case


def executed_layers(config: Configuration) -> int:
    """How many layers a token passes. A layer that is executed again counts again."""
    layer_map = config.settings.get("layer_map")
    return len(layer_map.split(",")) if layer_map else config.settings.get("depth", 0)


# ---- the best settings of each side ------------------------------------------------------------------------


def compare_best(low, full, limit: float) -> tuple[Comparison | None, list[str]]:
    """Perplexities at the best settings of each side, and how these were chosen. None: no seed in common."""
    best_low = best_perplexities(low)
    best_full = best_perplexities(full)
    unbiased = seed_differences(best_low.unbiased, best_full.unbiased)
    all_seeds = seed_differences(best_low.by_seed, best_full.by_seed)
    differences = unbiased or all_seeds
    if not differences:
        return None, []
    diverged = [seed for seed, difference in differences.items() if not math.isfinite(difference)]
    notes = tuning_notes(best_low, best_full, varied_settings(low + full))
    notes += seed_notes(best_low, best_full, unbiased, all_seeds)
    if diverged:
        notes.append(
            f"seed {numbers_text(diverged)} diverged, and a mean without it would look too good: "
            "choose settings that are stable on all seeds"
        )
    finite = {seed: difference for seed, difference in differences.items() if seed not in diverged}
    return Comparison("perplexity", finite, limit, biased=bool(diverged) or not unbiased), notes


def best_perplexities(configs: list[Configuration]) -> BestSettings:
    groups = group_by(configs, tuned_settings)
    return best_settings([mean_logs(group, perplexity, trained_in_full) for group in groups])


def perplexity(run) -> float | None:
    """Infinite for a run that diverged, so that a setting which diverges on some seeds is not chosen."""
    return run_value(run, "val/ppl") or (math.inf if "val/ppl" in run.summary else None)


def tuning_notes(low: BestSettings, full: BestSettings, varied: str) -> list[str]:
    if low.count != full.count:
        settings = "setting" if full.count == 1 else "settings"
        favoured = "full" if full.count > low.count else "low"
        return [
            f"uneven tuning: {full.count} {settings} for full rank, {low.count} for low rank ({varied}); "
            f"that favours {favoured} rank"
        ]
    if low.count > 1:
        return [
            f"{low.count} settings were tried on each side ({varied}); each seed is compared at the setting "
            "that is best on the other seeds"
        ]
    return []


def seed_notes(low: BestSettings, full: BestSettings, unbiased: dict, all_seeds: dict) -> list[str]:
    """Which seeds are not counted, and why."""
    notes = []
    chosen_on = sorted(all_seeds.keys() - unbiased.keys())
    if unbiased and chosen_on:
        notes.append(f"seed {numbers_text(chosen_on)} served to choose the settings and is not counted")
    unpaired = sorted(low.by_seed.keys() - full.by_seed.keys())
    if unpaired:
        notes.append(f"seed {numbers_text(unpaired)} has no full-rank run and is not counted")
    if not unbiased:
        notes.append(
            "the settings were chosen on the seeds that are compared, which flatters them: "
            "run the chosen ones on other seeds"
        )
    return notes


def varied_settings(configs: list[Configuration]) -> str:
    """The tuned settings that differ between configurations, in words."""
    settings = [dict(tuned_settings(config)) for config in configs]
    names = []
    for name in settings[0]:
        if len({each.get(name) for each in settings}) > 1:
            names.append(name.replace("_", " "))
    return ", ".join(names) or "the same ones"


# ---- names and look-ups ------------------------------------------------------------------------------------


def same_settings(configs: list[Configuration], config: Configuration, names) -> list[Configuration]:
    return [other for other in configs if values_of(other, names) == values_of(config, names)]


def parameter_share(config: Configuration, baseline: Configuration) -> float | None:
    parameters = config.mean("params/total")
    baseline_parameters = baseline.mean("params/total")
    return parameters / baseline_parameters if parameters and baseline_parameters else None


def common_name(configs: list[Configuration]) -> str:
    """The parts that the names share."""
    parts = configs[0].name.split(", ")
    for config in configs[1:]:
        parts = [part for part in parts if part in config.name.split(", ")]
    return ", ".join(parts) or configs[0].name


def no_common_seed(low, full) -> str:
    low_seeds = numbers_text(mean_logs(low, "val/ppl")) or "none"
    full_seeds = numbers_text(mean_logs(full, "val/ppl")) or "none"
    return f"no seed in common with full rank ({low_seeds} here, {full_seeds} there), or nothing recorded"


def numbers_text(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
