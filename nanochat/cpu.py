"""All that exists only to be fast on a CPU: how it multiplies, the relu² MLP tile by tile, and attention
block by block.

What each part gains is in dev/LOG.md. Shapes: B batch, H heads, K key/value heads, T time, D head dim, M
width inside the MLP. Of a block of attention: b rows of the batch, R = b·K, G = H/K heads that share keys, n
queries, c keys.
"""

import contextlib
import ctypes
import sys
from functools import lru_cache

import torch
import torch.nn.functional as F

from nanochat import devices

FEW_ROWS = 4  # up to so many, `linear` multiplies in another way
SMALL_MATRIX = 2**18  # entries of a matrix whose products stay in the cache until they are summed
TILE_BYTES = 2**23  # of what a tile of the MLP is between the two products
QUERY_BLOCKS = 8  # of a long sequence: more of them skip more keys that no query of a block sees
MIN_QUERIES = 64  # in a block, for efficient products
SHORT = 1024  # tokens; up to here blocks are faster than torch's kernel even without a window
SCORE_BYTES = 2**22  # of scores to work on at a time, which the cache holds from one operation to the next


# ---- the process -------------------------------------------------------------------------------------------


def keep_freed_memory():
    """Let glibc's malloc keep what tensors of up to 16 MiB free, for the next step: a tenth of a step, at a
    lower peak.

    Else it gives the memory back to the system at every step. On other systems nothing is changed.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 17 * 2**20)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def multiply_by_onednn():
    """Let oneDNN multiply float32 matrices on processors that MKL is not made for: a seventh faster on AMD's
    Zen 4.

    torch does so only where oneDNN may round the factors to bfloat16. oneDNN makes use of that on processors
    with AMX; a product tells whether it does on this one.
    """
    processor = devices.processor()
    instructions = processor.get("flags", "").split()
    if processor.get("vendor_id") != "AuthenticAMD" or "avx512_bf16" not in instructions:
        return
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    x = torch.full((256, 256), 1 + 2**-12)
    if not torch.equal(x @ torch.eye(256), x):
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"


# ---- products of few rows, in decoding ---------------------------------------------------------------------


def linear(x, weight):
    """x Wᵀ without a gradient. x: (..., in), weight: (out, in), of one dtype -> (..., out).

    Few rows are multiplied as (W xᵀ)ᵀ, a single one twice over or, with a small W, as sums of products. The
    usual way takes MKL 1.5 to 4 times as long. bfloat16 goes the usual way.
    """
    rows = x.numel() // x.size(-1)
    if rows > FEW_ROWS or x.element_size() < 4:
        return F.linear(x, weight)
    if rows == 1 and weight.numel() <= SMALL_MATRIX:
        return (weight * x.reshape(-1)).sum(-1).view(*x.shape[:-1], -1)
    x2 = x.reshape(rows, -1)
    y = torch.mm(weight, (torch.cat((x2, x2)) if rows == 1 else x2).T)  # (out, 2) or (out, rows)
    return y[:, :rows].T.reshape(*x.shape[:-1], -1)


@contextlib.contextmanager
def few_rows_by_mkl(rows: int):
    """Give products of few rows to MKL again, which is faster at them, where oneDNN has been chosen."""
    matmul = torch.backends.mkldnn.matmul
    if rows > FEW_ROWS or matmul.fp32_precision != "bf16":
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "bf16"


# ---- the relu² MLP by tiles --------------------------------------------------------------------------------


def tile_rows(rows: int, width: int, itemsize: int) -> int:
    """Rows of a tile, `width` numbers each, which the cache holds from one product to the next.

    At least an eighth of all rows when compiled, where each tile is code of its own.
    """
    fewest = -(-rows // 8) if torch.compiler.is_compiling() else 512
    return min(rows, max(fewest, TILE_BYTES // (width * itemsize)))


class TiledReLU2(torch.autograd.Function):
    """`ops.ReLU2`, a tile of the rows at a time."""

    @staticmethod
    def forward(ctx, x, up, down, keep_product: bool):
        if keep_product:
            ctx.save_for_backward(x, up, down, None)
            return torch.ops.nanochat.relu2(x, up, down)
        rows = x.flatten(0, -2)  # (N, in)
        y = rows.new_empty(len(rows), len(down))
        relu = rows.new_empty(len(rows), len(up))
        n = tile_rows(len(rows), len(up), x.element_size())
        for i in range(0, len(rows), n):
            tile = torch.mm(rows[i : i + n], up.T, out=relu[i : i + n]).relu_()
            torch.mm(tile * tile, down.T, out=y[i : i + n])
        ctx.save_for_backward(x, up, down, relu)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, up, down, relu = ctx.saved_tensors
        rows = x.flatten(0, -2)
        grad_y = grad.flatten(0, -2)
        twice = 2 * down
        grad_x = torch.empty_like(rows)
        grad_up = None
        grad_down = None
        n = tile_rows(len(rows), len(up), x.element_size())
        for i in range(0, len(rows), n):
            part = rows[i : i + n]
            grad_part = grad_y[i : i + n]
            tile = torch.mm(part, up.T).relu_() if relu is None else relu[i : i + n]
            grad_z = (grad_part @ twice).mul_(tile)  # before relu
            grad_down = add_product(grad_down, grad_part.T, tile * tile)
            grad_up = add_product(grad_up, grad_z.T, part)
            torch.mm(grad_z, up, out=grad_x[i : i + n])
        return grad_x.view(x.shape), grad_up.to(up.dtype), grad_down.to(down.dtype), None


def relu2(x, up, down):
    """relu(x Uᵀ)² Dᵀ without keeping anything. x: (..., in) -> (..., out)."""
    rows = x.flatten(0, -2)
    y = rows.new_empty(len(rows), len(down))
    n = tile_rows(len(rows), len(up), x.element_size())
    for i in range(0, len(rows), n):
        torch.mm(torch.mm(rows[i : i + n], up.T).relu_().square_(), down.T, out=y[i : i + n])
    return y.view(*x.shape[:-1], -1)


def add_product(total, a, b):
    """total + a b, in float32 or wider; total: None for 0. May change total."""
    if total is None:
        return a @ b
    if a.dtype == torch.promote_types(a.dtype, torch.float32):
        return total.addmm_(a, b)
    return total.float().add_(a @ b)


# ---- attention by blocks of queries ------------------------------------------------------------------------


def by_blocks(T: int, window) -> bool:
    """Whether training goes block by block: where torch's kernel computes much that no query sees.

    window: compiled code gets it as a 0-d tensor where the answer is yes.
    """
    return T <= SHORT or isinstance(window, torch.Tensor) or window < T


class BlockAttention(torch.autograd.Function):
    """Causal attention within a window. q: (B, H, T, D), k and v: (B, K, T, D) -> (B, T, H·D).

    The weights of one block of queries at a time are computed for the result, and again for the gradients, so
    that memory grows with T and not with T². window: a 0-d tensor, so that compiled code serves every window.
    To the compiler each pass is one operator, run as it is: code for each block would take long to make.
    """

    @staticmethod
    def forward(ctx, q, k, v, window, scale: float):
        v = v.contiguous()  # here, where the compiler makes it so as it writes v
        ctx.save_for_backward(q, k, v, window)
        ctx.scale = scale
        return torch.ops.nanochat.block_attention(q, k, v, window, scale)

    @staticmethod
    def backward(ctx, grad):
        grads = torch.ops.nanochat.block_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
        return *grads, None, None


def block_attention(q, k, v, window, scale: float):
    B, H, T, D = q.shape
    K = k.size(1)
    n, blocks, batches = plan_blocks(B, K, H // K, T, window.item(), q.dtype)
    y = q.new_empty(len(blocks), B * K, H // K * n, D)
    for rows in batches:
        queries = split_queries(q[rows], n, K)
        keys = pad_keys(k[rows], n)
        values = pad_keys(v[rows], n)
        for i, (start, c, bias) in enumerate(blocks):
            part_k = keys.narrow(1, start, c).contiguous()
            p = torch.baddbmm(bias, queries[i], part_k.mT, alpha=scale).softmax(-1)  # (R, G·n, c)
            torch.bmm(p, values.narrow(1, start, c), out=y[i, rows.start * K : rows.stop * K])
    y = y.unflatten(2, (-1, n)).unflatten(1, (B, K))  # (blocks, B, K, G, n, D)
    return y.permute(1, 0, 4, 2, 3, 5).flatten(1, 2).flatten(2)[:, :T].contiguous()


def block_attention_backward(grad, q, k, v, window, scale: float):
    """grad: (B, T, H·D) -> the gradients of q, k and v; those of k and v are sums in the dtype of k."""
    B, H, T, D = q.shape
    K = k.size(1)
    n, blocks, batches = plan_blocks(B, K, H // K, T, window.item(), q.dtype)
    grad = grad.unflatten(2, (H, D)).transpose(1, 2)
    grad_q = q.new_empty(len(blocks), B * K, H // K * n, D)
    grad_k = k.new_zeros(B * K, len(blocks) * n, D)
    grad_v = torch.zeros_like(grad_k)
    for rows in batches:
        queries = split_queries(q[rows], n, K)
        grads = split_queries(grad[rows], n, K)
        keys = pad_keys(k[rows], n)
        values = pad_keys(v[rows], n)
        heads = slice(rows.start * K, rows.stop * K)
        for i, (start, c, bias) in enumerate(blocks):
            part_q = queries[i]
            part_k = keys.narrow(1, start, c).contiguous()
            part_v = values.narrow(1, start, c).contiguous()
            p = torch.baddbmm(bias, part_q, part_k.mT, alpha=scale).softmax(-1)  # (R, G·n, c)
            grad_p = torch.bmm(grads[i], part_v.mT)
            grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype)
            torch.baddbmm(part_q, grad_scores, part_k, beta=0, alpha=scale, out=grad_q[i, heads])
            grad_k[heads].narrow(1, start, c).baddbmm_(grad_scores.mT, part_q, alpha=scale)
            grad_v[heads].narrow(1, start, c).baddbmm_(p.mT, grads[i])
    grad_q = grad_q.unflatten(2, (-1, n)).unflatten(1, (B, K)).permute(1, 0, 4, 2, 3, 5)
    # now (B, blocks, n, K, G, D); in memory as (B, T, H, D), the order in which q and k were made
    grad_q = grad_q.flatten(1, 2).flatten(2, 3)[:, :T].contiguous().transpose(1, 2)
    grad_k = grad_k[:, :T].unflatten(0, (B, K)).transpose(1, 2).contiguous().transpose(1, 2)
    return grad_q, grad_k, grad_v[:, :T].reshape(v.shape).contiguous()


@lru_cache(maxsize=16)
def plan_blocks(B: int, K: int, G: int, T: int, window: int, dtype):
    """(n, [(first key, c, bias) of each block of n queries], [rows of the batch to take together]).

    bias: (G·n, c), added to the scores: 0 where a query sees a key, else -inf. The keys of a block begin
    where another block's queries do, and end with its own.
    """
    n = min(T, max(MIN_QUERIES, -(-T // QUERY_BLOCKS) // MIN_QUERIES * MIN_QUERIES))
    blocks = []
    largest = 0
    with torch.inference_mode(False):  # what is kept here serves training
        for start in range(0, T, n):
            first = max(0, start - window + 1) // n * n
            c = start + n - first
            distance = torch.arange(start, start + n)[:, None] - torch.arange(first, start + n)
            seen = (distance >= 0) & (distance < window)
            bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf).repeat(G, 1)
            blocks.append((first, c, bias))
            largest = max(largest, bias.nbytes)
    b = -(-B // -(-B * K * largest // SCORE_BYTES))
    return n, blocks, [slice(i, min(B, i + b)) for i in range(0, B, b)]


def pad_keys(x, n: int):
    """(b, K, T, D) -> (R, T', D), contiguous, with zeros at the end of the last of its blocks of n."""
    missing = -x.size(2) % n
    x = F.pad(x, (0, 0, 0, missing)) if missing else x  # F.pad would copy all the same
    return x.flatten(0, 1).contiguous()


def split_queries(x, n: int, K: int):
    """(b, H, T, D) -> (blocks, R, G·n, D), contiguous, since a product would copy a mere slice each time."""
    missing = -x.size(2) % n
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    x = x.unflatten(2, (-1, n)).unflatten(1, (K, -1))  # (b, K, G, blocks, n, D)
    return x.permute(3, 0, 1, 2, 4, 5).flatten(3, 4).flatten(1, 2).contiguous()


# Not by torch.library.custom_op, which would load torch's compiler in a run that is not compiled.
library = torch.library.Library("nanochat", "FRAGMENT")
library.define("block_attention(Tensor q, Tensor k, Tensor v, Tensor window, float scale) -> Tensor")
library.define(
    "block_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor window, float scale)"
    " -> (Tensor, Tensor, Tensor)"
)
library.impl("block_attention", block_attention, "CPU")
library.impl("block_attention_backward", block_attention_backward, "CPU")


@torch.library.register_fake("nanochat::block_attention", lib=library)
def block_attention_shape(q, k, v, window, scale):
    return q.new_empty(q.size(0), q.size(2), q.size(1) * q.size(3))


@torch.library.register_fake("nanochat::block_attention_backward", lib=library)
def block_attention_backward_shapes(grad, q, k, v, window, scale):
    grad_q = q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)
    grad_k = k.new_empty(k.transpose(1, 2).shape).transpose(1, 2)
    return grad_q, grad_k, v.new_empty(v.shape)
