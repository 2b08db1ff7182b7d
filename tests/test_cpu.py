"""What is only there to be fast on a CPU: oneDNN, products of few rows, tiles of the MLP, block attention."""

import pytest
import torch
import torch.nn.functional as F

from nanochat import (
    cpu,
    devices,
    recompute,  # noqa: F401  its operators
)
from nanochat.attention import attention, window_mask
from nanochat.cpu import (
    FEW_ROWS,
    BlockAttention,
    TiledReLU2,
    by_blocks,
    few_rows_by_mkl,
    plan_blocks,
    tile_rows,
)
from nanochat.gpt import SCORE_SCALE
from nanochat.ops import linear


@pytest.fixture
def float32_products():
    """torch's setting, undone afterwards."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


@pytest.mark.parametrize(
    "vendor,flags,exact,chosen",
    [
        ("AuthenticAMD", "fma avx512_bf16", True, "bf16"),
        ("AuthenticAMD", "fma avx512_bf16", False, "ieee"),
        ("AuthenticAMD", "fma avx2", True, "none"),
        ("GenuineIntel", "avx512_bf16 amx_bf16", True, "none"),
    ],
)
def test_onednn_multiplies_float32_on_amd_only_and_only_where_it_does_not_round(
    vendor, flags, exact, chosen, float32_products, monkeypatch
):
    float32_products.fp32_precision = "none"
    monkeypatch.setattr(devices, "processor", lambda: {"vendor_id": vendor, "flags": flags})
    if not exact:  # a library that rounds the factors
        eye = torch.eye
        monkeypatch.setattr(torch, "eye", lambda n: eye(n).mul_(1 - 2**-12))
    cpu.multiply_by_onednn()
    assert float32_products.fp32_precision == chosen


def test_float32_products_have_all_digits_as_they_are_set_here(float32_products):
    cpu.multiply_by_onednn()
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((512, 256, 1024), (1024, 512, 64), (7, 300, 5)):
        a, b = (torch.randn(shape, generator=generator) for shape in ((m, k), (k, n)))
        exact = a.double() @ b.double()
        assert (a @ b - exact).norm() < 2e-6 * exact.norm()  # 2e-3 where factors are rounded to bfloat16


@pytest.mark.parametrize("chosen", ["bf16", "ieee", "none"])
def test_few_rows_are_mkls(chosen, float32_products):
    float32_products.fp32_precision = chosen
    with few_rows_by_mkl(FEW_ROWS):
        assert float32_products.fp32_precision == ("ieee" if chosen == "bf16" else chosen)
    with few_rows_by_mkl(FEW_ROWS + 1):
        assert float32_products.fp32_precision == chosen
    assert float32_products.fp32_precision == chosen


# ---- products


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (1000, 300)])  # in the cache, and beyond it
@pytest.mark.parametrize("rows", [(1,), (1, 1), (1, 2), (4, 1), (5, 1)])
def test_few_rows_are_multiplied_as_many_are(shape, rows):
    x = torch.randn(*rows, shape[1], dtype=torch.float64)
    weight = torch.randn(shape)
    with torch.no_grad():
        y = linear(x, weight)
        torch.testing.assert_close(y, torch.einsum("...i,oi->...o", x, weight.double()))
        assert linear(x.bfloat16(), weight).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_mlp_by_tiles_equals_that_of_all_rows(monkeypatch, dtype):
    shapes = ((3, 500, 8), (12, 8), (6, 12), (3, 500, 6))
    x, up, down, grad = (torch.randn(shape, dtype=dtype) for shape in shapes)
    inputs = [tensor.requires_grad_() for tensor in (x, up, down)]

    def outputs():
        y = TiledReLU2.apply(*inputs, False)
        kept = TiledReLU2.apply(*inputs, True)
        with torch.no_grad():
            assert torch.equal(y, kept) and torch.equal(y, cpu.relu2(*inputs))
        grads = torch.autograd.grad(y, inputs, grad)
        assert all(map(torch.equal, grads, torch.autograd.grad(kept, inputs, grad)))
        return y, *grads

    whole = outputs()
    monkeypatch.setattr("nanochat.cpu.TILE_BYTES", 1)
    assert tile_rows(1500, 12, dtype.itemsize) == 512  # 3 tiles, the last one short
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    for value, expected in zip(outputs(), whole):
        assert (value - expected).norm() <= tolerance * expected.norm()


def test_the_tiles_of_an_mlp_fit_a_cache():
    assert [tile_rows(5000, width, 4) for width in (16, 4096, 10**6)] == [5000, 512, 512]


# ---- attention


# with blocks of 4 and 8 queries, a last one that is short
@pytest.mark.parametrize("T,window", [(16, 16), (16, 5), (22, 22), (22, 9), (40, 20), (64, 3)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_by_blocks_equals_that_of_the_whole_matrix(monkeypatch, T, window, kv_heads):
    monkeypatch.setattr("nanochat.cpu.MIN_QUERIES", 4)
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
    monkeypatch.setattr("nanochat.cpu.SCORE_BYTES", 1)  # each row of the batch by itself
    plan_blocks.cache_clear()
    _, blocks, batches = plan_blocks(2, kv_heads, 4 // kv_heads, T, window, q.dtype)
    assert len(blocks) > 2 and len(batches) == 2
    y = BlockAttention.apply(q, k, v, torch.tensor(window), 0.6)
    plan_blocks.cache_clear()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad((weight * y).sum(), (q, k, v)),
        torch.autograd.grad((weight * expected).sum(), (q, k, v)),
    )


@pytest.mark.parametrize("T", [64, 96])  # whole blocks, and a last one that is short
def test_gradients_of_attention_by_blocks_lie_in_memory_as_the_compiler_expects(T):
    inputs = [torch.randn(2, T, heads, 8).transpose(1, 2) for heads in (4, 2, 2)]
    grad = torch.randn(2, T, 32)
    outputs = cpu.block_attention_backward(grad, *inputs, torch.tensor(T), 0.6)
    announced = cpu.block_attention_backward_shapes(grad, *inputs, torch.tensor(T), 0.6)
    for output, expected in zip(outputs, announced):
        assert (output.shape, output.stride()) == (expected.shape, expected.stride())


def test_attention_by_blocks_is_for_training_and_agrees_with_torchs_kernel():
    """With and without a gradient, in float32 and bfloat16; also where scores are too high for exp."""
    ones = torch.ones(1, 1, 24, 8)  # every score is scale · D
    long = torch.ones(1, 1, 3, 512)
    for q, k, scale in (
        (ones, ones, SCORE_SCALE / 8**0.5),
        (long, long, SCORE_SCALE / 512**0.5),
        (ones, ones, 60.0),
        (*torch.randn(2, 1, 2, 24, 8), 0.6),
    ):
        v = torch.randn(q.shape)
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
            inputs = [t.to(dtype).requires_grad_() for t in (q, k, v)]
            by_block = attention(*inputs, scale)
            assert "BlockAttention" in type(by_block.grad_fn).__name__
            with torch.no_grad():
                whole = attention(*inputs, scale)
                torch.testing.assert_close(by_block, whole, atol=tolerance, rtol=tolerance)
    assert by_blocks(512, 512) and by_blocks(2048, 1024) and not by_blocks(2048, 2048)


def test_memory_of_attention_by_blocks_grows_with_the_length():
    """What is kept doubles with the length, and does not quadruple as the weights would."""

    def kept(T):
        saved = []
        x = torch.randn(1, 1, T, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            BlockAttention.apply(x, x, x, torch.tensor(T), 0.1)
        return sum(saved) - 8  # the window

    assert kept(512) == 2 * kept(256)
