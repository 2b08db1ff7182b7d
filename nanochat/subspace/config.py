"""What a subspace is: its settings, the matrices that it makes, and checks of both."""

from dataclasses import dataclass
from typing import NamedTuple

from nanochat.config import MATRICES
from nanochat.errors import InputError
from nanochat.gpt import GPTConfig
from nanochat.model_flags import SUBSPACE_KINDS as KINDS
from nanochat.model_flags import SUBSPACE_SCOPES as SCOPES
from nanochat.subspace import noise
from nanochat.subspace.operators import padded

PROJECTED = ("fastfood", "fft-fastfood")
# flags that need --subspace
SUBSPACE_FLAGS = ("subspace_dim", "subspace_scope", "subspace_rank", "subspace_scales", "freeze_embeddings")


@dataclass(frozen=True)
class SubspaceConfig:
    """All of a subspace but its trained numbers. A checkpoint holds both and nothing else of it."""

    kind: str
    dim: int = 0  # d; for basis, fastfood and fft-fastfood
    scope: str = ""  # global, layer or matrix; for the same kinds; "" = global
    rank: int = 0  # for lora-random
    scales: bool = False  # one more trained number for each matrix; for fastfood and fft-fastfood
    freeze_embeddings: bool = False  # tables and head keep their initial values
    seed: int = 0  # of everything that is not trained
    generator: str = noise.VERSION  # which numbers a seed stands for

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
    """The α that a matrix uses. number: its place in `matrices`."""
    return {"layer": matrix.layer, "matrix": number}.get(config.scope, 0)


def group_matrices(config: SubspaceConfig, targets: list[Matrix]) -> list[list[Matrix]]:
    """For each α the matrices that share it."""
    groups = {}
    for number, matrix in enumerate(targets):
        groups.setdefault(group_number(config, matrix, number), []).append(matrix)
    return list(groups.values())


def group_sizes(config: SubspaceConfig, targets: list[Matrix]) -> list[int]:
    """The number of entries that each α makes."""
    sizes = []
    for group in group_matrices(config, targets):
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
    has_ranks = any((*model.attn_ranks, *model.mlp_ranks, *model.matrix_ranks, model.lm_head_rank))
    remedy = "leave out --attn-rank, --mlp-rank, --matrix-ranks and --lm-head-rank"
    require(not has_ranks, f"--subspace {kind}", f"the matrices that it makes have full rank; {remedy}")
    check_dim(config, model)
    message = f"for {' and '.join(PROJECTED)} only; leave it out"
    require(not config.scales or kind in PROJECTED, "--subspace-scales", message)
    if kind == "lora-random":
        largest = min(min(m.rows, m.columns) for m in matrices(model))
        message = f"lora-random needs a rank from 1 to {largest}, the smallest side of a matrix"
        require(1 <= config.rank <= largest, f"--subspace-rank {config.rank}", message)
    else:
        require(not config.rank, f"--subspace-rank {config.rank}", "for lora-random only; leave it out")
    require(
        kind != "none" or not config.freeze_embeddings,
        "--freeze-embeddings",
        "with --subspace none nothing would be trained; leave one of the two out",
    )
    require(
        config.generator == noise.VERSION,
        f"generator {config.generator!r}",
        f"it drew the frozen weights, this version draws with {noise.VERSION!r}; "
        "use the version of this program that trained the model",
    )


def check_dim(config: SubspaceConfig, model: GPTConfig):
    """InputError unless dimension and scope of α fit the kind and the matrices."""
    kind = config.kind
    dim = f"--subspace-dim {config.dim}"
    scope = f"--subspace-scope {config.scope}"
    if not config.has_alpha:
        require(not config.dim, dim, f"{kind} has no dimension; leave it out")
        require(not config.scope, scope, f"in {kind} no matrices share numbers; leave it out")
        return
    require(config.dim >= 1, dim, f"{kind} needs a dimension of 1 or more")
    require(config.scope in ("", *SCOPES), scope, f"use one of {', '.join(SCOPES)}")
    if kind in PROJECTED:
        largest = min(group_sizes(config, matrices(model)))
        if kind == "fastfood":
            largest = padded(largest)
        message = f"of scope {config.scope or 'global'} {kind} has {largest} dimensions; use 1 to {largest}"
        require(config.dim <= largest, dim, message)


def from_flags(args, model: GPTConfig) -> SubspaceConfig | None:
    """The subspace of base_train's flags; None without --subspace. InputError if they do not fit together."""
    if not args.subspace:
        for name in SUBSPACE_FLAGS:
            if getattr(args, name):
                raise InputError(
                    f"--{name.replace('_', '-')}: means something with --subspace only; "
                    f"give one of {', '.join(KINDS)}, or leave it out"
                )
        return None
    if args.init_from:
        raise InputError(
            f"--init-from {args.init_from}: not together with --subspace, whose matrices --seed draws; "
            "leave one of the two out"
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
