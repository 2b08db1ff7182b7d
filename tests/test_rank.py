"""Rank schedules, budgets and the accounting."""

import random
from dataclasses import replace

import pytest
from test_gpt import live_bytes, tokens

from nanochat import recompute
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Rates, build_optimizers
from nanochat.rank import (
    account,
    count_parameters,
    on_meta,
    predict_peak,
    ranks_over_depth,
    solve_depth,
    solve_rank,
)
from nanochat.whole_ranks import rank_step, resolve_rank

SHAPE = GPTConfig(sequence_len=64, vocab_size=256, n_layer=4, n_head=2, n_kv_head=2, n_embd=64)


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


def test_the_published_sizes_of_d20():
    """20 layers of width 1280 and 65,536 tokens: 561 M; 227 M with rank 128 in attention and MLP."""
    d20 = GPTConfig(vocab_size=65536, n_layer=20, n_head=10, n_kv_head=10, n_embd=1280)
    assert count_parameters(d20) == pytest.approx(561e6, rel=0.01)
    low = replace(d20, attn_ranks=(128,) * 20, mlp_ranks=(128,) * 20)
    assert count_parameters(low) == pytest.approx(227e6, rel=0.01)


def test_the_mlp_is_as_wide_as_its_ratio_says():
    """C = 64: attention 4 C², MLP 2 C N, or r (C + N) a matrix."""
    wide, low = (account(replace(SHAPE, mlp_ratio=1.5, mlp_ranks=ranks)) for ranks in ((), (16,) * 4))
    assert wide["params/mlp"] == 4 * 2 * 64 * 96 and low["params/mlp"] == 4 * 2 * 16 * (64 + 96)
    assert wide["flops/per_token"] - low["flops/per_token"] == 6 * (wide["params/mlp"] - low["params/mlp"])
    assert wide["params/attention"] == 4 * 4 * 64 * 64


def test_memory_of_weights_gradients_and_moments():
    counts = account(SHAPE)
    matrices = 12 * 64 * 64 * 4
    rest = 2 * 256 * 64 + 8 + 64
    assert counts["mem/weights_bytes"] == counts["mem/grads_bytes"] == 4 * (matrices + rest)
    # Muon: one moment, and a number for each line of the longer side; AdamW: two moments
    lines = 4 * (4 * 64 + 2 * 256)
    assert counts["mem/optimizer_bytes"] == 4 * (matrices + lines) + 8 * rest


def two_steps(config, rows: int, passes: int):
    """Training steps, the second with optimizer state from the start. What it returns is what lives on."""
    model = GPT(config)
    model.init_weights()
    recompute.apply(model)
    rates = Rates(embedding_lr=0.1, unembedding_lr=0.01, matrix_lr=0.01, scalar_lr=0.1)
    optimizers = build_optimizers(model, rates)
    idx = tokens(rows, config.sequence_len, vocab=config.vocab_size)
    for _ in range(2):
        for _ in range(passes):
            model(idx, idx).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizers


@pytest.mark.parametrize(
    "rows,passes,changes",
    [
        (16, 1, {}),
        (16, 2, {}),
        (2, 1, dict(vocab_size=4096)),
        (1, 1, dict(n_embd=256)),
        (16, 1, dict(n_layer=1)),
        (16, 1, dict(attn_ranks=(16,) * 4, mlp_ranks=(16,) * 4)),
        (16, 1, dict(attn_ranks=(16,) * 4, mlp_ranks=(16,) * 4, lm_head_rank=16)),
        (16, 1, dict(attn_ranks=(16,) * 4, mlp_ranks=(16,) * 4, recompute="bottleneck")),
        (16, 1, dict(attn_ranks=(16,) * 4, recompute="bottleneck")),
        (
            16,
            1,
            dict(
                attn_ranks=(16,) * 4, mlp_ranks=(16,) * 4, matrix_ranks={"down": (32,) * 4}, factor_act="silu"
            ),
        ),
        (16, 1, dict(attn_ranks=(32,) * 4, mlp_ranks=(32,) * 4, factor_act="silu", recompute="bottleneck")),
        (16, 1, dict(recompute="block")),
        (16, 2, dict(attn_ranks=(16,) * 4, mlp_ranks=(16,) * 4, recompute="block")),
        (16, 1, dict(matrix_ranks={"v": (16,) * 4}, value_embeddings=True, recompute="bottleneck")),
        (16, 1, dict(layer_map=(0, 0, 1, 1, 2, 3))),
        (16, 1, dict(n_kv_head=1, tie_embeddings=True)),
        (16, 1, dict(value_embeddings=True)),
        (16, 1, dict(mlp_ratio=1.5)),
        (16, 1, dict(mlp_ratio=8, mlp_ranks=(16,) * 4, recompute="bottleneck")),
    ],
)
def test_predicted_peak_is_within_a_tenth_of_the_measured(rows, passes, changes):
    config = replace(SHAPE, **{"sequence_len": 128, "vocab_size": 512, **changes})
    measured = live_bytes(lambda: two_steps(config, rows, passes))[0]
    predicted = predict_peak(config, rows, accumulated=passes > 1)["mem/predicted_peak_bytes"]
    assert predicted == pytest.approx(measured, rel=0.1)
