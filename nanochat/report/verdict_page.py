"""The verdict in words and tables: hypotheses in, blocks of nanochat/report/page.py out."""

from nanochat.report.pairing import MAX_SEEDS
from nanochat.report.verdict import (
    NOT_APPLICABLE,
    NOT_SUPPORTED,
    OPEN,
    SAME_IN_PAIRS,
    SUPPORTED,
    UNDECIDED,
    CaseVerdict,
    Estimate,
    Hypothesis,
)


def verdict_blocks(hypotheses: list[Hypothesis]) -> list[tuple]:
    blocks = [("heading", "The verdict")]
    for hypothesis in hypotheses:
        blocks += hypothesis_blocks(hypothesis)
    left_out = left_out_lines(hypotheses)
    if left_out:
        blocks += [("subheading", "Left out of the verdict"), ("list", left_out)]
    return [*blocks, ("subheading", "How the verdict is made"), ("list", method_notes(hypotheses))]


def hypothesis_blocks(hypothesis: Hypothesis) -> list[tuple]:
    blocks = [
        ("subheading", f"{hypothesis.claim.name}: {hypothesis.verdict}"),
        ("paragraph", conclusion(hypothesis)),
    ]
    if hypothesis.cases:
        interval = f"{percent(hypothesis.case_confidence)} interval"
        header = ["ratio to full rank", "estimate", interval, "margin", "pairs (seeds)", "finding"]
        blocks.append(("table", header, table_rows(hypothesis), "numbers"))
    notes = note_lines(hypothesis.cases)
    if notes:
        blocks.append(("list", notes))
    return blocks


def left_out_lines(hypotheses: list[Hypothesis]) -> list[str]:
    """Each run or configuration that is left out, once. Behind it the hypotheses, unless all leave it out."""
    names_by_item = {}
    for hypothesis in hypotheses:
        for item in hypothesis.left_out:
            names_by_item.setdefault(item, []).append(hypothesis.claim.name)
    return [
        item if len(names) == len(hypotheses) else f"{item} ({', '.join(names)})"
        for item, names in names_by_item.items()
    ]


def note_lines(cases: tuple[CaseVerdict, ...]) -> list[str]:
    """Each note once, with the cases that it concerns."""
    names_by_note = {}
    for case in cases:
        for note in case.notes:
            names_by_note.setdefault(note, []).append(case.name)
    return [
        f"{'all' if len(names) == len(cases) > 1 else '; '.join(names)}: {note}."
        for note, names in names_by_note.items()
    ]


def conclusion(hypothesis: Hypothesis) -> str:
    claim = hypothesis.claim
    text = f"{claim.text[0].upper() + claim.text[1:]} ({claim.criterion}): **{hypothesis.verdict}**."
    if hypothesis.verdict == NOT_APPLICABLE:
        return f"{text} No run can test it: it needs {claim.needs}."
    for verdict, label in (
        (SUPPORTED, "Shown"),
        (NOT_SUPPORTED, "The contrary is shown"),
        (UNDECIDED, "Open"),
    ):
        cases = [case_text(case) for case in hypothesis.cases if case.verdict == verdict]
        if cases:
            text += f" {label} for {len(cases)} of {len(hypothesis.cases)}: {'; '.join(cases)}."
    return text


def case_text(case: CaseVerdict) -> str:
    ratios = [
        f"{estimate.comparison.quantity} × {estimate.ratio:.3f}"
        for estimate in case.estimates
        if estimate.comparison.limit and estimate.ratio
    ]
    text = f"{case.name} ({', '.join(ratios)})" if ratios else case.name
    return f"{text}, {what_would_settle(case)}" if case.verdict == UNDECIDED else text


def what_would_settle(case: CaseVerdict) -> str:
    needed = case.seeds_needed
    if needed is None:
        return f"so near to the margin that more than {MAX_SEEDS} seeds would be needed"
    if needed == 0:
        return "measured and predicted memory disagree"
    seeds = "1 more seed" if needed == 1 else f"{needed} more seeds"
    no_spread = any(estimate.finding == OPEN and estimate.low is None for estimate in case.estimates)
    return f"at least {seeds} needed" if no_spread else f"{seeds} needed"


def table_rows(hypothesis: Hypothesis) -> list[list[str]]:
    """For each case a row of its own with its verdict, and then a row for each quantity."""
    rows = []
    for case in hypothesis.cases:
        rows.append([f"{case.name} against {case.baseline}: {case.verdict}"])
        rows += [estimate_row(estimate) for estimate in case.estimates]
    return rows


def estimate_row(estimate: Estimate) -> list[str]:
    comparison = estimate.comparison
    bounds = "–" if estimate.low is None else f"{ratio_text(estimate.low)} to {ratio_text(estimate.high)}"
    seeds = list(map(str, comparison.differences))
    count = f"{len(seeds)} ({', '.join(seeds)})" if 0 < len(seeds) <= 6 else f"{len(seeds)}"
    return [
        comparison.quantity,
        ratio_text(estimate.ratio),
        bounds,
        f"below {comparison.limit:g}" if comparison.limit else "–",
        count,
        finding_text(estimate),
    ]


def finding_text(estimate: Estimate) -> str:
    if estimate.finding != OPEN or estimate.seeds_needed == 0:
        return estimate.finding or "–"
    if estimate.seeds_needed is None:
        return f"open: over {MAX_SEEDS} more"
    return f"open: {estimate.seeds_needed} more"


def ratio_text(ratio: float | None) -> str:
    """The bound of an interval over many powers of ten, as two noisy pairs can have, is not written out."""
    if ratio is None:
        return "–"
    if ratio > 1000:
        return "over 1000"
    if ratio < 0.001:
        return "under 0.001"
    return f"{ratio:.4f}"


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def method_notes(hypotheses: list[Hypothesis]) -> list[str]:
    """How the verdict is made, for a reader who checks it."""
    each = ", ".join(f"{h.claim.name} {percent(h.case_confidence)}" for h in hypotheses)
    error_rate = percent(1 - hypotheses[0].confidence)
    return [
        f"**Pairs**: a low-rank and a full-rank run of the same {SAME_IN_PAIRS}, so both saw the same rows "
        "in the same order. For H1 and H2 their depth and width are the same too. Runs that repeat a seed "
        "with all settings count once, as their mean.",
        "**Interval**: over the pairs' differences of logarithms, mean ± Student's t × sd / √pairs; its "
        "exponential is the interval of the ratio. One pair has no interval and decides nothing.",
        "**Several configurations**: Bonferroni's correction. The more configurations have two pairs or "
        f"more, the wider each interval is: {each}. So the chance that any configuration is wrongly called "
        f"supported is at most {error_rate} for each hypothesis. “Supported” means for at least one "
        "configuration; the text names which. For H1 one configuration has to show both, less time and "
        "less memory.",
        "**Findings**: “below”, the whole interval is below the margin; “not below”, the whole interval is "
        "above it; “open”, neither. “Not supported” means that the contrary is shown for every "
        "configuration. “More” seeds are the fewest that would exclude the margin if the estimate and the "
        "spread stayed as they are. A spread over few seeds is itself uncertain.",
        "**Tuning**: where several settings were tried, such as learning rates, the best of low rank is "
        "compared with the best of full rank. Each seed is taken at the setting that is best on the other "
        "seeds; a seed on which the setting was chosen is not counted. One setting on each side is no "
        "tuning: it may suit one side better than the other.",
        "**Time**: the median training step after a run's first 10, on the same device, dtype, processes, "
        "threads and rows a pass. The runs of a pair were separate processes at different times. What else "
        "the machine did shows in the spread over seeds if it changed from pair to pair, but not if it "
        "slowed all runs of one kind.",
        "**Memory**: on a GPU the measured peak of what torch allocated decides. On a CPU the resident set "
        "also holds Python, libraries and what the allocator kept, so the predicted peak decides: the sum "
        "of all tensors at the highest point of a step that is not compiled. It is computed, so it has no "
        "spread. If the resident set surely says the contrary, nothing is decided; without a prediction "
        "the resident set decides. Weights, gradients and optimizer state do not include activations, "
        "which low rank can add to, so they decide nothing.",
    ]
