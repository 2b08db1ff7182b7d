"""Activation recomputation, applied from outside to the finished blocks of a model.

    recompute.apply(model)    # as config.recompute says; before adapters are attached and blocks are compiled

    none         the forward pass keeps all that the backward pass needs
    bottleneck   a block with a low-rank matrix keeps its input and its products r wide; the backward pass
                 computes the rest again (as CoLA-M does, arXiv 2502.10940)
    block        every block, full rank too, keeps its input alone (Chen et al., arXiv 1604.06174)

The blocks are those of gpt.py, run under torch.utils.checkpoint. Under `bottleneck` the layers are marked as
`keep_product`: their r-wide products then go through operators of their own, and a policy tells the
checkpoint to keep the results of these. Losses and gradients stay the same to the bit. Without a gradient
nothing changes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanochat import cpu, fp8
from nanochat.gpt import GPT, Block, Linear, LowRankLinear

MODES = ("none", "bottleneck", "block")


class RecomputedBlock(Block):
    """A block whose activations the backward pass computes again."""

    selective = False  # whether it keeps what is r wide
    compute = Block.forward

    def forward(self, *inputs):
        if not torch.is_grad_enabled():
            return self.compute(*inputs)
        # without a policy the compiler keeps more than the block's input
        by_policy = self.selective or torch.compiler.is_compiling()
        options = {}
        if by_policy:
            options["context_fn"] = keep_bottlenecks if self.selective else keep_nothing
        return checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def apply(model: GPT):
    """Let the blocks of a model recompute as its config says."""
    mode = model.config.recompute
    remove(model)
    for block in model.blocks:
        layers = [layer for layer in block.modules() if isinstance(layer, (Linear, LowRankLinear))]
        factored = [layer for layer in layers if layer.rank]
        if mode == "block" or (mode == "bottleneck" and factored):
            block.__class__ = RecomputedBlock
            block.selective = mode == "bottleneck"
            for layer in layers:
                layer.recomputed = True
            for layer in factored:
                layer.keep_product = block.selective


def remove(model: GPT):
    """Plain blocks again, which keep all."""
    for block in model.blocks:
        block.__class__ = Block
        for layer in block.modules():
            if isinstance(layer, (Linear, LowRankLinear)):
                layer.recomputed = layer.keep_product = False


# ---- what is kept ------------------------------------------------------------------------------------------


def bottleneck(x, weight):
    """x Aᵀ: (..., in) -> (..., r)."""
    return F.linear(x, weight)


def relu2(x, up, down):
    """relu(x Uᵀ)² Aᵀ: (..., in) -> (..., r), of which `ops.ReLU2` has the backward pass."""
    if x.is_cuda:
        return F.linear(F.linear(x, up).relu_().square_(), down)
    return cpu.relu2(x, up, down)


def save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def bottleneck_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight


# Not by torch.library.custom_op, which would load torch's compiler in a run that is not compiled.
library = torch.library.Library("nanochat", "FRAGMENT")
library.define("bottleneck(Tensor x, Tensor weight) -> Tensor")
library.define(
    "float8_bottleneck(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, ScalarType type) -> Tensor"
)
library.define("relu2(Tensor x, Tensor up, Tensor down) -> Tensor")
library.impl("bottleneck", bottleneck, "CompositeExplicitAutograd")
library.impl("float8_bottleneck", fp8.scaled_product, "CompositeExplicitAutograd")
library.impl("relu2", relu2, "CompositeExplicitAutograd")
torch.library.register_fake("nanochat::bottleneck", bottleneck, lib=library)
torch.library.register_autograd(
    "nanochat::bottleneck", bottleneck_backward, setup_context=save_inputs, lib=library
)
torch.library.register_fake("nanochat::float8_bottleneck", fp8.scaled_product, lib=library)
operators = torch.ops.nanochat
# fused_mlp.py adds its own
KEPT = {operators.bottleneck.default, operators.float8_bottleneck.default, operators.relu2.default}


def policy(ctx, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_all(ctx, operator, *args, **kwargs):
    return CheckpointPolicy.PREFER_RECOMPUTE


keep_bottlenecks = partial(create_selective_checkpoint_contexts, policy)
keep_nothing = partial(create_selective_checkpoint_contexts, recompute_all)
