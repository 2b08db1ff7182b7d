"""Causal attention within a window: which kernel serves which device stands here.

Shapes: B batch, H heads, K key/value heads, T time, S keys, D head dim.
"""

import torch
import torch.nn.functional as F

from nanochat import cpu


def window_mask(T: int, window: int, device):
    """(T, T) bool, True where query i sees key j: i - window < j <= i."""
    i = torch.arange(T, device=device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance < window)


def attention(q, k, v, scale: float, mask=None):
    """softmax(scale · q kᵀ) v over the keys that a query sees, (B, T, H·D).

    q: (B, H, T, D), k and v: (B, K, S, D). mask: bool, (T, S) or with more dimensions, True where a query
    sees a key; None: all keys up to the query's own or, where S > T, all. In training T = S, and on a CPU
    the mask is that of a window (see `cpu.window_of`).
    """
    T = q.size(2)
    if torch.is_grad_enabled() and not q.is_cuda and k.size(2) == T:
        window = cpu.window_of(mask, T)
        if window is not None:
            return cpu.BlockAttention.apply(q, k, v, window, scale)
    causal = mask is None and k.size(2) == T
    grouped = k.size(1) < q.size(1)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return y.transpose(1, 2).flatten(2)
