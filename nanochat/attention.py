"""Causal attention within a window: torch's own kernel or, to train on a CPU, block by block of queries.

Shapes: B batch, H heads, K key/value heads, T time, D head dim. Of a block: b rows of the batch, R = b·K, G = H/K heads that share keys,
n queries, c keys.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

BLOCKS = 8  # blocks of queries in a long sequence: more skip more of the keys that none of them sees
SMALLEST = 64  # queries in a block, for efficient products
SHORT = 1024  # up to this length blocks are faster than torch's kernel without a window too (dev/LOG.md)
IN_CACHE = 2**22  # bytes of scores to work on at a time, which a cache holds from one step to the next


def window_mask(T: int, window: int, device):
    """(T, T) bool, True where query i may see key j: i - window < j <= i."""
    i = torch.arange(T, device=device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance < window)


def by_blocks(T: int, window: int) -> bool:
    """Whether to go block by block in training on a CPU: where torch's kernel computes much that is then hidden."""
    return window < T or T <= SHORT


def mask_for(T: int, window: int, device):
    """What `attention` is told of a window over T tokens with none before them."""
    if torch.is_grad_enabled() and device.type == "cpu" and by_blocks(T, window):
        return torch.tensor(window)
    return window_mask(T, window, device) if window < T else None


def attention(q, k, v, scale: float, mask=None):
    """q: (B, H, T, D), k and v: (B, K, S, D) -> (B, T, H·D).

    mask: bool, (T, S) or with more dimensions, which keys a query sees; or a window as a tensor of no dimension, which asks for blocks (an
    argument to compiled code, where layers that differ in it share theirs); None: all up to the query's own or, where S > T, all.
    """
    if mask is not None and mask.ndim == 0:
        return BlockAttention.apply(q, k, v, mask, scale)
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and q.size(2) == k.size(2),
        scale=scale,
        enable_gqa=k.size(1) < q.size(1),
    )
    return y.transpose(1, 2).flatten(2)


class BlockAttention(torch.autograd.Function):
    """The weights of one block at a time, once for the result and again for the gradients, so that memory grows with T and not T².

    To the compiler each pass is one operator, run as it is: code of its own for each block takes long to make.
    """

    @staticmethod
    def forward(ctx, q, k, v, window, scale):
        v = v.contiguous()  # here, where the compiler makes it so as it writes v
        ctx.save_for_backward(q, k, v, window)
        ctx.scale = scale
        return torch.ops.nanochat.block_attention(q, k, v, window, scale)

    @staticmethod
    def backward(ctx, grad):
        return *torch.ops.nanochat.block_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


def block_attention(q, k, v, window, scale: float):
    (B, H, T, D) = q.shape
    K = k.size(1)
    n, found = blocks(T, window.item(), H // K, q.dtype)
    y = q.new_empty(len(found), B * K, H // K * n, D)
    for rows in batch_slices(B, K, found):
        queries = by_block(q[rows], n, K)
        keys = in_time(k[rows], n)
        values = in_time(v[rows], n)
        for i, (start, c, hidden) in enumerate(found):
            p = weights(queries[i], keys.narrow(1, start, c).contiguous(), hidden, scale)
            torch.bmm(p, values.narrow(1, start, c), out=y[i, rows.start * K : rows.stop * K])
    return from_blocks(y, B, K, n).permute(0, 3, 1, 2, 4).flatten(2)[:, :T].contiguous()


def block_attention_backward(grad, q, k, v, window, scale: float):
    """grad: (B, T, H·D) -> the gradients of q, k and v. Those of k and v are sums over blocks, in the dtype of k."""
    (B, H, T, D) = q.shape
    K = k.size(1)
    n, found = blocks(T, window.item(), H // K, q.dtype)
    grad = grad.unflatten(2, (H, D)).transpose(1, 2)
    grad_q = q.new_empty(len(found), B * K, H // K * n, D)
    grad_k, grad_v = (k.new_zeros(B * K, len(found) * n, D) for _ in range(2))
    for rows in batch_slices(B, K, found):
        queries = by_block(q[rows], n, K)
        of_ys = by_block(grad[rows], n, K)
        keys = in_time(k[rows], n)
        values = in_time(v[rows], n)
        of = slice(rows.start * K, rows.stop * K)
        for i, (start, c, hidden) in enumerate(found):
            of_q = queries[i]
            of_y = of_ys[i]
            of_k = keys.narrow(1, start, c).contiguous()
            of_v = values.narrow(1, start, c).contiguous()
            p = weights(of_q, of_k, hidden, scale)  # (R, G·n, c)
            of_scores = torch._softmax_backward_data(torch.bmm(of_y, of_v.mT), p, -1, p.dtype)
            torch.baddbmm(of_q, of_scores, of_k, beta=0, alpha=scale, out=grad_q[i, of])
            grad_k[of].narrow(1, start, c).baddbmm_(of_scores.mT, of_q, alpha=scale)
            grad_v[of].narrow(1, start, c).baddbmm_(p.mT, of_y)
    grad_q = from_blocks(grad_q, B, K, n).flatten(1, 2)[:, :, :T]
    return grad_q.contiguous(), *(x[:, :T].reshape(B, K, T, D) for x in (grad_k, grad_v))


@lru_cache(maxsize=8)
def blocks(T: int, window: int, G: int, dtype):
    """(n, [(first key, c, hidden) of each block of n queries]); hidden: (G·n, c), to be added to scores: 0 where a query sees a key, else -inf.

    The keys begin where another block's queries do and end with this one's.
    """
    n = min(T, max(SMALLEST, -(-T // BLOCKS) // SMALLEST * SMALLEST))
    found = []
    for start in range(0, T, n):
        first = max(0, start - window + 1) // n * n
        c = start + n - first
        seen = window_mask(c, min(window, c), "cpu")[-n:]
        found.append(
            (first, c, torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).repeat(G, 1))
        )
    return n, found


def batch_slices(B: int, K: int, found):
    """Rows of the batch to take together."""
    most = K * max(hidden.nbytes for _, _, hidden in found)
    b = -(-B // -(-B * most // IN_CACHE))
    return [slice(i, min(B, i + b)) for i in range(0, B, b)]


def in_time(x, n: int):
    """(b, K, T, D) -> (R, T', D), whole in memory."""
    return filled_up(x, n).flatten(0, 1).contiguous()


def by_block(x, n: int, K: int):
    """(b, H, T, D) -> (blocks, R, G·n, D), whole in memory: a product would copy a mere slice, each time."""
    x = filled_up(x, n).unflatten(2, (-1, n)).unflatten(1, (K, -1))  # (b, K, G, blocks, n, D)
    return x.permute(3, 0, 1, 2, 4, 5).flatten(3, 4).flatten(1, 2).contiguous()


def filled_up(x, n: int):
    """(b, H, T, D) -> (b, H, T', D), the last of its blocks of n filled up with zeros."""
    missing = -x.size(2) % n
    return F.pad(x, (0, 0, 0, missing)) if missing else x  # F.pad would copy all the same


def from_blocks(x, B: int, K: int, n: int):
    """(blocks, B·K, G·n, D) -> (B, K, G, T', D)."""
    return x.unflatten(2, (-1, n)).unflatten(1, (B, K)).permute(1, 2, 3, 0, 4, 5).flatten(3, 4)


def weights(q, k, hidden, scale: float):
    """q: (R, G·n, D), k: (R, c, D) -> (R, G·n, c), each query's shares, of sum 1."""
    return torch.baddbmm(hidden, q, k.mT, alpha=scale).softmax(-1)


# Not by torch.library.custom_op, which would load torch's compiler in a run that is not compiled.
library = torch.library.Library("nanochat", "DEF")
library.define("block_attention(Tensor q, Tensor k, Tensor v, Tensor window, float scale) -> Tensor")
library.define(
    "block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor window, float scale) -> (Tensor, Tensor, Tensor)"
)
library.impl("block_attention", block_attention, "CPU")
library.impl("block_attention_backward", block_attention_backward, "CPU")


@torch.library.register_fake("nanochat::block_attention", lib=library)
def shape_of_result(q, k, v, window, scale):
    return q.new_empty(q.size(0), q.size(2), q.size(1) * q.size(3))


@torch.library.register_fake("nanochat::block_attention_backward", lib=library)
def shapes_of_gradients(grad, q, k, v, window, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))
