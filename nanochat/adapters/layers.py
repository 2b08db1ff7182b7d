"""The modules of adapters: LoRA, AdaLoRA's triplets and IA3 beside one matrix; attention and MLP around them.

`attach` puts them into a model. Shapes: in and out of the adapted matrix, r the adapter's rank, (...) batch
and time.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.errors import InputError
from nanochat.gpt import MLP, Linear
from nanochat.ops import norm

# ---- beside one matrix -------------------------------------------------------------------------------------
# An adapter changes y = W x of its layer by four methods:
#   base_input(x)      the input of the base
#   inner(x)           z, the adapter's own function of the input; None if it has none
#   outer(y, z)        the output of the layer; y: the output of the base
#   merge_into(layer)  a plain layer with the same output


class Update(nn.Module):
    """y + z of rank r beside a frozen matrix.

    dropout: of x, only while gradients are computed, so never in evaluation.
    """

    def __init__(self, scale: float, dropout: float):
        super().__init__()
        self.scale = scale
        self.dropout = dropout

    def base_input(self, x):
        return x

    def with_dropout(self, x):
        if self.dropout and self.training and torch.is_grad_enabled():
            return F.dropout(x, self.dropout)
        return x

    @torch.no_grad()
    def merge_into(self, layer) -> Linear:
        """W0 + s·BA: a full matrix, even if W0 is a product."""
        if getattr(layer, "act", "none") != "none":
            raise InputError(
                f"adapter: a base with {layer.act} between its factors is no matrix; "
                "an update cannot be merged into it"
            )
        with torch.device("meta"):
            dense = Linear(layer.in_features, layer.out_features)
        dense.weight = nn.Parameter(layer.dense_weight() + self.delta(), requires_grad=False)
        return dense


class LoRA(Update):
    """s·B(A x), A: (r, in), B: (out, r) (arXiv 2106.09685).

    At the start B = 0 and A is uniform in ±1/√in (Kaiming's with a = √5).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(scale, dropout)
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))

    def init(self, generator):
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)

    def inner(self, x):  # (..., in) -> (..., r)
        return F.linear(self.with_dropout(x), self.A.to(x.dtype))

    def outer(self, y, z):  # (..., out), (..., r) -> (..., out)
        return y + F.linear(z * self.scale, self.B.to(y.dtype))

    def delta(self):  # (out, in)
        return self.scale * (self.B @ self.A)


class Triplets(Update):
    """s·P(λ ∘ Q x), P: (out, r), λ: (r,), Q: (r, in): AdaLoRA's form of an SVD (arXiv 2303.10512).

    A triplet is one λᵢ, its column of P and its row of Q. If it is not `live`, λᵢ = 0. At the start λ = 0; P
    and Q are Gaussian, so their columns and rows are nearly orthogonal and about 1 long. rank: at the start.
    end_rank: this matrix's share of the budget at the end.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        end_rank: int,
        scale: float,
        dropout: float = 0.0,
    ):
        super().__init__(scale, dropout)
        self.end_rank = end_rank
        self.P = nn.Parameter(torch.empty(out_features, rank))
        self.lam = nn.Parameter(torch.zeros(rank))
        self.Q = nn.Parameter(torch.empty(rank, in_features))
        self.register_buffer("live", torch.ones(rank, dtype=torch.bool))

    def init(self, generator):
        for factor, length in ((self.P, len(self.P)), (self.Q, self.Q.size(1))):
            nn.init.normal_(factor, std=length**-0.5, generator=generator)

    def inner(self, x):  # (..., in) -> (..., r)
        return F.linear(self.with_dropout(x), self.Q.to(x.dtype))

    def outer(self, y, z):  # (..., out), (..., r) -> (..., out)
        return y + F.linear(z * (self.scale * self.lam).to(z.dtype), self.P.to(y.dtype))

    def delta(self):  # (out, in)
        return self.scale * (self.P * self.lam) @ self.Q


class IA3(nn.Module):
    """A learned scale on each output of the matrix or, for `down`, on each input (arXiv 2205.05638).

    Scales begin at 1. They merge exactly into the matrix's rows or columns. For this reason the scale of the
    keys acts on k's output, before rotation and QK norm: behind the norm it could not be merged. The norm
    removes the length of each head's key again, so the D scales of a head have D - 1 degrees of freedom. They
    change the weights of the head's channels; they cannot sharpen or flatten all its scores. The scale of the
    values acts on v's output, before a value embedding is added. The inputs of `down` are the hidden units
    after relu².
    """

    def __init__(self, in_features: int, out_features: int, side: str):
        super().__init__()
        self.side = side  # "in" or "out"
        self.l = nn.Parameter(torch.ones(in_features if side == "in" else out_features))

    def base_input(self, x):
        return x * self.l.to(x.dtype) if self.side == "in" else x

    def inner(self, x):
        return None

    def outer(self, y, z):
        return y * self.l.to(y.dtype) if self.side == "out" else y

    @torch.no_grad()
    def merge_into(self, layer):
        """A layer of the base's class. Of a product only one factor changes."""
        layer = copy.deepcopy(layer)
        is_product = not isinstance(layer, Linear)
        if self.side == "in":
            factor = layer.A if is_product else layer.weight
            factor.mul_(self.l)
        else:
            factor = layer.B if is_product else layer.weight
            factor.mul_(self.l[:, None])
        return layer


# ---- around the matrices -----------------------------------------------------------------------------------


class AdaptedLinear(nn.Module):
    """An unchanged linear layer of the model, with an adapter or without."""

    def __init__(self, base, name: str, adapter=None):
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.base = base
        self.name = name
        self.adapters = nn.ModuleDict()  # checkpoints and optimizers find its parameters by .adapters.NAME.
        if adapter is not None:
            self.adapters[name] = adapter

    @property
    def adapter(self):
        return self.adapters[self.name] if self.adapters else None

    # `ops.project` reads these of a layer: it multiplies the first factors of several layers together
    @property
    def rank(self):
        return self.base.rank

    @property
    def weight(self):
        return self.base.weight

    @property
    def A(self):
        return self.base.A

    @property
    def keep_product(self):
        return self.base.keep_product

    @property
    def product(self):
        return self.base.product

    def forward(self, x, h=None):
        """(..., in) -> (..., out). h: the layer's first factor times x, if it was computed with others."""
        if self.adapter is None:
            return self.base(x, h)
        y = self.base(self.adapter.base_input(x) if h is None else x, h)
        return self.adapter.outer(y, self.adapter.inner(x))

    def merged(self):
        """A plain layer with the same output; without an adapter the base itself."""
        return self.base if self.adapter is None else self.adapter.merge_into(self.base)


class AdaptedMLP(MLP):
    """MLP over adapted layers. relu² is a step of its own: `down` may scale or drop its input."""

    def forward(self, x):
        return self.down(F.relu(self.up(norm(x))).square())
