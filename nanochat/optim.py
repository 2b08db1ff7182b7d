"""Optimizers: Muon for the matrices inside the blocks, AdamW for the rest. One function decides which parameter goes where."""

import inspect
from dataclasses import dataclass

import torch

from nanochat.gpt import GPT

# Coefficients (a, b, c) of polynomial steps X <- aX + b(XXᵀ)X + c(XXᵀ)²X that drive the singular values to 1. Each minimises
# the largest |1 - p(σ)| over the interval that the steps before it leave of [0.03, 1]: the construction of Polar Express (Amsel
# et al., arXiv 2505.16932). Smaller singular values, mostly noise, are lifted 82-fold at most. The paper's five steps from
# 0.001 lift them 1000-fold, which made training amplify rounding errors (dev/LOG.md).
POLAR_EXPRESS = (
    (7.362530032, -20.743402569, 15.160556340),
    (2.917538090, -2.182405890, 0.475529388),
    (2.046310008, -1.429474831, 0.393352366),
    (1.876379705, -1.251532147, 0.375153243),
)

# Both factors of a product move in one step, so each moves less than a full matrix would. With 0.4 one --matrix-lr serves full rank and
# ranks from 1/16 to 1/2 of the width: their best rates lie within about a step of √2 (dev/LOG.md).
FACTOR_SCALE = 0.4

# AdamW's epsilon for the per-layer and per-channel scalars: far above the rounding errors of their gradients (about 1e-8) and far
# below the gradients (1e-4 to 1e-1). At the second step the gradients of the residual scales are rounding errors alone, because
# the model is still its embeddings, normalised; a smaller epsilon would turn them into full steps.
SCALAR_EPS = 1e-5

# A momentum of less than 1e-14 is 0. Where no gradient comes any more it decays by mu a step, and its square would underflow.
NOTHING = 1e-28


def orthogonalize(X):
    """X: (..., m, n) -> its nearest semi-orthogonal matrix UVᵀ, but for singular values below 0.03 of the largest (see above); 0 of 0.

    The steps want a largest singular value just below 1. (Σσ⁸)^⅛ = ||(XXᵀ)²||_F^¼, on hand in the first step, bounds it far more
    closely than ||X||_F, which grows with the width.
    """
    shape = X.shape
    tall = X.size(-2) > X.size(-1)
    X = X.reshape(-1, *shape[-2:])
    G = gram(X, tall)  # (count, m, m)
    square = G.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]  # ||X||_F²
    square.masked_fill_(square < NOTHING, torch.inf)
    G.div_(square)
    GG = G @ G
    size = 1.02 * GG.norm(dim=(-2, -1), keepdim=True) ** 0.25 + 1e-7
    G = G.div_(size**2)
    GG = GG.div_(size**4)
    scale = square.rsqrt() / size
    if (
        max(shape[-2:]) > 2 * G.size(-1) and X.dtype != torch.bfloat16
    ):  # bfloat16 has too few digits for squared singular values
        Q = gram_polynomial(G, GG).mul_(scale)
        X = X @ Q if tall else Q @ X
    else:
        X = X * scale
        for i, (a, b, c) in enumerate(POLAR_EXPRESS):
            P = torch.baddbmm(G := gram(X, tall), G, G, beta=b, alpha=c) if i else G.mul_(b).add_(GG, alpha=c)
            X = torch.baddbmm(X, *((X, P) if tall else (P, X)), beta=a)
    return X.reshape(shape)


def gram(X, tall: bool):
    """(count, m, n) -> XXᵀ or, of tall ones, XᵀX: on the small side, r × r for a factor."""
    return X.mT @ X if tall else X @ X.mT


def gram_polynomial(G, GG):
    """XXᵀ and its square, (count, m, m) -> the product Q of all steps: Q X is what they make of X. Only m × m matmuls."""
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        P = torch.baddbmm(G := P @ G @ P, G, G, beta=b, alpha=c) if i else torch.add(b * G, GG, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P @ Q if i else P
    return Q


class WithoutCompiler:
    """Optimizers are not compiled here. torch guards some of their methods against it, and the guards load the compiler: in a run that is
    not compiled, 1.4 s of its start and 71 MB for nothing.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)


class AdamW(WithoutCompiler, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(WithoutCompiler, torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon), and evened out (NorMuon,
    arXiv 2510.05491).

    W <- W - lr · (scale · U + weight_decay · W), U = UVᵀ of the Nesterov momentum; then the lines of U along its longer side,
    whose norms differ, are divided by the root of their running mean square, and U is brought back to its Frobenius norm.
    Each group holds matrices of one shape, updated as one batch, and has its own `scale`. dtype: of the orthogonalisation, None: the
    matrices' own; bfloat16 is enough for it, and what it is on a GPU anyway.
    """

    def __init__(
        self,
        groups,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        beta2: float = 0.95,
        dtype=None,
    ):
        super().__init__(
            groups, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, scale=1.0, beta2=beta2)
        )
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            mu = group["momentum"]
            lr = group["lr"]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p].update(momentum=torch.zeros_like(p), square=p.new_zeros(line_shape(p)))
            momenta, squares = ([self.state[p][key] for p in params] for key in ("momentum", "square"))
            grads = [p.grad for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - mu)
            nesterov = torch.stack(grads)  # (count, out, in)
            torch._foreach_lerp_(nesterov.unbind(), momenta, mu)
            updates = orthogonalize(
                nesterov.to(torch.bfloat16 if nesterov.is_cuda else self.dtype or nesterov.dtype)
            ).to(nesterov.dtype)
            updates, square = even_out(updates, torch.stack(squares), group["beta2"])
            torch._foreach_copy_(squares, square.unbind())
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, updates.unbind(), alpha=-lr * group["scale"])


def even_out(updates, square, beta2: float):
    """Divide, in place, each line of the updates (count, out, in) by the root of its running mean square, and restore each matrix's norm.

    square: (count, *line_shape), the running mean squares so far. Returns the updates and the mean squares moved on.
    """
    along = -2 if square.size(-2) == 1 else -1
    mean = updates.square().mean(dim=along, keepdim=True)
    square = square.lerp(mean, 1 - beta2)
    scale = 1 / (square.sqrt() + 1e-10)
    before, after = (
        x.sum(dim=(-2, -1), keepdim=True) for x in (mean, mean * scale.square())
    )  # squared norms, up to a factor
    return updates.mul_(scale * (before / (after + 1e-20)).sqrt()), square


def line_shape(p) -> tuple[int, int]:
    """Shape of one number for each row of a tall matrix, or for each column of a wide one."""
    return (p.size(0), 1) if p.size(0) >= p.size(1) else (1, p.size(1))


def muon_momentum(step: int) -> float:
    """From 0.8 to 0.95 over the first 1000 steps: early gradients are soon out of date (as nanochat, faster, from 0.85)."""
    return 0.8 + 0.15 * min(1.0, step / 1000)


def default_matrix_lr(steps: int) -> float:
    """Muon's learning rate for a run of so many steps: 0.08 up to 200 steps, as tuned here (dev/LOG.md), falling with the
    cube root of the steps to nanochat's 0.02 from 12,800 steps on.
    """
    return max(0.02, 0.08 * min(1.0, 200 / steps) ** (1 / 3))


def update_scale(role: str, out_features: int, in_features: int) -> float:
    """Spectral norm of one update at lr 1, by the role of the parameter: 'weight', or a factor 'A' or 'B'.

    max(1, out/in)^½: the same change of a unit-RMS input's output for every shape (Yang et al., arXiv 2310.17813);
    times FACTOR_SCALE for a factor.
    """
    scale = max(1.0, out_features / in_features) ** 0.5
    return scale if role == "weight" else FACTOR_SCALE * scale


# ---- who gets what --------------------------------------------------------------------------------------------------

ADDED = (
    ".adapters.",
    "subspace",
)  # in the names of parameters that are not a GPT's own: AdamW's, with settings of their own


def uses_muon(name: str, parameter) -> bool:
    """Muon for the matrices, full or factored, inside the blocks; AdamW for tables, the head, the per-layer scalars and what is added."""
    return name.startswith("blocks.") and parameter.ndim == 2 and not any(part in name for part in ADDED)


@dataclass(frozen=True, eq=False)
class Piece:
    """Entries start to end of a flattened parameter: what one process updates and keeps the optimizer state of."""

    name: str
    parameter: torch.nn.Parameter
    start: int
    end: int

    @property
    def whole(self) -> bool:
        return self.end - self.start == self.parameter.numel()

    def of(self, tensor):
        """These entries of a tensor of the parameter's shape: (end - start,), sharing its memory."""
        return tensor.view(-1)[self.start : self.end]


def split_parameters(model: GPT, processes: int) -> list[list[Piece]]:
    """The pieces of each process: together every parameter that requires a gradient, each entry exactly once.

    Muon needs matrices whole: each goes to the process that has least so far, the largest first. AdamW works entry by entry:
    its parameters are cut into equal slices.
    """
    pieces = [[] for _ in range(processes)]
    load = [0] * processes
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, p in sorted((item for item in trained if uses_muon(*item)), key=lambda item: -item[1].numel()):
        least = load.index(min(load))
        pieces[least].append(Piece(name, p, 0, p.numel()))
        load[least] += p.numel()
    for name, p in (item for item in trained if not uses_muon(*item)):
        size = -(-p.numel() // processes)
        for i in range(-(-p.numel() // size)):
            pieces[i].append(Piece(name, p, i * size, min((i + 1) * size, p.numel())))
    return pieces


def build_optimizers(
    model: GPT,
    *,
    embedding_lr: float = 0.0,
    unembedding_lr: float = 0.0,
    matrix_lr: float = 0.0,
    scalar_lr: float = 0.0,
    weight_decay: float = 0.0,
    extra: dict[str, dict] | None = None,
    pieces: list[Piece] | None = None,
    dtype=None,
) -> list[torch.optim.Optimizer]:
    """[AdamW, Muon] over one process's pieces of the model (default: all of it), each in exactly one group.

    Every group keeps its `initial_lr`, which the schedule multiplies, and the `names` of its parameters. Weight decay acts on the
    Muon matrices only. dtype: see `Muon`. unembedding_lr is for width 768 and scaled by 768 / width: the head sums over the width (arXiv 2203.03466).
    extra: {a part of a name, as in ADDED: AdamW's settings (lr, betas, eps, weight_decay) of the parameters that have it}; there
    weight decay acts on matrices only. Rates of what a model does not train may be left out.
    """
    tables = {}
    head = {}
    scales = {}
    scalars = {}
    matrices = {}
    added = {(part, decays): {} for part in extra or () for decays in (True, False)}
    slices = []
    for piece in split_parameters(model, 1)[0] if pieces is None else pieces:
        name = piece.name
        p = piece.parameter
        local = (
            p if piece.whole else torch.nn.Parameter(piece.of(p.data))
        )  # a slice shares the parameter's memory
        if local is not p:
            slices.append((piece, local))
        if part := next((part for part in extra or () if part in name), None):
            added[part, p.ndim == 2][name] = local
        elif uses_muon(name, p):
            factor = name.rsplit(".", 1)[1]  # 'weight', 'A' or 'B'
            matrices.setdefault((factor, *p.shape), {})[name] = local
        elif name.startswith("lm_head.") or (name == "wte.weight" and model.lm_head is None):
            head[name] = local
        elif p.ndim == 2:
            tables[name] = local
        elif name == "resid_lambdas":
            scales[name] = local
        else:
            scalars[name] = local

    def group(named, **settings):
        return dict(params=list(named.values()), names=list(named), **settings)

    def extra_group(part, decays, named):
        return group(named, **(extra[part] | ({} if decays else {"weight_decay": 0.0})))

    adamw = AdamW(
        [
            group(tables, lr=embedding_lr),
            group(head, lr=unembedding_lr * 768 / model.config.n_embd),
            group(scalars, lr=scalar_lr, eps=SCALAR_EPS),
            group(
                scales, lr=0.1 * scalar_lr, eps=SCALAR_EPS
            ),  # these multiply from layer to layer: smaller steps
            *(extra_group(*key, named) for key, named in added.items()),
        ],
        betas=(0.8, 0.98),
        eps=1e-10,
        weight_decay=0.0,
        fused=True,
    )

    def take_gradients(*_):
        for piece, local in slices:
            local.grad = piece.of(piece.parameter.grad)

    adamw.register_step_pre_hook(take_gradients)
    muon = Muon(
        [group(named, scale=update_scale(*key)) for key, named in matrices.items()] or [group({})],
        lr=matrix_lr,
        weight_decay=weight_decay,
        dtype=dtype,
    )
    for optimizer in (adamw, muon):
        for g in optimizer.param_groups:
            g["initial_lr"] = g["lr"]
    return [adamw, muon]


# ---- state by name --------------------------------------------------------------------------------------------------


def optimizer_state(optimizers) -> dict:
    """{parameter name: {key: tensor}} of what this process holds."""
    return {
        name: dict(optimizer.state[p])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"])
    }


def load_optimizer_state(optimizers, pieces: list[Piece], state: dict):
    """Take this process's part of a state of whole parameters, as `parallel.gather_state` makes it for any number of processes."""
    by_name = {piece.name: piece for piece in pieces}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                piece = by_name[name]
                optimizer.state[p] = {
                    key: (value if piece.whole or value.ndim == 0 else piece.of(value)).to(
                        p.device, copy=True
                    )
                    for key, value in state[name].items()
                }
