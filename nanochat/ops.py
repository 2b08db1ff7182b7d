"""Products, norms, the relu² MLP and the loss.

Three of them are autograd functions with a backward pass of their own. They keep fewer tensors for the
backward pass, and make fewer passes over memory, than autograd's rules for their parts.
Shapes: B batch, T time, N = B·T rows, C width, V vocabulary, r rank, D head dim, M width inside the MLP.
"""

import math

import torch
import torch.nn.functional as F

from nanochat import cpu

SOFTCAP = 15.0  # logits are SOFTCAP · tanh(z / SOFTCAP), so they stay in (-15, 15)
CPU_LOGITS = 2**21  # numbers in a chunk of logits: 8 MB of float32, which a CPU's cache holds
GPU_LOGITS = 2**26  # likewise: 256 MB, which fill a GPU
# whether a product of bfloat16 can be added to float32 within the product: with CUDA, in newer torch
ADDS_TO_FLOAT32 = torch.version.cuda is not None and hasattr(torch.ops.aten.addmm, "dtype_out")


# ---- products ----------------------------------------------------------------------------------------------


def linear(x, weight, keep_product=False):
    """x Wᵀ. x: (..., in), weight: (out, in), cast to the dtype of x -> (..., out).

    keep_product: a block that is computed again in the backward pass keeps this product (see recompute.py,
    which defines the operator).
    """
    weight = weight.to(x.dtype)
    if torch.is_grad_enabled():
        return torch.ops.nanochat.bottleneck(x, weight) if keep_product else F.linear(x, weight)
    return F.linear(x, weight) if x.is_cuda else cpu.linear(x, weight)


def project(x, q, k, v):
    """(q(x), k(x), v(x)) of three layers, their first factors as one product, (B, T, 3r). x: (B, T, C)."""
    one_token = x.size(1) == 1  # joining the weights would take longer than the products
    if one_token or not q.product == k.product == v.product:
        return q(x), k(x), v(x)
    factors = []
    for layer in (q, k, v):
        factors.append(layer.A if layer.rank else layer.weight)
    h = q.product(x, torch.cat(factors), q.keep_product and k.keep_product and v.keep_product)
    hq, hk, hv = h.split(list(map(len, factors)), dim=-1)
    return q(x, hq), k(x, hk), v(x, hv)


def relu2_mlp(x, up, down, fused=False):
    """down(relu(up(x))²), two layers. x: (..., C) -> (..., C). fused: with the operator of fused_mlp.py."""
    # the compiler recomputes the parts of a formula, but nothing inside an autograd function
    by_formula = down.recomputed and torch.compiler.is_compiling() and not fused
    if by_formula or not (torch.is_grad_enabled() and up.product == down.product == linear):
        return down(F.relu(up(x)).square())
    if up.rank:
        x = linear(x, up.A, up.keep_product)  # (..., r)
        x = F.silu(x) if up.act == "silu" else x
    wide = (up.B if up.rank else up.weight).to(x.dtype)  # (M, r), or (M, C)
    narrow = (down.A if down.rank else down.weight).to(x.dtype)  # (r, M), or (C, M)
    if fused:
        return down(x, torch.ops.nanochat.fused_relu2(x, wide, narrow))
    function = ReLU2 if x.is_cuda else cpu.TiledReLU2
    return down(x, function.apply(x, wide, narrow, down.keep_product))


class ReLU2(torch.autograd.Function):
    """y = relu(x Uᵀ)² Dᵀ. x: (..., in), U: (M, in), D: (out, M). On a CPU: `cpu.TiledReLU2`.

    It keeps relu(x Uᵀ), and computes the square again. keep_product: y is kept while the rest of the block is
    computed again, so relu(x Uᵀ) is not kept here.
    """

    @staticmethod
    def forward(ctx, x, up, down, keep_product: bool):
        if keep_product:
            ctx.save_for_backward(x, up, down, None)
            return torch.ops.nanochat.relu2(x, up, down)
        relu = F.linear(x, up).relu_()  # (..., M)
        ctx.save_for_backward(x, up, down, relu)
        return F.linear(relu * relu, down)

    @staticmethod
    def backward(ctx, grad):
        x, up, down, relu = ctx.saved_tensors
        relu = F.linear(x, up).relu_() if relu is None else relu
        grad_z = (grad @ (2 * down)).mul_(relu)  # (..., M), the gradient before relu
        grad_down = grad.flatten(0, -2).T @ (relu * relu).flatten(0, -2)
        grad_up = grad_z.flatten(0, -2).T @ x.flatten(0, -2)
        return grad_z @ up, grad_up, grad_down, None


# ---- norm and rotation -------------------------------------------------------------------------------------


class RMSNorm(torch.autograd.Function):
    """y = x / rms(x) over the last dimension, of x rotated by its position first where cos and sin are given.

    It keeps y, which the next product keeps anyway, and not x. x: (..., C), or (B, T, H, D) with cos, sin:
    (T, 1, D). The pair of channels i and i + D/2 turns by one angle, so the second halves of cos and sin are
    those of the negative angles.
    """

    @staticmethod
    def forward(ctx, x, cos=None, sin=None):
        if cos is not None:
            first, second = x.chunk(2, dim=-1)
            x = (x.contiguous() * cos).addcmul_(torch.cat((second, first), dim=-1), sin)
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = (length.square() / x.size(-1) + torch.finfo(wide).eps).rsqrt()  # 1 / rms(x): (..., 1)
        y = x * scale
        if y.dtype != x.dtype:  # torch 2.11 compiles a cast that changes nothing to a gradient of zero
            y = y.to(x.dtype)
        ctx.save_for_backward(y, scale, cos, sin)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale, cos, sin = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True, dtype=scale.dtype)
        grad = torch.addcmul(grad.to(scale.dtype), y.to(scale.dtype), along, value=-1).mul_(scale).to(y.dtype)
        if cos is not None:  # back by the same angle
            first, second = grad.chunk(2, dim=-1)
            grad = (grad * cos).addcmul_(torch.cat((second, first), dim=-1), sin, value=-1)
        return grad, None, None


norm = RMSNorm.apply  # norm(x), or norm(x, cos, sin)


# ---- the head ----------------------------------------------------------------------------------------------
# Each function takes x: (..., C), the head's weight: (V, C), in the dtype of x, and targets: (...). With a
# low-rank head x and weight are r wide.


def logits(x, weight, targets=None):
    """float32 (float64 stays) SOFTCAP · tanh(x Wᵀ / SOFTCAP), (..., V)."""
    z = linear(x, weight)
    return SOFTCAP * z.to(torch.promote_types(z.dtype, torch.float32)).div_(SOFTCAP).tanh_()


def token_losses(x, weight, targets):
    """Cross-entropy of each target in nats, shaped as targets, float32. No gradient."""
    n = rows_at_once(x, len(weight))
    losses = []
    for part, target in zip(x.flatten(0, -2).split(n), targets.flatten().split(n)):
        losses.append(F.cross_entropy(logits(part, weight), target, reduction="none"))
    return torch.cat(losses).view(targets.shape)


def rows_at_once(x, V: int, compiled: bool = False) -> int:
    """Rows of logits to compute together, of which x is the head's input."""
    return chunk_rows(x.size(-1), V, x.is_cuda, compiled)


def chunk_rows(width: int, V: int, on_gpu: bool, compiled: bool) -> int:
    """Rows in a chunk of logits, at least 512 for an efficient product. width: of the head's input.

    compiled: for the loss with its gradients in compiled code, which holds n rows of logits in the dtype of x
    and nothing else of that size. Each chunk reads and writes the gradient of the head once more, 8·V·C bytes
    in float32. With n = 4·C its products take several times as long as that.
    """
    n = max(512, (GPU_LOGITS if on_gpu else CPU_LOGITS) // V)
    if compiled and on_gpu:
        n = max(n, 2 ** int(math.log2(4 * width)))  # a power of two, as most numbers of rows are
    return n


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy in nats of softcapped logits, without ever holding all of them.

    The rows are taken in chunks. The forward pass turns the logits of a chunk at once into their part of the
    loss and of the gradients of x and weight, so that only (n, V) numbers exist at a time, n rows of N. With
    logits l = s·tanh(z/s):  ∂loss/∂z = (softmax(l) - onehot(target)) / N · (1 - (l/s)²).
    chunk_loss: computes the same from (z, target, 1/N) of a chunk (see compiler.py), and takes `chunk_rows`.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, chunk_loss=None, chunk_rows=None):
        rows = x.flatten(0, -2)  # (N, C)
        targets = targets.flatten()[:, None]  # (N, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        share = torch.full(targets.shape, 1 / len(rows), device=x.device, dtype=wide)
        loss = 0
        grad_x = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        # without chunk_rows as `rows_at_once`
        n = chunk_rows or max(512, (GPU_LOGITS if x.is_cuda else CPU_LOGITS) // len(weight))
        grad_weight = None  # (V, C)
        adds_to_float32 = ADDS_TO_FLOAT32 and x.is_cuda and x.dtype != wide and n < len(rows)
        if adds_to_float32 and ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight, dtype=wide)
        for i in range(0, len(rows), n):
            chunk = rows[i : i + n]
            target = targets[i : i + n]
            part = share[i : i + n]
            z = None  # before the next one
            z = F.linear(chunk, weight)  # (n, V), and then its gradient
            if chunk_loss is not None:
                chunk_mean, z = chunk_loss(z, target, part)
            else:
                tanh = z.to(wide).div_(SOFTCAP).tanh_()
                p = (SOFTCAP * tanh).exp_()  # at most e^15: no maximum need be taken off first
                sums = p.sum(dim=-1, keepdim=True)
                chunk_mean = (part * (sums.log() - SOFTCAP * tanh.gather(1, target))).sum()
                p = p.div_(sums)  # softmax
                p.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
                z.copy_(tanh.square_().neg_().add_(1).mul_(p).mul_(part))  # float32: no copy, z is tanh
                tanh = p = None
            loss = loss + chunk_mean
            if grad_x is not None:
                torch.mm(z, weight, out=grad_x[i : i + n])
            if not ctx.needs_input_grad[1]:
                continue
            if adds_to_float32:
                beta = 1 if i else 0
                torch.addmm(grad_weight, z.T, chunk, beta=beta, out_dtype=wide, out=grad_weight)
            elif grad_weight is None:
                grad_weight = z.T @ chunk
            elif z.dtype == wide:
                grad_weight.addmm_(z.T, chunk)
            else:
                grad_weight = grad_weight.float().add_(z.T @ chunk)
        ctx.save_for_backward(None if grad_x is None else grad_x.view_as(x), grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            grad_x = grad_x * grad_loss.to(grad_x.dtype)
        if grad_weight is not None:
            product = torch.empty_like(grad_weight, dtype=ctx.dtype)
            grad_weight = torch.mul(grad_weight, grad_loss, out=product)
        return grad_x, grad_weight, None, None, None
