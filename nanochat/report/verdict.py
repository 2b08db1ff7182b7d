"""The verdict on H1, H2, H3 from finished runs alone: an estimate, its interval over seeds, and supported, not supported or undecided."""

import math
from dataclasses import dataclass, replace
from statistics import fmean

from nanochat.common import InputError
from nanochat.report.configurations import Configuration, finished, run_value
from nanochat.report.pairing import (
    CONTEXT,
    COST,
    FAMILY,
    LEARNING,
    RANK,
    SHAPE,
    by_seed,
    differences,
    ended,
    grouped,
    interval,
    key,
    seeds_to_settle,
    tuned,
    tuning,
    unlike,
)

SUPPORTED = "supported"
NOT_SUPPORTED = "not supported"
UNDECIDED = "undecided"
NOT_APPLICABLE = "not applicable"
BELOW = "below"  # where an interval lies beside its limit
ABOVE = "not below"
OPEN = "open"
ALIKE = "seed, text, tokenizer, tokens, batch and schedule"
STATES = ("mem/weights_bytes", "mem/grads_bytes", "mem/optimizer_bytes")


@dataclass(frozen=True)
class Comparison:
    """One quantity of a low-rank configuration over the same of its baseline, seed by seed."""

    quantity: str
    differences: dict[int, float]  # {seed: difference of logarithms}
    limit: float | None = None  # the ratio that decides must lie below it; None: for information
    checks: bool = False  # measured beside a prediction that decides: where it surely says the contrary, nothing is decided
    flattered: bool = False  # by settings chosen on the seeds compared, or by seeds that diverged: an estimate without an interval


@dataclass(frozen=True)
class Estimate:
    """A comparison with its interval. Ratios, not logarithms."""

    of: Comparison
    ratio: float | None
    low: float | None  # None with fewer than two pairs
    high: float | None
    finding: str  # BELOW, ABOVE or OPEN; "" without a limit
    more: (
        int | None
    )  # where OPEN: further seeds that would settle it if ratio and spread stay (0: none would); None: over MOST in all


@dataclass(frozen=True)
class Line:
    """One low-rank configuration against its baseline."""

    name: str
    baseline: str
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        found = {e.finding for e in self.estimates if e.of.limit}
        return NOT_SUPPORTED if ABOVE in found else SUPPORTED if found == {BELOW} else UNDECIDED

    @property
    def more(self) -> int | None:
        """Further seeds that would settle every open quantity; None: more than MOST in all."""
        needed = [e.more for e in self.estimates if e.finding == OPEN]
        return None if None in needed else max(needed, default=0)


@dataclass(frozen=True)
class Hypothesis:
    name: str  # "H1"
    claim: str
    asked: str  # the margin, in words
    needs: str  # which runs would speak to it
    lines: tuple[Line, ...]
    confidence: float  # of all intervals together
    each: float  # of each interval
    left_out: tuple[str, ...]  # "run or configuration: why"

    @property
    def verdict(self) -> str:
        """Supported if it is for at least one configuration, after correction for their number; not supported if for none it can be."""
        found = {line.verdict for line in self.lines}
        if not found:
            return NOT_APPLICABLE
        return SUPPORTED if SUPPORTED in found else NOT_SUPPORTED if found == {NOT_SUPPORTED} else UNDECIDED


def verdict(
    configs: list[Configuration],
    margin_time: float = 0.0,
    margin_memory: float = 0.0,
    margin_ppl: float = 0.05,
    confidence: float = 0.95,
    equal_params: float = 0.02,
) -> list[Hypothesis]:
    """H1, H2, H3 from the finished runs.

    margin_time, margin_memory: by what share less than full rank counts as less (0: any). margin_ppl: the share of perplexity that is
    "little": 0.05 is half of what a full-rank model loses when it is made half as large at 1e9 parameters, by the fit of Hoffmann et al.
    (arXiv 2203.15556: 0.094 nats, 10 %), and many times what two seeds usually differ by. equal_params: the share by which "equal" numbers
    of parameters may differ. InputError: a share out of range, or runs of several validation texts or tokenizers.
    """
    for flag, share, high in (
        ("--margin-time", margin_time, 1),
        ("--margin-memory", margin_memory, 1),
        ("--margin-ppl", margin_ppl, math.inf),
        ("--equal-params", equal_params, 1),
    ):
        if not 0 <= share < high:
            raise InputError(
                f"{flag} {share:g}: give a share such as 0.05, at least 0"
                + (" and below 1" if high == 1 else "")
            )
    if not 0.5 <= confidence < 1:
        raise InputError(f"--confidence {confidence:g}: give a share from 0.5 to below 1, such as 0.95")
    configs = [
        c for c in configs if not c.method
    ]  # adapters and subspaces are neither low rank nor what it is compared with
    check_one_text(configs)
    left = [
        f"{run.name}: {run.summary.get('status', 'unfinished')}, not finished"
        for c in configs
        for run in c.runs
        if not finished(run)
    ]
    left += [
        f"{run.name}: ended before all of its tokens, so its perplexity is left out"
        for c in configs
        for run in c.runs
        if finished(run) and not ended(run)
    ]
    usable = [c for c in configs if any(map(finished, c.runs))]
    low = [c for c in usable if c.low_rank]
    full = [c for c in usable if not c.low_rank]

    def hypothesis(name, claim, asked, needs, found):
        lines, unpaired = found
        count = sum(
            any(c.limit and not c.flattered and len(c.differences) > 1 for c in line[2]) for line in lines
        )
        each = 1 - (1 - confidence) / max(
            1, count
        )  # Bonferroni, over the configurations that could be decided
        return Hypothesis(
            name,
            claim,
            asked,
            needs,
            tuple(judged(line, each) for line in lines),
            confidence,
            each,
            tuple(left + unpaired),
        )

    return [
        hypothesis(
            "H1",
            "low-rank layers train with less memory and less time per step than full rank",
            f"time per step below × {1 - margin_time:g} and memory below × {1 - margin_memory:g}",
            f"finished low-rank and full-rank runs of the same {ALIKE}, depth, width and per-device batch, on the same device",
            cost_lines(low, full, 1 - margin_time, 1 - margin_memory),
        ),
        hypothesis(
            "H2",
            "low rank in both attention and MLP costs little perplexity",
            f"perplexity below × {1 + margin_ppl:g}",
            f"finished runs with low rank in both attention and MLP, and full-rank runs of the same {ALIKE}, depth and width",
            perplexity_lines(
                [c for c in low if factored_in(c, "attn", "qkvo") and factored_in(c, "mlp", ("up", "down"))],
                full,
                1 + margin_ppl,
            ),
        ),
        hypothesis(
            "H3",
            "at equal parameters a deeper low-rank network beats the full-rank baseline",
            f"perplexity below × 1, with numbers of parameters within {100 * equal_params:g} %",
            f"finished low-rank runs that are deeper than a full-rank run of the same {ALIKE} and have its number of parameters (a tied "
            "layer counts as often as it is executed)",
            deeper_lines(low, full, equal_params),
        ),
    ]


def factored_in(config: Configuration, group: str, matrices) -> bool:
    """Whether the group, attn or mlp, or at least one of its matrices has a rank."""
    single = dict(part.split("=") for part in (config.settings.get("matrix_ranks") or "").split(",") if part)
    ranks = [rank for name in matrices for rank in single.get(name, "0").split("/")]  # one a layer: "64/64/0"
    return bool(config.settings.get(f"{group}_rank")) or any(rank not in ("0", "full") for rank in ranks)


def check_one_text(configs: list[Configuration]):
    """InputError where finished runs were evaluated on different texts or through different tokenizers."""
    for name, what in (("val_fingerprint", "validation text"), ("tokenizer_hash", "tokenizer")):
        groups = grouped([c for c in configs if any(map(finished, c.runs))], lambda c: c.settings.get(name))
        if len(groups) > 1:
            some = " / ".join(
                ", ".join(shorten([run.name for c in group for run in c.runs])) for group in groups
            )
            offer = (
                "bits per byte (val/bpb) do, on one text; "
                if name == "tokenizer_hash"
                else "neither do bits per byte; "
            )
            raise InputError(
                f"runs {some}: not of one {what}, so their perplexities do not compare; {offer}"
                f"for a verdict report each {what} by itself"
            )


def shorten(names: list[str]) -> list[str]:
    return names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]


# ---- the comparisons of each hypothesis: (name, baseline, comparisons, notes) -----------------------------------------------------


def cost_lines(low, full, time_limit: float, memory_limit: float) -> tuple[list[tuple], list[str]]:
    """Time and memory do not depend on learning rates: the runs of one seed at several count as their mean."""
    alike = (*CONTEXT, *SHAPE, *COST)
    lines = []
    unpaired = []
    for group in grouped(
        low, lambda c: tuple(sorted((k, str(v)) for k, v in c.settings.items() if k not in LEARNING))
    ):
        partners = [c for c in full if key(c, alike) == key(group[0], alike)]
        if not partners:
            unpaired.append(f"{common_name(group)}: {unlike(group[0], full, alike)}")
            continue

        def of(quantity):
            return differences(by_seed(group, quantity), by_seed(partners, quantity))

        peak = of("mem/peak_bytes")
        predicted = of("mem/predicted_peak_bytes")
        comparisons = [Comparison("time per step", of("step_time"), time_limit)]
        if predicted and group[0].settings.get("device_type") != "cuda":
            comparisons += [
                Comparison("predicted peak memory", predicted, memory_limit),
                Comparison("peak resident set", peak, checks=True),
            ]
        else:
            comparisons += [
                Comparison("measured peak memory", peak, memory_limit),
                Comparison("predicted peak memory", predicted),
            ]
        comparisons += [
            Comparison(
                "weights, gradients, optimizer",
                of(lambda run: sum(run.summary.get(k, math.nan) for k in STATES)),
            )
        ]
        if not any(c.differences for c in comparisons):
            unpaired.append(f"{common_name(group)}: {seeds_apart(group, partners)}")
            continue
        lines.append(
            (
                common_name(group),
                common_name(partners),
                [c for c in comparisons if c.limit or c.differences],
                [],
            )
        )
    return lines, unpaired


def perplexity_lines(low, full, limit: float) -> tuple[list[tuple], list[str]]:
    """Each rank that spares parameters, at its best settings, against full rank, same shape, at its best."""
    alike = (*CONTEXT, *SHAPE)
    lines = []
    unpaired = []
    for group in grouped(low, lambda c: key(c, (*alike, *RANK))):
        partners = [c for c in full if key(c, alike) == key(group[0], alike)]
        if not partners:
            unpaired.append(f"{common_name(group)}: {unlike(group[0], full, alike)}")
            continue
        share = parameters(group[0], partners[0])
        if share and share >= 0.99:
            unpaired.append(
                f"{common_name(group)}: spares nothing, it has × {share:.3f} the parameters of {common_name(partners)}"
            )
            continue
        comparison, notes = tuned_comparison(group, partners, limit)
        if comparison:
            lines.append(
                (
                    common_name(group),
                    common_name(partners) + (f", parameters × {share:.3f}" if share else ""),
                    [comparison],
                    notes,
                )
            )
        else:
            unpaired.append(f"{common_name(group)}: {seeds_apart(group, partners)}")
    return lines, unpaired


def deeper_lines(low, full, tolerance: float) -> tuple[list[tuple], list[str]]:
    """Each deeper low-rank shape against the best full-rank shape of as many parameters: the hardest baseline that the runs offer."""
    alike = (*CONTEXT, *FAMILY)
    lines = []
    unpaired = []
    for group in grouped(low, lambda c: key(c, (*CONTEXT, *SHAPE, *RANK))):
        shallower = [
            c for c in full if key(c, alike) == key(group[0], alike) and positions(c) < positions(group[0])
        ]
        shares = {c.name: share for c in shallower if (share := parameters(group[0], c)) is not None}
        equal = [c for c in shallower if abs(shares.get(c.name, math.inf) - 1) <= tolerance + 1e-9]
        if not equal:
            if shares:
                near = min(shares, key=lambda name: abs(shares[name] - 1))
                unpaired.append(
                    f"{common_name(group)}: deeper, but with × {shares[near]:.3f} the parameters of {near}"
                )
            continue
        found = []
        for partners in grouped(equal, lambda c: key(c, SHAPE)):
            comparison, notes = tuned_comparison(group, partners, 1.0)
            if comparison:
                best = min((m for c in partners if (m := c.mean("val/ppl")) is not None), default=math.inf)
                found.append(
                    (
                        best,
                        f"{common_name(partners)}, parameters × {shares[partners[0].name]:.3f}",
                        comparison,
                        notes,
                    )
                )
        if found:
            best, baseline, comparison, notes = min(found, key=lambda f: f[0])
            others = (
                [f"the best of {len(found)} full-rank shapes of as many parameters is the baseline"]
                if len(found) > 1
                else []
            )
            lines.append((common_name(group), baseline, [comparison], notes + others))
        else:
            unpaired.append(f"{common_name(group)}: {seeds_apart(group, equal)}")
    return lines, unpaired


def positions(config: Configuration) -> int:
    """How many layers a token passes, one that is executed again counted again."""
    layer_map = config.settings.get("layer_map")
    return len(layer_map.split(",")) if layer_map else config.settings.get("depth", 0)


def parameters(config: Configuration, base: Configuration) -> float | None:
    ours = config.mean("params/total")
    theirs = base.mean("params/total")
    return ours / theirs if ours and theirs else None


def perplexity(run) -> float | None:
    """Infinite where the run diverged, so that a scan does not choose what diverges on other seeds."""
    return run_value(run, "val/ppl") or (math.inf if "val/ppl" in run.summary else None)


def tuned_comparison(low, full, limit: float) -> tuple[Comparison | None, list[str]]:
    """Perplexities of the best settings on each side, and what to know about how they were chosen. None: no seed in common."""
    ours, theirs = (
        tuned([by_seed(group, perplexity, ended) for group in grouped(side, tuning)]) for side in (low, full)
    )
    pairs = differences(ours.fair, theirs.fair)
    flattered = differences(ours.fair | ours.peeked, theirs.fair | theirs.peeked)
    notes = []
    if ours.tried != theirs.tried:
        notes.append(
            f"uneven tuning: {theirs.tried} setting{'s' * (theirs.tried > 1)} for full rank, {ours.tried} for low rank "
            f"({differing_settings(low + full)}); that favours {'full' if theirs.tried > ours.tried else 'low'} rank"
        )
    elif ours.tried > 1:
        notes.append(
            f"{ours.tried} settings were tried on each side ({differing_settings(low + full)}); each seed is compared at "
            "the setting that is best on the other seeds"
        )
    if pairs and (spent := sorted(flattered.keys() - pairs.keys())):
        notes.append(f"seed {', '.join(map(str, spent))} served to choose the settings and is not counted")
    if lonely := sorted((ours.fair | ours.peeked).keys() - (theirs.fair | theirs.peeked).keys()):
        notes.append(f"seed {', '.join(map(str, lonely))} has no full-rank run and is not counted")
    if not pairs and flattered:
        notes.append(
            "the settings were chosen on the very seeds compared, which flatters them: run the chosen ones on other seeds"
        )
    counted = pairs or flattered
    diverged = [s for s, difference in counted.items() if not math.isfinite(difference)]
    if diverged:
        notes.append(
            f"seed {', '.join(map(str, diverged))} diverged, and a mean without it would flatter: choose settings that are stable "
            "on all seeds"
        )
    if not counted:
        return None, []
    finite = {s: difference for s, difference in counted.items() if s not in diverged}
    return Comparison("perplexity", finite, limit, flattered=bool(diverged) or not pairs), notes


def differing_settings(configs) -> str:
    settings = [dict(tuning(c)) for c in configs]
    names = [name.replace("_", " ") for name in settings[0] if len({s.get(name) for s in settings}) > 1]
    return ", ".join(names) or "the same ones"


def common_name(configs: list[Configuration]) -> str:
    """The parts that the names share."""
    shared = [
        part for part in configs[0].name.split(", ") if all(part in c.name.split(", ") for c in configs)
    ]
    return ", ".join(shared) or configs[0].name


def seeds_apart(low, full) -> str:
    ours, theirs = (", ".join(map(str, by_seed(side, "val/ppl"))) or "none" for side in (low, full))
    return f"no seed in common with full rank ({ours} here, {theirs} there), or nothing recorded"


# ---- from differences to findings --------------------------------------------------------------------------------------


def judged(line: tuple, confidence: float) -> Line:
    name, baseline, comparisons, notes = line
    estimates = [estimate(c, confidence) for c in comparisons]
    measured = next((e for e in estimates if e.of.checks and e.low), None)
    for i, e in enumerate(estimates):
        if (
            measured
            and e.of.quantity == "predicted peak memory"
            and (measured.low > 1 > e.ratio or measured.high < 1 < e.ratio)
        ):
            estimates[i] = replace(e, finding=OPEN, more=0)
            notes = [
                *notes,
                "the measured resident set says the contrary of the predicted peak, so memory is not decided",
            ]
    return Line(name, baseline, tuple(estimates), tuple(notes))


def estimate(c: Comparison, confidence: float) -> Estimate:
    values = list(c.differences.values())
    ratio = math.exp(fmean(values)) if values else None
    bounds = None if c.flattered else interval(values, confidence)
    low, high = map(math.exp, bounds) if bounds else (None, None)
    if c.limit is None:
        return Estimate(c, ratio, low, high, "", 0)
    finding = (
        OPEN
        if bounds is None
        else BELOW
        if high < c.limit
        else ABOVE
        if low > c.limit or low == high == c.limit
        else OPEN
    )
    usable = [] if c.flattered else values
    total = seeds_to_settle(usable, math.log(c.limit), confidence)
    return Estimate(
        c,
        ratio,
        low,
        high,
        finding,
        None if total is None else max(1, total - len(usable)) if finding == OPEN else 0,
    )
