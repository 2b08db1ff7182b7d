"""Models under a budget of parameters: --budget-params with --solve rank, --solve depth or --plan.

First the solvers, which know models alone. Then the flags that ask for them, with all checks, and the table
of --plan.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import chain
from pathlib import Path
from typing import Any

from nanochat import metrics
from nanochat.accounting import account, count_parameters
from nanochat.arguments import LARGEST_INTEGER, as_whole_number, quoted
from nanochat.devices import pick_device_type
from nanochat.errors import InputError, first_line, shortened
from nanochat.flag_types import DEEPEST
from nanochat.gpt import GPTConfig
from nanochat.layer_ranks import (
    GROUPS,
    list_that_fixes_depth,
    matrices_by_field,
    named_in_short,
    ranks_in_short,
    ranks_of_field,
)
from nanochat.model_flags import RANK_GROUP
from nanochat.naming import is_tag, no_such_run
from nanochat.peak import execution, predict_peak
from nanochat.plan import full_rank, model_config, starting_point, training_plan
from nanochat.processes import print0
from nanochat.rank import AUTOMATIC, rank_step, resolve_rank
from nanochat.run_files import read_config

# ---- the largest ranks -------------------------------------------------------------------------------------


@dataclass
class Level:
    """Matrices of a group (attention or MLP) that are given the same rank: they keep equal ranks.

    Ranks are counted in steps from 1 to `largest`. A step is `unit` ranks; where fractions mean another rank
    for each matrix, it is the fraction 1 / (largest + 1), which is one rank of the largest.
    """

    group: str
    places: list[tuple[str, int]]  # (field that gives the rank, layer)
    shapes: Counter[tuple[int, int]]  # (in, out) of its matrices, counted
    target: float  # steps, before scaling
    largest: int
    unit: int  # 0 where a step is a fraction
    multiple: int  # of fractions: see `resolve_rank`

    def rank(self, steps: int) -> float:
        return self.unit * steps if self.unit else steps / (self.largest + 1)

    def parameters(self, steps: int) -> int:
        rank = self.rank(steps)
        total = 0
        for shape, count in self.shapes.items():
            total += count * resolve_rank(rank, *shape, self.multiple) * sum(shape)
        return total


def rank_levels(config: GPTConfig) -> list[Level]:
    """The levels of each factored group, lowest first.

    If nothing is factored, then all matrices that are not named in matrix_ranks are, at their largest rank.
    """
    levels = []
    for group in GROUPS:
        levels += levels_of_group(config, group)
    if levels:
        return levels
    for group in GROUPS:
        if matrices := matrices_by_field(config, group).get(group):
            largest = min(min(config.matrix_shape(matrix)) for matrix in matrices)
            ranks: dict[str, Any] = {group: (largest,) * config.n_layer}
            factored = replace(config, **ranks)
            levels += levels_of_group(factored, group, given_by_user=False)
    return levels


def levels_of_group(config: GPTConfig, group: str, given_by_user: bool = True) -> list[Level]:
    """The levels of one group; [] at full rank.

    given_by_user: the user gave these ranks. If they are whole numbers, any whole numbers may be chosen.
    """
    fields = matrices_by_field(config, group)
    factored = []
    for field in fields:
        factored += [(field, layer, rank) for layer, rank in enumerate(ranks_of_field(config, field)) if rank]
    if not factored:
        return []
    sides = {}  # field -> the smaller side of each of its matrices
    for field, _, _ in factored:
        sides[field] = [min(config.matrix_shape(matrix)) for matrix in fields[field]]
    distinct = set(chain.from_iterable(sides.values()))
    largest_side = max(distinct)
    fractions = all(rank < 1 for _, _, rank in factored)
    stay_fractions = fractions and len(distinct) > 1  # the same fraction is another rank for each matrix
    unit = step_under_budget(config.rank_multiple, min(distinct))
    if given_by_user and not fractions:
        unit = 1

    places_by_rank = {}  # target rank; of the largest side where fractions stay fractions
    for field, layer, rank in factored:
        side = largest_side if stay_fractions else min(sides[field])
        target = rank * side if rank < 1 else rank
        places_by_rank.setdefault(target, []).append((field, layer))
    levels = []
    for target, places in sorted(places_by_rank.items()):
        shapes = Counter()
        for field, _ in places:
            shapes.update(config.matrix_shape(matrix) for matrix in fields[field])
        if stay_fractions:
            levels.append(Level(group, places, shapes, target, largest_side - 1, 0, config.rank_multiple))
        else:
            largest = min(map(min, shapes)) // unit
            levels.append(Level(group, places, shapes, target / unit, largest, unit, config.rank_multiple))
    return levels


def step_under_budget(multiple: int, smaller: int) -> int:
    """The number of which solved ranks are multiples: `rank_step`, but at most 8 where it is automatic.

    With 64, a step in 40 layers of width 1280 is 2% of d20's parameters, which a report does not call equal.
    """
    step = rank_step(multiple, smaller)
    return min(step, 8) if multiple == AUTOMATIC else step


def with_ranks(config: GPTConfig, levels: list[Level], steps: list[int]) -> GPTConfig:
    """The config in which each level has the rank of so many steps."""
    ranks: dict[str, list[float]] = {}  # field -> one rank a layer
    for level, count in zip(levels, steps):
        for field, layer in level.places:
            ranks.setdefault(field, [0] * config.n_layer)[layer] = level.rank(count)
    groups: dict[str, Any] = {field: tuple(values) for field, values in ranks.items() if field in GROUPS}
    single = {field: tuple(values) for field, values in ranks.items() if field not in GROUPS}
    return replace(config, **groups, matrix_ranks=config.matrix_ranks | single)


def solve_rank(config: GPTConfig, budget: int) -> GPTConfig:
    """Scale the ranks of attention and MLP: as many parameters as possible, but at most `budget`.

    All ranks grow from 1 by one common factor, rounded. Where the next rank of some layers costs too much,
    the others go on with what is left. At the end no rank can grow without breaking the budget or the shape:
    matrices of a group that were given equal ranks keep equal ranks, and none passes one that was given more.

    A group at full rank stays so, unless all are: then all are factored. So does a matrix that `matrix_ranks`
    has at 0; one that it gives a rank is scaled as the others. The head stays as it is. Fractions become
    whole ranks, in steps of `step_under_budget`. Where the same fraction is another rank for each matrix, as
    under grouped queries for q and k, they stay fractions.

    ValueError if even the smallest ranks are over the budget.
    """
    levels = rank_levels(config)
    if not levels:
        raise ValueError("no matrix is left whose rank could be chosen")
    steps = [1] * len(levels)
    least = count_parameters(with_ranks(config, levels, steps))
    if least > budget:
        smallest = max(1, *(level.unit for level in levels))
        raise ValueError(f"even rank {smallest} in every layer has {least:,} parameters")
    spare = budget - least
    # (the common factor at which a level's rank rounds to its next step, the level)
    queue = [(1.5 / level.target, i) for i, level in enumerate(levels)]
    heapify(queue)
    while queue:
        _, i = heappop(queue)
        level = levels[i]
        larger = steps[i] + 1
        has_level_above = i + 1 < len(levels) and levels[i + 1].group == level.group
        if larger > level.largest or (has_level_above and larger > steps[i + 1]):
            continue
        price = level.parameters(larger) - level.parameters(steps[i])
        if price > spare:
            continue  # for good: what is spare only shrinks
        steps[i] = larger
        spare -= price
        heappush(queue, ((larger + 0.5) / level.target, i))
    return with_ranks(config, levels, steps)


# ---- the deepest model -------------------------------------------------------------------------------------


def solve_depth(config_at: Callable[[int], GPTConfig], budget: int) -> GPTConfig:
    """The deepest config_at(depth) with at most `budget` parameters. ValueError if the shallowest has more.

    config_at(depth) never has fewer parameters at a greater depth, with one exception: where its width grows
    with the depth, a fraction may become another multiple at the next width, and lose a third of its rank.
    """
    shallowest = config_at(1)
    least = count_parameters(shallowest)
    if least > budget:
        raise ValueError(f"even {shallowest.n_layer} layer(s) have {least:,} parameters")
    low = 1  # within the budget
    high = 2  # beyond it, after this loop
    while count_parameters(config_at(high)) <= budget:
        low = high
        high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count_parameters(config_at(middle)) <= budget:
            low = middle
        else:
            high = middle
    deepest = config_at(low)
    if config_at(high).n_embd == deepest.n_embd:
        return deepest
    # the exception: look on, as far as a lost third of the rank could make up for
    while (count := count_parameters(config_at(high))) <= 1.5 * budget:
        if count <= budget:
            deepest = config_at(high)
        high += 1
    return deepest


# ---- from flags to a model ---------------------------------------------------------------------------------


def choose_model(args, vocab_size: int) -> GPTConfig:
    """The model of --init-from, or of the flags, with the depth or the ranks that --budget-params allows."""
    if args.init_from is not None:
        return checkpoint_model(args, vocab_size)
    if not args.budget_params and not args.solve:
        return model_config(args, vocab_size)
    if not (args.budget_params and args.solve):
        raise InputError(
            "--budget-params and --solve go together: e.g. --budget-params 10_000_000 --solve rank"
        )
    budget = parameter_budget(args)
    try:
        if args.solve == "rank":
            return solve_rank(model_config(args, vocab_size), budget)
        check_depth_is_free(args, "--solve depth")
        return solve_depth(lambda depth: nearest_config(args, vocab_size, depth), budget)
    except ValueError as e:
        raise InputError(f"--budget-params {args.budget_params}: {e}") from None


def checkpoint_model(args, vocab_size: int) -> GPTConfig:
    """The model of --init-from."""
    folder, _ = starting_point(args.init_from)
    config = recorded_model(folder)
    if config.vocab_size != vocab_size:
        raise InputError(
            f"--init-from {args.init_from}: has a vocabulary of {config.vocab_size} tokens, "
            f"here it is {vocab_size}; put {folder / 'tokenizer.json'} in its place"
        )
    return replace(config, recompute=args.recompute)


def recorded_model(folder: Path) -> GPTConfig:
    """The model of a run, from its config.json."""
    try:
        return GPTConfig(**read_config(folder)["derived"]["model"])
    except (TypeError, ValueError) as e:
        message = f"{folder / 'config.json'}: derived.model is no model of this program ({first_line(e)})"
        raise InputError(f"{message}; restore it") from None


def parameter_budget(args) -> int:
    """--budget-params as a number; where it names a run, that run's number of parameters."""
    budget = as_whole_number(args.budget_params)
    if budget is not None:
        if not 0 < budget <= LARGEST_INTEGER:
            raise InputError(
                f"--budget-params {quoted(args.budget_params)}: "
                "give a number of parameters such as 10_000_000, or the tag of a run"
            )
        return budget
    folder = metrics.runs_dir() / args.budget_params
    if not is_tag(args.budget_params) or not (folder / "config.json").is_file():
        raise InputError(
            f"--budget-params {shortened(args.budget_params)}: neither a whole number such as "
            f"10_000_000 nor a run's tag: {no_such_run(args.budget_params)}"
        )
    budget = metrics.load_run(folder).summary.get("params/total")
    if budget is None:
        raise InputError(
            f"--budget-params {args.budget_params}: that run has no parameter count in its summary.json yet"
        )
    return budget


def nearest_config(args, vocab_size: int, depth: int) -> GPTConfig:
    """The model of the flags with `depth` layers, or with the nearest depth at which the flags fit together.

    Where the width follows the depth, they may not fit at this one. Smaller depths are tried first, then up
    to 128 larger ones. InputError if none will do, or if the depth is beyond DEEPEST.
    """
    if depth > DEEPEST:
        raise InputError(
            f"--budget-params {args.budget_params}: "
            f"leaves room for more than {DEEPEST:,} layers; give less, or a larger --model-dim"
        )
    errors = []
    for nearby in (*range(depth, 0, -1), *range(depth + 1, depth + 129)):
        try:
            return model_config(args, vocab_size, nearby)
        except InputError as e:
            errors.append(e)
    raise errors[0]


def check_depth_is_free(args, flag: str):
    """InputError, beginning with `flag`, if another flag has one value for each layer."""
    if args.layer_map[:1].isdigit():
        raise InputError(
            f"{flag}: --layer-map {args.layer_map} names the layers and so fixes the depth; "
            "use --solve rank, or --layer-map mobilellm"
        )
    if rank_list := list_that_fixes_depth(args):
        raise InputError(
            f"{flag}: {rank_list} has one rank a layer and so fixes the depth; "
            "use --solve rank, or a named schedule"
        )


# ---- --plan ------------------------------------------------------------------------------------------------


def budget_frontier(args, vocab_size: int) -> list[GPTConfig]:
    """The models with the largest ranks within --budget-params: one a depth, from 1 to 4 × --depth layers.

    It ends before the first depth at which even rank 1 is too much.
    """
    if not args.budget_params or args.solve:
        raise InputError(
            "--plan: needs --budget-params, without --solve: it shows what --solve would find, depth by depth"
        )
    check_depth_is_free(args, "--plan")
    if args.depth > 256:
        raise InputError(
            f"--depth {args.depth}: --plan goes through every depth up to 4 times that; give at most 256"
        )
    budget = parameter_budget(args)
    configs = []
    for depth in range(1, 4 * args.depth + 1):
        config = nearest_config(args, vocab_size, depth)
        if config.n_layer != depth:
            continue  # the flags do not fit together at this depth
        try:
            configs.append(solve_rank(config, budget))
        except ValueError as e:
            if not configs:
                raise InputError(f"--budget-params {args.budget_params}: at depth {depth} {e}") from None
            break
    return configs


def print_frontier(args, vocab_size: int, world_size: int, dtype_bytes: int):
    """What --plan shows: at each depth the largest ranks within the budget, and their costs beside full rank.

    The first row is the full-rank model of the flags. dtype_bytes: of one number of an activation.
    """
    flags_at_full_rank = Namespace(**{**vars(args), **RANK_GROUP.defaults()})
    full = model_config(flags_at_full_rank, vocab_size)
    configs = budget_frontier(args, vocab_size)
    full_costs = frontier_costs(args, full, world_size, dtype_bytes)
    budget = parameter_budget(args)
    print0(
        f"the largest ranks within {budget:,} parameters at each depth; "
        "beside each figure its ratio to the full-rank model:"
    )
    print0(
        f"{'depth':>5}{'width':>7}{'attention rank':>16}{'MLP rank':>16}"
        f"{'parameters':>15}{'':6}{'MFLOP/token':>15}{'':6}{'peak MiB':>15}"
    )
    print0(frontier_row(full, full_costs, full_costs))
    for config in configs:
        row = frontier_row(config, frontier_costs(args, config, world_size, dtype_bytes), full_costs)
        if count_parameters(full_rank(config)) <= budget:
            row += "  full rank fits too"
        print0(row)
    if configs[-1].n_layer == 4 * args.depth:
        print0(f"deeper models may fit too: shown up to 4 × --depth {args.depth}")


def frontier_costs(args, config: GPTConfig, world_size: int, dtype_bytes: int) -> tuple[float, float, float]:
    """(parameters, MFLOP a token, peak MiB)"""
    plan = training_plan(args, config, world_size)
    device_type = pick_device_type(args.device_type)
    memory = predict_peak(config, execution(args, plan, device_type, dtype_bytes, world_size))
    costs = account(config)
    return (
        costs["params/total"],
        costs["flops/per_token"] / 1e6,
        memory["mem/predicted_peak_bytes"] / 2**20,
    )


def frontier_row(config: GPTConfig, costs: tuple, full_costs: tuple) -> str:
    """One depth: its ranks, and each cost beside its ratio to the full-rank model's."""
    row = f"{config.n_layer:5}{config.n_embd:7}"
    row += f"{ranks_in_short(config.attn_ranks):>16}{ranks_in_short(config.mlp_ranks):>16}"
    for cost, full_cost, digits in zip(costs, full_costs, (0, 1, 0)):
        row += f"{cost:15,.{digits}f}{cost / full_cost:6.2f}"
    if config.matrix_ranks:
        row += f"  ({named_in_short(config)})"
    return row
