"""Products, norms and the loss where a plain call would be slow or keep too much. Several have a backward pass of their own: less kept, and
fewer passes over memory, than by autograd's rules for their parts.
"""

import contextlib

import torch
import torch.nn.functional as F

SOFTCAP = 15.0  # logits are squashed into (-15, 15)
FEW = 4  # rows that `linear` multiplies in another way
IN_CACHE = 2**18  # products that stay in a CPU's cache until they are summed


def linear(x, weight):
    """x Wᵀ, x: (..., in), weight: (out, in), cast to x's dtype -> (..., out).

    The few rows of a step of decoding on a CPU, but for bfloat16, as (W xᵀ)ᵀ, a single one twice over; or, of a small W, as sums of products.
    The usual way MKL takes 1.5 to 4 times as long for the same numbers, on one core (dev/LOG.md).
    """
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    rows = x.numel() // x.size(-1)
    if rows > FEW or x.is_cuda or x.element_size() < 4 or torch.is_grad_enabled():
        return F.linear(x, weight)
    if rows == 1 and weight.numel() <= IN_CACHE:
        return (weight * x.reshape(-1)).sum(-1).view(*x.shape[:-1], -1)
    x2 = x.reshape(rows, -1)
    y = torch.mm(weight, (torch.cat((x2, x2)) if rows == 1 else x2).T)  # (out, 2) or (out, rows)
    return y[:, :rows].T.reshape(*x.shape[:-1], -1)


@contextlib.contextmanager
def for_rows(rows: int):
    """Few rows are MKL's again, which is faster for them than oneDNN, where that has been chosen (see `common.multiply_by_onednn`)."""
    matmul = torch.backends.mkldnn.matmul
    if rows > FEW or matmul.fp32_precision != "bf16":
        yield
        return
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = "bf16"


def normalised(x):
    """x / rms(x) over the last dimension, and 1 / rms(x), (…, 1), in float32 (float64 stays)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = (size.square() / x.size(-1) + torch.finfo(wide).eps).rsqrt()
    return (x * scale).to(x.dtype), scale


class RMSNorm(torch.autograd.Function):
    """y = x / rms(x) over the last dimension. It keeps y, which whatever comes next keeps anyway, and not x."""

    @staticmethod
    def forward(ctx, x):
        y, scale = normalised(x)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        return through_norm(grad, *ctx.saved_tensors)


def through_norm(grad, y, scale):
    """The gradient of x, from that of y = x · scale, with scale = 1 / rms(x)."""
    along = (grad * y).mean(-1, keepdim=True, dtype=scale.dtype)
    return torch.addcmul(grad.to(scale.dtype), y.to(scale.dtype), along, value=-1).mul_(scale).to(y.dtype)


class RotaryNorm(torch.autograd.Function):
    """x turned by its position (rotary embedding, arXiv 2104.09864), over its rms. x: (..., T, D); cos, sin: (T, D/2). It keeps the result, not x."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        y, scale = normalised(turned(x, cos, sin))
        ctx.save_for_backward(y, scale, cos, sin)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, scale, cos, sin = ctx.saved_tensors
        return turned(through_norm(grad, y, scale), cos, -sin), None, None


def turned(x, cos, sin):
    """Every pair (x_i, x_{i+D/2}) turned by its angle, clockwise. x: (..., T, D); cos, sin: (T, D/2)."""
    y = x.new_empty(x.shape)
    (a, b) = x.chunk(2, dim=-1)
    (c, d) = y.chunk(2, dim=-1)
    torch.mul(a, cos, out=c).addcmul_(b, sin)
    torch.mul(b, cos, out=d).addcmul_(a, sin, value=-1)
    return y


# Without a gradient no function with a backward pass of its own: for one token that costs more than what it computes. Nor does the
# compiler need those that spare passes over memory: it fuses the plain formulas.


def norm(x):
    return RMSNorm.apply(x) if torch.is_grad_enabled() else normalised(x)[0]


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864). x: (B, H, T, D); cos, sin: (T, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def rotary_norm(x, cos, sin):
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return RotaryNorm.apply(x, cos, sin)
    return norm(rotate(x, cos, sin))


class SquaredReLUMLP(torch.autograd.Function):
    """y = relu(x Uᵀ)² Dᵀ, x: (..., in), U: (N, in), D: (out, N). keep: relu(x Uᵀ) is kept, and its square, as large, made again for
    D's gradient; otherwise both are made again.

    On a CPU a part of the rows at a time, whose hidden layer its cache holds from one product to the next (see `hidden_rows_at_once`).
    """

    @staticmethod
    def forward(ctx, x, up, down, keep: bool):
        flat = x.flatten(0, -2)  # (R, in)
        y = flat.new_empty(len(flat), len(down))
        hidden = flat.new_empty(len(flat), len(up)) if keep else None
        for rows in row_slices(flat, len(up)):
            part = torch.mm(flat[rows], up.T, out=None if hidden is None else hidden[rows]).relu_()
            torch.mm(part * part, down.T, out=y[rows])
        ctx.save_for_backward(flat, up, down, hidden)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        flat, up, down, hidden = ctx.saved_tensors
        shape = grad.shape
        grad = grad.flatten(0, -2)
        twice = 2 * down
        grad_x = torch.empty_like(flat)
        grad_up = Sum(up)
        grad_down = Sum(down)
        for rows in row_slices(flat, len(up)):
            part = torch.mm(flat[rows], up.T).relu_() if hidden is None else hidden[rows]
            of_y = grad[rows]
            of_hidden = (of_y @ twice).mul_(part)  # before the relu
            grad_down.add(of_y.T, part * part)
            grad_up.add(of_hidden.T, flat[rows])
            torch.mm(of_hidden, up, out=grad_x[rows])
        return grad_x.view(*shape[:-1], -1), grad_up.total(), grad_down.total(), None


class Sum:
    """A sum of matrix products, in float32 or wider, for a gradient of `like`."""

    def __init__(self, like):
        self.like = like
        self.value = None

    def add(self, a, b):
        if self.value is None:
            self.value = a @ b
        elif a.dtype == torch.promote_types(a.dtype, torch.float32):
            self.value.addmm_(a, b)
        else:
            self.value = self.value.float().add_(a @ b)

    def total(self):
        return self.value.to(self.like.dtype)


def hidden_rows_at_once(x, width: int) -> int:
    """Rows of an MLP to take together: all on a GPU; on a CPU so many that their hidden layer, `width` numbers a row, takes 8 MB, which its
    cache holds. At least an eighth when compiled, where each part is code of its own.
    """
    fewest = -(-len(x) // 8) if torch.compiler.is_compiling() else 512
    return len(x) if x.is_cuda else min(len(x), max(fewest, 2**23 // (width * x.element_size())))


def row_slices(x, width: int):
    """All rows of x, (R, in), in slices of `hidden_rows_at_once`."""
    n = hidden_rows_at_once(x, width)
    return [slice(i, i + n) for i in range(0, len(x), n)]


def squashed(x, weight):
    """x: (N, C), weight: (V, C) -> float32 (float64 stays) tanh(z / SOFTCAP), (N, V), of z = x Wᵀ. The logits are SOFTCAP times that."""
    z = linear(x, weight)
    return z.to(torch.promote_types(z.dtype, torch.float32)).div_(SOFTCAP).tanh_()


def rows_at_once(x, V: int) -> int:
    """Rows of logits to compute together: on a CPU 8 MB of float32, which its cache holds, but enough rows for an efficient matmul; 256 MB
    on a GPU, to fill it.
    """
    return max(1, 2**26 // V) if x.is_cuda else max(512, 2**21 // V)


def loss_of_logits(z, target, share):
    """z: (n, V), logits before the softcap, of n of N rows; target, share = 1/N: (n, 1) -> their part of the mean loss, and its gradient for z.

    With l = s·tanh(z/s):  ∂loss/∂z = (softmax(l) - onehot(target)) / N · (1 - (l/s)²).
    """
    tanh = z.to(share.dtype).div_(SOFTCAP).tanh_()  # in z's place
    grad = (SOFTCAP * tanh).exp_()  # at most e^15: no maximum need be taken off first
    sums = grad.sum(dim=-1, keepdim=True)
    loss = (share * (sums.log() - SOFTCAP * tanh.gather(1, target))).sum()
    grad = grad.div_(sums)  # softmax
    grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
    return loss, grad.mul_(tanh.square_().neg_().add_(1)).mul_(share).to(z.dtype)


def loss_of_logits_to_compile(z, target, share):
    """The same, compiled in two passes over each row, with tanh(u) = 1 - 2 / (1 + exp(2u)), which is twice as fast there."""
    s, own = (
        1 / (1 + torch.exp(logits.to(share.dtype) * (2 / SOFTCAP))) for logits in (z, z.gather(1, target))
    )
    p = (
        torch.exp(SOFTCAP - 2 * SOFTCAP * s) * share
    )  # a row's own factor here, or the first pass would be one over all rows
    sums = p.sum(dim=-1, keepdim=True)
    loss = (share * ((sums / share).log() - SOFTCAP + 2 * SOFTCAP * own)).sum()
    hit = torch.arange(z.size(1), device=z.device) == target
    return loss, ((p / sums - hit.to(share.dtype)) * share * 4 * s * (1 - s)).to(z.dtype)


class HeadCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softcapped logits without ever holding all of them.

    The rows are taken in chunks; each chunk's logits are turned into its share of the loss and of the gradients of x and
    weight at once, in the forward pass, so that only (chunk, V) float32 numbers exist at a time. of_logits: `loss_of_logits`, or the
    other one compiled.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, of_logits):  # (N, C), (V, C), (N,)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = Sum(weight)
        loss = 0
        share = torch.full(
            (len(x), 1), 1 / len(x), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        n = rows_at_once(x, len(weight))
        for i in range(0, len(x), n):
            chunk = x[i : i + n]
            part, grad = of_logits(linear(chunk, weight), targets[i : i + n, None], share[i : i + n])
            loss = loss + part
            if grad_x is not None:
                torch.mm(grad, weight, out=grad_x[i : i + n])
            if ctx.needs_input_grad[1]:
                grad_weight.add(grad.T, chunk)
        ctx.save_for_backward(grad_x, grad_weight.value)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight = ctx.saved_tensors
        return (
            None if grad_x is None else grad_x * grad_loss.to(grad_x.dtype),
            None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype),
            None,
            None,
        )
