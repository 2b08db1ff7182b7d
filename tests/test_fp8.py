"""Products in float8 against a reference in float64, and what --fp8 does to a model.

torch multiplies float8 on a CPU too, by another routine than on a GPU.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from nanochat import fp8, recompute
from nanochat.adapters.attach import AdapterConfig, attach
from nanochat.errors import InputError
from nanochat.flags import build_parser
from nanochat.fp8 import E4M3, E5M2, Float8Product, check_float8, quantize, train_in_float8
from nanochat.gpt import GPT, GPTConfig, LowRankLinear
from nanochat.ops import linear

# the widths that suit, and ranks that do and that do not
SHAPE = GPTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=4, n_kv_head=4, n_embd=256)
LOW = dict(attn_ranks=(128, 128), mlp_ranks=(128, 128))
MIXED = dict(matrix_ranks={"q": (64, 64), "up": (128, 128), "down": (72, 128)})


def numbers(dtype) -> torch.Tensor:
    """All finite numbers of a float8 format >= 0 by its definition, ascending, float64."""
    mantissa, bias, codes = {E4M3: (3, 7, 127), E5M2: (2, 15, 124)}[dtype]
    values = []
    for code in range(codes):
        exponent, fraction = divmod(code, 2**mantissa)
        share = fraction / 2**mantissa
        values.append((1 + share) * 2.0 ** (exponent - bias) if exponent else share * 2.0 ** (1 - bias))
    return torch.tensor(values, dtype=torch.float64)


def rounded(x, dtype) -> torch.Tensor:
    """x as scale · float8 by the definitions of both, float64; ties go to even codes."""
    values = numbers(dtype)
    scale = (x.float().abs().max() / values[-1].float()).double()
    size = (x.float().abs() / scale.float()).double()
    middles = (values[1:] + values[:-1]) / 2
    code = torch.bucketize(size, middles)
    code += (size == middles[code.clamp(max=len(middles) - 1)]) & (code % 2 == 1)
    return x.double().sign() * values[code] * scale


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, W and the gradient of y, in bfloat16; a few entries are much larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 24, 64, generator=generator)
    weight = torch.randn(48, 64, generator=generator) / 8
    grad = torch.randn(2, 24, 48, generator=generator) * 1e-6 * torch.logspace(0, 2, 48)
    x[0, 0] *= 10
    return x.bfloat16(), weight.bfloat16(), grad.bfloat16()


def products(x, weight, grad) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y and the gradients of x and W, by Float8Product."""
    x = x.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    y = Float8Product.apply(x, weight, False)
    y.backward(grad)
    return y.detach(), x.grad, weight.grad


def test_the_three_products_are_those_of_the_rounded_tensors():
    x, weight, grad = tensors()
    x8 = rounded(x, E4M3)
    weight8 = rounded(weight, E4M3)
    grad8 = rounded(grad, E5M2)
    expected = x8 @ weight8.T, grad8 @ weight8, grad8.flatten(0, 1).T @ x8.flatten(0, 1)
    for product, value in zip(products(x, weight, grad), expected):
        assert product.dtype == torch.bfloat16
        # the sums are float32 and rounded to bfloat16
        torch.testing.assert_close(product.double(), value, rtol=2**-8, atol=1e-6 * value.abs().max().item())


@pytest.mark.parametrize("dtype, error", [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_rounding_is_within_the_error_of_the_format(dtype, error):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 0, 64)
    x8, scale = quantize(x, dtype)
    largest = numbers(dtype)[-1]
    assert scale.shape == () and scale == pytest.approx((x.abs().max() / largest).item())
    rounding = (x8.double() * scale.double() - x.double()).abs()
    smallest = numbers(dtype)[1] * scale.double()  # the distance of the smallest numbers
    assert (rounding <= torch.maximum(error * x.double().abs(), smallest / 2) * (1 + 1e-6)).all()
    assert x8.double().abs().max() == largest  # the whole range is used


def test_the_gradients_are_as_exact_as_the_formats():
    """Against float64 without any rounding. e4m3 has errors up to 6%, e5m2 up to 12%; they average out."""
    x, weight, grad = tensors(seed=2)
    wide = [t.double() for t in (x, weight, grad)]
    exact = wide[0] @ wide[1].T, wide[2] @ wide[1], wide[2].flatten(0, 1).T @ wide[0].flatten(0, 1)
    for product, value in zip(products(x, weight, grad), exact):
        error = ((product.double() - value).norm() / value.norm()).item()
        assert 0.005 < error < 0.08


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1.0, 3e38])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_size_of_a_tensor_gives_nan(size, which):
    parts = list(tensors())
    parts[which] = (torch.sign(parts[which].float()) * size).bfloat16()
    for product in products(*parts):
        assert not product.isnan().any()
    for dtype in (E4M3, E5M2):
        x8, scale = quantize(parts[which], dtype)
        assert x8.float().isfinite().all() and 0 < scale < math.inf


def test_a_value_that_is_not_finite_stays_visible():
    """So that the training step is not applied."""
    for bad in (math.inf, math.nan):
        x, weight, grad = tensors()
        grad[1, 2, 3] = bad
        y, grad_x, grad_weight = products(x, weight, grad)
        assert y.isfinite().all() and not grad_x.isfinite().all() and not grad_weight.isfinite().all()


def test_a_frozen_weight_has_no_gradient():
    x, weight, grad = tensors()
    x.requires_grad_()
    Float8Product.apply(x, weight, False).backward(grad)
    assert x.grad is not None and weight.grad is None


# ---- models ------------------------------------------------------------------------------------------------


def build(in_float8: bool = True, **changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**vars(SHAPE) | changes))
    model.init_weights()
    for p in model.parameters():  # wake the zero-initialised outputs
        p.data += 0.02 * torch.randn_like(p)
    recompute.apply(model)
    if in_float8:
        train_in_float8(model)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))


def result(model: GPT) -> list[torch.Tensor]:
    """[loss, every gradient]"""
    idx = tokens()
    loss = model(idx, idx, torch.bfloat16)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("changes", [{}, LOW, MIXED])
def test_gradients_of_a_model_are_near_those_in_bfloat16(changes):
    plain = result(build(False, **changes))
    eight = result(build(**changes))
    assert eight[0] == pytest.approx(plain[0].item(), rel=0.02)
    differences = []
    for a, b in zip(plain[1:], eight[1:]):
        if a.ndim == 2:
            differences.append(((a - b).norm() / a.norm()).item())
    assert 0.005 < max(differences) < 0.3 and sorted(differences)[len(differences) // 2] < 0.15


@pytest.mark.parametrize("mode", ["bottleneck", "block"])
@pytest.mark.parametrize("changes", [{}, LOW, MIXED])
def test_recomputation_changes_no_bit(changes, mode):
    kept = result(build(**changes))
    again = result(build(**changes, recompute=mode))
    assert all(map(torch.equal, kept, again))


def test_what_is_evaluated_is_the_usual_model():
    idx = tokens()
    eight = build(**LOW)
    plain = build(False, **LOW)
    assert torch.equal(
        eight.token_losses(idx, idx, torch.bfloat16), plain.token_losses(idx, idx, torch.bfloat16)
    )


def test_which_matrices_take_part():
    model = build(**MIXED)
    block = model.blocks[0]
    products = {name: getattr(part, name).product for part, name in parts(block)}
    suiting = {name for name, product in products.items() if product is fp8.float8_linear}
    assert suiting == {"k", "v", "o", "up"}  # q has rank 64, the down of this layer rank 72
    assert model.blocks[1].mlp.down.product is fp8.float8_linear
    assert model.lm_head.product is linear
    small = build(n_embd=96, n_head=3, n_kv_head=3)
    assert all(getattr(part, name).product is linear for part, name in parts(small.blocks[0]))


def parts(block):
    return [(block.attn, name) for name in ("q", "k", "v", "o")] + [(block.mlp, "up"), (block.mlp, "down")]


def test_an_adapted_model_still_trains():
    model = build(**LOW)
    attach(model, "a", AdapterConfig("lora", rank=2))
    loss, *gradients = result(model)
    assert loss.isfinite() and gradients and all(g.isfinite().all() for g in gradients)


def test_activations_take_half_the_bytes():
    """Of a low-rank layer: what the backward pass keeps of x and of A x."""
    kept = []
    layer = LowRankLinear(256, 256, 128)
    layer.init()
    for product in (linear, fp8.float8_linear):
        layer.product = product
        sizes = {}

        def pack(t, sizes=sizes):
            if t.ndim > 1 and len(t) == 512:
                sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        x = torch.randn(512, 256, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        kept.append(sum(sizes.values()))
        del y
    assert kept == [2 * 512 * (256 + 128), 512 * (256 + 128)]


# ---- the flag ----------------------------------------------------------------------------------------------


def flags(*more: str) -> SimpleNamespace:
    return build_parser().parse_args(["--fp8", "--device-batch-size", "1", *more])


def test_errors_say_what_would_be_right(monkeypatch):
    check_float8(build_parser().parse_args([]), SHAPE, "cpu")  # without the flag
    with pytest.raises(InputError, match="^--fp8: a processor .* train on an L4, RTX 4090, H100 .*leave out"):
        check_float8(flags(), SHAPE, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fp8, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(InputError, match="^--fp8: NVIDIA A100-SXM4-80GB does not .* H100"):
        check_float8(flags(), SHAPE, "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    check_float8(flags(), SHAPE, "cuda")
    with pytest.raises(InputError, match="no matrix suits: .* multiples of 16 from 128 on"):
        check_float8(flags(), GPTConfig(n_embd=64, n_head=1, n_kv_head=1, n_layer=1), "cuda")
    with pytest.raises(InputError, match="--max-seq-len 200: .* must be a multiple of 16"):
        check_float8(flags("--max-seq-len", "200"), SHAPE, "cuda")
