"""The low-rank MLP between its bottlenecks on a GPU, by kernels that never hold its hidden layer in memory.

    y = relu(x Uᵀ)² Dᵀ     x: (N, R1), U = up.B: (M, R1), D = down.A: (R2, M)  ->  y: (N, R2)

A program of the forward kernel takes a tile of rows. It makes the hidden layer a few columns at a time, and
adds each piece's share of y up on the chip (as FlashAttention does with keys, arXiv 2205.14135). Nothing
M wide is kept: the backward pass makes the pieces again. Its kernel adds up the gradient of x in the same
way, and writes h = relu(x Uᵀ)² and g, the gradient before relu, for some thousand rows at a time. From
these the library makes the gradients of the matrices, gᵀ x and (∂y)ᵀ h. A kernel for them would have to make
h and g a second time, and at r = 512 the sums of 64 columns would fill all registers of a multiprocessor.

Products are summed in float32; h and g are rounded to the dtype of x. This file needs Triton. mlp_kernel.py
says which layers use it.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from nanochat import recompute
from nanochat.mlp_kernel import backward_rows
from nanochat.ops import ADDS_TO_FLOAT32

# largest rank: (rows of a tile, columns of a piece, warps, pieces under way) of each kernel. They fit the
# registers (without spilling) and the 227 KB of shared memory of an H100's multiprocessor
FORWARD_TILES = {
    192: (128, 64, 8, 2),
    320: (128, 32, 8, 3),
    384: (64, 32, 8, 3),
    512: (64, 32, 8, 2),
}
BACKWARD_TILES = {
    128: (128, 64, 8, 2),
    256: (128, 32, 8, 2),
    320: (64, 32, 8, 3),
    384: (64, 32, 8, 2),
    512: (64, 16, 8, 2),
}


# ---- kernels -----------------------------------------------------------------------------------------------
# Triton's tiles have powers of two as sizes, so a rank is the sum of two: 320 = 256 + 64. Tensors of the
# first part end in _a, those of the second in _b. R1b or R2b is 0 where one power is enough. Where the sum is
# larger than the rank, the rest of the second part is 0. M is a multiple of COLUMNS.


class Sizes(NamedTuple):
    M: int
    R1: int
    R1a: int
    R1b: int
    R2: int
    R2a: int
    R2b: int


def sizes_of(up, down) -> Sizes:
    return Sizes(len(up), up.size(1), *two_powers(up.size(1)), len(down), *two_powers(len(down)))


def two_powers(r: int) -> tuple[int, int]:
    """Two powers of two with a sum of at least r: 320 -> (256, 64), 448 -> (256, 256), 64 -> (64, 0)."""
    first = 2 ** int(math.log2(r))
    rest = r - first
    return first, 2 ** math.ceil(math.log2(rest)) if rest else 0


@triton.jit
def at(matrix, rows, columns, width):
    """Pointers to a tile of a matrix. rows: (n,), columns: (c,) -> (n, c)"""
    return matrix + rows[:, None] * width + columns[None, :]


@triton.jit
def forward_kernel(tensors, N, sizes: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x, up, down, y = tensors
    M: tl.constexpr = sizes.M
    R1: tl.constexpr = sizes.R1
    R1a: tl.constexpr = sizes.R1a
    R1b: tl.constexpr = sizes.R1b
    R2: tl.constexpr = sizes.R2
    R2a: tl.constexpr = sizes.R2a
    R2b: tl.constexpr = sizes.R2b
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = (rows < N)[:, None]
    in_a = tl.arange(0, R1a)
    out_a = tl.arange(0, R2a)
    x_a = tl.load(at(x, rows, in_a, R1), mask=exists, other=0.0)
    y_a = tl.zeros((ROWS, R2a), tl.float32)
    if R1b:
        in_b = R1a + tl.arange(0, R1b)
        x_b = tl.load(at(x, rows, in_b, R1), mask=exists & (in_b < R1)[None, :], other=0.0)
    if R2b:
        out_b = R2a + tl.arange(0, R2b)
        y_b = tl.zeros((ROWS, R2b), tl.float32)
    for start in range(0, M, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        up_a = tl.load(at(up, columns, in_a, R1))
        z = tl.dot(x_a, up_a.T)
        if R1b:
            up_b = tl.load(at(up, columns, in_b, R1), mask=(in_b < R1)[None, :], other=0.0)
            z = tl.dot(x_b, up_b.T, z)
        z = tl.maximum(z, 0.0)
        h = (z * z).to(x.dtype.element_ty)
        down_a = tl.load(at(down, out_a, columns, M))
        y_a = tl.dot(h, down_a.T, y_a)
        if R2b:
            down_b = tl.load(at(down, out_b, columns, M), mask=(out_b < R2)[:, None], other=0.0)
            y_b = tl.dot(h, down_b.T, y_b)
    tl.store(at(y, rows, out_a, R2), y_a.to(y.dtype.element_ty), mask=exists)
    if R2b:
        tl.store(at(y, rows, out_b, R2), y_b.to(y.dtype.element_ty), mask=exists & (out_b < R2)[None, :])


@triton.jit
def backward_kernel(tensors, N, sizes: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    grad, x, up, down, grad_x, g, h = tensors
    M: tl.constexpr = sizes.M
    R1: tl.constexpr = sizes.R1
    R1a: tl.constexpr = sizes.R1a
    R1b: tl.constexpr = sizes.R1b
    R2: tl.constexpr = sizes.R2
    R2a: tl.constexpr = sizes.R2a
    R2b: tl.constexpr = sizes.R2b
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = (rows < N)[:, None]
    in_a = tl.arange(0, R1a)
    out_a = tl.arange(0, R2a)
    x_a = tl.load(at(x, rows, in_a, R1), mask=exists, other=0.0)
    grad_a = tl.load(at(grad, rows, out_a, R2), mask=exists, other=0.0)
    sum_a = tl.zeros((ROWS, R1a), tl.float32)
    if R1b:
        in_b = R1a + tl.arange(0, R1b)
        x_b = tl.load(at(x, rows, in_b, R1), mask=exists & (in_b < R1)[None, :], other=0.0)
        sum_b = tl.zeros((ROWS, R1b), tl.float32)
    if R2b:
        out_b = R2a + tl.arange(0, R2b)
        grad_b = tl.load(at(grad, rows, out_b, R2), mask=exists & (out_b < R2)[None, :], other=0.0)
    for start in range(0, M, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        up_a = tl.load(at(up, columns, in_a, R1))
        down_a = tl.load(at(down, out_a, columns, M))
        z = tl.dot(x_a, up_a.T)
        grad_h = tl.dot(grad_a, down_a)
        if R1b:
            up_b = tl.load(at(up, columns, in_b, R1), mask=(in_b < R1)[None, :], other=0.0)
            z = tl.dot(x_b, up_b.T, z)
        if R2b:
            down_b = tl.load(at(down, out_b, columns, M), mask=(out_b < R2)[:, None], other=0.0)
            grad_h = tl.dot(grad_b, down_b, grad_h)
        z = tl.maximum(z, 0.0)
        grad_z = (2 * z * grad_h).to(x.dtype.element_ty)
        tl.store(at(h, rows, columns, M), (z * z).to(x.dtype.element_ty), mask=exists)
        tl.store(at(g, rows, columns, M), grad_z, mask=exists)
        sum_a = tl.dot(grad_z, up_a, sum_a)
        if R1b:
            sum_b = tl.dot(grad_z, up_b, sum_b)
    tl.store(at(grad_x, rows, in_a, R1), sum_a.to(x.dtype.element_ty), mask=exists)
    if R1b:
        tl.store(at(grad_x, rows, in_b, R1), sum_b.to(x.dtype.element_ty), mask=exists & (in_b < R1)[None, :])


def launch(kernel, tiles: dict, tensors: tuple, N: int, sizes: Sizes):
    """Run a kernel over N rows."""
    rows, columns, warps, stages = tiles[min(size for size in tiles if size >= max(sizes.R1, sizes.R2))]
    kernel[(triton.cdiv(N, rows),)](tensors, N, sizes, rows, columns, num_warps=warps, num_stages=stages)


# ---- the operators -----------------------------------------------------------------------------------------


def fused_relu2(x, up, down):
    """relu(x Uᵀ)² Dᵀ. x: (..., R1), up: (M, R1), down: (R2, M) -> (..., R2)."""
    rows = x.reshape(-1, x.size(-1)).contiguous()
    y = rows.new_empty(len(rows), len(down))
    tensors = (rows, up.contiguous(), down.contiguous(), y)
    launch(forward_kernel, FORWARD_TILES, tensors, len(rows), sizes_of(up, down))
    return y.view(*x.shape[:-1], len(down))


def fused_relu2_backward(grad, x, up, down):
    """The gradients of x, up and down, each in its dtype. grad: (..., R2)."""
    n = backward_rows(len(up))
    rows = x.reshape(-1, x.size(-1)).contiguous()
    grad = grad.reshape(-1, len(down)).contiguous()
    matrices = (up.contiguous(), down.contiguous())
    grad_x = torch.empty_like(rows)
    grad_up = torch.zeros_like(up, dtype=torch.float32)
    grad_down = torch.zeros_like(down, dtype=torch.float32)
    g, h = rows.new_empty(2, min(n, len(rows)), len(up))
    for part, grad_part, grad_x_part in zip(rows.split(n), grad.split(n), grad_x.split(n)):
        g = g[: len(part)]
        h = h[: len(part)]
        tensors = (grad_part, part, *matrices, grad_x_part, g, h)
        launch(backward_kernel, BACKWARD_TILES, tensors, len(part), sizes_of(up, down))
        add_product(grad_up, g.T, part)
        add_product(grad_down, grad_part.T, h)
    return grad_x.view(x.shape), grad_up.to(up.dtype), grad_down.to(down.dtype)


def add_product(total, a, b):
    """total += a b. total: float32."""
    if a.is_cuda and ADDS_TO_FLOAT32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(a @ b)


def save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward(ctx, grad):
    return torch.ops.nanochat.fused_relu2_backward(grad, *ctx.saved_tensors)


# Not by torch.library.triton_op: the compiler would measure and inline the kernels in each graph.
library = torch.library.Library("nanochat", "FRAGMENT")
library.define("fused_relu2(Tensor x, Tensor up, Tensor down) -> Tensor")
library.define(
    "fused_relu2_backward(Tensor grad, Tensor x, Tensor up, Tensor down) -> (Tensor, Tensor, Tensor)"
)
library.impl("fused_relu2", fused_relu2, "CompositeExplicitAutograd")
library.impl("fused_relu2_backward", fused_relu2_backward, "CompositeExplicitAutograd")
torch.library.register_autograd("nanochat::fused_relu2", backward, setup_context=save_inputs, lib=library)
recompute.KEPT.add(torch.ops.nanochat.fused_relu2.default)


@torch.library.register_fake("nanochat::fused_relu2", lib=library)
def fused_relu2_shape(x, up, down):
    return x.new_empty(*x.shape[:-1], len(down))


@torch.library.register_fake("nanochat::fused_relu2_backward", lib=library)
def fused_relu2_backward_shapes(grad, x, up, down):
    return x.new_empty(x.shape), torch.empty_like(up), torch.empty_like(down)
