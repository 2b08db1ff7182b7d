"""From the flags of rank to one rank a layer, with all checks; and how ranks are printed."""

from argparse import ArgumentTypeError

from nanochat.config import MATRICES
from nanochat.errors import InputError
from nanochat.flag_types import SCHEDULES, matrix_ranks, rank_flag
from nanochat.gpt import GPTConfig
from nanochat.rank import ranks_over_depth, resolve_rank

# field of GPTConfig -> its matrices
GROUPS = {"attn_ranks": MATRICES[:4], "mlp_ranks": MATRICES[4:]}


def is_list(schedule: str) -> bool:
    """Whether a --rank-schedule is a list of ranks, not the name of a schedule."""
    return "," in schedule or schedule[:1].isdigit()


def schedule_of(args, group: str) -> tuple[str, str]:
    """(flag, value) of the schedule of a group, attn or mlp: its own where given, else the one for both."""
    schedule = getattr(args, f"{group}_rank_schedule")
    return (f"--{group}-rank-schedule", schedule) if schedule else ("--rank-schedule", args.rank_schedule)


def layer_ranks(args, group: str, depth: int) -> tuple[float, ...]:
    """One rank a layer of attention ("attn") or of the MLP ("mlp") under its schedule; () = full rank."""
    start = getattr(args, f"{group}_rank")
    own_end = getattr(args, f"{group}_rank_end")
    flag, schedule = schedule_of(args, group)
    if is_list(schedule):
        ranks = listed_ranks(flag, schedule, depth)
        if start:
            raise InputError(
                f"{flag} {schedule}: gives the ranks that --{group}-rank {start:g} gives too; "
                f"leave --{group}-rank out, or give a list to one group with "
                "--attn-rank-schedule or --mlp-rank-schedule"
            )
    elif schedule not in SCHEDULES:
        raise InputError(f"{flag} {schedule}: use one of {', '.join(SCHEDULES)}, or a list of ranks r0,r1,…")
    if own_end and (is_list(schedule) or schedule == "constant"):
        raise InputError(
            f"--{group}-rank-end {own_end:g}: means nothing under {flag} {schedule}; "
            f"give --{group}-rank-schedule linear, step, exponential or quadratic"
        )
    if is_list(schedule):
        return ranks
    if schedule == "constant":
        return (start,) * depth if start else ()
    return changing_ranks(args, group, flag, schedule, depth)


def listed_ranks(flag: str, schedule: str, depth: int) -> tuple[float, ...]:
    """'64,32,16' -> (64, 32, 16)"""
    try:
        ranks = tuple(rank_flag(part.strip()) for part in schedule.split(","))
    except ArgumentTypeError as e:
        raise InputError(f"{flag} {schedule}: {e}") from None
    if len(ranks) != depth or not all(ranks):
        raise InputError(f"{flag} {schedule}: give {depth} ranks above 0, one a layer")
    return ranks


def changing_ranks(args, group: str, flag: str, schedule: str, depth: int) -> tuple[float, ...]:
    """The ranks of a named schedule; () where the schedule is for the other group alone."""
    start = getattr(args, f"{group}_rank")
    own_end = getattr(args, f"{group}_rank_end")
    end_flag, end = (f"--{group}-rank-end", own_end) if own_end else ("--rank-end", args.rank_end)
    if not start and own_end:
        raise InputError(f"{end_flag} {end:g}: needs --{group}-rank above 0 to start from")
    if not start and flag != "--rank-schedule":
        raise InputError(f"{flag} {schedule}: needs --{group}-rank above 0 to start from")
    if not (args.attn_rank or args.mlp_rank):
        raise InputError(f"{flag} {schedule}: needs --attn-rank or --mlp-rank above 0 to start from")
    if not start:
        return ()
    if not end:
        own_flag = f", or --{group}-rank-end" if flag != "--rank-schedule" else ""
        raise InputError(f"{flag} {schedule}: needs --rank-end above 0{own_flag}")
    if (start < 1) != (end < 1):
        raise InputError(
            f"{end_flag} {end:g}: give it as --{group}-rank {start:g} is given, "
            "both as ranks or both as fractions"
        )
    return ranks_over_depth(schedule, start, end, depth)


def named_ranks(text: str, depth: int) -> dict[str, tuple[float, ...]]:
    """--matrix-ranks with one rank a layer of each matrix that it names."""
    ranks_by_matrix = {}
    for name, ranks in matrix_ranks(text).items():
        if len(ranks) not in (1, depth):
            raise InputError(
                f"--matrix-ranks {text}: gives {name} {len(ranks)} ranks; give one, or {depth}, one a layer"
            )
        ranks_by_matrix[name] = ranks * depth if len(ranks) == 1 else ranks
    return ranks_by_matrix


def list_that_fixes_depth(args) -> str:
    """The flag and value that has one rank a layer, such as '--rank-schedule 8,4,2'; '' if there is none."""
    schedules = [schedule_of(args, "attn"), schedule_of(args, "mlp")]
    lists = [f"{flag} {value}" for flag, value in schedules if is_list(value)]
    if "/" in args.matrix_ranks:
        lists.append(f"--matrix-ranks {args.matrix_ranks}")
    return lists[0] if lists else ""


def check_ranks(config: GPTConfig):
    """InputError for the first rank that does not fit its matrix."""
    flags = {name: f"--matrix-ranks: {name}" for name in MATRICES}
    flags |= {"attn_ranks": "--attn-rank", "mlp_ranks": "--mlp-rank"}
    for field, matrices in fields_with_ranks(config).items():
        for layer, rank in enumerate(ranks_of_field(config, field)):
            for matrix in matrices:
                check_rank(f"{flags[field]} (layer {layer})", rank, config.matrix_shape(matrix))
    check_rank("--lm-head-rank", config.lm_head_rank, (config.n_embd, config.vocab_size))


def check_rank(flag: str, rank: float, shape: tuple[int, int]):
    try:
        resolve_rank(rank, *shape)
    except ValueError as e:
        raise InputError(f"{flag}: {e}") from None


def matrices_by_field(config: GPTConfig, group: str) -> dict[str, tuple[str, ...]]:
    """{field that gives ranks: its matrices} of a group: the group, and each matrix named in matrix_ranks."""
    single = [matrix for matrix in GROUPS[group] if config.matrix_ranks.get(matrix)]
    rest = tuple(matrix for matrix in GROUPS[group] if matrix not in single)
    fields = {group: rest} if rest else {}
    return fields | {matrix: (matrix,) for matrix in single}


def ranks_of_field(config: GPTConfig, field: str) -> tuple[float, ...]:
    """One rank a layer, as given; () = full. field: attn_ranks, mlp_ranks, or a matrix of matrix_ranks."""
    return getattr(config, field) if field in GROUPS else config.matrix_ranks[field]


def fields_with_ranks(config: GPTConfig) -> dict[str, tuple[str, ...]]:
    """{attn_ranks, mlp_ranks or a matrix with ranks of its own: the matrices whose ranks it gives}"""
    return matrices_by_field(config, "attn_ranks") | matrices_by_field(config, "mlp_ranks")


# ---- printing -------------------------------------------------------------------------------------------


def ranks_in_short(ranks: tuple[float, ...]) -> str:
    """'full', '64', or the first, the middle and the last layer's rank: '100…46…10'."""
    if not any(ranks):
        return "full"
    if len(set(ranks)) == 1:
        return f"{ranks[0]:g}"
    return "…".join(f"{ranks[layer]:g}" for layer in (0, len(ranks) // 2, -1))


def named_in_short(config: GPTConfig) -> str:
    """Ranks of matrices that have their own: 'v full, down 64'; '' if there are none."""
    return ", ".join(f"{name} {ranks_in_short(ranks)}" for name, ranks in config.matrix_ranks.items())


def rank_lines(config: GPTConfig) -> list[str]:
    """What a model's ranks are: 'rank of mlp: 0.297 (384)', with the whole rank that a fraction means."""
    names = {"attn_ranks": "attention", "mlp_ranks": "mlp"}
    fields = fields_with_ranks(config)
    lines = []
    for field in (*GROUPS, *config.matrix_ranks):
        if field in fields:
            shapes = [config.matrix_shape(matrix) for matrix in fields[field]]
            words = rank_words(ranks_of_field(config, field), shapes, config.rank_multiple)
            lines.append(f"rank of {names.get(field, field)}: {words}")
    head = rank_words((config.lm_head_rank,), [(config.n_embd, config.vocab_size)], config.rank_multiple)
    return [*lines, f"rank of lm_head: {head}"]


def rank_words(ranks: tuple[float, ...], shapes: list[tuple[int, int]], multiple: int) -> str:
    words = []
    for rank in ranks or (0,):
        whole = sorted({resolve_rank(rank, *shape, multiple) for shape in shapes}, reverse=True)
        meaning = f" ({' and '.join(map(str, whole))})" if 0 < rank < 1 else ""
        words.append(f"{rank:g}{meaning}" if rank else "full")
    return words[0] if len(set(words)) == 1 else ", ".join(words)
