"""The verdict on H1, H2 and H3 from finished runs alone.

Each ratio of low rank to full rank gets an interval over seeds, and each hypothesis is supported, not
supported or undecided. comparisons.py pairs the runs, verdict_page.py prints the result.
"""

import math
from dataclasses import dataclass, replace
from statistics import fmean

from nanochat.errors import InputError
from nanochat.report.comparisons import (
    Case,
    Cases,
    Comparison,
    cost_cases,
    deeper_cases,
    has_low_rank,
    perplexity_cases,
)
from nanochat.report.configurations import Configuration, finished
from nanochat.report.pairing import group_by, interval, seeds_to_settle, trained_in_full

SUPPORTED = "supported"
NOT_SUPPORTED = "not supported"
UNDECIDED = "undecided"
NOT_APPLICABLE = "not applicable"
BELOW = "below"  # the whole interval lies below the limit
NOT_BELOW = "not below"  # the whole interval lies above the limit
OPEN = "open"  # neither
SAME_IN_PAIRS = "seed, text, tokenizer, tokens, batch and schedule"


@dataclass(frozen=True)
class Estimate:
    """A comparison with its interval. Ratios, not logarithms."""

    comparison: Comparison
    ratio: float | None
    low: float | None  # None with fewer than two pairs
    high: float | None
    finding: str  # BELOW, NOT_BELOW or OPEN; "" without a limit
    # how many more seeds would settle an OPEN estimate if ratio and spread stay the same. 0: no number of
    # seeds would. None: more than MAX_SEEDS in all
    seeds_needed: int | None


@dataclass(frozen=True)
class CaseVerdict:
    """A case, decided. See Case."""

    name: str
    baseline: str
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        findings = {estimate.finding for estimate in self.estimates if estimate.comparison.limit}
        if NOT_BELOW in findings:
            return NOT_SUPPORTED
        return SUPPORTED if findings == {BELOW} else UNDECIDED

    @property
    def seeds_needed(self) -> int | None:
        """Further seeds that would settle every open quantity; None: more than MAX_SEEDS in all."""
        needed = [estimate.seeds_needed for estimate in self.estimates if estimate.finding == OPEN]
        return None if None in needed else max(needed, default=0)


@dataclass(frozen=True)
class Claim:
    """What a hypothesis says, in words."""

    name: str  # "H1"
    text: str
    criterion: str  # which ratio must be below which margin
    needs: str  # the runs that could decide it


@dataclass(frozen=True)
class Hypothesis:
    """A claim with its evidence."""

    claim: Claim
    cases: tuple[CaseVerdict, ...]
    confidence: float  # of all intervals together
    case_confidence: float  # of each interval
    left_out: tuple[str, ...]  # "run or configuration: why"

    @property
    def verdict(self) -> str:
        """Supported if one case or more is; not supported if the contrary is shown for every case.

        The intervals are corrected for the number of cases.
        """
        verdicts = {case.verdict for case in self.cases}
        if not verdicts:
            return NOT_APPLICABLE
        if SUPPORTED in verdicts:
            return SUPPORTED
        return NOT_SUPPORTED if verdicts == {NOT_SUPPORTED} else UNDECIDED


def verdict(
    configs: list[Configuration],
    margin_time: float = 0.0,
    margin_memory: float = 0.0,
    margin_ppl: float = 0.05,
    confidence: float = 0.95,
    equal_params: float = 0.02,
) -> list[Hypothesis]:
    """H1, H2 and H3 from the finished runs.

    margin_time, margin_memory: the share by which low rank must need less than full rank (0: any less will
    do). margin_ppl: the share of perplexity that counts as little. 0.05 is half of what a full-rank model of
    1e9 parameters loses when it is made half as large, by the fit of Hoffmann et al. (arXiv 2203.15556: 0.094
    nats, 10 %), and many times what two seeds usually differ by. equal_params: the share by which equal
    numbers of parameters may differ. InputError: a share out of range, or runs of several validation texts or
    tokenizers.
    """
    check_share("--margin-time", margin_time)
    check_share("--margin-memory", margin_memory)
    check_share("--margin-ppl", margin_ppl, end=math.inf)
    check_share("--equal-params", equal_params)
    if not 0.5 <= confidence < 1:
        raise InputError(f"--confidence {confidence:g}: give a share from 0.5 to below 1, such as 0.95")
    # adapters and subspaces are neither low rank nor its baseline
    configs = [c for c in configs if not c.method]
    check_one_text(configs)
    usable = [c for c in configs if any(map(finished, c.runs))]
    low = [c for c in usable if c.low_rank]
    full = [c for c in usable if not c.low_rank]
    both = [c for c in low if has_low_rank(c, "attn", "qkvo") and has_low_rank(c, "mlp", ("up", "down"))]
    time_limit = 1 - margin_time
    memory_limit = 1 - margin_memory
    ppl_limit = 1 + margin_ppl
    evidence = [
        (cost_claim(time_limit, memory_limit), cost_cases(low, full, time_limit, memory_limit)),
        (perplexity_claim(ppl_limit), perplexity_cases(both, full, ppl_limit)),
        (depth_claim(equal_params), deeper_cases(low, full, equal_params)),
    ]
    left_out = unusable_runs(configs)
    return [judge_claim(claim, cases, left_out, confidence) for claim, cases in evidence]


# ---- the claims --------------------------------------------------------------------------------------------


def cost_claim(time_limit: float, memory_limit: float) -> Claim:
    return Claim(
        "H1",
        "low-rank layers train with less memory and less time per step than full rank",
        f"time per step below × {time_limit:g} and memory below × {memory_limit:g}",
        f"finished low-rank and full-rank runs of the same {SAME_IN_PAIRS}, depth, width and per-device "
        "batch, on the same device",
    )


def perplexity_claim(limit: float) -> Claim:
    return Claim(
        "H2",
        "low rank in both attention and MLP costs little perplexity",
        f"perplexity below × {limit:g}",
        "finished runs with low rank in both attention and MLP, and full-rank runs of the same "
        f"{SAME_IN_PAIRS}, depth and width",
    )


def depth_claim(equal_params: float) -> Claim:
    return Claim(
        "H3",
        "at equal parameters a deeper low-rank network beats the full-rank baseline",
        f"perplexity below × 1, with numbers of parameters within {100 * equal_params:g} %",
        f"finished low-rank runs that are deeper than a full-rank run of the same {SAME_IN_PAIRS} and have "
        "its number of parameters (a tied layer counts as often as it is executed)",
    )


# ---- checks ------------------------------------------------------------------------------------------------


def check_share(flag: str, share: float, end: float = 1):
    if not 0 <= share < end:
        bound = " and below 1" if end == 1 else ""
        raise InputError(f"{flag} {share:g}: give a share such as 0.05, at least 0{bound}")


def check_one_text(configs: list[Configuration]):
    """InputError if finished runs were evaluated on different texts or with different tokenizers."""
    usable = [config for config in configs if any(map(finished, config.runs))]
    texts = group_by(usable, lambda config: config.settings.get("val_fingerprint"))
    tokenizers = group_by(usable, lambda config: config.settings.get("tokenizer_hash"))
    check_one_group(texts, "validation text", "neither do bits per byte")
    check_one_group(tokenizers, "tokenizer", "bits per byte (val/bpb) do, on one text")


def check_one_group(groups: list[list[Configuration]], noun: str, remedy: str):
    if len(groups) > 1:
        raise InputError(
            f"runs {' / '.join(map(run_names, groups))}: not of one {noun}, so their perplexities do not "
            f"compare; {remedy}; for a verdict report each {noun} by itself"
        )


def run_names(configs: list[Configuration]) -> str:
    names = [run.name for config in configs for run in config.runs]
    if len(names) > 4:
        names = [*names[:3], f"{len(names) - 3} more"]
    return ", ".join(names)


def unusable_runs(configs: list[Configuration]) -> list[str]:
    """A line on each run that is unfinished, and then on each that ended early."""
    runs = [run for config in configs for run in config.runs]
    unfinished = []
    shortened = []
    for run in runs:
        if not finished(run):
            unfinished.append(f"{run.name}: {run.summary.get('status', 'unfinished')}, not finished")
        elif not trained_in_full(run):
            shortened.append(f"{run.name}: ended before all of its tokens, so its perplexity is left out")
    return unfinished + shortened


# ---- from differences to findings --------------------------------------------------------------------------


def judge_claim(claim: Claim, cases: Cases, left_out: list[str], confidence: float) -> Hypothesis:
    """Bonferroni's correction: the confidence holds for all cases that could be decided, taken together."""
    compared, excluded = cases
    decidable = [case for case in compared if any(map(can_decide, case.comparisons))]
    case_confidence = 1 - (1 - confidence) / max(1, len(decidable))
    verdicts = tuple(judge_case(case, case_confidence) for case in compared)
    return Hypothesis(claim, verdicts, confidence, case_confidence, tuple(left_out + excluded))


def can_decide(comparison: Comparison) -> bool:
    return bool(comparison.limit and not comparison.biased and len(comparison.differences) > 1)


def judge_case(case: Case, confidence: float) -> CaseVerdict:
    estimates = [estimate(comparison, confidence) for comparison in case.comparisons]
    notes = list(case.notes)
    measured = next((e for e in estimates if e.comparison.cross_check and e.low), None)
    for i, predicted in enumerate(estimates):
        if predicted.comparison.quantity == "predicted peak memory" and contradicts(measured, predicted):
            estimates[i] = replace(predicted, finding=OPEN, seeds_needed=0)
            notes.append(
                "the measured resident set says the contrary of the predicted peak, so memory is not decided"
            )
    return CaseVerdict(case.name, case.baseline, tuple(estimates), tuple(notes))


def contradicts(measured: Estimate | None, predicted: Estimate) -> bool:
    """Whether the whole measured interval lies on the other side of 1 than the prediction."""
    if not measured:
        return False
    return measured.low > 1 > predicted.ratio or measured.high < 1 < predicted.ratio


def estimate(comparison: Comparison, confidence: float) -> Estimate:
    values = list(comparison.differences.values())
    ratio = math.exp(fmean(values)) if values else None
    bounds = None if comparison.biased else interval(values, confidence)
    low, high = map(math.exp, bounds) if bounds else (None, None)
    if comparison.limit is None:
        return Estimate(comparison, ratio, low, high, "", 0)
    finding = classify(low, high, comparison.limit)
    if finding != OPEN:
        return Estimate(comparison, ratio, low, high, finding, 0)
    usable = [] if comparison.biased else values
    total = seeds_to_settle(usable, math.log(comparison.limit), confidence)
    needed = None if total is None else max(1, total - len(usable))
    return Estimate(comparison, ratio, low, high, finding, needed)


def classify(low: float | None, high: float | None, limit: float) -> str:
    """Where the interval lies. One without width that is equal to the limit is not below it."""
    if low is None:
        return OPEN
    if high < limit:
        return BELOW
    if low > limit or low == high == limit:
        return NOT_BELOW
    return OPEN
