"""What a model costs: parameters, FLOPs, and the bytes of a training step."""

import math
from dataclasses import replace

import pytest
import torch
from test_gpt import live_bytes, tokens
from torch.utils.flop_counter import FlopCounterMode

from nanochat import devices, gpt, recompute
from nanochat.accounting import account, count_parameters, mean_keys
from nanochat.attention import window_mask
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Rates, build_optimizers
from nanochat.peak import Execution, predict_peak

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
    predicted = predict_peak(config, Execution(rows, accumulated=passes > 1))["mem/predicted_peak_bytes"]
    assert predicted == pytest.approx(measured, rel=0.1)


# ---- FLOPs as executed


class AttentionByQuery(torch.autograd.Function):
    """Attention that multiplies with no key that a query does not see. As fused kernels do, its backward pass
    computes the scores again. q, k, v: (N, T, D); mask: (T, T).
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        rows = []
        for i in range(q.size(1)):
            seen = mask[i]
            weights = (q[:, i : i + 1] @ k[:, seen].mT * scale).softmax(-1)
            rows.append(weights @ v[:, seen])
        return torch.cat(rows, dim=1)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (q, k, v))
        for i in range(q.size(1)):
            seen = mask[i]
            query = q[:, i : i + 1]
            row = grad[:, i : i + 1]
            weights = (query @ k[:, seen].mT * ctx.scale).softmax(-1)
            grad_v[:, seen] += weights.mT @ row
            grad_weights = row @ v[:, seen].mT
            grad_scores = (
                weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * ctx.scale
            )
            grad_q[:, i : i + 1] = grad_scores @ k[:, seen]
            grad_k[:, seen] += grad_scores.mT @ query
        return grad_q, grad_k, grad_v, None, None


def attention_by_query(q, k, v, scale, window):
    """In place of `attention.attention`."""
    B, H, T, D = q.shape
    groups = H // k.size(1)
    k, v = (t.repeat_interleave(groups, dim=1).flatten(0, 1) for t in (k, v))
    mask = window_mask(T, window, q.device)
    y = AttentionByQuery.apply(q.flatten(0, 1), k, v, mask, scale)
    return y.view(B, H, T, D).transpose(1, 2).flatten(2)


def counted_flops(model, idx, monkeypatch) -> float:
    """FLOPs a token of a training pass, as torch counts the shapes of its products."""
    monkeypatch.setattr(gpt, "attention", attention_by_query)
    # as in compiled code, where the last product of a block that is computed again falls away
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    own = torch.ops.nanochat

    def one_product(x, weight, out_shape=None, **_):  # all are shapes
        return 2 * math.prod(x) * weight[0]

    def two_products(x, up, down, out_shape=None, **_):
        return 2 * math.prod(x) * up[0] + 2 * math.prod(x[:-1]) * up[0] * down[0]

    formulas = {own.bottleneck: one_product, own.relu2: two_products}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(idx, idx).backward()
    return counter.get_total_flops() / idx.numel()


EXECUTED = {
    "full": {},
    "windows": dict(window_pattern="SL", n_layer=3),
    "grouped queries, low-rank head": dict(n_kv_head=1, lm_head_rank=4),
    "tied": dict(layer_map=(0, 1, 1, 0), tie_embeddings=True),
    "low": dict(attn_ranks=(4, 8), mlp_ranks=(4, 8)),
    "silu": dict(attn_ranks=(4, 8), mlp_ranks=(4, 8), factor_act="silu"),
    "up and q": dict(matrix_ranks={"up": (8, 4), "q": (8, 4)}),
    "down, o and v": dict(matrix_ranks={"down": (8, 0), "v": (0, 4), "o": (0, 4)}),
}


@pytest.mark.parametrize("mode", recompute.MODES)
@pytest.mark.parametrize("name", EXECUTED)
def test_executed_flops_are_those_that_torch_counts(name, mode, monkeypatch):
    shape = dict(
        sequence_len=12, vocab_size=40, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"
    )
    model = GPT(GPTConfig(**shape | EXECUTED[name], recompute=mode))
    model.init_weights()
    recompute.apply(model)
    costs = account(model)
    assert counted_flops(model, tokens(2, 12, vocab=40), monkeypatch) == costs["flops/executed_per_token"]
    if mode == "none":  # only attention differs: 12 for each key of the window, 14 for each key that is seen
        attention = 0.0
        for layer in model.config.positions:
            window = model.config.window(layer)
            attention += 32 * (12 * window - 14 * window_mask(12, window, "cpu").sum().item() / 12)
        assert costs["flops/per_token"] - costs["flops/executed_per_token"] == pytest.approx(attention, abs=1)


@pytest.mark.parametrize("T, window", [(1, 1), (8, 8), (8, 3), (8, 1), (7, 20)])
def test_the_keys_that_a_query_sees(T, window):
    assert mean_keys(T, window) == pytest.approx(window_mask(T, window, "cpu").sum().item() / T)


def test_a_card_is_known_by_its_whole_name():
    peaks = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA H200": 989e12,
        "NVIDIA H200 NVL": 835e12,
        "NVIDIA GH200 480GB": 989e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA GB200": 2500e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12,
        "NVIDIA A10": 125e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40": 181e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA GeForce RTX 4090": 165.2e12,
        "AMD Instinct MI300X": 1307e12,
        # a part of a card, cards of nearly the same name, a card without bfloat16, no card
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None,
        "NVIDIA GeForce RTX 3090 Ti": None,
        "NVIDIA A10G": None,
        "Tesla V100-SXM2-16GB": None,
        "AMD EPYC 9654 96-Core Processor": None,
    }
    assert {name: devices.peak_flops(name) for name in peaks} == peaks
