"""Operators that make matrices of a few numbers: sums of random sign matrices, Fastfood, and Fastfood with a cosine transform.

All are linear in α: (d,), and none holds a (d, n) matrix; n: the entries to make, N: n padded to a power of two. What is random in them
comes from nanochat/subspace/noise.py, by a seed.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.subspace import noise
from nanochat.subspace.hadamard import cosine, walsh_hadamard


def padded(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def pieces(n: int, d: int, device):
    """(start, end) of the entries and (first, last) of the streams to draw together, an order that no result depends on but for its
    rounding: entries ascending, and for each all streams in turn.
    """
    at_once = 32 * noise.words_at_once(device)
    width = min(n, at_once)
    count = max(1, at_once // width)
    for start in range(0, n, width):
        end = min(n, start + width)
        yield start, end, [(first, min(d, first + count)) for first in range(0, d, count)]


class Combination(torch.autograd.Function):
    """W = scale · Σ_k α_k W_k, (rows, columns) in `dtype`, of sign matrices W_k that exist a piece at a time.

    Each product α_k · ±1 is exact and the sums are taken in the order of k, so W is the same to the bit on every device. Backward:
    ∂L/∂α_k = scale · ⟨∂L/∂W, W_k⟩, with the same W_k made again, which is cheaper than to keep them.
    """

    @staticmethod
    def forward(ctx, alpha, keys, rows: int, columns: int, scale: float, dtype):
        ctx.keys, ctx.scale, ctx.like = keys, scale, alpha.new_empty(0)
        W = torch.empty(rows * columns, device=alpha.device, dtype=dtype)
        for start, end, blocks in pieces(rows * columns, len(alpha), alpha.device):
            total = alpha.new_zeros(end - start)
            for first, last in blocks:
                drawn = noise.signs(
                    noise.numbered(keys, first, last, alpha.device), start, end, alpha.device, alpha.dtype
                )
                for k in range(first, last):
                    total.addcmul_(drawn[k - first], alpha[k])
            W[start:end] = total.mul_(scale)
        ctx.d = len(alpha)
        return W.view(rows, columns)

    @staticmethod
    def backward(ctx, grad):
        grad, device = grad.flatten(), grad.device
        inner = ctx.like.new_zeros(ctx.d)
        for start, end, blocks in pieces(len(grad), ctx.d, device):
            part = grad[start:end].to(inner.dtype)
            for first, last in blocks:
                inner[first:last] += (
                    noise.signs(
                        noise.numbered(ctx.keys, first, last, device), start, end, device, inner.dtype
                    )
                    @ part
                )
        return inner.mul_(ctx.scale), None, None, None, None, None


class Fastfood(nn.Module):
    """α: (d,) -> P α: (n,), whose entries have variance ||α||²: P = N^-½ · H·G·Π·H·B, cut to n rows. State O(N), time O(N log N)."""

    def __init__(self, d: int, n: int, seed: int, group: int, device):
        super().__init__()
        self.n, N = n, padded(n)
        self.register_buffer(
            "B", noise.signs(noise.stream(seed, noise.SIGNS, group), 0, d, device), persistent=False
        )  # (d,): the rest meets zeros
        self.register_buffer(
            "order",
            noise.permutation(noise.stream(seed, noise.PERMUTATION, group), N, device),
            persistent=False,
        )
        self.register_buffer(
            "G",
            noise.gaussian(noise.stream(seed, noise.GAUSSIAN, group), N, device).mul_(N**-0.5),
            persistent=False,
        )

    def forward(self, alpha):
        N = len(self.order)
        mixed = walsh_hadamard(F.pad(self.B * alpha, (0, N - len(alpha)))).index_select(0, self.order)  # (N,)
        return walsh_hadamard(self.G * mixed)[: self.n]


class FFTFastfood(nn.Module):
    """α: (d,) -> P α: (n,), of mean square ||α||²: P = n^½ · Π·F·B, its columns orthogonal."""

    def __init__(self, d: int, n: int, seed: int, group: int, device):
        super().__init__()
        self.register_buffer(
            "B",
            noise.signs(noise.stream(seed, noise.SIGNS, group), 0, d, device).mul_(n**0.5),
            persistent=False,
        )
        self.register_buffer(
            "order",
            noise.permutation(noise.stream(seed, noise.PERMUTATION, group), n, device),
            persistent=False,
        )

    def forward(self, alpha):
        return cosine(F.pad(self.B * alpha, (0, len(self.order) - len(alpha)))).index_select(0, self.order)
