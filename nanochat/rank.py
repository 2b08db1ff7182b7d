"""Ranks without torch: the whole rank of one matrix, the rank of each layer, and ranks as text.

A rank is 0 (full), a whole number, or a fraction in (0, 1) of the matrix's smaller side. A whole number stays
as it is. A fraction becomes a multiple of --rank-multiple. The reason: the matrix units of a GPU read rows in
pieces of 16 bytes, which are 8 numbers in bfloat16, and compute in blocks of 64 numbers or so. For example,
0.297 of 1280 is 380.16. A row of 380 numbers ends inside a piece, a row of 384 numbers at the end of one.
"""

AUTOMATIC = -1  # --rank-multiple: from 1024 rows and columns on 64, from 256 on 8, below as given


def rank_step(multiple: int, smaller: int) -> int:
    """The number of which ranks given as fractions become multiples. smaller: the matrix's smaller side."""
    if multiple != AUTOMATIC:
        return multiple if multiple <= smaller else 1
    if smaller >= 1024:
        return 64
    return 8 if smaller >= 256 else 1


def resolve_rank(rank: float, in_features: int, out_features: int, multiple: int = 1) -> int:
    """A rank as given -> the whole rank of one matrix; 0 stays 0 (full). ValueError above min(in, out).

    A fraction becomes the nearest multiple, at least one and at most what fits into min(in, out).
    """
    smaller = min(in_features, out_features)
    if 0 < rank < 1:
        step = rank_step(multiple, smaller)
        nearest = max(1, round(rank * smaller / step))
        return step * min(nearest, smaller // step)
    if rank < 0 or rank > smaller or rank != int(rank):
        raise ValueError(
            f"rank {rank:g} does not fit a {out_features} x {in_features} matrix: "
            f"give 0 (full), 1 to {smaller}, or a fraction between 0 and 1"
        )
    return int(rank)


# ---- rank schedules ----------------------------------------------------------------------------------------


def ranks_over_depth(schedule: str, start: float, end: float, depth: int) -> tuple[float, ...]:
    """The rank of each layer, first to last. schedule: one of flag_types.SCHEDULES.

    With t from 0 at the first layer to 1 at the last:

    constant     start everywhere
    linear       start + (end - start)·t
    step         start in the first half of the layers, end in the second
    exponential  start·(end/start)^t
    quadratic    start in the middle, end at both ends: start - (start - end)·(2t - 1)²

    Integer ranks are rounded; if start and end are fractions (of min(in, out)) so are the results.
    """
    ranks = [rank_at(schedule, start, end, layer / max(1, depth - 1)) for layer in range(depth)]
    return tuple(ranks) if 0 < start < 1 else tuple(round(rank) for rank in ranks)


def rank_at(schedule: str, start: float, end: float, t: float) -> float:
    if schedule == "constant":
        return start
    if schedule == "linear":
        return start + (end - start) * t
    if schedule == "step":
        return start if t <= 0.5 else end
    if schedule == "exponential":
        return start * (end / start) ** t if start > 0 and end > 0 else 0
    return start - (start - end) * (2 * t - 1) ** 2  # quadratic


# ---- ranks as text -----------------------------------------------------------------------------------------


def matrix_ranks_text(ranks: dict[str, tuple[float, ...]]) -> str:
    """{'v': (0,), 'down': (64, 128)} -> 'down=64/128,v=0', as --matrix-ranks takes it."""
    parts = []
    for name in sorted(ranks):
        words = [f"{rank:g}" for rank in ranks[name]]
        parts.append(f"{name}={'/'.join(words)}")
    return ",".join(parts)


def shortest_ranks_text(ranks: dict[str, tuple[float, ...]]) -> str:
    """The same, but a rank that all layers share is written once."""
    shortest = {}
    for name, layers in ranks.items():
        shortest[name] = layers[:1] if len(set(layers)) == 1 else layers
    return matrix_ranks_text(shortest)
