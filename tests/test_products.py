"""Which library multiplies float32 matrices on a CPU, and that none rounds their entries."""

import pytest
import torch

from nanochat import common
from nanochat.functional import FEW, for_rows


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
    monkeypatch.setattr(common, "processor", lambda: {"vendor_id": vendor, "flags": flags})
    if not exact:  # a library that rounds the factors
        eye = torch.eye
        monkeypatch.setattr(torch, "eye", lambda n: eye(n).mul_(1 - 2**-12))
    common.multiply_by_onednn()
    assert float32_products.fp32_precision == chosen


def test_float32_products_have_all_digits_as_they_are_set_here(float32_products):
    common.multiply_by_onednn()
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((512, 256, 1024), (1024, 512, 64), (7, 300, 5)):
        a, b = (torch.randn(shape, generator=generator) for shape in ((m, k), (k, n)))
        exact = a.double() @ b.double()
        assert (a @ b - exact).norm() < 2e-6 * exact.norm()  # 2e-3 where factors are rounded to bfloat16


@pytest.mark.parametrize("chosen", ["bf16", "ieee", "none"])
def test_few_rows_are_mkls(chosen, float32_products):
    float32_products.fp32_precision = chosen
    with for_rows(FEW):
        assert float32_products.fp32_precision == ("ieee" if chosen == "bf16" else chosen)
    with for_rows(FEW + 1):
        assert float32_products.fp32_precision == chosen
    assert float32_products.fp32_precision == chosen
