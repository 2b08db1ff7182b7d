"""What a model costs: parameters, FLOPs, and the bytes of a training step."""

from dataclasses import replace

import pytest
from test_gpt import live_bytes, tokens

from nanochat import recompute
from nanochat.accounting import account, count_parameters
from nanochat.gpt import GPT, GPTConfig
from nanochat.memory import predict_peak
from nanochat.optim import Rates, build_optimizers

SHAPE = GPTConfig(sequence_len=64, vocab_size=256, n_layer=4, n_head=2, n_kv_head=2, n_embd=64)


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
