"""The model against explicit computations: factors, attention, head loss, counts."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanochat.attention import (
    BlockAttention,
    attention,
    batch_slices,
    blocks,
    by_blocks,
    mask_for,
    window_mask,
)
from nanochat.functional import (
    SOFTCAP,
    HeadCrossEntropy,
    RotaryNorm,
    SquaredReLUMLP,
    linear,
    loss_of_logits,
    loss_of_logits_to_compile,
    norm,
    rotate,
    row_slices,
)
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
from nanochat.rank import account


def tiny(**changes) -> GPT:
    config = GPTConfig(
        **{**dict(sequence_len=16, vocab_size=50, n_layer=3, n_head=4, n_kv_head=4, n_embd=32), **changes}
    )
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    for p in model.parameters():  # wake the zero-initialised outputs, so that every part matters
        if p.ndim == 2:
            p.data += 0.1 * torch.randn_like(p)
    return model


def tokens(*shape, vocab=50):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1))


def live_bytes(function) -> tuple[int, int]:
    """(highest, at the end) bytes of tensors allocated and not freed since `function` was called, by the allocator's own events."""
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
    out = torch.zeros(B, T, attn.n_head, attn.head_dim, dtype=x.dtype)
    weights = {name: getattr(attn, name).dense_weight() for name in "qkvo"}
    for b in range(B):
        for h in range(attn.n_head):
            kv = h * attn.n_kv_head // attn.n_head
            q = x[b] @ weights["q"][h * D : (h + 1) * D].T
            k, v = (x[b] @ weights[n][kv * D : (kv + 1) * D].T for n in "kv")
            q = norm(rotate(q, cos, sin))
            k = norm(rotate(k, cos, sin))
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
    cos, sin = model.rotary(16, x.device, torch.float64)
    expected = explicit_attention(attn, norm(x), cos, sin, window={"L": 16, "S": 8}[pattern])
    mask = window_mask(16, 8, x.device) if pattern == "S" else None
    torch.testing.assert_close(attn(x, None, cos, sin, mask), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [6, 0.3])  # as a fraction, q has a larger rank than k and v of two heads
def test_joint_projections_and_their_gradients_equal_those_of_the_dense_matrices(rank):
    attn = tiny(n_kv_head=2, attn_ranks=(rank,) * 3).double().blocks[0].attn
    layers = {name: getattr(attn, name) for name in "qkv"}
    x = torch.randn(2, 16, 32, dtype=torch.float64, requires_grad=True)
    factors = [p for layer in layers.values() for p in (layer.A, layer.B)]
    outputs = [y.transpose(1, 2).flatten(2) for y in attn.project(attn.narrow(x))]
    dense = [norm(x) @ layer.dense_weight().T for layer in layers.values()]
    torch.testing.assert_close(list(outputs), dense)
    weights = [torch.randn_like(y) for y in dense]
    joint, separate = (
        [*torch.autograd.grad(sum((w * y).sum() for w, y in zip(weights, ys)), [x, *factors])]
        for ys in (outputs, dense)
    )
    torch.testing.assert_close(joint, separate)


@pytest.mark.parametrize(
    "T,window", [(16, 16), (16, 5), (22, 22), (22, 9), (40, 20), (64, 3)]
)  # with blocks of 4 and 8 queries, a last one that is short
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_by_blocks_equals_that_of_the_whole_matrix(monkeypatch, T, window, kv_heads):
    monkeypatch.setattr("nanochat.attention.SMALLEST", 4)
    q, k = (
        F.normalize(torch.randn(2, h, T, 8, dtype=torch.float64), dim=-1).mul(8**0.5).requires_grad_()
        for h in (4, kv_heads)
    )
    v = torch.randn(2, kv_heads, T, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, T, 32, dtype=torch.float64)
    mask = window_mask(T, window, "cpu")
    scores = 0.6 * q @ k.repeat_interleave(4 // kv_heads, dim=1).mT
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (p @ v.repeat_interleave(4 // kv_heads, dim=1)).transpose(1, 2).flatten(2)
    monkeypatch.setattr("nanochat.attention.IN_CACHE", 1)  # each row of the batch by itself
    blocks.cache_clear()
    _, found = blocks(T, window, 4 // kv_heads, q.dtype)
    assert len(found) > 2 and len(batch_slices(2, kv_heads, found)) == 2
    y = BlockAttention.apply(q, k, v, torch.tensor(window), 0.6)
    blocks.cache_clear()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad((weight * y).sum(), (q, k, v)),
        torch.autograd.grad((weight * expected).sum(), (q, k, v)),
    )


def test_attention_by_blocks_is_for_training_and_agrees_with_torchs_kernel():
    """The same model under a gradient and without, in float32 and bfloat16; scores too high for their exponentials."""
    same = [
        (torch.ones(1, 1, T, D), torch.ones(1, 1, T, D), T, SCORE_SCALE / D**0.5)
        for D, T in ((8, 24), (512, 3))
    ]  # every score is scale · D
    for q, k, T, scale in (*same, (*same[0][:3], 60.0), (*torch.randn(2, 1, 2, 24, 8), 24, 0.6)):
        v = torch.randn(q.shape)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
            inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
            by_block = attention(*inputs, scale, mask_for(T, T, q.device))
            assert "BlockAttention" in type(by_block.grad_fn).__name__
            with torch.no_grad():
                assert mask_for(T, T, q.device) is None
                torch.testing.assert_close(
                    by_block, attention(*inputs, scale), atol=tolerance, rtol=tolerance
                )
    assert by_blocks(2048, 1024) and not by_blocks(2048, 2048)


def test_memory_of_attention_by_blocks_grows_with_the_length():
    """What is kept doubles with the length, and does not quadruple as the weights would."""

    def kept(T):
        saved = []
        x = torch.randn(1, 1, T, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            BlockAttention.apply(x, x, x, torch.tensor(T), 0.1)
        return sum(saved) - 8  # the window

    assert kept(512) == 2 * kept(256)


def test_window_pattern_is_tiled_and_the_last_layer_sees_everything():
    config = GPTConfig(sequence_len=64, n_layer=6, window_pattern="SSL")
    assert [config.window(i) for i in range(6)] == [32, 32, 64, 32, 32, 64]
    assert GPTConfig(sequence_len=64, n_layer=2, window_pattern="S").window(1) == 64


def test_rotary_scores_depend_on_the_distance_only():
    model = tiny().double()
    cos, sin = model.rotary(16, "cpu", torch.float64)
    q = torch.randn(8, dtype=torch.float64)
    k = torch.randn(8, dtype=torch.float64)
    score = lambda i, j: (
        rotate(q[None], cos[i : i + 1], sin[i : i + 1])[0]
        @ rotate(k[None], cos[j : j + 1], sin[j : j + 1])[0]
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


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("at_once", [4, 100])  # a part of the rows at a time, or all
def test_squared_relu_mlp_has_the_gradients_of_its_formula(monkeypatch, at_once, keep):
    monkeypatch.setattr(
        "nanochat.functional.row_slices",
        lambda x, width: [slice(i, i + at_once) for i in range(0, len(x), at_once)],
    )
    x, up, down, grad = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 5, 8), (12, 8), (6, 12), (3, 5, 6))
    )
    plain = F.relu(x @ up.T).square() @ down.T
    y = SquaredReLUMLP.apply(x, up, down, keep)
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, up, down), grad), torch.autograd.grad(plain, (x, up, down), grad)
    )
    half = [t.detach().bfloat16().requires_grad_() for t in (x, up, down)]
    found = torch.autograd.grad(SquaredReLUMLP.apply(*half, keep), half, grad.bfloat16())
    for value, expected in zip(
        found, torch.autograd.grad(F.relu(x @ up.T).square() @ down.T, (x, up, down), grad)
    ):
        assert value.dtype == torch.bfloat16 and (value - expected).norm() < 0.02 * expected.norm()


def test_the_rows_of_an_mlp_are_all_in_one_slice():
    x = torch.empty(5000, 8)
    for width in (16, 4096, 10**6):
        slices = row_slices(x, width)
        assert torch.cat([torch.arange(5000)[rows] for rows in slices]).equal(torch.arange(5000))
        assert len(slices) == {16: 1, 4096: 10, 10**6: 10}[width]


def test_norms_have_the_gradients_of_their_formulas():
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 8, dtype=torch.float64)
    angle = torch.randn(5, 4, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), -angle)
    pairs = (
        torch.complex(*F.rms_norm(x, (8,)).chunk(2, dim=-1)) * turn
    )  # a complex number for each pair of channels
    for y, plain in (
        (norm(x), F.rms_norm(x, (8,))),
        (RotaryNorm.apply(x, angle.cos(), angle.sin()), torch.cat((pairs.real, pairs.imag), dim=-1)),
    ):
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(
            torch.autograd.grad(y, x, grad), torch.autograd.grad(plain, x, grad, retain_graph=True)
        )
    half = torch.randn(4, 64).bfloat16().requires_grad_()
    y = norm(half)
    assert y.dtype == torch.bfloat16 and torch.autograd.grad(y.sum(), half)[0].dtype == torch.bfloat16
    torch.testing.assert_close(
        y, F.rms_norm(half.float(), (64,)).bfloat16(), atol=0, rtol=0.005
    )  # one rounding


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (1000, 300)])  # in the cache, and beyond it
@pytest.mark.parametrize("rows", [(1,), (1, 1), (1, 2), (4, 1), (5, 1)])
def test_few_rows_are_multiplied_as_many_are(shape, rows):
    x = torch.randn(*rows, shape[1], dtype=torch.float64)
    weight = torch.randn(shape)
    with torch.no_grad():
        y = linear(x, weight)
        torch.testing.assert_close(y, torch.einsum("...i,oi->...o", x, weight.double()))
        assert linear(x.bfloat16(), weight).dtype == torch.bfloat16


# ---- head and loss


@pytest.mark.parametrize("of_logits", [loss_of_logits, loss_of_logits_to_compile])
@pytest.mark.parametrize("N", [1, 13, 64])
def test_head_loss_and_gradients_equal_the_plain_formula(monkeypatch, N, of_logits):
    monkeypatch.setattr("nanochat.functional.rows_at_once", lambda x, V: 7)
    x = torch.randn(N, 8, dtype=torch.float64, requires_grad=True)
    weight = (
        3 * torch.randn(50, 8, dtype=torch.float64)
    ).requires_grad_()  # large enough for the softcap to bend
    target = tokens(N)
    plain = F.cross_entropy(SOFTCAP * torch.tanh(x @ weight.T / SOFTCAP), target)
    expected = torch.autograd.grad(2.5 * plain, (x, weight))
    loss = HeadCrossEntropy.apply(x, weight, target, of_logits)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(2.5 * loss, (x, weight)), expected)


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
    found = [
        [getattr(m, "rank", 0) for m in (b.attn.q, b.attn.k, b.attn.v, b.attn.o, b.mlp.up, b.mlp.down)]
        for b in model.blocks
    ]
    assert found == [[4, 0, 8, 4, 3, 8], [4, 0, 8, 4, 0, 8], [4, 0, 8, 4, 1, 8]]
    assert account(model)["params/attention"] == 3 * (2 * 4 * 64 + 32 * 32 + 8 * 64)


@pytest.mark.parametrize(
    "changes",
    [
        dict(attn_ranks=(8,) * 3, mlp_ranks=(8,) * 3),
        dict(matrix_ranks={"v": (4,) * 3, "down": (4,) * 3}),
        dict(attn_ranks=(8,) * 3, mlp_ranks=(8,) * 3, factor_act="silu"),
    ],
)
def test_recomputing_changes_no_gradient(changes):
    plain = tiny(**changes)
    again = tiny(**changes, recompute="bottleneck")
    idx = tokens(2, 16)
    for model in (plain, again):
        model(idx, idx).backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters()):
        assert torch.equal(p.grad, q.grad), name


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
    """Forward FLOPs a token = a third of the training FLOPs; torch counts the full T × T attention, as 'L' does."""
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
