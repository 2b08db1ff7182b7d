"""Adapters: a few trained numbers beside the matrices of a finished, frozen GPT: LoRA, AdaLoRA, IA3.

    attach(model, "wiki", AdapterConfig("lora", rank=8, alpha=16))  # freezes the base, adds the adapter
    adapter_state(model, "wiki")                                    # the adapter's tensors, for a checkpoint
    plain_model(model)                                              # a plain GPT, the adapter in its matrices

A model has one adapter. A regular expression chooses its matrices in the blocks (blocks.N.attn.{q,k,v,o},
blocks.N.mlp.{up,down}). A LowRankLinear counts as one matrix, its product. gpt.py knows nothing of this:
`attach` puts an `AdaptedLinear` around every matrix. The computations of the base do not change, so at an
adapter's start the logits equal the base's to the bit.

The modules are in layers.py. AdaLoRA's schedule and scores are in adalora.py.
"""

import copy
import difflib
import hashlib
import math
import re
from dataclasses import asdict, dataclass, field

import torch
import torch.nn as nn

from nanochat import recompute
from nanochat.accounting import on_meta
from nanochat.adapters.layers import IA3, AdaptedLinear, AdaptedMLP, LoRA, Triplets
from nanochat.config import MATRICES
from nanochat.errors import InputError
from nanochat.gpt import GPT, GPTConfig

# the matrices that each kind adapts by default
TARGETS = {
    "lora": r"attn\.[qkvo]$|mlp\.(up|down)$",
    "adalora": r"attn\.[qkvo]$|mlp\.(up|down)$",
    "ia3": r"attn\.[kv]$|mlp\.down$",
}


@dataclass
class AdapterConfig:
    """All of an adapter but its trained numbers.

    Patterns are regular expressions that are searched in names such as blocks.3.attn.q. In `ranks` and
    `alphas` the first pattern that matches a matrix's name counts; if none matches, `rank` and `alpha` do.
    """

    kind: str = "lora"  # lora, adalora or ia3
    targets: str = ""  # pattern of the adapted matrices; "" = all of them, or for ia3 k, v and down
    rank: int = 8  # r; for adalora the mean at the end
    alpha: float = 16.0  # B(A x) is scaled by alpha / r
    dropout: float = 0.0  # of the adapter's input, in training
    rslora: bool = False  # scale by alpha / √r instead (arXiv 2312.03732)
    ranks: dict[str, int] = field(default_factory=dict)  # pattern -> rank
    alphas: dict[str, float] = field(default_factory=dict)  # pattern -> alpha
    initial: float = 1.5  # adalora: ranks at the start / `rank`
    seed: int = 0

    def __post_init__(self):
        def require(condition, flag, value, message):
            if not condition:
                raise InputError(f"adapter's {flag} {value}: {message}")

        require(self.kind in TARGETS, "kind", self.kind, f"use one of {', '.join(TARGETS)}")
        for rank in (self.rank, *self.ranks.values()):
            require(rank == int(rank) and rank >= 1, "rank", rank, "use a whole number >= 1")
        for alpha in (self.alpha, *self.alphas.values()):
            require(0 < alpha < math.inf, "alpha", alpha, "use a number above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "use a number from 0 to below 1")
        message = "below 1 the budget would rise from start to end; use 1 or more"
        require(1 <= self.initial < math.inf, "initial ranks", self.initial, message)
        for pattern in (self.pattern, *self.ranks, *self.alphas):
            try:
                re.compile(pattern)
            except re.error as e:
                require(False, "pattern", repr(pattern), f"not a regular expression ({e})")

    @property
    def pattern(self) -> str:
        return self.targets or TARGETS[self.kind]

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """(r, s) of the adapter of one matrix."""
        rank = first_match(self.ranks, name, self.rank)
        alpha = first_match(self.alphas, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def first_match(patterns: dict, name: str, default):
    """The value of the first pattern that matches a part of the name."""
    return next((value for pattern, value in patterns.items() if re.search(pattern, name)), default)


# ---- matrices of a model -----------------------------------------------------------------------------------


def matrices(model: GPT) -> dict[str, nn.Module]:
    """{name: layer} of the matrices in the blocks, plain or adapted, in the order in which they act."""
    return {
        f"blocks.{i}.{name}": block.get_submodule(name)
        for i, block in enumerate(model.blocks)
        for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    }


def matching(names: list[str], pattern: str) -> list[str]:
    """The names in which the pattern is found. InputError with the most similar names if there are none."""
    matches = [name for name in names if re.search(pattern, name)]
    if matches:
        return matches
    literal = re.sub(r"\\[^.]|[^\w.]", "", pattern)  # the pattern without its operators

    def similarity(name):
        """The similarity of the pattern and the most similar ending of the name."""
        return max(difflib.SequenceMatcher(None, literal, name[i:]).ratio() for i in range(len(name)))

    nearest = sorted(names, key=similarity, reverse=True)[:3]
    raise InputError(
        f"adapter's pattern {pattern!r}: no matrix has such a name; the nearest are {', '.join(nearest)}"
    )


def is_adapted(model: GPT) -> bool:
    return isinstance(model.blocks[0].mlp, AdaptedMLP)


def attach(model: GPT, name: str, config: AdapterConfig):
    """Add an adapter at its start and freeze the base. Call it before `compile_blocks`.

    With dropout, activations are not recomputed: the second computation would drop other entries. InputError
    if the name or the config does not fit; then the model is unchanged.
    """
    is_reserved = hasattr(nn.ModuleDict(), name)  # the name becomes an attribute of a ModuleDict
    if not name or "." in name or is_reserved:
        message = "not a name for an adapter; choose a word without dots, such as wiki"
        raise InputError(f"adapter {name!r}: {message}")
    if is_adapted(model):
        raise InputError(f"adapter {name!r}: the model has one already; make a plain model of it first")
    layers = matrices(model)
    targets = matching(list(layers), config.pattern)
    for pattern in (*config.ranks, *config.alphas):
        matching(targets, pattern)
    generator = torch.Generator().manual_seed(config.seed)
    adapters = {target: make_adapter(config, target, layers[target], generator) for target in targets}

    model.requires_grad_(False)
    for target, layer in layers.items():
        adapter = adapters.get(target)
        if adapter is not None:
            weight = next(layer.parameters())
            adapter.to(weight.device, weight.dtype)
        parent, child = target.rsplit(".", 1)
        setattr(model.get_submodule(parent), child, AdaptedLinear(layer, name, adapter))
    for block in model.blocks:
        block.mlp.__class__ = AdaptedMLP
    if config.dropout:
        recompute.remove(model)
    model.adapter_configs = {name: config}


def make_adapter(config: AdapterConfig, name: str, layer, generator) -> LoRA | Triplets | IA3:
    """The adapter of one matrix, on the CPU, initialised. InputError if the rank does not fit."""
    in_features = layer.in_features
    out_features = layer.out_features
    with torch.device("cpu"):
        if config.kind == "ia3":
            return IA3(in_features, out_features, "in" if name.endswith(".down") else "out")
        rank, scale = config.rank_and_scale(name)
        largest = min(in_features, out_features)
        if rank > largest:
            raise InputError(
                f"adapter's rank {rank}: {name} is {out_features} x {in_features}; give 1 to {largest}"
            )
        if config.kind == "lora":
            adapter = LoRA(in_features, out_features, rank, scale, config.dropout)
        else:
            start = min(largest, math.ceil(config.initial * rank))
            adapter = Triplets(in_features, out_features, start, rank, scale, config.dropout)
        adapter.init(generator)
        return adapter


def adapters_of(model: GPT, name: str) -> dict[str, LoRA | Triplets | IA3]:
    """{matrix: its adapter}. InputError if the model has no adapter of this name."""
    attached = list(model.adapter_configs) if is_adapted(model) else []
    if name not in attached:
        raise InputError(f"adapter {name!r}: not attached; there are: {', '.join(attached) or 'none'}")
    layers = matrices(model).items()
    return {target: layer.adapter for target, layer in layers if layer.adapter is not None}


# ---- a plain model again -----------------------------------------------------------------------------------


def plain_model(model: GPT) -> GPT:
    """A plain, trainable GPT with the adapter inside its matrices; without an adapter the model itself.

    It shares no tensor with the model, and tied layers become copies. InputError if a base matrix has a
    nonlinearity between its factors, so that an update cannot be merged into it.
    """
    if not is_adapted(model):
        return model
    merged = {name: layer.merged() for name, layer in matrices(model).items()}
    base = base_state(model)
    state = {name: tensor for name, tensor in base.items() if name.rpartition(".")[0] not in merged}
    for name, layer in merged.items():
        state |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    ranks = {name: getattr(layer, "rank", 0) for name, layer in merged.items()}
    new = on_meta(with_changed_ranks(model.config, ranks))
    new.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return new


def with_changed_ranks(config: GPTConfig, ranks: dict[str, int]) -> GPTConfig:
    """A copy of the config with {name of a matrix in the blocks: rank}.

    A kind of matrix keeps its ranks unless one of its layers went from low to full rank or back.
    """
    config = copy.deepcopy(config)
    for matrix in MATRICES:
        layer_ranks = tuple(rank for name, rank in ranks.items() if name.endswith(f".{matrix}"))
        if any((config.rank(matrix, i) > 0) != (rank > 0) for i, rank in enumerate(layer_ranks)):
            config.matrix_ranks[matrix] = layer_ranks
    return config


# ---- checkpoints -------------------------------------------------------------------------------------------


def base_state(model: GPT) -> dict[str, torch.Tensor]:
    """The state_dict of the base alone, with the names that it has without an adapter."""
    return {
        name.replace(".base.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".adapters." not in name
    }


def base_hash(model: GPT) -> str:
    """SHA-256 over names, types, shapes and bytes of the base; attaching and training an adapter keep it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(model: GPT, name: str) -> dict:
    """An adapter's config, matrices and base, in types that JSON has."""
    return {
        **asdict(model.adapter_configs[name]),
        "base": base_hash(model),
        "matrices": list(adapters_of(model, name)),
    }


def adapter_state(model: GPT, name: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors by name, not copied."""
    return {
        f"{target}.{key}": tensor
        for target, adapter in adapters_of(model, name).items()
        for key, tensor in adapter.state_dict().items()
    }


@torch.no_grad()
def load_adapter_state(model: GPT, name: str, state: dict[str, torch.Tensor]):
    """Copy tensors of `adapter_state` into the attached adapter. InputError if names or shapes differ."""
    tensors = adapter_state(model, name)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    saved_shapes = {key: tensor.shape for key, tensor in state.items()}
    if shapes != saved_shapes:
        keys = shapes.keys() | saved_shapes.keys()
        differing = sorted(key for key in keys if shapes.get(key) != saved_shapes.get(key))
        raise InputError(
            f"adapter {name!r}: the tensors do not fit it: "
            f"{', '.join(differing[:3])} and {len(differing)} in all"
        )
    for key, tensor in tensors.items():
        tensor.copy_(state[key])


def attach_saved(model: GPT, name: str, description: dict, state: dict[str, torch.Tensor]):
    """Attach an adapter from its `describe` and `adapter_state`. InputError if it has another base."""
    model_hash = base_hash(model)
    saved_hash = str(description.get("base"))
    if saved_hash != model_hash:
        raise InputError(
            f"adapter {name!r}: made for another base (its hash is {saved_hash[:12]}, "
            f"this model's {model_hash[:12]}); give the checkpoint that it was trained on"
        )
    fields = AdapterConfig.__dataclass_fields__
    config = AdapterConfig(**{key: value for key, value in description.items() if key in fields})
    attach(model, name, config)
    load_adapter_state(model, name, state)
