"""Models under a budget of parameters: the largest ranks, the deepest model, and the plan of both."""

import itertools
import random
import re
from dataclasses import replace

import pytest

from nanochat.accounting import account, count_parameters
from nanochat.budget import budget_frontier, choose_model, rank_levels, solve_depth, solve_rank, with_ranks
from nanochat.config import MATRICES
from nanochat.errors import InputError
from nanochat.flags import build_parser
from nanochat.gpt import GPTConfig
from nanochat.layer_ranks import GROUPS, ranks_in_short
from nanochat.plan import full_rank, model_config
from nanochat.rank import rank_step, ranks_over_depth, resolve_rank
from scripts import base_train


def random_config(rng: random.Random) -> GPTConfig:
    """A small model with random ranks: of any schedule or a list, whole or fractions, of none, one or both
    groups, with grouped queries or without.
    """
    head_dim = 2 * rng.randint(2, 8)
    heads = rng.randint(1, 4)
    depth = rng.randint(1, 6)
    kv_heads = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    largest = {"attn_ranks": kv_heads * head_dim, "mlp_ranks": heads * head_dim}

    def some_rank(group, fraction):
        return rng.uniform(0.01, 0.99) if fraction else rng.randint(1, largest[group])

    def some_ranks(group):
        schedule = rng.choice(["full", "list", "constant", "linear", "step", "exponential", "quadratic"])
        fraction = rng.random() < 0.4
        if schedule == "full":
            return ()
        if schedule == "list":
            return tuple(some_rank(group, fraction) for _ in range(depth))
        return ranks_over_depth(schedule, some_rank(group, fraction), some_rank(group, fraction), depth)

    return GPTConfig(
        16,
        rng.randint(10, 200),
        depth,
        heads,
        kv_heads,
        heads * head_dim,
        tie_embeddings=rng.random() < 0.3,
        value_embeddings=rng.random() < 0.3,
        **{group: some_ranks(group) for group in GROUPS},
    )


def same_order(before, after) -> bool:
    """Equal stays equal, and none passes one that was given more."""
    pairs = sorted(zip(before, after))
    return all(a <= b and (x < y or a == b) for (x, a), (y, b) in itertools.pairwise(pairs))


def next_larger(config: GPTConfig, given: GPTConfig):
    """The configs with one more rank in the layers of a group that were given one and the same rank."""
    for group in GROUPS:
        ranks = getattr(config, group)
        before = getattr(given, group) or (0,) * given.n_layer
        if not ranks:
            continue
        for value in set(before):
            grown = list(ranks)
            for layer, rank in enumerate(ranks):
                if before[layer] == value:
                    grown[layer] = rank + (1 / config.n_embd if 0 < rank < 1 else 1)
            yield group, before, grown


@pytest.mark.parametrize("seed", range(60))
def test_solved_ranks_are_the_largest_of_their_shape_within_any_budget(seed):
    rng = random.Random(seed)
    given = random_config(rng)
    smallest = given
    for group in GROUPS:
        ranks = tuple(1 / given.n_embd if rank < 1 else 1 for rank in getattr(given, group))
        smallest = replace(smallest, **{group: ranks})
    if not any(given.attn_ranks + given.mlp_ranks):
        smallest = replace(given, **dict.fromkeys(GROUPS, (1,) * given.n_layer))
    low = count_parameters(smallest)
    high = count_parameters(solve_rank(given, 10**12))
    budget = rng.choice([low, rng.randint(low, high), rng.randint(low, low + (high - low) // 10), high])
    config = solve_rank(given, budget)

    C = config.n_embd
    kv_dim = config.n_kv_head * config.n_embd // config.n_head
    assert count_parameters(config) <= budget
    for group in GROUPS:
        before = getattr(given, group)
        after = getattr(config, group)
        assert bool(after) == bool(before) or not any(given.attn_ranks + given.mlp_ranks)
        assert same_order(before, after)
        for r in after:  # within [1, min(in, out)] of each matrix: resolve_rank raises if not
            assert all(
                resolve_rank(r, *shape) >= 1
                for shape in ((C, C), (C, kv_dim if group == "attn_ranks" else C))
            )
    for group, before, grown in next_larger(config, given):  # nothing that keeps the shape is affordable
        limit = kv_dim if group == "attn_ranks" else C
        possible = all(r < 1 - 1e-9 if s < 1 else r <= limit for r, s in zip(grown, getattr(config, group)))
        if possible and same_order(before, grown):
            assert count_parameters(replace(config, **{group: tuple(grown)})) > budget


def named_config(rng: random.Random) -> GPTConfig:
    """A small model in which some matrices have ranks of their own, of all layers or of some, or none."""
    given = random_config(rng)
    whole = rng.random() < 0.5
    smallest = min(given.n_kv_head * given.n_embd // given.n_head, given.n_embd)

    def some_ranks():
        if rng.random() < 0.4:
            return (0,) * given.n_layer
        choices = range(smallest + 1) if whole else [0, 0.2, 0.5, 0.7]
        ranks = rng.choices(choices, k=given.n_layer)
        return tuple(ranks) if rng.random() < 0.5 else (ranks[0],) * given.n_layer

    matrices = rng.sample(MATRICES, rng.randint(1, 4))
    named = {matrix: some_ranks() for matrix in matrices}
    return replace(given, matrix_ranks=named, rank_multiple=rng.choice([-1, 1, 4]))


def places(config: GPTConfig, group: str) -> dict:
    """{(matrix, layer): rank as given} of the factored matrices of a group."""
    every = itertools.product(GROUPS[group], range(config.n_layer))
    return {place: config.rank(*place) for place in every if config.rank(*place)}


@pytest.mark.parametrize("seed", range(40))
def test_matrices_with_ranks_of_their_own_keep_their_ratio_and_none_can_grow(seed):
    rng = random.Random(seed)
    given = named_config(rng)
    if not any(places(given, group) for group in GROUPS):
        given = replace(given, mlp_ranks=(0.5,) * given.n_layer, matrix_ranks={"v": (0,) * given.n_layer})
    high = count_parameters(solve_rank(given, 10**12))
    levels = rank_levels(given)
    least = count_parameters(with_ranks(given, levels, [1] * len(levels)))
    near = rng.randint(least, least + (high - least) // 5)
    budget = rng.choice([least, near, rng.randint(least, high), high])
    config = solve_rank(given, budget)
    assert count_parameters(config) <= budget
    for group in GROUPS:
        before = places(given, group)
        after = places(config, group)
        assert before.keys() == after.keys(), "what is at full rank stays so, and nothing else becomes it"
        sides = {place: min(given.matrix_shape(place[0])) for place in before}
        fractions = all(rank < 1 for rank in before.values())
        if len(set(sides.values())) > 1:
            continue  # a fraction is another rank for each
        wanted = {place: rank * sides[place] if rank < 1 else rank for place, rank in before.items()}
        assert same_order(list(wanted.values()), list(after.values()))
        step = rank_step(given.rank_multiple, min(sides.values())) if fractions and sides else 1
        assert all(rank % step == 0 for rank in after.values())
        for value in set(wanted.values()):
            grown = dict(after)
            for place, rank in wanted.items():
                if rank == value:
                    grown[place] += step
            fits = max(grown.values()) <= min(sides.values())
            if fits and same_order(list(wanted.values()), list(grown.values())):
                named = dict(config.matrix_ranks)
                for matrix in GROUPS[group]:
                    named[matrix] = tuple(grown.get((matrix, layer), 0) for layer in range(config.n_layer))
                assert count_parameters(replace(config, matrix_ranks=named)) > budget


def test_ranks_keep_their_proportions():
    given = GPTConfig(16, 100, 4, 4, 4, 256, attn_ranks=(80, 60, 40, 20), mlp_ranks=(16, 16, 8, 8))
    for factor in (0.25, 1.6, 3):
        attn_ranks = tuple(round(factor * rank) for rank in given.attn_ranks)
        mlp_ranks = tuple(round(factor * rank) for rank in given.mlp_ranks)
        scaled = replace(given, attn_ranks=attn_ranks, mlp_ranks=mlp_ranks)
        assert solve_rank(given, count_parameters(scaled)) == scaled


def test_what_is_left_over_takes_no_layer_past_one_that_was_given_more():
    """One rank in one layer costs 8 widths; three layers that keep equal ranks cannot share two of them."""
    given = GPTConfig(16, 100, 4, 4, 4, 64, attn_ranks=(10, 10, 10, 9))
    budget = count_parameters(given) + 2 * 8 * 64
    assert solve_rank(given, budget).attn_ranks == (10, 10, 10, 10)
    assert solve_rank(given, budget + 2 * 8 * 64).attn_ranks == (11, 11, 11, 10)


def test_a_fraction_under_grouped_queries_stays_another_rank_for_each_matrix():
    given = GPTConfig(16, 100, 2, 4, 1, 64, attn_ranks=(0.25,) * 2)
    config = solve_rank(given, count_parameters(replace(given, attn_ranks=(0.5,) * 2)))
    assert config.attn_ranks == (0.5, 0.5)  # 32 for q and o, 8 for k and v
    assert solve_rank(given, 10**9).attn_ranks == (63 / 64,) * 2
    whole = solve_rank(replace(given, attn_ranks=(4, 4)), 10**9)
    assert whole.attn_ranks == (16, 16)  # a whole rank has to fit k and v too


@pytest.mark.parametrize("schedule", ["constant", "linear", "step", "exponential", "quadratic"])
def test_deepest_model_of_every_schedule(schedule):
    """Beside a search through all depths."""

    def at(depth):
        return GPTConfig(
            16,
            50,
            depth,
            2,
            2,
            16,
            attn_ranks=ranks_over_depth(schedule, 12, 3, depth),
            mlp_ranks=(0.3,) * depth,
        )

    counts = [count_parameters(at(depth)) for depth in range(1, 20)]
    budgets = {*counts[:9:2], *(count - 1 for count in counts[2:9:2])}
    for budget in budgets:
        deepest = max(depth for depth, count in enumerate(counts, 1) if count <= budget)
        assert solve_depth(at, budget).n_layer == deepest


SHAPE = GPTConfig(sequence_len=64, vocab_size=256, n_layer=4, n_head=2, n_kv_head=2, n_embd=64)


@pytest.mark.parametrize(
    "attn,mlp", [((), ()), ((16,) * 4, ()), ((32, 20, 10, 4), (8,) * 4), ((0.5, 0.4, 0.3, 0.2), (0.25,) * 4)]
)
@pytest.mark.parametrize("more", [0, 5_000, 17_123, 60_000, 10**9])
def test_solved_rank_comes_nearest_to_the_budget_from_below(attn, mlp, more):
    smallest = replace(SHAPE, attn_ranks=(1,) * 4, mlp_ranks=() if attn and not mlp else (1,) * 4)
    budget = count_parameters(smallest) + more
    config = solve_rank(replace(SHAPE, attn_ranks=attn, mlp_ranks=mlp), budget)
    ranks = [r for group in (config.attn_ranks, config.mlp_ranks) for r in group]
    assert count_parameters(config) <= budget and all(1 <= r <= 64 for r in ranks)
    if attn and not mlp:
        assert config.mlp_ranks == ()  # a full-rank group stays so
    if min(ranks) < 64 and (not attn or len(set(attn)) == 1):  # one step more in every rank is too much
        attn_ranks = tuple(min(64, rank + 1) for rank in config.attn_ranks)
        mlp_ranks = tuple(min(64, rank + 1) for rank in config.mlp_ranks)
        larger = replace(config, attn_ranks=attn_ranks, mlp_ranks=mlp_ranks)
        assert larger == config or count_parameters(larger) > budget


def test_solved_depth_is_the_deepest_within_the_budget():
    def at(depth):
        return replace(SHAPE, n_layer=depth, attn_ranks=(8,) * depth, mlp_ranks=(8,) * depth)

    for depth in (1, 2, 7, 30):
        budget = count_parameters(at(depth))
        assert solve_depth(at, budget).n_layer == depth
        assert solve_depth(at, budget + 1).n_layer == depth


def test_solved_depth_is_the_deepest_where_a_wider_model_has_smaller_ranks_too():
    """Here the width passes 256 between 24 and 25 layers, where a rank of 11 becomes one of 8."""

    def at(depth):
        ranks = (0.045,) * depth
        return GPTConfig(
            16, 50, depth, 1, 1, 2 * round(5.3 * depth), attn_ranks=ranks, mlp_ranks=ranks, rank_multiple=-1
        )

    counts = {depth: count_parameters(at(depth)) for depth in range(1, 36)}
    assert at(24).n_embd < 256 < at(25).n_embd and counts[25] < counts[24]
    for budget in (counts[25], counts[24] - 1, counts[24], counts[22], counts[27]):
        assert solve_depth(at, budget).n_layer == max(depth for depth, n in counts.items() if n <= budget)


def test_impossible_budgets_say_what_the_least_is():
    with pytest.raises(ValueError, match="even rank 1"):
        solve_rank(SHAPE, 1000)
    with pytest.raises(ValueError, match=r"even 1 layer\(s\) have"):
        solve_depth(lambda depth: replace(SHAPE, n_layer=depth), 1000)


# ---- flags

SMALL = [
    *("--depth", "3", "--model-dim", "32", "--head-dim", "16"),
    *("--max-seq-len", "32", "--device-batch-size", "4", "--vocab-size", "300"),
]


def flags(*more):
    return build_parser().parse_args([*SMALL, *map(str, more)])


def test_depths_at_which_the_flags_do_not_fit_together_are_passed_over():
    """Width 16 × depth: 2 key/value heads need an even number of heads, rank 40 a width of 40."""

    shape = ("--model-dim", -1, "--aspect-ratio", 16, "--n-kv-head", 2, "--mlp-rank", 40)

    def at(budget, *more):
        return flags(*shape, "--budget-params", budget, *more)

    counts = {}
    for depth in (4, 6, 8, 10, 12):
        counts[depth] = count_parameters(model_config(at(1, "--depth", depth), 300))
    for budget in (200_000, 400_000, 10**6):
        deepest = max(depth for depth, count in counts.items() if count <= budget)
        assert choose_model(at(budget, "--solve", "depth"), 300).n_layer == deepest
    frontier = budget_frontier(at(400_000), 300)
    assert len(frontier) > 1 and [config.n_layer for config in frontier] == [4, 6, 8, 10, 12][: len(frontier)]
    with pytest.raises(InputError, match=r"--budget-params 10000: even 4 layer\(s\) have"):
        choose_model(at(10_000, "--solve", "depth"), 300)


RECIPE = ("--attn-rank", 0.25, "--mlp-rank", 0.297, "--matrix-ranks", "v=0,o=0")  # what speedrun.sh trains
WIDE = ("--model-dim", 256, "--head-dim", 64)


def test_the_recipe_fills_the_budget_of_full_rank_in_twice_the_layers():
    full = choose_model(flags(*WIDE, "--depth", 2), 300)
    budget = count_parameters(full)
    asked = (*WIDE, "--depth", 4, "--budget-params", budget, "--solve", "rank")
    deep = choose_model(flags(*asked, *RECIPE), 300)
    assert 0.98 * budget < count_parameters(deep) <= budget and full_rank(deep) == replace(full, n_layer=4)
    assert deep.matrix_ranks == {"v": (0,) * 4, "o": (0,) * 4}
    (q,) = set(deep.attn_ranks)
    (up,) = set(deep.mlp_ranks)
    assert q % 8 == up % 8 == 0 and up / q == pytest.approx(0.297 / 0.25, rel=0.2)
    own = choose_model(flags(*asked, "--attn-rank", 16, "--mlp-rank", 48, "--matrix-ranks", "v=32,o=0"), 300)
    assert own.rank("v", 0) == pytest.approx(2 * own.rank("q", 0), abs=2) and own.rank("o", 3) == 0


def test_a_wide_model_is_solved_in_eights():
    """Steps of 64 would leave 2% of d20's budget, which no report calls equal."""
    d40 = GPTConfig(
        vocab_size=65536,
        n_layer=40,
        n_head=10,
        n_kv_head=10,
        n_embd=1280,
        attn_ranks=(0.25,) * 40,
        mlp_ranks=(0.297,) * 40,
        matrix_ranks={"v": (0,) * 40, "o": (0,) * 40},
        rank_multiple=-1,
    )
    budget = 560_989_480  # of d20 at full rank
    config = solve_rank(d40, budget)
    assert (set(config.attn_ranks), set(config.mlp_ranks)) == ({336}, {376})
    assert 0.998 * budget < count_parameters(config) <= budget
    assert {r % 64 for r in solve_rank(replace(d40, rank_multiple=64), budget).mlp_ranks} == {0}


def test_ranks_of_single_layers_are_scaled_and_full_ones_stay():
    budget = count_parameters(model_config(flags("--matrix-ranks", "down=12/24/0"), 300))
    asked = ("--solve", "rank", "--budget-params")
    config = choose_model(flags("--matrix-ranks", "down=4/8/0,q=0", *asked, budget), 300)
    assert config.matrix_ranks == {"down": (12, 24, 0), "q": (0, 0, 0)}
    assert not (config.mlp_ranks or config.attn_ranks)
    unnamed = choose_model(flags("--matrix-ranks", "v=0", *asked, 30_000), 300)
    assert unnamed.rank("q", 0) > 0 and unnamed.rank("up", 0) > 0 and unnamed.rank("v", 0) == 0
    with pytest.raises(InputError, match="--budget-params 30000: no matrix is left whose rank could be"):
        choose_model(flags("--matrix-ranks", "q=0,k=0,v=0,o=0,up=0,down=0", *asked, 30_000), 300)


def test_plan_says_which_matrices_have_ranks_of_their_own(capsys):
    asked = ("--attn-rank", "8", "--matrix-ranks", "v=0,q=16", "--budget-params", "60000")
    base_train.main([*SMALL, *asked, "--plan"])
    rows = [line for line in capsys.readouterr().out.splitlines() if re.match(r" *\d", line)][1:]
    assert len(rows) > 1
    for row in rows:
        config = choose_model(flags("--depth", row.split()[0], *asked, "--solve", "rank"), 300)
        assert f"(q {config.rank('q', 0)}, v full)" in row and row.split()[2] == str(config.attn_ranks[0])


def test_plan_lists_the_largest_rank_at_each_depth(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "nothing"))
    more = ("--attn-rank", 0.5, "--mlp-rank", 0.25, "--budget-params", 40_000)
    base_train.main([*SMALL, *map(str, more), "--plan"])
    lines = capsys.readouterr().out.splitlines()
    full = account(choose_model(flags(), 300))
    assert not (tmp_path / "nothing").exists()
    assert lines[2].split()[:6] == ["3", "32", "full", "full", f"{full['params/total']:,}", "1.00"]
    rows = [line.split() for line in lines[3:] if re.match(r" *\d", line)]
    assert [int(row[0]) for row in rows] == list(range(1, 13))
    assert lines[-1].startswith("deeper models may fit too")
    for row in rows:
        config = choose_model(flags("--depth", row[0], *more, "--solve", "rank"), 300)
        cost = account(config)
        assert row[2:4] == [str(config.attn_ranks[0]), str(config.mlp_ranks[0])]
        assert row[4:6] == [f"{cost['params/total']:,}", f"{cost['params/total'] / full['params/total']:.2f}"]
        assert row[6:8] == [
            f"{cost['flops/per_token'] / 1e6:,.1f}",
            f"{cost['flops/per_token'] / full['flops/per_token']:.2f}",
        ]
        dense = count_parameters(choose_model(flags("--depth", row[0]), 300))
        assert (row[-1] == "too") == (dense <= 40_000)


def test_plan_predicts_the_memory_that_a_dry_run_predicts(capsys):
    more = ["--mlp-rank", "8", "--budget-params", "40000"]
    base_train.main([*SMALL, *more, "--plan"])
    row = [line.split() for line in capsys.readouterr().out.splitlines()][5]
    assert row[0] == "3"
    base_train.main([*SMALL, *more, "--solve", "rank", "--dry-run"])
    predicted = re.search(r"mem/predicted_peak_bytes +([\d,]+)", capsys.readouterr().out)[1]
    predicted = int(predicted.replace(",", ""))
    assert row[8] == f"{predicted / 2**20:,.0f}"


def test_plan_stops_where_rank_1_no_longer_fits():
    args = flags("--budget-params", 24_000)
    last = budget_frontier(args, 300)[-1].n_layer
    assert last < 12
    with pytest.raises(InputError, match="even rank 1"):
        choose_model(flags("--depth", last + 1, "--budget-params", 24_000, "--solve", "rank"), 300)


@pytest.mark.parametrize(
    "more,message",
    [
        (
            ("--budget-params", 40_000, "--matrix-ranks", "v=8/4/2"),
            r"--plan: --matrix-ranks v=8/4/2 has one rank a layer",
        ),
        (
            ("--budget-params", 40_000, "--mlp-rank-schedule", "8,4,2"),
            r"--plan: --mlp-rank-schedule 8,4,2 has one rank a layer",
        ),
        ((), r"--plan: needs --budget-params"),
        (("--budget-params", 40_000, "--solve", "rank"), r"--plan: .* without --solve"),
        (
            ("--budget-params", 5_000),
            r"--budget-params 5000: at depth 1 even rank 1 in every layer has 19,\d+ parameters",
        ),
        (
            ("--budget-params", 40_000, "--mlp-rank", 8, "--rank-schedule", "8,4,2"),
            r"--plan: --rank-schedule 8,4,2 has one rank a layer",
        ),
        (
            ("--budget-params", "40k"),
            r"--budget-params 40k: neither a whole number such as 10_000_000 nor a run's tag: no such run in",
        ),
        (("--budget-params", 40_000, "--mlp-rank", 99), r"--mlp-rank.*rank 99 does not fit"),
        (("--budget-params", 40_000, "--total-batch-size", 100), r"--total-batch-size 100: not a multiple"),
    ],
)
def test_impossible_plans_are_one_line(more, message, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(InputError, match=message) as e:
        base_train.main([*SMALL, *map(str, more), "--plan"])
    assert "\n" not in str(e.value)


def test_a_list_of_ranks_leaves_no_depth_to_solve_for():
    args = flags("--budget-params", 40_000, "--solve", "depth", "--rank-schedule", "8,4,2")
    with pytest.raises(InputError, match=r"--solve depth: --rank-schedule 8,4,2 .* use --solve rank"):
        choose_model(args, 300)


def test_ranks_in_short():
    ranks = ((), (8, 8, 8), (10, 90, 10), (100, 46, 22, 10))
    assert list(map(ranks_in_short, ranks)) == ["full", "8", "10…90…10", "100…22…10"]
