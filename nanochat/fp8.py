"""Products in float8, applied from outside to the finished blocks of a model.

    train_in_float8(model)    # before its blocks are compiled

For y = x Wᵀ a training step multiplies three times: for y, for the gradient of x and for that of W. Here all
three multiply 8-bit numbers, which a GPU does at twice the speed of bfloat16 (formats: arXiv 2209.05433). A
tensor has one scale, its largest entry / the largest number of the format, which is made anew for every
product (tensor-wise dynamic scaling, as nanochat's --fp8); q, k and v, which are multiplied together, share
one. Weights, their gradients and the optimizer's state stay as they are, and so do the products of the head.
Without a gradient, as in evaluation and generation, all products are the usual ones.
"""

import math

import torch

from nanochat.config import MATRICES, GPTConfig
from nanochat.devices import device_name
from nanochat.errors import InputError
from nanochat.gpt import GPT, Linear, LowRankLinear
from nanochat.ops import linear

E4M3 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa, up to 448: activations and weights
E5M2 = torch.float8_e5m2  # 5 and 2 bits, up to 57,344: gradients, which differ more in size
SMALLEST = 1e-30  # largest entry of a tensor: with less, as in one of zeros, 1 / scale would be infinite
MULTIPLE = 16  # of which all sides of a product have to be: the GPU's library asks for it
SHORTEST_SIDE = 128  # as in nanochat: with shorter ones the 8-bit numbers take longer to make than they save
OLDEST_GPU = (8, 9)  # compute capability


def check_float8(args, config: GPTConfig, device_type: str):
    """InputError if --fp8 is given and this device has no float8, or no matrix of the model suits."""
    if not args.fp8:
        return
    way_out = "train on an L4, RTX 4090, H100 or a newer NVIDIA GPU, or leave out --fp8"
    if device_type != "cuda":
        raise InputError(f"--fp8: a processor does not multiply float8; {way_out}")
    if torch.cuda.is_available():  # else `init_process` explains that
        capability = torch.cuda.get_device_capability()
        if capability < OLDEST_GPU or torch.version.hip:
            name = device_name(torch.device("cuda"))
            raise InputError(f"--fp8: {name} does not multiply float8 as torch does it here; {way_out}")
    if args.max_seq_len * args.device_batch_size % MULTIPLE:
        raise InputError(
            f"--max-seq-len {args.max_seq_len}: with --fp8 the tokens of a pass, {args.device_batch_size} "
            f"row(s) of {args.max_seq_len}, must be a multiple of {MULTIPLE}; give a length that is one"
        )
    for layer in range(config.n_layer):
        for matrix in MATRICES:
            if suits(*config.matrix_shape(matrix), config.whole_rank(matrix, layer)):
                return
    raise InputError(
        f"--fp8: no matrix suits: sides and ranks must be multiples of {MULTIPLE} from {SHORTEST_SIDE} on; "
        "give other --model-dim and ranks, or leave out --fp8"
    )


def train_in_float8(model: GPT):
    """Let the matrices of the blocks multiply in float8, full and factored ones, as far as they suit."""
    for block in model.blocks:
        for layer in block.modules():
            is_matrix = isinstance(layer, (Linear, LowRankLinear))
            if is_matrix and suits(layer.in_features, layer.out_features, layer.rank):
                layer.product = float8_linear


def suits(in_features: int, out_features: int, rank: int) -> bool:
    """Whether a full matrix (rank 0), or both factors of one, are large enough and of the right sides."""
    sides = (in_features, out_features, rank or in_features)
    return all(side % MULTIPLE == 0 and side >= SHORTEST_SIDE for side in sides)


# ---- the product -------------------------------------------------------------------------------------------


def float8_linear(x, weight, keep_product=False):
    """`ops.linear` in float8. x: (..., in), weight: (out, in) -> (..., out)."""
    if not torch.is_grad_enabled():
        return linear(x, weight)
    return Float8Product.apply(x, weight, keep_product)


class Float8Product(torch.autograd.Function):
    """y = x Wᵀ. It keeps x and W as 8-bit numbers: a byte each, where bfloat16 takes two."""

    @staticmethod
    def forward(ctx, x, weight, keep_product: bool):
        x8, x_scale = quantize(x.reshape(-1, x.size(-1)), E4M3)  # (N, in)
        weight8, weight_scale = quantize(weight.to(x.dtype), E4M3)  # (out, in)
        ctx.save_for_backward(x8, x_scale, weight8, weight_scale)
        multiply = torch.ops.nanochat.float8_bottleneck if keep_product else scaled_product
        return multiply(x8, weight8, x_scale, weight_scale, x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        grad8, scale = quantize(grad.reshape(-1, grad.size(-1)), E5M2)  # (N, out)
        grad_x = None
        grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = scaled_product(grad8, transposed(weight8), scale, weight_scale, grad.dtype, fast=False)
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            grad_weight = scaled_product(
                transposed(grad8), transposed(x8), scale, x_scale, grad.dtype, fast=False
            )
        return grad_x, grad_weight, None


def quantize(x, dtype):
    """(x8, scale) with x ≈ scale · x8. x8: x in float8; scale: () float32, which never leaves the device."""
    largest = torch.finfo(dtype).max
    amax = torch.linalg.vector_norm(x, math.inf, dtype=torch.float32)
    scale = amax.clamp(min=SMALLEST) / largest
    # rounding can exceed the largest number, which some versions of torch turn into NaN
    return (x.float() / scale).clamp(-largest, largest).to(dtype).contiguous(), scale


def transposed(x):
    """A copy: a product in float8 reads the rows of its first factor and the columns of its second."""
    return x.T.contiguous()


def scaled_product(a, b, a_scale, b_scale, dtype: torch.dtype, fast: bool = True):
    """a_scale · b_scale · a bᵀ. a: (m, k), b: (n, k), both float8 with rows in one piece -> (m, n).

    fast: sums with fewer bits, which is good enough for activations.
    """
    return torch._scaled_mm(a, b.T, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)
