"""Weights in bfloat16 to compute with, where several processes share the work and products are in bfloat16.

The float32 values are the masters, each on its owner alone (see `shards.ParameterShard`). Matrices and tables
become bfloat16: half to keep and half to exchange. The vectors, which are small, stay float32. Gradients stay
float32 until they leave: the terms of one (of micro-steps, of the tokens of a table, of a matrix that is used
twice) are added in float32. So losses and gradients are to the bit those of float32 weights that are cast
where they are used.

One process alone would keep masters and working weights, more memory than casts take.
"""

import torch
import torch.nn.functional as F

from nanochat.shards import ParameterShard

WORKING_DTYPE = torch.bfloat16


def serve(dtype: torch.dtype, processes: int) -> bool:
    """Whether a run has working weights. dtype: of its products.

    Before torch 2.10 a gradient had no dtype of its own: there all weights stay float32.
    """
    return processes > 1 and dtype == WORKING_DTYPE and hasattr(torch.Tensor, "grad_dtype")


def make(model: torch.nn.Module, own: list[ParameterShard]):
    """Turn the trained matrices and tables into working weights. own: the shards of this process."""
    for shard in own:
        if shard.parameter.ndim > 1:
            shard.separate_master()
    for parameter in model.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            parameter.data = parameter.data.to(WORKING_DTYPE)
            parameter.grad_dtype = torch.float32
    for module in model.modules():
        if type(module) is torch.nn.Embedding:
            module.__class__ = WorkingTable


class WorkingTable(torch.nn.Embedding):
    """A table whose gradient is summed over the tokens in float32."""

    def forward(self, tokens):
        return Lookup.apply(self.weight, tokens)


class Lookup(torch.autograd.Function):
    """table: (V, C), tokens: (…) -> (…, C)."""

    @staticmethod
    def forward(ctx, table, tokens):
        ctx.save_for_backward(tokens)
        ctx.rows = len(table)
        return F.embedding(tokens, table)

    @staticmethod
    def backward(ctx, grad):
        (tokens,) = ctx.saved_tensors
        return torch.ops.aten.embedding_dense_backward(grad.float(), tokens, ctx.rows, -1, False), None
