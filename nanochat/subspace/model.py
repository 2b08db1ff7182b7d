"""Random subspaces: a GPT whose matrices are a function of a few trained numbers and a seed.

    model = GPT(config); model.init_weights()
    attach(model, SubspaceConfig("basis", dim=5, scope="layer", seed=1))   # its matrices are no parameters any more
    model.state_dict()                                                     # what is trained, all of it: 5 numbers a layer, embeddings, head

With W₀ the matrices as they begin, ±1 or Gaussian numbers that a seed names (nanochat/subspace/noise.py), and α trained:

    none          W = W₀
    basis         W = Σ_k α_k W_k, W_k random signs, made anew in every pass and never stored; α begins at length 1
    fastfood      W = W₀ + (P α), P = S·H·G·Π·H·B (Le, Sarlos, Smola 2013; of all matrices: Li et al., arXiv 1804.08838)
    fft-fastfood  W = W₀ + (P α), P = S·Π·F·B, F the orthonormal cosine transform, which needs no power of two
    lora-random   W = W₀ + B A, with factors of a small rank r trained from scratch, B = 0 at first

An α of length 1 stands for matrices of the size of a dense initialisation (variance 1/in), or a change of that size. It belongs to
one matrix, to the matrices of one layer, or to all of them: the scope. With `scales` each matrix's part of P α has one more trained
factor (structure-aware: Aghajanyan et al., arXiv 2012.13255). The per-layer and per-channel scalars stay at their initial values.

The model file knows nothing of this: the matrices are put in their places before every pass. The operators are in
nanochat/subspace/operators.py. d: the numbers of one α.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from nanochat.common import InputError
from nanochat.gpt import GPT, MATRICES, GPTConfig
from nanochat.model_flags import SUBSPACE_KINDS as KINDS
from nanochat.model_flags import SUBSPACE_SCOPES as SCOPES
from nanochat.optim import SCALAR_EPS
from nanochat.subspace import noise
from nanochat.subspace.operators import Combination, Fastfood, FFTFastfood, padded

PROJECTED = ("fastfood", "fft-fastfood")
SCALARS = ("resid_lambdas", "x0_lambdas", "smear")


@dataclass(frozen=True)
class SubspaceConfig:
    """What a subspace is, but for its trained numbers: with them, all that a checkpoint needs."""

    kind: str
    dim: int = 0  # d; of basis, fastfood and fft-fastfood
    scope: str = ""  # global, layer or matrix, likewise; "" = global
    rank: int = 0  # of lora-random
    scales: bool = False  # one more trained number for each matrix, of fastfood and fft-fastfood
    freeze_embeddings: bool = False  # tables and head stay as drawn
    seed: int = 0  # of everything that is not trained
    generator: str = noise.VERSION  # which numbers a seed names

    @property
    def has_alpha(self) -> bool:
        return self.kind == "basis" or self.kind in PROJECTED


class Matrix(NamedTuple):
    """One matrix of the blocks, W: (rows, columns)."""

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
    """Of all blocks, in the order in which they act."""
    C = config.n_embd
    N = config.n_hidden
    K = config.n_kv_head * config.n_embd // config.n_head
    shapes = dict(zip(MATRICES, ((C, C), (K, C), (K, C), (C, C), (N, C), (C, N))))
    return [Matrix(layer, kind, *shape) for layer in range(config.n_layer) for kind, shape in shapes.items()]


def group_of(config: SubspaceConfig, matrix: Matrix, number: int) -> int:
    """Which α a matrix belongs to, from its layer and its place in `matrices`."""
    return {"layer": matrix.layer, "matrix": number}.get(config.scope, 0)


def grouped(config: SubspaceConfig, of: list[Matrix]) -> list[list[Matrix]]:
    groups = {}
    for number, matrix in enumerate(of):
        groups.setdefault(group_of(config, matrix, number), []).append(matrix)
    return list(groups.values())


# ---- checks ---------------------------------------------------------------------------------------------------------


def check(config: SubspaceConfig, model: GPTConfig):
    """InputError, naming the flag of base_train, unless the parts of a subspace fit each other and the model."""

    def require(good, flag, what):
        if not good:
            raise InputError(f"{flag}: {what}")

    kind = config.kind
    require(kind in KINDS, f"--subspace {kind}", f"use one of {', '.join(KINDS)}")
    require(
        not any((*model.attn_ranks, *model.mlp_ranks, *model.matrix_ranks, model.lm_head_rank)),
        f"--subspace {kind}",
        "not together with the flags of rank, the matrices it makes are full; leave --attn-rank, --mlp-rank, --matrix-ranks and --lm-head-rank out",
    )
    if config.has_alpha:
        require(
            config.dim >= 1,
            f"--subspace-dim {config.dim}",
            f"{kind} needs a number of trained numbers, 1 or more",
        )
        require(
            config.scope in ("", *SCOPES),
            f"--subspace-scope {config.scope}",
            f"use one of {', '.join(SCOPES)}",
        )
    else:
        require(not config.dim, f"--subspace-dim {config.dim}", f"{kind} has no such dimension; leave it out")
        require(
            not config.scope,
            f"--subspace-scope {config.scope}",
            f"{kind} has no numbers that matrices share; leave it out",
        )
    if kind in PROJECTED:
        smallest = min(sum(m.size for m in group) for group in grouped(config, matrices(model)))
        most = padded(smallest) if kind == "fastfood" else smallest
        require(
            config.dim <= most,
            f"--subspace-dim {config.dim}",
            f"of scope {config.scope or 'global'} {kind} has {most} dimensions; use 1 to {most}",
        )
    require(
        not config.scales or kind in PROJECTED,
        "--subspace-scales",
        f"for {' and '.join(PROJECTED)} only; leave it out",
    )
    if kind == "lora-random":
        most = min(min(m.rows, m.columns) for m in matrices(model))
        require(
            1 <= config.rank <= most,
            f"--subspace-rank {config.rank}",
            f"lora-random needs a rank from 1 to {most}, the smallest side of a matrix",
        )
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
        f"the frozen weights were drawn by it, this version draws with {noise.VERSION!r}; use the version of this program that trained the model",
    )


def from_flags(args, model: GPTConfig) -> SubspaceConfig | None:
    """The subspace that base_train's flags describe, None without --subspace. InputError where they do not fit together."""
    given = [
        flag
        for flag in (
            "subspace_dim",
            "subspace_scope",
            "subspace_rank",
            "subspace_scales",
            "freeze_embeddings",
        )
        if getattr(args, flag)
    ]
    if not args.subspace:
        if given:
            raise InputError(
                f"--{given[0].replace('_', '-')}: means something with --subspace only; give one of {', '.join(KINDS)}, or leave it out"
            )
        return None
    if args.init_from:
        raise InputError(
            f"--init-from {args.init_from}: not together with --subspace, whose matrices begin as --seed draws them; leave one of them out"
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
    """{part of a name: AdamW's settings}, for `optim.build_optimizers`, of the numbers that the matrices are made of.

    AdamW moves each of d numbers by about lr, and so α by lr·√d: divided by √d, or √r, a step is a like share of the matrices.
    """
    return {
        "subspace.scales": {"lr": scales_lr, "eps": SCALAR_EPS},
        "subspace.": {"lr": lr * max(1, config.dim, config.rank) ** -0.5},
    }


# ---- what it costs --------------------------------------------------------------------------------------------------


def own_numbers(config: SubspaceConfig, model: GPTConfig) -> int:
    """Trained numbers beside embeddings and head."""
    of = matrices(model)
    if config.has_alpha:
        return config.dim * len(grouped(config, of)) + config.scales * len(of)
    return sum(config.rank * (m.rows + m.columns) for m in of)


def state_bytes(config: SubspaceConfig, model: GPTConfig) -> int:
    """Held beside the trained numbers and the matrices in use, and in no checkpoint: W₀ where they are not it, and what P is made of."""
    total = sum(m.size for m in matrices(model))
    groups = [sum(m.size for m in g) for g in grouped(config, matrices(model))]
    each = {
        "fastfood": lambda n: 12 * padded(n) + 4 * config.dim,
        "fft-fastfood": lambda n: 8 * n + 4 * config.dim,
    }.get(config.kind, lambda n: 0)
    return (0 if config.kind in ("basis", "none") else 4 * total) + sum(map(each, groups))


def pass_bytes(config: SubspaceConfig, model: GPTConfig, itemsize: int) -> int:
    """Of all matrices and their gradients, in the dtype of the pass, and of what making them takes meanwhile."""
    of = matrices(model)
    largest = max(sum(m.size for m in group) for group in grouped(config, of))
    making = {"fastfood": 12 * padded(largest), "fft-fastfood": 28 * largest}.get(
        config.kind, 8 * max(m.size for m in of)
    )
    return 2 * itemsize * sum(m.size for m in of) + making


def costs(config: SubspaceConfig, model: GPTConfig, dense: dict) -> dict:
    """What `rank.account` says of the model, `dense`, with what is otherwise in a subspace.

    params/total and its parts are the network's numbers, however they are made; params/trained those that are learned, and
    params/stored_bits what tells the model: 32 for each of these, and 64 of seed. Making the matrices is not in flops/per_token.
    """
    own = own_numbers(config, model)
    trained = own + (0 if config.freeze_embeddings else dense["params/embedding"] + dense["params/lm_head"])
    found = {
        "params/trained": trained,
        "params/stored_bits": 32 * trained + 64,
        "mem/weights_bytes": dense["mem/weights_bytes"] + 4 * own + state_bytes(config, model),
        "mem/grads_bytes": 4 * trained,
        "mem/optimizer_bytes": 8 * trained,
    }
    if peak := dense.get(
        "mem/predicted_peak_bytes"
    ):  # gradients of the matrices come and go as in the dense model
        found["mem/predicted_peak_bytes"] = peak + sum(
            found[key] - dense[key] for key in ("mem/weights_bytes", "mem/optimizer_bytes")
        )
    return dense | found


def available_bytes(device_type: str) -> int:
    """Memory that is free on a GPU, or in the machine; where the system does not say, all that it has."""
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
    there = available_bytes(device_type)
    if needed > there:
        raise InputError(
            f"--subspace {config.kind}: needs {needed / 2**30:,.1f} GiB for its matrices and what makes them, {there / 2**30:,.1f} GiB are "
            "free; use a smaller --model-dim or --depth"
            + (", or a smaller --subspace-scope" if config.kind in PROJECTED else "")
        )


# ---- the matrices ---------------------------------------------------------------------------------------------------


def start_of(matrix: Matrix, config: SubspaceConfig, device):
    """W₀, float32, as `Linear.init` draws it. The outputs of attention and MLP begin at zero, except on frozen noise: nothing else may fill them."""
    if matrix.kind in ("o", "down") and config.kind != "lora-random":
        return torch.zeros(matrix.rows, matrix.columns, device=device)
    keys = matrix.stream(config.seed, noise.FROZEN)
    return noise.uniform(keys, matrix.size, math.sqrt(3 / matrix.columns), device).view(
        matrix.rows, matrix.columns
    )


class Subspace(nn.Module):
    """The trained numbers beside embeddings and head, and the matrices that they make. Its state_dict holds the trained numbers alone."""

    def __init__(self, config: SubspaceConfig, of: list[Matrix], device):
        super().__init__()
        self.config = config
        self.of = of
        self.kept: tuple | None = None
        groups = grouped(config, of)
        self.group = [group_of(config, matrix, number) for number, matrix in enumerate(of)]
        if config.kind != "basis":
            for number, matrix in enumerate(of):
                self.register_buffer(f"start{number}", start_of(matrix, config, device), persistent=False)
        if config.has_alpha:
            self.alpha = nn.Parameter(
                torch.full(
                    (len(groups), config.dim),
                    config.dim**-0.5 if config.kind == "basis" else 0.0,
                    device=device,
                )
            )
        if config.kind in PROJECTED:
            make = Fastfood if config.kind == "fastfood" else FFTFastfood
            self.projections = nn.ModuleList(
                make(config.dim, sum(m.size for m in g), config.seed, i, device) for i, g in enumerate(groups)
            )
        if config.scales:
            self.scales = nn.Parameter(torch.ones(len(of), device=device))
        if config.kind == "lora-random":
            self.A = nn.ParameterList(
                noise.uniform(
                    m.stream(config.seed, noise.FACTOR),
                    config.rank * m.columns,
                    math.sqrt(3 / m.columns),
                    device,
                ).view(config.rank, m.columns)
                for m in of
            )
            self.B = nn.ParameterList(torch.zeros(m.rows, config.rank, device=device) for m in of)

    def starts(self):
        return [getattr(self, f"start{number}") for number in range(len(self.of))]

    def made(self, dtype) -> list[torch.Tensor]:
        """The matrices, in the order of `of`."""
        if self.config.kind == "basis":
            alphas = self.alpha.unbind()
            return [
                Combination.apply(
                    alphas[group],
                    m.stream(self.config.seed, noise.BASIS),
                    m.rows,
                    m.columns,
                    m.columns**-0.5,
                    dtype,
                )
                for m, group in zip(self.of, self.group)
            ]
        if self.config.kind == "none":
            return [W.to(dtype) for W in self.starts()]
        if self.config.kind == "lora-random":
            return [torch.addmm(W, B, A).to(dtype) for W, B, A in zip(self.starts(), self.B, self.A)]
        changes = [
            part
            for projection, alpha, group in zip(
                self.projections, self.alpha.unbind(), grouped(self.config, self.of)
            )
            for part in projection(alpha).split([m.size for m in group])
        ]
        scales = self.scales.unbind() if self.config.scales else [1.0] * len(self.of)
        return [
            (W + part.view_as(W) * (scale * m.columns**-0.5)).to(dtype)
            for W, part, scale, m in zip(self.starts(), changes, scales, self.of)
        ]

    def matrices(self, dtype) -> list[torch.Tensor]:
        """`made`, but without a gradient only where the trained numbers have changed: their values tell, which no way to change them escapes."""
        if torch.is_grad_enabled():
            self.kept = None
            return self.made(dtype)
        now = [p.detach() for p in self.parameters()]
        if self.kept is None or self.kept[0] != dtype or not all(map(torch.equal, self.kept[1], now)):
            self.kept = dtype, [p.clone() for p in now], self.made(dtype)
        return self.kept[2]


# ---- joined to a model ----------------------------------------------------------------------------------------------


class GeneratedGPT(GPT):
    """A GPT whose matrices its `subspace` makes before every pass."""

    def forward(self, idx, targets=None, compute_dtype=torch.float32, cache=None, head=None):
        place(self, compute_dtype)
        return super().forward(idx, targets, compute_dtype, cache, head)


def place(model: GPT, dtype):
    """Put the matrices where the layers look for them."""
    for matrix, weight in zip(model.subspace.of, model.subspace.matrices(dtype)):
        model.get_submodule(matrix.name).weight = weight


def freeze(module: nn.Module, name: str, value):
    """A parameter becomes a buffer that no optimizer, checkpoint or count of parameters sees."""
    delattr(module, name)
    module.register_buffer(name, value, persistent=False)


@torch.no_grad()
def attach(model: GPT, config: SubspaceConfig):
    """Make a GPT's matrices those of the subspace at its start. What is left of its parameters is trained. Before `compile_blocks`.

    The rest of an initialised model stays: embeddings and head. InputError if the subspace does not fit it, see `check`.
    """
    check(config, model.config)
    device = model.wte.weight.device
    model.subspace = Subspace(config, matrices(model.config), device)
    model.init_scalars()
    for name in SCALARS:
        freeze(model, name, getattr(model, name).detach())
    for matrix in model.subspace.of:
        freeze(model.get_submodule(matrix.name), "weight", torch.empty(0, device=device))
    if config.freeze_embeddings:
        freeze_embeddings(model, config.seed)
    model.__class__ = GeneratedGPT
    place(model, torch.float32)


def restore(model: GPT, description: dict, state: dict):
    """Make an empty GPT the one of a checkpoint, to the bit, from asdict of its config and its trained numbers. InputError if its weights
    were drawn by another generator.
    """
    attach(model, SubspaceConfig(**description))
    model.load_state_dict(state)
    with torch.no_grad():
        place(model, torch.float32)


def freeze_embeddings(model: GPT, seed: int):
    """Tables and head as a seed names them: in size as `GPT.init_weights` draws them, but a head of zeros would never let anything pass."""
    V, C = model.wte.weight.shape
    device = model.wte.weight.device
    table = noise.gaussian(noise.stream(seed, noise.EMBEDDING, 0), V * C, device).view(V, C)
    if model.lm_head is None:
        table.mul_(0.02)
    else:
        freeze(
            model.lm_head,
            "weight",
            noise.uniform(noise.stream(seed, noise.EMBEDDING, 1), V * C, math.sqrt(3 / C), device).view(V, C),
        )
    freeze(model.wte, "weight", table)
    for values in model.value_embeds.values():
        freeze(values, "weight", torch.zeros_like(values.weight))
