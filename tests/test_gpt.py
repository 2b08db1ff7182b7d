"""The model against explicit computations: factors, attention, head loss, counts."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanochat import recompute
from nanochat.accounting import account
from nanochat.attention import window_mask
from nanochat.compiler import chunk_loss
from nanochat.gpt import (
    GPT,
    SCORE_SCALE,
    Attention,
    GPTConfig,
    Linear,
    LowRankLinear,
    make_linear,
    resolve_rank,
)
from nanochat.ops import SOFTCAP, CrossEntropy, logits, norm, project, relu2_mlp, rows_at_once


def tiny(**changes) -> GPT:
    config = GPTConfig(
        **{**dict(sequence_len=16, vocab_size=50, n_layer=3, n_head=4, n_kv_head=4, n_embd=32), **changes}
    )
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    recompute.apply(model)
    for p in model.parameters():  # wake the zero-initialised outputs, so that every part matters
        if p.ndim == 2:
            p.data += 0.1 * torch.randn_like(p)
    return model


def rotary(T: int, D: int, dtype=torch.float64):
    """cos and sin, as `GPT.forward` computes them for a context of 16."""
    angle = torch.arange(T)[:, None] * 64.0 ** (-torch.arange(0, D, 2) / D)
    angle = torch.cat((angle, -angle), dim=-1).to(dtype)
    return angle.cos(), angle.sin()


def tokens(*shape, vocab=50):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1))


def live_bytes(function) -> tuple[int, int]:
    """(highest, at the end) bytes that `function` allocated and did not free, by the allocator's events."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()  # noqa: F841 - it holds what the backward pass needs
    events = sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    )
    live = list(itertools.accumulate(e.nbytes() for e in events))
    return max(live), live[-1]


# ---- linear layers


def test_low_rank_layer_applies_exactly_its_dense_weight():
    layer = LowRankLinear(24, 40, 5).double()
    layer.init()
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    assert layer.A.shape == (5, 24) and layer.B.shape == (40, 5)
    torch.testing.assert_close(layer(x), x @ (layer.B @ layer.A).T)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T)
    assert torch.linalg.matrix_rank(layer.dense_weight()) == 5


@pytest.mark.parametrize("n_in,n_out,rank", [(128, 128, 32), (128, 512, 42), (512, 128, 128), (64, 64, 64)])
def test_initial_product_has_the_variance_of_the_full_rank_layer(n_in, n_out, rank):
    torch.manual_seed(0)
    full = Linear(n_in, n_out)
    low = LowRankLinear(n_in, n_out, rank)
    full.init()
    low.init()
    assert low.dense_weight().square().mean().item() == pytest.approx(1 / n_in, rel=1e-4)
    assert full.weight.square().mean().item() == pytest.approx(1 / n_in, rel=0.05)


def test_residual_outputs_start_at_zero_and_still_learn():
    model = GPT(
        GPTConfig(
            sequence_len=16,
            vocab_size=50,
            n_layer=2,
            n_head=2,
            n_kv_head=2,
            n_embd=32,
            attn_ranks=(4, 4),
            mlp_ranks=(4, 4),
        )
    )
    torch.manual_seed(0)
    model.init_weights()
    for block in model.blocks:
        assert block.attn.o.dense_weight().abs().max() == 0 and block.mlp.down.dense_weight().abs().max() == 0
    model.lm_head.weight.data.normal_()
    idx = tokens(2, 16)
    model(idx, idx).backward()
    assert all(block.mlp.down.B.grad.abs().max() > 0 for block in model.blocks)


def test_rank_as_number_and_as_fraction():
    assert (
        resolve_rank(0, 10, 40) == 0
        and resolve_rank(10, 10, 40) == 10
        and resolve_rank(0.25, 256, 1024) == 64
    )
    assert resolve_rank(0.001, 10, 40) == 1
    for bad in (11, -1, 2.5):
        with pytest.raises(ValueError, match="1 to 10"):
            resolve_rank(bad, 10, 40)
    assert isinstance(make_linear(8, 8, 0), Linear) and isinstance(make_linear(8, 8, 2), LowRankLinear)


# ---- attention


def explicit_attention(attn: Attention, x, cos, sin, window):
    """One head and one query at a time, in plain arithmetic."""
    B, T, _ = x.shape
    D = attn.head_dim
    H = attn.q.out_features // D
    K = attn.k.out_features // D
    out = torch.zeros(B, T, H, D, dtype=x.dtype)
    weights = {name: getattr(attn, name).dense_weight() for name in "qkvo"}
    for b in range(B):
        for h in range(H):
            kv = h * K // H
            q = x[b] @ weights["q"][h * D : (h + 1) * D].T
            k, v = (x[b] @ weights[n][kv * D : (kv + 1) * D].T for n in "kv")
            q = norm(q, cos, sin)
            k = norm(k, cos, sin)
            for i in range(T):
                seen = range(max(0, i - window + 1), i + 1)
                p = torch.softmax(
                    SCORE_SCALE * torch.stack([q[i] @ k[j] for j in seen]) / math.sqrt(D), dim=0
                )
                out[b, i, h] = sum(p[n] * v[j] for n, j in enumerate(seen))
    return out.flatten(2) @ weights["o"].T


@pytest.mark.parametrize("pattern", ["L", "S"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("ranks", [(), (6, 6, 6)])
def test_attention_equals_explicit_computation(pattern, kv_heads, ranks):
    model = tiny(window_pattern=pattern, n_kv_head=kv_heads, attn_ranks=ranks).double()
    attn = model.blocks[0].attn
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    cos, sin = rotary(16, 8)
    expected = explicit_attention(attn, norm(x), cos, sin, window={"L": 16, "S": 8}[pattern])
    rotation = (cos[:, None], sin[:, None])  # for (B, T, H, D)
    for window in (16, None) if pattern == "L" else (8, window_mask(16, 8, x.device)):
        torch.testing.assert_close(attn(x, None, rotation, window), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [6, 0.3])  # as a fraction, q has a larger rank than k and v of two heads
def test_joint_projections_and_their_gradients_equal_those_of_the_dense_matrices(rank):
    attn = tiny(n_kv_head=2, attn_ranks=(rank,) * 3).double().blocks[0].attn
    layers = {name: getattr(attn, name) for name in "qkv"}
    x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    factors = [p for layer in layers.values() for p in (layer.A, layer.B)]
    outputs = project(norm(x), attn.q, attn.k, attn.v)
    dense = [norm(x) @ layer.dense_weight().T for layer in layers.values()]
    torch.testing.assert_close(list(outputs), dense)
    weights = [torch.randn_like(y) for y in dense]
    gradients = []
    for ys in (outputs, dense):
        total = sum((w * y).sum() for w, y in zip(weights, ys))
        gradients.append(list(torch.autograd.grad(total, [x, *factors])))
    torch.testing.assert_close(*gradients)


def test_window_pattern_is_tiled_and_the_last_layer_sees_everything():
    config = GPTConfig(sequence_len=64, n_layer=6, window_pattern="SSL")
    assert [config.window(i) for i in range(6)] == [32, 32, 64, 32, 32, 64]
    assert GPTConfig(sequence_len=64, n_layer=2, window_pattern="S").window(1) == 64


def test_rotary_scores_depend_on_the_distance_only():
    cos, sin = rotary(16, 8)
    q = torch.randn(8, dtype=torch.float64)
    k = torch.randn(8, dtype=torch.float64)

    def score(i, j):
        return (
            norm(q[None], cos[i : i + 1], sin[i : i + 1])[0]
            @ norm(k[None], cos[j : j + 1], sin[j : j + 1])[0]
        )

    torch.testing.assert_close(score(5, 2), score(13, 10), atol=1e-6, rtol=1e-6)
    assert abs(score(5, 2) - score(5, 4)) > 1e-3


def test_no_token_sees_its_future():
    model = tiny(value_embeddings=True)
    idx = tokens(1, 16)
    changed = idx.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 50
    before = model(idx)
    after = model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-5, rtol=1e-5)
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 1e-2


def test_norms_have_the_gradients_of_their_formulas():
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 8, dtype=torch.float64)
    cos, sin = rotary(5, 8)
    turn = torch.complex(cos[:, :4], -sin[:, :4])
    pairs = torch.complex(*F.rms_norm(x, (8,)).chunk(2, dim=-1)) * turn  # a number for each pair of channels
    rotated = torch.cat((pairs.real, pairs.imag), dim=-1)
    for y, plain in ((norm(x), F.rms_norm(x, (8,))), (norm(x, cos, sin), rotated)):
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(
            torch.autograd.grad(y, x, grad), torch.autograd.grad(plain, x, grad, retain_graph=True)
        )
        with torch.no_grad():
            torch.testing.assert_close(norm(x, cos, sin), rotated)
    half = torch.randn(4, 64).bfloat16().requires_grad_()
    y = norm(half)
    assert y.dtype == torch.bfloat16 and torch.autograd.grad(y.sum(), half)[0].dtype == torch.bfloat16
    # one rounding
    torch.testing.assert_close(y, F.rms_norm(half.float(), (64,)).bfloat16(), atol=0, rtol=0.005)


@pytest.mark.parametrize("up_rank", [0, 3])
@pytest.mark.parametrize("down_rank", [0, 3])
@pytest.mark.parametrize("kept", [False, True])
def test_relu2_mlp_has_the_gradients_of_its_formula(up_rank, down_rank, kept):
    up = make_linear(8, 12, up_rank).double()
    down = make_linear(12, 8, down_rank).double()
    up.init()
    down.init()
    down.keep_product = kept and down_rank > 0
    parameters = [*up.parameters(), *down.parameters()]
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 8, dtype=torch.float64)
    y = relu2_mlp(x, up, down)
    plain = down(F.relu(up(x)).square())
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, *parameters), grad), torch.autograd.grad(plain, (x, *parameters), grad)
    )
    half = x.detach().bfloat16().requires_grad_()
    y = relu2_mlp(half, up, down)
    grads = torch.autograd.grad(y, (half, *parameters), grad.bfloat16())
    plain = down(F.relu(up(x)).square())
    for value, expected in zip(grads[1:], torch.autograd.grad(plain, parameters, grad)):
        assert value.dtype == torch.float64 and (value - expected).norm() < 0.05 * expected.norm()
    assert y.dtype == grads[0].dtype == torch.bfloat16


# ---- head and loss


@pytest.mark.parametrize("chunk_loss", [None, chunk_loss])
@pytest.mark.parametrize("N", [1, 13, 1100])
def test_head_loss_and_gradients_equal_the_plain_formula(monkeypatch, N, chunk_loss):
    monkeypatch.setattr("nanochat.ops.CPU_LOGITS", 1)  # 512 rows at a time
    x = torch.randn(N, 8, dtype=torch.float64, requires_grad=True)
    weight = (
        3 * torch.randn(50, 8, dtype=torch.float64)
    ).requires_grad_()  # large enough for the softcap to bend
    target = tokens(N)
    plain = F.cross_entropy(SOFTCAP * torch.tanh(x @ weight.T / SOFTCAP), target)
    expected = torch.autograd.grad(2.5 * plain, (x, weight))
    loss = CrossEntropy.apply(x, weight, target, chunk_loss)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(2.5 * loss, (x, weight)), expected)
    torch.testing.assert_close(CrossEntropy.apply(x, weight, target, chunk_loss, 7), plain)
    torch.testing.assert_close(F.cross_entropy(logits(x, weight), target), plain)


def test_compiled_code_on_a_gpu_takes_more_rows_of_logits_at_once_for_a_wider_head():
    def rows(width, V, compiled, is_cuda=True):
        x = SimpleNamespace(is_cuda=is_cuda, size=lambda dim: width)
        return rows_at_once(x, V, compiled)

    assert rows(1280, 65536, False) == 1024
    assert [rows(width, 65536, True) for width in (64, 320, 1280, 2048)] == [1024, 1024, 4096, 8192]
    assert rows(1280, 2**20, True) == 4096 and rows(64, 4096, True) == 2**14
    assert rows(1280, 65536, True, is_cuda=False) == rows(1280, 65536, False, is_cuda=False) == 512


@pytest.mark.parametrize("changes", [{}, {"lm_head_rank": 5}, {"tie_embeddings": True}])
def test_loss_logits_and_token_losses_agree(changes):
    model = tiny(**changes)
    idx = tokens(3, 16)
    targets = tokens(3, 16) * 3 % 50
    logits = model(idx)
    assert logits.shape == (3, 16, 50) and logits.abs().max() < SOFTCAP
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 16)
    torch.testing.assert_close(model.token_losses(idx, targets), expected)
    torch.testing.assert_close(model(idx, targets), expected.mean())


def test_low_rank_model_equals_the_dense_model_of_its_products():
    low = tiny(attn_ranks=(4, 8, 16), mlp_ranks=(16, 8, 4), lm_head_rank=8).double()
    dense = tiny().double()
    state = low.state_dict()
    for name, module in low.named_modules():
        if isinstance(module, LowRankLinear):
            del state[f"{name}.A"], state[f"{name}.B"]
            state[f"{name}.weight"] = module.dense_weight()
    dense.load_state_dict(state)
    idx = tokens(2, 16)
    args = (idx, idx, torch.float64)
    torch.testing.assert_close(low(*args), dense(*args), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("act", ["none", "silu"])
def test_what_is_between_the_factors(act):
    layer = LowRankLinear(24, 40, 5, act).double()
    layer.init()
    x = torch.randn(3, 24, dtype=torch.float64)
    h = x @ layer.A.T
    torch.testing.assert_close(layer(x), (h * torch.sigmoid(h) if act == "silu" else h) @ layer.B.T)
    if act == "silu":
        with pytest.raises(ValueError, match="silu between its factors is not a matrix"):
            layer.dense_weight()


def test_matrices_may_have_ranks_of_their_own():
    ranks = dict(v=(8, 8, 8), down=(0.25, 0.25, 0.25), k=(0, 0, 0), up=(3, 0, 1))
    model = tiny(attn_ranks=(4,) * 3, matrix_ranks=ranks)
    built = []
    for b in model.blocks:
        built.append([layer.rank for layer in (b.attn.q, b.attn.k, b.attn.v, b.attn.o, b.mlp.up, b.mlp.down)])
    assert built == [[4, 0, 8, 4, 3, 8], [4, 0, 8, 4, 0, 8], [4, 0, 8, 4, 1, 8]]
    assert account(model)["params/attention"] == 3 * (2 * 4 * 64 + 32 * 32 + 8 * 64)


def test_value_embeddings_join_every_other_layer_and_change_the_output():
    model = tiny(value_embeddings=True, n_layer=4)
    assert sorted(model.value_embeds) == ["1", "3"]
    before = model(tokens(1, 16))
    model.value_embeds["1"].weight.data.add_(1.0)
    assert (model(tokens(1, 16)) - before).abs().max() > 1e-3


# ---- counts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(attn_ranks=(4, 8, 16), mlp_ranks=(3, 3, 3), lm_head_rank=5),
        dict(tie_embeddings=True, n_kv_head=2),
        dict(layer_map=(0, 0, 1, 2, 1), attn_ranks=(4, 8, 16)),
        dict(mlp_ranks=(3, 3, 3), matrix_ranks={"v": (8, 8, 8), "up": (0, 0, 0)}, factor_act="silu"),
    ],
)
def test_counted_flops_are_those_that_torch_counts(changes):
    """Forward FLOPs a token are a third of the training FLOPs; torch counts T × T attention, as 'L' does."""
    model = tiny(window_pattern="L", **changes)
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # neither the fused CPU kernel nor ours is counted
        model(tokens(2, 16))
    assert counter.get_total_flops() == account(model)["flops/per_token"] / 3 * 2 * 16


def test_counted_parameters_are_those_that_exist():
    model = tiny(attn_ranks=(4, 8, 16), mlp_ranks=(3, 3, 3), value_embeddings=True)
    counts = account(model)
    assert counts["params/total"] == sum(p.numel() for p in model.parameters())
    assert counts["params/attention"] == sum(r * 4 * (32 + 32) for r in (4, 8, 16))
    assert counts["params/mlp"] == 3 * 2 * 3 * (32 + 128)
    assert counts["params/embedding"] == 3 * 50 * 32  # wte and value tables of layers 0 and 2
    assert counts["params/other"] == 6 + 32  # residual and shortcut scales, smear


def test_bfloat16_compute_keeps_float32_masters():
    model = tiny(attn_ranks=(8,) * 3)
    idx = tokens(2, 16)
    loss = model(idx, idx, torch.bfloat16)
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert loss.item() == pytest.approx(model(idx, idx).item(), abs=0.05)
