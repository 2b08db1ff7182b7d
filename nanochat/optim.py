"""Optimizers: Muon for the matrices inside the blocks, AdamW for the rest; `uses_muon` says which."""

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nanochat.checkpoint_files import StoredState
from nanochat.gpt import GPT
from nanochat.shards import ParameterShard, shard_parameters, uses_muon

# Coefficients (a, b, c) of polynomial steps X <- aX + b(XXᵀ)X + c(XXᵀ)²X that drive the singular values to 1.
# Each minimises the largest |1 - p(σ)| over the interval that the steps before it leave of [0.03, 1]: the
# construction of Polar Express (Amsel et al., arXiv 2505.16932). Smaller singular values, mostly noise, grow
# 82-fold at most. The paper's five steps from 0.001 let them grow 1000-fold, which made training amplify
# rounding errors (dev/LOG.md).
POLAR_EXPRESS = (
    (7.362530032, -20.743402569, 15.160556340),
    (2.917538090, -2.182405890, 0.475529388),
    (2.046310008, -1.429474831, 0.393352366),
    (1.876379705, -1.251532147, 0.375153243),
)

# Both factors of a product move in one step, so each moves less than a full matrix would. With 0.4 one
# --matrix-lr serves full rank and ranks from 1/16 to 1/2 of the width: their best rates lie within about a
# step of √2 (dev/LOG.md).
FACTOR_SCALE = 0.4

# AdamW's epsilon for the per-layer and per-channel scalars: far above the rounding errors of their gradients
# (about 1e-8) and far below the gradients (1e-4 to 1e-1). At the second step the gradients of the residual
# scales are rounding errors alone, because the model is still its embeddings, normalised; a smaller epsilon
# would turn them into full steps.
SCALAR_EPS = 1e-5

# The square of 1e-14: a momentum of a smaller norm counts as 0. Where no gradient comes any more it decays by
# mu a step, and its square would underflow.
SMALLEST_SQUARE = 1e-28


def orthogonalize(X):
    """X: (..., m, n) -> its nearest semi-orthogonal matrix UVᵀ, except for singular values below 0.03 of the
    largest (see POLAR_EXPRESS); 0 stays 0.

    The steps want a largest singular value just below 1. (Σσ⁸)^⅛ = ||(XXᵀ)²||_F^¼, which the first step
    computes anyway, bounds it far more closely than ||X||_F, which grows with the width.
    """
    shape = X.shape
    tall = X.size(-2) > X.size(-1)
    X = X.reshape(-1, *shape[-2:])
    G = gram(X, tall)  # (count, m, m)
    square = G.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]  # ||X||_F²
    square.masked_fill_(square < SMALLEST_SQUARE, torch.inf)
    G.div_(square)
    GG = G @ G
    size = 1.02 * GG.norm(dim=(-2, -1), keepdim=True) ** 0.25 + 1e-7
    G = G.div_(size**2)
    GG = GG.div_(size**4)
    scale = square.rsqrt() / size
    # bfloat16 has too few digits for the squared singular values that the product of all steps works on
    if max(shape[-2:]) > 2 * G.size(-1) and X.dtype != torch.bfloat16:
        Q = gram_polynomial(G, GG).mul_(scale)
        X = X @ Q if tall else Q @ X
    else:
        X = polynomial_steps(X * scale, G, GG, tall)
    return X.reshape(shape)


def gram(X, tall: bool):
    """(count, m, n) -> XXᵀ or, of tall ones, XᵀX: on the small side, r × r for a factor."""
    return X.mT @ X if tall else X @ X.mT


def polynomial_steps(X, G, GG, tall: bool):
    """All steps on X, one after the other. G, GG: its Gram matrix and that one's square, (count, m, m)."""
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        if i == 0:
            P = G.mul_(b).add_(GG, alpha=c)
        else:
            G = gram(X, tall)
            P = torch.baddbmm(G, G, G, beta=b, alpha=c)
        X = torch.baddbmm(X, X, P, beta=a) if tall else torch.baddbmm(X, P, X, beta=a)
    return X


def gram_polynomial(G, GG):
    """XXᵀ and its square, (count, m, m) -> the product Q of all steps: they make QX of X.

    All matmuls are of m × m matrices.
    """
    product = None
    for a, b, c in POLAR_EXPRESS:
        if product is None:
            P = torch.add(b * G, GG, alpha=c)
        else:
            G = P @ G @ P
            P = torch.baddbmm(G, G, G, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        product = P if product is None else P @ product
    return product


class WithoutCompiler:
    """Optimizer methods without torch's guards against compilation.

    Optimizers are not compiled here. The guards would load the compiler, which costs an uncompiled run 1.4 s
    of its start and 71 MB.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)


class AdamW(WithoutCompiler, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(WithoutCompiler, torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon), with lines of equal
    size (NorMuon, arXiv 2510.05491).

    W <- W - lr · (scale · U + weight_decay · W), U = UVᵀ of the Nesterov momentum; then the lines of U along
    its longer side, whose norms differ, are divided by the root of their running mean square, and U is
    brought back to its Frobenius norm. Each group holds matrices of one shape, updated as one batch, and has
    its own `scale`.
    """

    def __init__(
        self,
        groups,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        beta2: float = 0.95,
        dtype: torch.dtype | None = None,
    ):
        """dtype: of the orthogonalisation; None: that of the matrices. A GPU always takes bfloat16."""
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, scale=1.0, beta2=beta2)
        super().__init__(groups, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["params"]:
                self.update_group(group)

    def update_group(self, group: dict):
        params = group["params"]
        mu = group["momentum"]
        lr = group["lr"]
        for p in params:
            if not self.state[p]:
                self.state[p].update(momentum=torch.zeros_like(p), square=p.new_zeros(line_shape(p)))
        momenta = [self.state[p]["momentum"] for p in params]
        squares = [self.state[p]["square"] for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - mu)
        nesterov = torch.stack(grads)  # (count, out, in)
        torch._foreach_lerp_(nesterov.unbind(), momenta, mu)
        dtype = torch.bfloat16 if nesterov.is_cuda else self.dtype or nesterov.dtype
        updates = orthogonalize(nesterov.to(dtype)).to(nesterov.dtype)
        updates, square = normalize_lines(updates, torch.stack(squares), group["beta2"])
        torch._foreach_copy_(squares, square.unbind())
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates.unbind(), alpha=-lr * group["scale"])


def normalize_lines(updates, square, beta2: float):
    """Divide each line of the updates (count, out, in) by the root of its running mean square, in place.

    Then each matrix is brought back to its norm. square: (count, *line_shape), the running mean squares so
    far. Returns the updates and the new mean squares.
    """
    line_dim = -2 if square.size(-2) == 1 else -1
    mean = updates.square().mean(dim=line_dim, keepdim=True)
    square = square.lerp(mean, 1 - beta2)
    scale = 1 / (square.sqrt() + 1e-10)
    norm_before = mean.sum(dim=(-2, -1), keepdim=True)  # squared, up to a factor
    norm_after = (mean * scale.square()).sum(dim=(-2, -1), keepdim=True)
    return updates.mul_(scale * (norm_before / (norm_after + 1e-20)).sqrt()), square


def line_shape(p) -> tuple[int, int]:
    """Shape of one number for each row of a tall matrix, or for each column of a wide one."""
    return (p.size(0), 1) if p.size(0) >= p.size(1) else (1, p.size(1))


def muon_momentum(step: int) -> float:
    """Muon's momentum: from 0.8 to 0.95 over the first 1000 steps, as early gradients are soon out of date.

    nanochat begins at 0.85, and is faster.
    """
    return 0.8 + 0.15 * min(1.0, step / 1000)


def lr_multiplier(step: int, steps: int, warmup: int, warmdown_ratio: float, final: float) -> float:
    """Linear warmup, constant, linear warmdown to `final`. step: updates so far."""
    warmdown = round(warmdown_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if step < steps - warmdown:
        return 1.0
    return final + (1 - final) * (steps - step) / warmdown


def default_matrix_lr(steps: int) -> float:
    """Muon's learning rate for a run of so many steps.

    It is 0.08 up to 200 steps, as tuned here (dev/LOG.md). From there it falls with the cube root of the
    number of steps, to nanochat's 0.02 at 12,800 steps and more.
    """
    return max(0.02, 0.08 * min(1.0, 200 / steps) ** (1 / 3))


def update_scale(role: str, out_features: int, in_features: int) -> float:
    """Spectral norm of one update at lr 1, by the role of the parameter: 'weight', or a factor 'A' or 'B'.

    max(1, out/in)^½: the same change of a unit-RMS input's output for every shape (Yang et al., arXiv
    2310.17813); times FACTOR_SCALE for a factor.
    """
    scale = max(1.0, out_features / in_features) ** 0.5
    return scale if role == "weight" else FACTOR_SCALE * scale


# ---- which parameter goes where ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Learning rates of a GPT's own parameters. Those of frozen parameters may be left out."""

    embedding_lr: float = 0.0
    unembedding_lr: float = 0.0  # of the head at width 768
    matrix_lr: float = 0.0  # of Muon
    scalar_lr: float = 0.0
    weight_decay: float = 0.0  # of Muon's matrices; nothing else decays


def build_optimizers(
    model: GPT,
    rates: Rates,
    extra: dict[str, dict] | None = None,
    shards: list[ParameterShard] | None = None,
    dtype: torch.dtype | None = None,
) -> list[torch.optim.Optimizer]:
    """[AdamW, Muon] over one process's shards of the model (default: all of it), each in exactly one group.

    Every group keeps its `initial_lr`, which the schedule multiplies, and the `names` of its parameters.
    extra: {a part of a name, as in ADDED: AdamW's settings (lr, betas, eps, weight_decay) of the parameters
    that have it}; there weight decay acts on matrices only. dtype: see `Muon`. The gradients are those of the
    shards' masters.
    """
    extra = extra or {}
    members: dict[tuple, dict] = defaultdict(dict)  # kind of group: {name: what is updated}
    for shard in shard_parameters(model, 1)[0] if shards is None else shards:
        members[group_kind(model, shard, extra)][shard.name] = shard.master
    kinds = settings_by_kind(model, rates, extra)
    groups = [param_group(members[kind], settings) for kind, settings in kinds.items()]
    adamw = AdamW(groups, betas=(0.8, 0.98), eps=1e-10, weight_decay=0.0, fused=True)
    matrices = []
    for (kind, *shape), params in members.items():
        if kind == "matrices":
            matrices.append(param_group(params, {"scale": update_scale(*shape)}))
    muon = Muon(matrices or [param_group({}, {})], rates.matrix_lr, rates.weight_decay, dtype=dtype)
    for optimizer in (adamw, muon):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [adamw, muon]


def group_kind(model: GPT, shard: ParameterShard, extra: dict) -> tuple:
    """The group of a parameter: a key of `settings_by_kind`, or ("matrices", role, *shape) of Muon."""
    name = shard.name
    p = shard.parameter
    part = next((part for part in extra if part in name), None)
    if part:
        return part, p.ndim == 2
    if uses_muon(name, p):
        role = name.rsplit(".", 1)[1]  # 'weight', or a factor 'A' or 'B'
        return "matrices", role, *p.shape
    if name.startswith("lm_head.") or (name == "wte.weight" and model.lm_head is None):
        return ("head",)
    if p.ndim == 2:
        return ("tables",)
    return ("residual scales",) if name == "resid_lambdas" else ("scalars",)


def settings_by_kind(model: GPT, rates: Rates, extra: dict) -> dict[tuple, dict]:
    """{kind of group: its settings} of AdamW. That of extra parameters: (part of name, are they matrices)."""
    settings: dict[tuple, dict] = {
        ("tables",): dict(lr=rates.embedding_lr),
        # the head sums over the width (arXiv 2203.03466)
        ("head",): dict(lr=rates.unembedding_lr * 768 / model.config.n_embd),
        ("scalars",): dict(lr=rates.scalar_lr, eps=SCALAR_EPS),
        # these multiply from layer to layer: smaller steps
        ("residual scales",): dict(lr=0.1 * rates.scalar_lr, eps=SCALAR_EPS),
    }
    for part, options in extra.items():
        settings[part, True] = options
        settings[part, False] = options | {"weight_decay": 0.0}
    return settings


def param_group(params: dict, settings: dict) -> dict:
    """A group as torch takes it. params: {name: parameter}."""
    return dict(params=list(params.values()), names=list(params), **settings)


# ---- state by name -----------------------------------------------------------------------------------------


def load_optimizer_state(optimizers, shards: list[ParameterShard], state: StoredState):
    """Take this process's part of a checkpoint's state of whole parameters."""
    by_name = {shard.name: shard for shard in shards}
    for optimizer, name, p in named_parameters(optimizers):
        shard = by_name[name]
        stored = state[name]
        for key in stored:
            part = stored[key] if shard.is_whole else stored.part(key, shard.start, shard.end)
            optimizer.state[p][key] = part.to(p.device, copy=True)


def named_parameters(optimizers) -> Iterator[tuple]:
    """(optimizer, name, parameter or this process's slice of it) of all groups, in their order."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                yield optimizer, name, p
