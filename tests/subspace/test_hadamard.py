"""The fast transforms against explicit matrices; distributions and bits of the random numbers."""

import hashlib

import pytest
import scipy.fft
import scipy.linalg
import torch

from nanochat.subspace import noise
from nanochat.subspace.hadamard import cosine, walsh_hadamard


def numbers(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]), dtype=dtype)


@pytest.mark.parametrize("n", [1, 2, 8, 32, 128, 1024])
def test_walsh_hadamard_is_the_product_with_the_explicit_matrix(n):
    x = numbers(2, 3, n)
    H = torch.tensor(scipy.linalg.hadamard(n), dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), x @ H, rtol=0, atol=1e-12)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), n * x, rtol=0, atol=1e-11)


def test_walsh_hadamard_is_its_own_adjoint_and_wants_a_power_of_two():
    x = numbers(4096)
    y = numbers(2, 4096)[1]
    assert torch.dot(walsh_hadamard(x), y).item() == pytest.approx(
        torch.dot(x, walsh_hadamard(y)).item(), rel=1e-12
    )
    assert torch.autograd.gradcheck(walsh_hadamard, numbers(2, 64).requires_grad_())
    with pytest.raises(ValueError, match="of 12 numbers"):
        walsh_hadamard(numbers(12))


@pytest.mark.parametrize("n", [1, 2, 3, 12, 101, 1024])
def test_cosine_is_the_orthonormal_transform_of_any_length(n):
    x = numbers(2, n)
    torch.testing.assert_close(
        cosine(x), torch.tensor(scipy.fft.dct(x.numpy(), norm="ortho")), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(cosine(x).norm(dim=1), x.norm(dim=1))  # orthogonal: lengths are kept
    if n == 12:
        assert torch.autograd.gradcheck(cosine, x.requires_grad_())


# ---- noise -------------------------------------------------------------------------------------------------


def reference_word(keys, counter):
    """The published mixing steps, in Python's own unbounded integers."""

    def mixed(x):
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2**32
        return x ^ x >> 15

    return mixed(mixed(counter % 2**32 ^ keys[0]) ^ keys[1] ^ counter >> 32)


def test_words_are_those_of_unbounded_integers_far_out_too():
    keys = noise.stream(2**63 + 5, 1, 2)
    counters = [0, 1, 31, 2**31, 2**32 - 1, 2**32, 2**40 + 3]
    assert noise.words(keys, torch.tensor(counters)).tolist() == [reference_word(keys, c) for c in counters]
    assert noise.words(keys, torch.tensor([0])) != noise.words(keys, torch.tensor([2**32]))


def test_signs_are_the_bits_of_the_words_wherever_one_starts():
    keys = noise.stream(1, 2)
    bits = [1 - 2 * (~reference_word(keys, i // 32) >> i % 32 & 1) for i in range(200)]
    for start, end in ((0, 200), (37, 38), (64, 96), (95, 161)):
        assert noise.signs(keys, start, end, "cpu").tolist() == bits[start:end]
    several = noise.signs(noise.sub_streams(keys, 3, 6, "cpu"), 5, 50, "cpu")
    for k, row in enumerate(several, 3):
        assert torch.equal(row, noise.signs(noise.sub_streams(keys, k, k + 1, "cpu"), 0, 64, "cpu")[0, 5:50])


def test_numbers_do_not_hang_on_the_piece_drawn_at_a_time_or_on_torchs_random_state(monkeypatch):
    def drawn():
        keys = noise.stream(7, 0, 1)
        return (
            noise.signs(keys, 0, 999, "cpu"),
            noise.uniform(keys, 999, 0.3),
            noise.gaussian(keys, 999),
            noise.permutation(keys, 999),
        )

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = drawn()
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setitem(noise.WORDS, "cpu", 50)
    torch.manual_seed(1)
    assert all(map(torch.equal, first, drawn()))
    # in every process, on every machine, in every version that calls itself by this name
    digest = hashlib.sha256(b"".join(t.double().numpy().astype("<f8").tobytes() for t in first)).hexdigest()
    assert (noise.VERSION, digest[:16]) == ("mix32x2-1", "eb55a9ff232b0f00")


@pytest.mark.parametrize(
    "draw, variance, kurtosis",
    [
        (lambda keys, n: noise.signs(keys, 0, n, "cpu"), 1, 1),
        (lambda keys, n: noise.uniform(keys, n, 3**0.5), 1, 1.8),
        (noise.gaussian, 1, 2.9),
    ],
)
def test_moments(draw, variance, kurtosis):
    n = 2**17
    x = draw(noise.stream(0, 4), n).double()
    assert abs(x.mean()) < 4 * n**-0.5
    assert x.var().item() == pytest.approx(variance, rel=0.01) and (x**4).mean().item() == pytest.approx(
        kurtosis, rel=0.02
    )


def test_streams_are_not_alike_and_a_permutation_is_one():
    base = noise.stream(0, 1)
    streams = torch.cat(
        [
            noise.signs(noise.sub_streams(key, 0, 64, "cpu"), 0, 4096, "cpu")
            for key in (base, noise.stream(0, 2), noise.stream(1, 1))
        ]
    )
    correlation = (streams @ streams.T / 4096).fill_diagonal_(0)
    # as of independent ones
    assert correlation.abs().max() < 5.5 / 64 and correlation.std().item() == pytest.approx(1 / 64, rel=0.02)
    square = noise.signs(base, 0, 256 * 256, "cpu").view(256, 256)
    # 2 in the limit of large random matrices: rows are independent, too
    assert torch.linalg.matrix_norm(square, 2) / 16 < 2.1
    assert torch.equal(noise.permutation(base, 1000).sort().values, torch.arange(1000))
