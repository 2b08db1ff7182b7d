"""What else factors could be: each candidate exchanges one part of base_train, which then runs as ever. What each reached is in dev/LOG.md.

    python dev/candidates.py spectron --model-tag try --depth 4 --model-dim 256 --mlp-rank 0.3 --matrix-lr 0.08

Initialisations: gaussian, cola, spectral. Paths beside BA, or in its place: diagonal, repeat, abba, silu-mlp, self-guided. Steps: adamw,
spectron, lora-muon, whose rate may follow (spectron=0.16). After each step: product-decay, rebalance. One process, not compiled, from the
first step on, with --num-iterations given. Formulas are held against explicit ones in tests/test_candidates.py.
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat import common, gpt  # noqa: E402
from nanochat.common import InputError  # noqa: E402
from nanochat.gpt import LowRankLinear  # noqa: E402
from nanochat.optim import AdamW, orthogonalize  # noqa: E402
from nanochat.training import Learner  # noqa: E402
from scripts import base_train  # noqa: E402

DAMPING = 0.1  # LoRA-Muon's δ: B begins at zero in o and down


# ---- initialisations ------------------------------------------------------------------------------------------------


class Gaussian(LowRankLinear):
    """Each factor's entries with std fan_in^-½ · min(1, (fan_out/fan_in)^½), its own fans: width-aware."""

    @torch.no_grad()
    def init(self, zero=False):
        for factor in (self.A, self.B):
            fan_out, fan_in = factor.shape
            factor.normal_(std=fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5))
        if zero:
            self.B.zero_()


class Cola(LowRankLinear):
    """Both factors with std (in + out)^-¼ r^-¼, also where a block ends (CoLA, arXiv 2502.10940)."""

    @torch.no_grad()
    def init(self, zero=False):
        for factor in (self.A, self.B):
            factor.normal_(std=((self.in_features + self.out_features) * self.rank) ** -0.25)


class Spectral(LowRankLinear):
    """B = U_r √S, A = √S V_rᵀ of a dense draw's SVD (Khodak et al., arXiv 2105.01029)."""

    @torch.no_grad()
    def init(self, zero=False):
        W = torch.empty(self.out_features, self.in_features).uniform_(-1, 1) * math.sqrt(3 / self.in_features)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        root = S[: self.rank].sqrt()
        self.A.copy_(root[:, None] * Vh[: self.rank])
        self.B.copy_(torch.zeros_like(self.B) if zero else U[:, : self.rank] * root)


# ---- paths beside BA ------------------------------------------------------------------------------------------------


class OneMatmul(LowRankLinear):
    """`narrow` by way of `first_factor`, of which attention makes one matmul for q, k and v."""

    def narrow(self, x):
        return F.linear(x, self.first_factor().to(x.dtype))


class Diagonal(OneMatmul):
    """y = BA x + D∘x where the matrix is square; D, a tenth of a scalar that AdamW trains, begins at zero."""

    def __init__(self, in_features, out_features, rank, act="none"):
        super().__init__(in_features, out_features, rank, act)
        self.D = nn.Parameter(torch.empty(in_features)) if in_features == out_features else None

    def first_factor(self):  # ([r + in], in): x passes through beside Ax
        return (
            self.A
            if self.D is None
            else torch.cat((self.A, torch.eye(self.in_features, device=self.A.device)))
        )

    def widen(self, h):
        if self.D is None:
            return super().widen(h)
        z, x = h.split((self.rank, self.in_features), dim=-1)
        return super().widen(z) + 0.1 * self.D * x

    @torch.no_grad()
    def init(self, zero=False):
        super().init(zero)
        if self.D is not None:
            self.D.zero_()


class Repeat(LowRankLinear):
    """y = B z + (α/√K)·repeat(z), z = A x, K = ⌈out/r⌉ (DLR); α, trained by AdamW, begins at 1, or at 0 where a block ends."""

    def __init__(self, in_features, out_features, rank, act="none"):
        super().__init__(in_features, out_features, rank, act)
        self.alpha = nn.Parameter(torch.empty(1))
        self.copies = -(-out_features // rank)

    def widen(self, h):
        repeated = torch.cat([h] * self.copies, dim=-1)[..., : self.out_features]
        return super().widen(h) + self.alpha / math.sqrt(self.copies) * repeated

    @torch.no_grad()
    def init(self, zero=False):
        super().init(zero)
        self.alpha.fill_(0.0 if zero else 1.0)


class Abba(OneMatmul):
    """W = (B₁A₁) ∘ (B₂A₂), each of half the rank: rank up to r²/4 from as many numbers, at a dense matrix's FLOPs (arXiv 2505.14238)."""

    def __init__(self, in_features, out_features, rank, act="none"):
        super().__init__(in_features, out_features, rank // 2, act)
        self.A2, self.B2 = nn.Parameter(torch.empty_like(self.A)), nn.Parameter(torch.empty_like(self.B))

    def first_factor(self):
        return (self.B @ self.A) * (self.B2 @ self.A2)

    def widen(self, h):
        return h.contiguous()

    @torch.no_grad()
    def init(self, zero=False):
        super().init(zero)
        nn.init.orthogonal_(self.A2)  # the entries of B₂A₂ have variance 1: W's are those of B₁A₁
        nn.init.orthogonal_(self.B2, gain=math.sqrt(self.out_features * self.in_features / self.rank))


class SiluMLP(LowRankLinear):
    """y = B silu(A x) in the MLP, whose matrices are the ones not square, and BA x in attention."""

    def __init__(self, in_features, out_features, rank, act="none"):
        super().__init__(in_features, out_features, rank, "none" if in_features == out_features else "silu")


class SelfGuided(OneMatmul):
    """y = α W x + (1 − α) BA x, W dense and equal to BA at first; α from 1 to 0 over the first half by a cosine (Wei et al., arXiv 2407.09835)."""

    share = 1.0  # α, of all layers

    def __init__(self, in_features, out_features, rank, act="none"):
        super().__init__(in_features, out_features, rank, act)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def first_factor(self):
        return torch.cat((self.weight, self.A))

    def widen(self, h):
        dense, z = h.split((self.out_features, self.rank), dim=-1)
        return self.share * dense + (1 - self.share) * super().widen(z)

    @torch.no_grad()
    def init(self, zero=False):
        super().init(zero)
        self.weight.copy_(self.B @ self.A)


def guide(progress: float) -> float:
    """α at a share of the steps."""
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, 2 * progress))


# ---- steps ----------------------------------------------------------------------------------------------------------


def factor_pairs(model) -> list[LowRankLinear]:
    return [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, LowRankLinear) and name.startswith("blocks.")
    ]


class Pairs(torch.optim.Optimizer):
    """Nesterov momentum and `rule(A, B, M_A, M_B, lr, state)`, which changes A and B, for every pair."""

    def __init__(self, layers, rule, lr):
        super().__init__([p for layer in layers for p in (layer.A, layer.B)], dict(lr=lr, momentum=0.95))
        self.layers = layers
        self.rule = rule

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for layer in self.layers:
            for p in (layer.A, layer.B):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
            M_A, M_B = (p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in (layer.A, layer.B))
            self.rule(layer.A, layer.B, M_A, M_B, group["lr"], self.state)


def spectron(A, B, M_A, M_B, lr, state):
    """Each factor moves by lr/(‖A‖₂ + ‖B‖₂ + 1) in every direction, so that their product moves by lr at most (arXiv 2602.12429).

    The spectral norms by one power iteration a step, from where the last one ended.
    """
    norms = 0.0
    for p in (A, B):
        v = state[p].setdefault("v", torch.ones_like(p[0]))
        v.copy_(F.normalize(p.mT @ (p @ v), dim=0) if p.any() else v)
        norms += (p @ v).norm() / v.norm()
    A.sub_(orthogonalize(M_A), alpha=float(lr / (norms + 1)))
    B.sub_(orthogonalize(M_B), alpha=float(lr / (norms + 1)))


def inverse_root(G):
    """(G + δI)^-½ of a symmetric G: (r, r)."""
    values, vectors = torch.linalg.eigh(G)
    return vectors * (values.clamp_min(0) + DAMPING).rsqrt() @ vectors.mT


def lora_muon(A, B, M_A, M_B, lr, state):
    """ΔB = −(lr/2) msign(M_B R_A) R_A, R_A = (AAᵀ)^-½, and in the same way for A (arXiv 2606.12921), damped."""
    R_A = inverse_root(A @ A.mT)
    R_B = inverse_root(B.mT @ B)
    lr = 0.5 * lr * max(1.0, B.size(0) / A.size(1)) ** 0.5  # the scale of a full matrix's step
    A.sub_(R_B @ orthogonalize(R_B @ M_A), alpha=lr)
    B.sub_(orthogonalize(M_B @ R_A) @ R_A, alpha=lr)


@torch.no_grad()
def decay_product(A, B, rate: float):
    """B −= rate · B(AAᵀ) and A −= rate · (BᵀB)A: the gradient of ½‖BA‖²_F, at O(r²d)."""
    by_A = B @ (A @ A.mT)
    by_B = (B.mT @ B) @ A
    B.sub_(by_A, alpha=rate)
    A.sub_(by_B, alpha=rate)


@torch.no_grad()
def rebalance(A, B):
    """The same product with B = U√S, A = √S Vᵀ, by QR of both and an SVD of r × r."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT)
    B.copy_(Q_B @ U * S.sqrt())
    A.copy_(S.sqrt()[:, None] * Vh @ Q_A.mT)


# ---- the run --------------------------------------------------------------------------------------------------------

LAYERS = {
    "gaussian": Gaussian,
    "cola": Cola,
    "spectral": Spectral,
    "diagonal": Diagonal,
    "repeat": Repeat,
    "abba": Abba,
    "silu-mlp": SiluMLP,
    "self-guided": SelfGuided,
}
RULES = {"spectron": spectron, "lora-muon": lora_muon}
VALUES = {
    "adamw": 0.006,
    "spectron": 0.08,
    "lora-muon": 0.08,  # rates of the factors; whole matrices keep --matrix-lr
    "product-decay": 0.05,
    "rebalance": 25,
}  # λ, by the rate of the step; steps between


class CandidateLearner(Learner):
    candidate = ""
    value = 0.0
    steps = 1

    def optimizers(self, pieces, dtype):
        adamw, self.muon = super().optimizers(pieces, dtype)
        self.done = 0
        if self.candidate not in ("adamw", *RULES):
            return [adamw, self.muon]
        self.muon.param_groups = [
            group for group in self.muon.param_groups if group["names"][0].endswith(".weight")
        ]
        layers = factor_pairs(self.model)
        names = {p: name for name, p in self.model.named_parameters()}
        params = [p for layer in layers for p in (layer.A, layer.B)]
        if self.candidate == "adamw":
            factors = AdamW(params, lr=self.value, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
        else:
            factors = Pairs(layers, RULES[self.candidate], self.value)
        factors.param_groups[0] |= dict(initial_lr=self.value, names=[names[p] for p in params])
        return [adamw, self.muon, factors]

    def after_update(self):
        self.done += 1
        SelfGuided.share = guide(self.done / self.steps)
        if self.candidate == "product-decay":
            for layer in factor_pairs(self.model):
                decay_product(layer.A, layer.B, self.value * self.muon.param_groups[0]["lr"])
        if self.candidate == "rebalance" and self.done % self.value == 0:
            for layer in factor_pairs(self.model):
                rebalance(layer.A, layer.B)
                for p in (layer.A, layer.B):
                    self.muon.state[p].clear()


def main():
    name, _, value = (sys.argv[1] if len(sys.argv) > 1 else "").partition("=")
    if name not in {**LAYERS, **VALUES} or (value and name not in VALUES):
        raise InputError(
            f"{name or 'no candidate'}: give one of {', '.join(LAYERS)}, or NAME=VALUE of {', '.join(VALUES)}, and then flags of base_train"
        )
    try:
        value = float(value or VALUES.get(name, 0))
    except ValueError:
        raise InputError(f"{name}={value}: give a number") from None
    argv = [*sys.argv[2:], "--compile", "off"]
    CandidateLearner.candidate, CandidateLearner.value, CandidateLearner.steps = (
        name,
        value,
        base_train.parse_flags(argv).num_iterations,
    )
    gpt.LowRankLinear = LAYERS.get(name, LowRankLinear)
    base_train.Learner = CandidateLearner
    base_train.run = partial(base_train.run, candidate=[name, value])  # into config.json
    base_train.main(argv)


if __name__ == "__main__":
    common.run_script(main)
