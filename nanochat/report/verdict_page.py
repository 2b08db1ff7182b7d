"""The verdict in words and tables: hypotheses in, blocks of nanochat/report/page.py out."""

from nanochat.report.pairing import MOST
from nanochat.report.verdict import (
    ALIKE,
    NOT_APPLICABLE,
    NOT_SUPPORTED,
    OPEN,
    SUPPORTED,
    UNDECIDED,
    Estimate,
    Hypothesis,
    Line,
)


def verdict_blocks(hypotheses: list[Hypothesis]) -> list[tuple]:
    """The verdict as blocks of a page (nanochat/report/page.py)."""
    blocks = [("heading", "The verdict")]
    left = {}  # item -> names of the hypotheses that leave it out
    for h in hypotheses:
        blocks += [("subheading", f"{h.name}: {h.verdict}"), ("paragraph", conclusion(h))]
        if h.lines:
            header = [
                "ratio to full rank",
                "estimate",
                f"{percent(h.each)} interval",
                "asked",
                "pairs (seeds)",
                "finding",
            ]
            blocks.append(("table", header, table_rows(h), "numbers"))
        if any(line.notes for line in h.lines):
            blocks.append(("list", noted(h.lines)))
        for item in h.left_out:
            left.setdefault(item, []).append(h.name)
    if left:
        items = [
            item if len(names) == len(hypotheses) else f"{item} ({', '.join(names)})"
            for item, names in left.items()
        ]
        blocks += [("subheading", "Left out of the verdict"), ("list", items)]
    return blocks + [("subheading", "How the verdict is made"), ("list", method(hypotheses))]


def noted(lines: tuple[Line, ...]) -> list[str]:
    """Each note once, with whom it concerns."""
    concerned = {}
    for line in lines:
        for note in line.notes:
            concerned.setdefault(note, []).append(line.name)
    return [
        f"{'all' if len(names) == len(lines) > 1 else '; '.join(names)}: {note}."
        for note, names in concerned.items()
    ]


def conclusion(h: Hypothesis) -> str:
    head = f"{h.claim[0].upper() + h.claim[1:]} ({h.asked}): **{h.verdict}**."
    if h.verdict == NOT_APPLICABLE:
        return f"{head} No runs speak to it: it needs {h.needs}."
    of = {v: [line for line in h.lines if line.verdict == v] for v in (SUPPORTED, NOT_SUPPORTED, UNDECIDED)}
    parts = [
        f"{label} for {len(of[v])} of {len(h.lines)}: {'; '.join(map(in_words, of[v]))}."
        for v, label in ((SUPPORTED, "Shown"), (NOT_SUPPORTED, "The contrary is shown"), (UNDECIDED, "Open"))
        if of[v]
    ]
    return " ".join([head, *parts])


def in_words(line: Line) -> str:
    ratios = ", ".join(f"{e.of.quantity} × {e.ratio:.3f}" for e in line.estimates if e.of.limit and e.ratio)
    words = f"{line.name} ({ratios})" if ratios else line.name
    return words + f", {wanted(line)}" * (line.verdict == UNDECIDED)


def wanted(line: Line) -> str:
    more = line.more
    if more is None:
        return f"so near to the margin that more than {MOST} seeds would be needed"
    no_spread = any(e.finding == OPEN and e.low is None for e in line.estimates)
    seeds = f"{'at least ' * no_spread}{more} more seed{'s' * (more > 1)} needed"
    return seeds if more else "measured and predicted memory disagree"


def table_rows(h: Hypothesis) -> list[list[str]]:
    rows = []
    for line in h.lines:
        rows.append([f"{line.name} against {line.baseline}: {line.verdict}"])
        for e in line.estimates:
            seeds = list(map(str, e.of.differences))
            rows.append(
                [
                    e.of.quantity,
                    number(e.ratio),
                    "–" if e.low is None else f"{number(e.low)} to {number(e.high)}",
                    f"below {e.of.limit:g}" if e.of.limit else "–",
                    f"{len(seeds)} ({', '.join(seeds)})" if 0 < len(seeds) <= 6 else f"{len(seeds)}",
                    in_short(e),
                ]
            )
    return rows


def in_short(e: Estimate) -> str:
    if e.finding != OPEN or e.more == 0:
        return e.finding or "–"
    return f"open: {f'over {MOST}' if e.more is None else e.more} more"


def number(ratio: float | None) -> str:
    """Two noisy pairs can leave an interval of many powers of ten: that it is wide is all that can be read off."""
    return (
        "–"
        if ratio is None
        else "over 1000"
        if ratio > 1000
        else "under 0.001"
        if ratio < 0.001
        else f"{ratio:.4f}"
    )


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def method(hypotheses: list[Hypothesis]) -> list[str]:
    """What was done, for whoever checks it."""
    each = ", ".join(f"{h.name} {percent(h.each)}" for h in hypotheses)
    return [
        f"**Pairs**: a low-rank and a full-rank run of the same {ALIKE}, so they saw the same rows in the same order; for H1 and H2 of "
        "the same depth and width too. Runs that repeat a seed and all settings count once, as their mean.",
        "**Interval**: of the pairs' differences of logarithms, mean ± Student's t × sd / √pairs, exponentiated. One pair has no interval "
        "and decides nothing.",
        f"**Several configurations**: Bonferroni. With so many configurations of two pairs or more, each interval is wider (H1 wants both time "
        f"and memory of one configuration): {each}. So the chance that any configuration is called supported wrongly is at most "
        f"{percent(1 - hypotheses[0].confidence)} a hypothesis. “Supported” means for at least one configuration, and the text names which.",
        "**Findings**: below, the whole interval is below the margin; not below, the whole interval is above it; open, neither. “Not "
        "supported”: the contrary is shown for every configuration. More seeds: the smallest number whose half-width would exclude the "
        "margin if the estimate and the spread stayed as they are. A spread from few seeds is itself uncertain.",
        "**Tuning**: where settings such as learning rates were scanned, best against best. A seed's setting is the one that is best on "
        "the other seeds; what was chosen on the seed itself is not counted. One setting on each side is no tuning: it may suit one of "
        "them better.",
        "**Time**: the median training step after a run's first 10, on the same device, dtype, processes, threads and rows a pass. The runs "
        "of a pair were made in separate processes at separate times: what else the machine did is in the spread over seeds as far as it "
        "changed from pair to pair; a drift between all runs of one kind and all of the other is not.",
        "**Memory**: on a GPU the measured peak of what torch allocated decides. On a CPU the resident set holds Python, libraries and "
        "what the allocator kept, so the predicted peak decides (all tensors at the highest point of a step that is not compiled: "
        "arithmetic, hence without spread) unless the resident set surely says the contrary; without a prediction the resident set "
        "decides. Weights, gradients and optimizer state leave out activations, which low rank can add to, so they decide nothing.",
    ]
