"""What adapters put into a model: LoRA, AdaLoRA's triplets and IA3 beside one matrix, and the attention and MLP that carry them.

Attached and removed by nanochat/adapters/attach.py. Shapes: in and out of the adapted matrix, r the adapter's rank, (...) batch and time.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.common import InputError
from nanochat.gpt import MLP, Linear
from nanochat.ops import norm

# ---- what stands beside one matrix ----------------------------------------------------------------------------------
# inner(x): what the adapter makes of the layer's input x; outer(y, z): the layer's output y with z = inner(x) taken in;
# before(x): the layer's input as the base sees it; fold(layer): a plain layer that does the same.


class Update(nn.Module):
    """y + z of rank r beside a frozen matrix. dropout: of x, only where gradients are taken, so never in evaluation."""

    def __init__(self, scale: float, dropout: float):
        super().__init__()
        self.scale = scale
        self.dropout = dropout

    def before(self, x):
        return x

    def dropped(self, x):
        return F.dropout(x, self.dropout) if self.dropout and self.training and torch.is_grad_enabled() else x

    @torch.no_grad()
    def fold(self, layer) -> Linear:
        """W0 + s·BA, a full matrix even where W0 is a product."""
        if getattr(layer, "act", "none") != "none":
            raise InputError(
                f"adapter: a base with {layer.act} between its factors is no matrix; an update cannot be merged into it"
            )
        with torch.device("meta"):
            dense = Linear(layer.in_features, layer.out_features)
        dense.weight = nn.Parameter(layer.dense_weight() + self.delta(), requires_grad=False)
        return dense


class LoRA(Update):
    """s·B(A x), A: (r, in), B: (out, r) (arXiv 2106.09685). B = 0 at the start, A uniform in ±1/√in (Kaiming's with a = √5)."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(scale, dropout)
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))

    def init(self, generator):
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)

    def inner(self, x):  # (..., in) -> (..., r)
        return F.linear(self.dropped(x), self.A.to(x.dtype))

    def outer(self, y, z):  # (..., out), (..., r) -> (..., out)
        return y + F.linear(z * self.scale, self.B.to(y.dtype))

    def delta(self):  # (out, in)
        return self.scale * (self.B @ self.A)


class Triplets(Update):
    """s·P(λ ∘ Q x), P: (out, r), λ: (r,), Q: (r, in): AdaLoRA's form of an SVD (arXiv 2303.10512). λ = 0 at the start, P and Q
    Gaussian, their columns and rows of length about 1 and near to orthonormal. A triplet is one λᵢ, its column of P and its row of Q;
    those not `live` have λᵢ = 0. rank: at the start; end_rank: this matrix's share of the budget at the end.
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
        return F.linear(self.dropped(x), self.Q.to(x.dtype))

    def outer(self, y, z):  # (..., out), (..., r) -> (..., out)
        return y + F.linear(z * (self.scale * self.lam).to(z.dtype), self.P.to(y.dtype))

    def delta(self):  # (out, in)
        return self.scale * (self.P * self.lam) @ self.Q


class IA3(nn.Module):
    """A learned scale on each output of the matrix or, for `down`, each of its inputs, which are the hidden units after relu²
    (arXiv 2205.05638). Ones at the start.

    It always folds exactly into the matrix's own rows or columns. For that the scale on the keys acts on k's output, before rotation
    and QK norm; a scale after the norm could be folded nowhere. The norm then takes the length of each head's key away again: of the D
    scales of a head, D - 1 directions act (which channels of the head count more), and none sharpens or flattens all its scores. The
    scale on the values acts on v's output, before a value embedding is added.
    """

    def __init__(self, in_features: int, out_features: int, side: str):
        super().__init__()
        self.side = side  # "in" or "out"
        self.l = nn.Parameter(torch.ones(in_features if side == "in" else out_features))

    def init(self, generator):
        pass

    def before(self, x):
        return x * self.l.to(x.dtype) if self.side == "in" else x

    def inner(self, x):
        return None

    def outer(self, y, z):
        return y * self.l.to(y.dtype) if self.side == "out" else y

    @torch.no_grad()
    def fold(self, layer):
        """Of the base's own class: of a product only one factor changes."""
        layer = copy.deepcopy(layer)
        if self.side == "in":
            (layer.weight if isinstance(layer, Linear) else layer.A).mul_(self.l)
        else:
            (layer.weight if isinstance(layer, Linear) else layer.B).mul_(self.l[:, None])
        return layer


# ---- the modules swapped in -----------------------------------------------------------------------------------------


class AdaptedLinear(nn.Module):
    """A linear layer of the model, untouched, and its adapters by name, of which one or none acts."""

    def __init__(self, base):
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.base, self.adapters, self.active = base, nn.ModuleDict(), None
        self.register_module("merged", None)  # the active adapter folded in; it then acts in the base's place

    @property
    def layer(self):
        return self.base if self.merged is None else self.merged

    @property
    def adapter(self):
        return self.adapters[self.active] if self.merged is None and self.active in self.adapters else None

    # what `ops.project` asks of a layer: its first factor is multiplied together with those of others
    @property
    def rank(self):
        return self.layer.rank

    @property
    def weight(self):
        return self.layer.weight

    @property
    def A(self):
        return self.layer.A

    @property
    def kept(self):
        return self.layer.kept

    def forward(self, x, h=None):
        """(..., in) -> (..., out). h: the layer's first factor times x, where it has been computed with others."""
        if self.adapter is None:
            return self.layer(x, h)
        y = self.layer(self.adapter.before(x) if h is None else x, h)
        return self.adapter.outer(y, self.adapter.inner(x))

    def folded(self):
        """A plain layer that does the same; the base itself where no adapter acts."""
        return self.layer if self.adapter is None else self.adapter.fold(self.layer)


class AdaptedMLP(MLP):
    """MLP over adapted layers: `down` may see its input scaled or dropped, so relu² is a step by itself."""

    def forward(self, x):
        return self.down(F.relu(self.up(norm(x))).square())
