"""Random subspaces: a GPT whose matrices are a function of a few trained numbers and a seed.

    model = GPT(config)
    model.init_weights()
    attach(model, SubspaceConfig("basis", dim=5, scope="layer", seed=1))  # the matrices are no parameters now
    model.state_dict()             # all that is trained: 5 numbers a layer, the embeddings and the head

W₀: the matrices at the start. P: ±1 or Gaussian numbers, which a seed stands for (noise.py). α: trained.

    none          W = W₀
    basis         W = Σ_k α_k W_k with random signs W_k, which every pass makes anew. |α| = 1 at the start.
    fastfood      W = W₀ + P α with P = S·H·G·Π·H·B (Le, Sarlos, Smola 2013; of all matrices together:
                  Li et al., arXiv 1804.08838)
    fft-fastfood  W = W₀ + P α with P = S·Π·F·B. F: the orthonormal cosine transform of any length.
    lora-random   W = W₀ + B A. The factors have a small rank r and are trained from scratch, from B = 0.

An α of length 1 makes matrices of the size of a dense initialisation (variance 1/in), or a change of that
size. The scope says which matrices share an α: all, those of a layer, or none. With `scales` each matrix's
part of P α has one more trained factor (structure-aware: Aghajanyan et al., arXiv 2012.13255). The scalars of
layers and channels stay at their initial values.

gpt.py knows nothing of this: the matrices are put in their places before every pass. config.py has the
settings, operators.py the operators, costs.py the costs. d: the numbers of one α.
"""

import math

import torch
import torch.nn as nn

from nanochat.checkpoint_files import load_weights
from nanochat.gpt import GPT
from nanochat.subspace import noise
from nanochat.subspace.config import (
    PROJECTED,
    Matrix,
    SubspaceConfig,
    check,
    group_matrices,
    group_number,
    group_sizes,
    matrices,
)
from nanochat.subspace.operators import Combination, Fastfood, FFTFastfood

SCALARS = ("resid_lambdas", "x0_lambdas", "smear")


# ---- the matrices ------------------------------------------------------------------------------------------


def initial_matrix(matrix: Matrix, config: SubspaceConfig, device):
    """W₀, float32, as `Linear.init` draws it.

    The output matrices of attention and MLP begin at zero. With lora-random they are noise like the others:
    W₀ stays frozen, so from zero they could never have more than rank r.
    """
    if matrix.kind in ("o", "down") and config.kind != "lora-random":
        return torch.zeros(matrix.rows, matrix.columns, device=device)
    keys = matrix.stream(config.seed, noise.FROZEN)
    W = noise.uniform(keys, matrix.size, math.sqrt(3 / matrix.columns), device)
    return W.view(matrix.rows, matrix.columns)


class Subspace(nn.Module):
    """The trained numbers beside embeddings and head, and the matrices that they make.

    Its state_dict holds the trained numbers alone.
    """

    def __init__(self, config: SubspaceConfig, targets: list[Matrix], device):
        super().__init__()
        self.config = config
        self.targets = targets
        self.cached: tuple | None = None  # (dtype, the trained numbers, the matrices made of them)
        self.group = [group_number(config, matrix, number) for number, matrix in enumerate(targets)]
        if config.kind != "basis":
            for number, matrix in enumerate(targets):
                W = initial_matrix(matrix, config, device)
                self.register_buffer(f"initial{number}", W, persistent=False)
        sizes = group_sizes(config, targets)
        if config.has_alpha:
            entry = config.dim**-0.5 if config.kind == "basis" else 0.0
            self.alpha = nn.Parameter(torch.full((len(sizes), config.dim), entry, device=device))
        if config.kind in PROJECTED:
            projection = Fastfood if config.kind == "fastfood" else FFTFastfood
            self.projections = nn.ModuleList(
                projection(config.dim, size, config.seed, i, device) for i, size in enumerate(sizes)
            )
        if config.scales:
            self.scales = nn.Parameter(torch.ones(len(targets), device=device))
        if config.kind == "lora-random":
            self.A = nn.ParameterList(initial_factor(m, config, device) for m in targets)
            self.B = nn.ParameterList(torch.zeros(m.rows, config.rank, device=device) for m in targets)

    def initial_matrices(self) -> list[torch.Tensor]:
        return [getattr(self, f"initial{number}") for number in range(len(self.targets))]

    def make_matrices(self, dtype) -> list[torch.Tensor]:
        """The matrices, in the order of `targets`."""
        if self.config.kind == "basis":
            return self.combine_basis(dtype)
        initial = self.initial_matrices()
        if self.config.kind == "none":
            return [W.to(dtype) for W in initial]
        if self.config.kind == "lora-random":
            return [torch.addmm(W, B, A).to(dtype) for W, B, A in zip(initial, self.B, self.A)]
        scales = self.scales.unbind() if self.config.scales else [1.0] * len(self.targets)
        changes = self.project()
        return [
            (W + change.view_as(W) * (scale * m.columns**-0.5)).to(dtype)
            for W, change, scale, m in zip(initial, changes, scales, self.targets)
        ]

    def combine_basis(self, dtype) -> list[torch.Tensor]:
        alphas = self.alpha.unbind()
        matrices = []
        for m, group in zip(self.targets, self.group):
            keys = m.stream(self.config.seed, noise.BASIS)
            matrices.append(Combination.apply(alphas[group], keys, m.rows, m.columns, m.columns**-0.5, dtype))
        return matrices

    def project(self) -> list[torch.Tensor]:
        """Each matrix's part of P α, flat, in the order of `targets`."""
        groups = group_matrices(self.config, self.targets)
        changes = []
        for projection, alpha, group in zip(self.projections, self.alpha.unbind(), groups):
            changes += projection(alpha).split([m.size for m in group])
        return changes

    def matrices(self, dtype) -> list[torch.Tensor]:
        """The matrices. Without gradients they are made again only after the trained numbers have changed.

        The values are compared, so any change counts, whoever makes it.
        """
        if torch.is_grad_enabled():
            self.cached = None
            return self.make_matrices(dtype)
        now = [p.detach() for p in self.parameters()]
        if self.cached is None or self.cached[0] != dtype or not all(map(torch.equal, self.cached[1], now)):
            numbers = [p.clone() for p in now]
            self.cached = (dtype, numbers, self.make_matrices(dtype))
        return self.cached[2]


def initial_factor(matrix: Matrix, config: SubspaceConfig, device):
    """A: (r, columns) of lora-random."""
    keys = matrix.stream(config.seed, noise.FACTOR)
    A = noise.uniform(keys, config.rank * matrix.columns, math.sqrt(3 / matrix.columns), device)
    return A.view(config.rank, matrix.columns)


# ---- a model in a subspace ---------------------------------------------------------------------------------


class SubspaceGPT(GPT):
    """A GPT whose matrices its `subspace` makes before every pass."""

    def forward(self, idx, targets=None, compute_dtype=torch.float32, cache=None, head=None):
        place_matrices(self, compute_dtype)
        return super().forward(idx, targets, compute_dtype, cache, head)


def place_matrices(model: GPT, dtype):
    """Make each matrix the weight of its layer."""
    for matrix, weight in zip(model.subspace.targets, model.subspace.matrices(dtype)):
        model.get_submodule(matrix.name).weight = weight


def freeze(module: nn.Module, name: str, value):
    """Turn a parameter into a buffer: optimizers, checkpoints and counts of parameters do not see it."""
    delattr(module, name)
    module.register_buffer(name, value, persistent=False)


@torch.no_grad()
def attach(model: GPT, config: SubspaceConfig):
    """Replace a GPT's matrices by those of a subspace at its start. Call it before `compile_blocks`.

    The other parameters (embeddings and head) stay as they are and are trained.
    InputError if the subspace does not fit the model, see `check`.
    """
    check(config, model.config)
    device = model.wte.weight.device
    model.subspace = Subspace(config, matrices(model.config), device)
    model.init_scalars()
    for name in SCALARS:
        freeze(model, name, getattr(model, name).detach())
    for matrix in model.subspace.targets:
        freeze(model.get_submodule(matrix.name), "weight", torch.empty(0, device=device))
    if config.freeze_embeddings:
        freeze_embeddings(model, config.seed)
    model.__class__ = SubspaceGPT
    place_matrices(model, torch.float32)


def restore(model: GPT, description: dict, state: dict):
    """Load a checkpoint into a new GPT: the same matrices, to the bit.

    description: the SubspaceConfig as a dict. state: the trained numbers. InputError: another generator drew
    the weights.
    """
    attach(model, SubspaceConfig(**description))
    load_weights(model, state)
    with torch.no_grad():
        place_matrices(model, torch.float32)


def freeze_embeddings(model: GPT, seed: int):
    """Make tables and head frozen noise of the size that `GPT.init_weights` gives them.

    The head is not zero as there: no gradient would ever pass through it.
    """
    V, C = model.wte.weight.shape
    device = model.wte.weight.device
    table = noise.gaussian(noise.stream(seed, noise.EMBEDDING, 0), V * C, device).view(V, C)
    if model.lm_head is None:
        table.mul_(0.02)
    else:
        keys = noise.stream(seed, noise.EMBEDDING, 1)
        freeze(model.lm_head, "weight", noise.uniform(keys, V * C, math.sqrt(3 / C), device).view(V, C))
    freeze(model.wte, "weight", table)
    for values in model.value_embeds.values():
        freeze(values, "weight", torch.zeros_like(values.weight))
