"""Rank schedules, and the whole ranks of fractions."""

import random
from dataclasses import replace

import pytest

from nanochat.accounting import account, on_meta
from nanochat.gpt import GPTConfig
from nanochat.rank import rank_step, ranks_over_depth, resolve_rank


@pytest.mark.parametrize(
    "schedule,expected",
    [
        ("constant", (100, 100, 100, 100)),
        ("linear", (100, 70, 40, 10)),
        ("step", (100, 100, 10, 10)),
        ("exponential", (100, 46, 22, 10)),
        ("quadratic", (10, 90, 90, 10)),
    ],
)
def test_schedules_by_hand(schedule, expected):
    assert ranks_over_depth(schedule, 100, 10, 4) == expected


def test_schedule_of_one_layer_and_of_fractions():
    assert ranks_over_depth("linear", 30, 10, 1) == (30,)
    assert ranks_over_depth("linear", 0.5, 0.25, 3) == (0.5, 0.375, 0.25)
    assert ranks_over_depth("quadratic", 90, 10, 3) == (10, 90, 10)


@pytest.mark.parametrize("seed", range(20))
def test_monotone_schedules_are_monotone_and_stay_between_their_ends(seed):
    rng = random.Random(seed)
    start = rng.randint(1, 400)
    end = rng.randint(1, 400)
    depth = rng.randint(2, 40)
    for schedule in ("linear", "step", "exponential"):
        ranks = ranks_over_depth(schedule, start, end, depth)
        assert len(ranks) == depth and ranks[0] == start and ranks[-1] == end
        assert list(ranks) == sorted(ranks, reverse=start > end)
    quadratic = ranks_over_depth("quadratic", start, end, depth)
    assert min(start, end) <= min(quadratic) and max(quadratic) <= max(start, end)


@pytest.mark.parametrize(
    "width,nearest,multiple",
    [(192, 57, 57), (256, 76, 80), (512, 152, 152), (1024, 304, 320), (1280, 380, 384)],
)
def test_a_fraction_becomes_the_nearest_multiple_that_suits_the_width(width, nearest, multiple):
    config = GPTConfig(
        vocab_size=300, n_layer=1, n_head=2, n_kv_head=2, n_embd=width, attn_ranks=(57,), mlp_ranks=(0.297,)
    )
    for rank_multiple, rank in ((1, nearest), (-1, multiple)):
        model = on_meta(replace(config, rank_multiple=rank_multiple))
        block = model.blocks[0]
        assert (block.mlp.up.rank, block.mlp.down.rank) == (rank, rank)
        assert block.attn.q.rank == 57, "a whole number is as it is"
        assert account(model)["params/mlp"] == 2 * rank * 5 * width
    assert on_meta(config).blocks[0].mlp.up.rank == nearest, "an older checkpoint has no multiple"


@pytest.mark.parametrize("seed", range(20))
def test_multiples_are_near_their_fraction_and_fit_the_matrix(seed):
    rng = random.Random(seed)
    for _ in range(200):
        multiple = rng.choice([-1, -1, 1, 8, 48, 64])
        fraction = rng.uniform(1e-4, 1 - 1e-4)
        sides = rng.randint(1, 3000), rng.randint(1, 3000)
        smaller = min(sides)
        rank = resolve_rank(fraction, *sides, multiple)
        step = rank_step(multiple, smaller)
        assert rank % step == 0 and step <= rank <= smaller
        assert abs(rank - fraction * smaller) <= step / 2 or rank == step or rank + step > smaller
        assert resolve_rank(rank, *sides, multiple) == rank
