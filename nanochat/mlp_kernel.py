"""Which kernel computes the low-rank MLPs on a GPU (--mlp-kernel): the library's, or those of fused_mlp.py.

    use_mlp_kernel(model, "fused")    # before compiler.compile_blocks

A fused MLP keeps x and its two bottlenecks for the backward pass, and nothing as wide as its hidden layer. So
`--recompute bottleneck` computes nothing of it again but that layer. Without a gradient, as in evaluation and
generation, the library computes all MLPs.
"""

import math
from importlib.util import find_spec

import torch

from nanochat.errors import InputError
from nanochat.gpt import GPT, MLP
from nanochat.ops import linear
from nanochat.processes import print0

LARGEST_RANK = 512  # of which the sums of a tile of rows fit on the chip
BACKWARD_NUMBERS = 2**28  # of the hidden layer and its gradient, at a time: 512 MB in bfloat16
INSTEAD = "give --mlp-kernel auto"
SHARED_MEMORY = 227 * 2**10  # bytes of a multiprocessor that the kernels may use, those of an H100


def check_mlp_flags(args):
    """InputError if --mlp-kernel cannot be had with other flags, on whichever machine."""
    if args.mlp_kernel == "fused" and args.fp8:
        raise InputError(
            "--mlp-kernel fused: computes in bfloat16, and --fp8 in float8; give only one of them"
        )
    if args.mlp_kernel == "fused" and args.dtype not in ("auto", "bfloat16"):
        raise InputError(f"--mlp-kernel fused: computes in bfloat16, not {args.dtype}; {INSTEAD}")


def check_mlp_kernel(choice: str, device_type: str, dtype: torch.dtype):
    """InputError if --mlp-kernel cannot be had on this machine."""
    if choice != "fused":
        return
    if device_type != "cuda":
        raise InputError(f"--mlp-kernel fused: needs a GPU, and this run is on {device_type}; {INSTEAD}")
    if find_spec("triton") is None:
        raise InputError(f"--mlp-kernel fused: needs Triton, which is not installed here; {INSTEAD}")
    if torch.cuda.is_available():  # else `init_process` has explained that
        gpu = torch.cuda.get_device_properties(0)
        if gpu.shared_memory_per_block_optin < SHARED_MEMORY:
            kilobytes = gpu.shared_memory_per_block_optin // 2**10
            raise InputError(
                f"--mlp-kernel fused: needs 227 KB of shared memory, as an H100 has, and a block of "
                f"{gpu.name} has {kilobytes}; {INSTEAD}"
            )
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"--mlp-kernel fused: computes in bfloat16, not {name}; {INSTEAD} or --dtype bfloat16"
        )


def use_mlp_kernel(model: GPT, choice: str):
    """Compute the MLPs as --mlp-kernel says. Under `fused`, those that do not fit stay with the library."""
    for block in model.blocks:
        block.mlp.fused = choice == "fused" and fits(block.mlp)
    if choice == "fused":
        import nanochat.fused_mlp  # noqa: F401  defines the operators

        fused = sum(block.mlp.fused for block in model.blocks)
        print0(f"--mlp-kernel fused: fits the MLP of {fused} of {len(model.blocks)} layers")


def fits(mlp: MLP) -> bool:
    """Whether both matrices have low ranks that the kernels take. With adapters or in float8 they do not."""
    if type(mlp) is not MLP or mlp.up.out_features % 64:
        return False
    for layer in (mlp.up, mlp.down):
        if layer.product != linear or not 0 < layer.rank <= LARGEST_RANK or layer.rank % 16:
            return False
    return True


def backward_rows(width: int) -> int:
    """How many rows of the hidden layer, of this width, the backward pass makes at a time: a power of two."""
    return 2 ** int(math.log2(BACKWARD_NUMBERS / (2 * width)))
