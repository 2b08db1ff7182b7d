"""Operators that make matrices from a few numbers: sums of random signs, Fastfood, Fastfood with cosines.

All are linear in α: (d,), and none stores a (d, n) matrix. n: the number of entries. N: the next power of
two. The random numbers come from noise.py, by a seed.
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
    """Yield (start, end, [(first, last), …]): draw entries start to end of streams first to last at once.

    Entries ascend, and each piece has all d streams in turn. The sizes of the pieces change only the rounding
    of results.
    """
    at_once = 32 * noise.words_at_once(device)
    width = min(n, at_once)
    count = max(1, at_once // width)
    blocks = [(first, min(d, first + count)) for first in range(0, d, count)]
    for start in range(0, n, width):
        yield start, min(n, start + width), blocks


class Combination(torch.autograd.Function):
    """W = scale · Σ_k α_k W_k, (rows, columns) in `dtype`. The sign matrices W_k exist one piece at a time.

    Each product α_k · ±1 is exact and the sums are in the order of k, so W is the same to the bit on every
    device. Backward: ∂L/∂α_k = scale · ⟨∂L/∂W, W_k⟩. It makes the same W_k again: that costs less than to
    keep them.
    """

    @staticmethod
    def forward(ctx, alpha, keys, rows: int, columns: int, scale: float, dtype):
        device = alpha.device
        ctx.keys = keys
        ctx.scale = scale
        ctx.d = len(alpha)
        ctx.alpha_dtype = alpha.dtype
        W = torch.empty(rows * columns, device=device, dtype=dtype)
        for start, end, blocks in pieces(rows * columns, len(alpha), device):
            total = alpha.new_zeros(end - start)
            for first, last in blocks:
                streams = noise.sub_streams(keys, first, last, device)
                signs = noise.signs(streams, start, end, device, alpha.dtype)
                for k in range(first, last):
                    total.addcmul_(signs[k - first], alpha[k])
            W[start:end] = total.mul_(scale)
        return W.view(rows, columns)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.flatten()
        device = grad.device
        grad_alpha = torch.zeros(ctx.d, device=device, dtype=ctx.alpha_dtype)
        for start, end, blocks in pieces(len(grad), ctx.d, device):
            grad_piece = grad[start:end].to(ctx.alpha_dtype)
            for first, last in blocks:
                streams = noise.sub_streams(ctx.keys, first, last, device)
                signs = noise.signs(streams, start, end, device, ctx.alpha_dtype)
                grad_alpha[first:last] += signs @ grad_piece
        return grad_alpha.mul_(ctx.scale), None, None, None, None, None


class Fastfood(nn.Module):
    """α: (d,) -> P α: (n,), with entries of variance ‖α‖²: P = N^-½ · H·G·Π·H·B, cut to n rows.

    State O(N), time O(N log N).
    """

    def __init__(self, d: int, n: int, seed: int, group: int, device):
        super().__init__()
        self.n = n
        N = padded(n)
        signs = noise.signs(noise.stream(seed, noise.SIGNS, group), 0, d, device)
        order = noise.permutation(noise.stream(seed, noise.PERMUTATION, group), N, device)
        gaussian = noise.gaussian(noise.stream(seed, noise.GAUSSIAN, group), N, device).mul_(N**-0.5)
        self.register_buffer("B", signs, persistent=False)  # (d,): beyond it, α is padded with zeros
        self.register_buffer("order", order, persistent=False)  # Π
        self.register_buffer("G", gaussian, persistent=False)

    def forward(self, alpha):
        padding = len(self.order) - len(alpha)
        mixed = walsh_hadamard(F.pad(self.B * alpha, (0, padding))).index_select(0, self.order)  # (N,)
        return walsh_hadamard(self.G * mixed)[: self.n]


class FFTFastfood(nn.Module):
    """α: (d,) -> P α: (n,), of mean square ‖α‖²: P = n^½ · Π·F·B, its columns orthogonal."""

    def __init__(self, d: int, n: int, seed: int, group: int, device):
        super().__init__()
        signs = noise.signs(noise.stream(seed, noise.SIGNS, group), 0, d, device).mul_(n**0.5)
        order = noise.permutation(noise.stream(seed, noise.PERMUTATION, group), n, device)
        self.register_buffer("B", signs, persistent=False)
        self.register_buffer("order", order, persistent=False)

    def forward(self, alpha):
        padding = len(self.order) - len(alpha)
        return cosine(F.pad(self.B * alpha, (0, padding))).index_select(0, self.order)
