"""Random subspaces: a GPT whose matrices are a function of a few trained numbers and a seed.

    model = GPT(config)
    model.init_weights()
    attach(model, SubspaceConfig("basis", dim=5, scope="layer", seed=1))   # now its matrices are made
    model.state_dict()      # all that is trained: 5 numbers a layer, embeddings, head

With W₀ the matrices as they begin, ±1 or Gaussian numbers that a seed names (noise.py), and α trained:

    none          W = W₀
    basis         W = Σ_k α_k W_k, W_k random signs, made anew in every pass, never stored; at first |α| = 1
    fastfood      W = W₀ + (P α), P = S·H·G·Π·H·B (Le, Sarlos, Smola 2013; of all matrices: Li et al.,
                  arXiv 1804.08838)
    fft-fastfood  W = W₀ + (P α), P = S·Π·F·B, F the orthonormal cosine transform, which needs no power of two
    lora-random   W = W₀ + B A, with factors of a small rank r trained from scratch, B = 0 at first

An α of length 1 stands for matrices of the size of a dense initialisation (variance 1/in), or a change of
that size. The scope says what an α belongs to: one matrix, the matrices of one layer, or all matrices. With
`scales` each matrix's part of P α has one more trained factor (structure-aware: Aghajanyan et al., arXiv
2012.13255). The per-layer and per-channel scalars stay at their initial values.

gpt.py knows nothing of this: the matrices are put in their places before every pass. The operators are in
operators.py. d: the numbers of one α.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from nanochat.config import MATRICES
from nanochat.errors import InputError
from nanochat.gpt import GPT, GPTConfig
from nanochat.model_flags import SUBSPACE_KINDS as KINDS
from nanochat.model_flags import SUBSPACE_SCOPES as SCOPES
from nanochat.optim import SCALAR_EPS
from nanochat.subspace import noise
from nanochat.subspace.operators import Combination, Fastfood, FFTFastfood, padded

PROJECTED = ("fastfood", "fft-fastfood")
SCALARS = ("resid_lambdas", "x0_lambdas", "smear")


@dataclass(frozen=True)
class SubspaceConfig:
    """All of a subspace but its trained numbers: with them it is all that a checkpoint needs."""

    kind: str
    dim: int = 0  # d; of basis, fastfood and fft-fastfood
    scope: str = ""  # global, layer or matrix; of the same kinds; "" = global
    rank: int = 0  # of lora-random
    scales: bool = False  # one more trained number for each matrix, of fastfood and fft-fastfood
    freeze_embeddings: bool = False  # tables and head stay as drawn
    seed: int = 0  # of everything that is not trained
    generator: str = noise.VERSION  # which numbers a seed names

    @property
    def has_alpha(self) -> bool:
        return self.kind == "basis" or self.kind in PROJECTED


class Matrix(NamedTuple):
    """Name and shape of one matrix of the blocks, W: (rows, columns)."""

    layer: int
    kind: str  # q, k, v, o, up or down
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.{'mlp' if self.kind in ('up', 'down') else 'attn'}.{self.kind}"

    def stream(self, seed: int, purpose: int) -> tuple[int, int]:
        return noise.stream(seed, purpose, self.layer, MATRICES.index(self.kind))


def matrices(config: GPTConfig) -> list[Matrix]:
    """The matrices of all blocks, in the order in which they act."""
    C = config.n_embd
    N = config.n_hidden
    K = config.n_kv_head * config.n_embd // config.n_head
    shapes = dict(zip(MATRICES, ((C, C), (K, C), (K, C), (C, C), (N, C), (C, N))))
    return [Matrix(layer, kind, *shape) for layer in range(config.n_layer) for kind, shape in shapes.items()]


def group_number(config: SubspaceConfig, matrix: Matrix, number: int) -> int:
    """Which α a matrix belongs to, from its layer and its place in `matrices`."""
    return {"layer": matrix.layer, "matrix": number}.get(config.scope, 0)


def groups_of(config: SubspaceConfig, targets: list[Matrix]) -> list[list[Matrix]]:
    """The matrices that share an α, for each α."""
    groups = {}
    for number, matrix in enumerate(targets):
        groups.setdefault(group_number(config, matrix, number), []).append(matrix)
    return list(groups.values())


def group_sizes(config: SubspaceConfig, targets: list[Matrix]) -> list[int]:
    """Entries that each α makes."""
    sizes = []
    for group in groups_of(config, targets):
        sizes.append(sum(matrix.size for matrix in group))
    return sizes


# ---- checks ------------------------------------------------------------------------------------------------


def require(condition, flag: str, message: str):
    if not condition:
        raise InputError(f"{flag}: {message}")


def check(config: SubspaceConfig, model: GPTConfig):
    """InputError, naming the flag of base_train, unless the subspace is possible and fits the model."""
    kind = config.kind
    require(kind in KINDS, f"--subspace {kind}", f"use one of {', '.join(KINDS)}")
    require(
        not any((*model.attn_ranks, *model.mlp_ranks, *model.matrix_ranks, model.lm_head_rank)),
        f"--subspace {kind}",
        "not together with the flags of rank, the matrices it makes are full; "
        "leave --attn-rank, --mlp-rank, --matrix-ranks and --lm-head-rank out",
    )
    check_dim(config, model)
    only = f"for {' and '.join(PROJECTED)} only; leave it out"
    require(not config.scales or kind in PROJECTED, "--subspace-scales", only)
    if kind == "lora-random":
        largest = min(min(m.rows, m.columns) for m in matrices(model))
        message = f"lora-random needs a rank from 1 to {largest}, the smallest side of a matrix"
        require(1 <= config.rank <= largest, f"--subspace-rank {config.rank}", message)
    else:
        require(not config.rank, f"--subspace-rank {config.rank}", "for lora-random only; leave it out")
    require(
        kind != "none" or not config.freeze_embeddings,
        "--freeze-embeddings",
        "with --subspace none nothing would be trained; leave one of them out",
    )
    require(
        config.generator == noise.VERSION,
        f"generator {config.generator!r}",
        f"the frozen weights were drawn by it, this version draws with {noise.VERSION!r}; "
        "use the version of this program that trained the model",
    )


def check_dim(config: SubspaceConfig, model: GPTConfig):
    """InputError unless dimension and scope of α fit the kind and the matrices."""
    kind = config.kind
    dim = f"--subspace-dim {config.dim}"
    scope = f"--subspace-scope {config.scope}"
    if not config.has_alpha:
        require(not config.dim, dim, f"{kind} has no such dimension; leave it out")
        require(not config.scope, scope, f"{kind} has no numbers that matrices share; leave it out")
        return
    require(config.dim >= 1, dim, f"{kind} needs a number of trained numbers, 1 or more")
    require(config.scope in ("", *SCOPES), scope, f"use one of {', '.join(SCOPES)}")
    if kind in PROJECTED:
        largest = min(group_sizes(config, matrices(model)))
        if kind == "fastfood":
            largest = padded(largest)
        message = f"of scope {config.scope or 'global'} {kind} has {largest} dimensions; use 1 to {largest}"
        require(config.dim <= largest, dim, message)


def from_flags(args, model: GPTConfig) -> SubspaceConfig | None:
    """The subspace of base_train's flags, None without --subspace. InputError where the flags do not fit."""
    if not args.subspace:
        for flag in (
            "subspace_dim",
            "subspace_scope",
            "subspace_rank",
            "subspace_scales",
            "freeze_embeddings",
        ):
            if getattr(args, flag):
                raise InputError(
                    f"--{flag.replace('_', '-')}: means something with --subspace only; "
                    f"give one of {', '.join(KINDS)}, or leave it out"
                )
        return None
    if args.init_from:
        raise InputError(
            f"--init-from {args.init_from}: not together with --subspace, whose matrices begin as --seed "
            "draws them; leave one of them out"
        )
    config = SubspaceConfig(
        args.subspace,
        args.subspace_dim,
        args.subspace_scope,
        args.subspace_rank,
        args.subspace_scales,
        args.freeze_embeddings,
        args.seed,
    )
    check(config, model)
    return config


def adamw_settings(config: SubspaceConfig, lr: float, scales_lr: float) -> dict[str, dict]:
    """{part of a name: AdamW's settings} of a subspace's trained numbers, for `optim.build_optimizers`.

    AdamW moves each of d numbers by about lr, and so α by lr·√d. Divided by √d (or √r), a step changes the
    same share of the matrices for every d.
    """
    return {
        "subspace.scales": {"lr": scales_lr, "eps": SCALAR_EPS},
        "subspace.": {"lr": lr * max(1, config.dim, config.rank) ** -0.5},
    }


# ---- what it costs -----------------------------------------------------------------------------------------


def count_trained(config: SubspaceConfig, model: GPTConfig) -> int:
    """Trained numbers beside embeddings and head."""
    targets = matrices(model)
    if not config.has_alpha:
        return sum(config.rank * (m.rows + m.columns) for m in targets)
    alphas = config.dim * len(groups_of(config, targets))
    return alphas + len(targets) if config.scales else alphas


def state_bytes(config: SubspaceConfig, model: GPTConfig) -> int:
    """Bytes of W₀ and of what P is made of: held beside trained numbers and matrices, in no checkpoint."""
    targets = matrices(model)
    total = 0
    if config.kind not in ("basis", "none"):  # basis has no W₀; of none it is the matrix in use
        total += 4 * sum(m.size for m in targets)
    for size in group_sizes(config, targets):
        if config.kind == "fastfood":
            total += 12 * padded(size) + 4 * config.dim
        if config.kind == "fft-fastfood":
            total += 8 * size + 4 * config.dim
    return total


def pass_bytes(config: SubspaceConfig, model: GPTConfig, itemsize: int) -> int:
    """Bytes of all matrices and their gradients in the dtype of the pass, and of what making them takes."""
    targets = matrices(model)
    largest = max(group_sizes(config, targets))
    making = {"fastfood": 12 * padded(largest), "fft-fastfood": 28 * largest}
    temporary = making.get(config.kind, 8 * max(m.size for m in targets))
    return 2 * itemsize * sum(m.size for m in targets) + temporary


def costs(config: SubspaceConfig, model: GPTConfig, dense: dict) -> dict:
    """What `rank.account` says of the model, `dense`, with the entries that differ in a subspace.

    params/total and its parts are the network's numbers, however they are made. params/trained: those that
    are learned. params/stored_bits: what tells the model, 32 for each of these and 64 of seed.
    flops/per_token does not count the making of the matrices.
    """
    own = count_trained(config, model)
    trained = own
    if not config.freeze_embeddings:
        trained += dense["params/embedding"] + dense["params/lm_head"]
    changed = {
        "params/trained": trained,
        "params/stored_bits": 32 * trained + 64,
        "mem/weights_bytes": dense["mem/weights_bytes"] + 4 * own + state_bytes(config, model),
        "mem/grads_bytes": 4 * trained,
        "mem/optimizer_bytes": 8 * trained,
    }
    # gradients of the matrices come and go as in the dense model
    if peak := dense.get("mem/predicted_peak_bytes"):
        for key in ("mem/weights_bytes", "mem/optimizer_bytes"):
            peak += changed[key] - dense[key]
        changed["mem/predicted_peak_bytes"] = peak
    return dense | changed


def available_bytes(device_type: str) -> int:
    """Free memory of a GPU, or of the machine; all of the machine's memory if the system does not say."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(config: SubspaceConfig, model: GPTConfig, itemsize: int, device_type: str):
    """InputError if the weights and what makes them would not fit; activations come on top."""
    needed = state_bytes(config, model) + pass_bytes(config, model, itemsize)
    available = available_bytes(device_type)
    if needed > available:
        smaller = "use a smaller --model-dim or --depth"
        if config.kind in PROJECTED:
            smaller += ", or a smaller --subspace-scope"
        raise InputError(
            f"--subspace {config.kind}: needs {needed / 2**30:,.1f} GiB for its matrices and what makes "
            f"them, {available / 2**30:,.1f} GiB are free; {smaller}"
        )


# ---- the matrices ------------------------------------------------------------------------------------------


def initial_matrix(matrix: Matrix, config: SubspaceConfig, device):
    """W₀, float32, as `Linear.init` draws it.

    The outputs of attention and MLP begin at zero. With lora-random they are noise like the others: W₀
    stays frozen, and from zeros they would never get more than rank r.
    """
    if matrix.kind in ("o", "down") and config.kind != "lora-random":
        return torch.zeros(matrix.rows, matrix.columns, device=device)
    keys = matrix.stream(config.seed, noise.FROZEN)
    W = noise.uniform(keys, matrix.size, math.sqrt(3 / matrix.columns), device)
    return W.view(matrix.rows, matrix.columns)


class Subspace(nn.Module):
    """The trained numbers beside embeddings and head, and the matrices made of them.

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
        made = []
        for m, group in zip(self.targets, self.group):
            keys = m.stream(self.config.seed, noise.BASIS)
            made.append(Combination.apply(alphas[group], keys, m.rows, m.columns, m.columns**-0.5, dtype))
        return made

    def project(self) -> list[torch.Tensor]:
        """Each matrix's part of P α, flat, in the order of `targets`."""
        groups = groups_of(self.config, self.targets)
        changes = []
        for projection, alpha, group in zip(self.projections, self.alpha.unbind(), groups):
            changes += projection(alpha).split([m.size for m in group])
        return changes

    def matrices(self, dtype) -> list[torch.Tensor]:
        """`make_matrices`, but without a gradient only where the trained numbers have changed since.

        Their values are compared: whatever changes them is noticed.
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


# ---- joined to a model -------------------------------------------------------------------------------------


class SubspaceGPT(GPT):
    """A GPT whose matrices its `subspace` makes before every pass."""

    def forward(self, idx, targets=None, compute_dtype=torch.float32, cache=None, head=None):
        place_matrices(self, compute_dtype)
        return super().forward(idx, targets, compute_dtype, cache, head)


def place_matrices(model: GPT, dtype):
    """Put the matrices where the layers look for them."""
    for matrix, weight in zip(model.subspace.targets, model.subspace.matrices(dtype)):
        model.get_submodule(matrix.name).weight = weight


def freeze(module: nn.Module, name: str, value):
    """Make a parameter a buffer that no optimizer, checkpoint or count of parameters sees."""
    delattr(module, name)
    module.register_buffer(name, value, persistent=False)


@torch.no_grad()
def attach(model: GPT, config: SubspaceConfig):
    """Make a GPT's matrices those of the subspace at its start. Call it before `compile_blocks`.

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
    """Make an empty GPT that of a checkpoint, to the bit, from its config (asdict) and trained numbers.

    InputError if its weights were drawn by another generator.
    """
    attach(model, SubspaceConfig(**description))
    model.load_state_dict(state)
    with torch.no_grad():
        place_matrices(model, torch.float32)


def freeze_embeddings(model: GPT, seed: int):
    """Make tables and head frozen noise, in size as `GPT.init_weights` draws them.

    But the head is not zero: nothing would ever pass it.
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
