"""Fast orthogonal transforms of the last dimension: Walsh-Hadamard (powers of two), cosine (any length)."""

import math
from functools import lru_cache

import torch

RADIX = 5  # log2 of the largest matrix that one pass multiplies by


@lru_cache
def hadamard(m: int, device, dtype):
    """Sylvester's (m, m) matrix of ±1, m a power of two: H_2m = H_2 ⊗ H_m."""
    with torch.inference_mode(False), torch.no_grad():
        H = torch.ones(1, 1, device=device, dtype=dtype)
        while H.size(0) < m:
            H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
        return H


def walsh_hadamard(x):
    """H x over the last dimension, not normalised: twice gives n·x. H is its own adjoint.

    H_ab = H_a ⊗ H_b: each pass multiplies the last axis by a small H and moves it to the front. After all
    passes the axes are in their old order. A pass is one matrix product, and there are fewer than the
    butterfly's log2 n. O(n log n). ValueError unless n is a power of two.
    """
    n = x.size(-1)
    if n & (n - 1) or not n:
        raise ValueError(f"a Walsh-Hadamard transform of {n} numbers: the length has to be a power of two")
    bits = n.bit_length() - 1
    batch = x.shape[:-1]
    passes = -(-bits // RADIX)
    for i in range(passes):
        m = 2 ** ((bits + i) // passes)  # as even as they can be
        x = hadamard(m, x.device, x.dtype) @ x.reshape(*batch, n // m, m).mT  # (..., m, n/m)
    return x.reshape(*batch, n)


def cosine(x):
    """The orthonormal DCT-II over the last dimension, by one FFT of the same length (Makhoul 1980).

    With v = x at even places, then x at odd places backwards, and V the FFT of v:
    X_k = s_k Re(V_k e^(-iπk/2n)), s_0 = n^-½, s_k = (2/n)^½.
    """
    n = x.size(-1)
    V = torch.fft.fft(torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), -1))
    turn = torch.arange(n, device=x.device, dtype=x.dtype) * (-math.pi / (2 * n))
    X = (V.real * turn.cos() - V.imag * turn.sin()) * math.sqrt(2 / n)
    return torch.cat((X[..., :1] * math.sqrt(0.5), X[..., 1:]), -1)
