"""Adapters: a finished GPT, frozen, with a few trained numbers beside its matrices: LoRA, AdaLoRA's triplets, IA3.

    attach(model, "wiki", AdapterConfig("lora", rank=8, alpha=16))    # the base is frozen, the adapter acts
    optimizer = AdamW(optimizer_groups(model, "wiki", lr=1e-3))       # of nanochat.optim; Muon hurts at such ranks
    use(model, None); use(model, "wiki")                              # the base to the bit; the adapter again
    save_adapter(path, model, "wiki"); load_adapter(path, model, "wiki")
    fold_in(model)                                                    # a plain GPT again, the adapter inside its matrices

An adapter belongs to matrices in the blocks (blocks.N.attn.{q,k,v,o}, blocks.N.mlp.{up,down}), which one regular expression chooses.
A LowRankLinear counts as one matrix, its product. The model file knows nothing of this: every matrix is wrapped in an
`AdaptedLinear`. The base's own products stay as they are, so without an adapter, and at an adapter's start, the logits are the base's to the bit.
The modules are in nanochat/adapters/layers.py; what AdaLoRA needs beyond its parameters (schedule, scores, export) in adalora.py.
"""

import copy
import difflib
import hashlib
import io
import math
import pickle
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn

from nanochat import recompute
from nanochat.adapters.layers import IA3, AdaptedLinear, AdaptedMLP, LoRA, Triplets
from nanochat.common import InputError
from nanochat.files import write_atomic
from nanochat.gpt import GPT, MATRICES, MLP
from nanochat.rank import on_meta

TARGETS = {
    "lora": r"attn\.[qkvo]$|mlp\.(up|down)$",
    "adalora": r"attn\.[qkvo]$|mlp\.(up|down)$",
    "ia3": r"attn\.[kv]$|mlp\.down$",
}


@dataclass
class AdapterConfig:
    """What an adapter is, but for its numbers. Patterns are regular expressions, searched for in names such as blocks.3.attn.q."""

    kind: str = "lora"  # lora, adalora or ia3
    targets: str = ""  # pattern of the adapted matrices; "" = all of them, or for ia3 k, v and down
    rank: int = 8  # r; of adalora the mean at the end
    alpha: float = 16.0  # what B(A x) is scaled by: alpha / r
    dropout: float = 0.0  # of the adapter's input, in training
    rslora: bool = False  # scale by alpha / √r instead (arXiv 2312.03732)
    ranks: dict[str, int] = field(
        default_factory=dict
    )  # pattern -> rank, the first that fits a name; else `rank`
    alphas: dict[str, float] = field(default_factory=dict)  # pattern -> alpha, likewise
    initial: float = 1.5  # adalora: ranks at the start, over `rank`
    seed: int = 0

    def __post_init__(self):
        def require(good, flag, value, what):
            if not good:
                raise InputError(f"adapter's {flag} {value}: {what}")

        require(self.kind in TARGETS, "kind", self.kind, f"use one of {', '.join(TARGETS)}")
        for rank in (self.rank, *self.ranks.values()):
            require(rank == int(rank) and rank >= 1, "rank", rank, "use a whole number >= 1")
        for alpha in (self.alpha, *self.alphas.values()):
            require(0 < alpha < math.inf, "alpha", alpha, "use a number above 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "use a number from 0 to below 1")
        require(
            1 <= self.initial < math.inf,
            "initial ranks",
            self.initial,
            "below 1 the budget would rise from start to end; use 1 or more",
        )
        for pattern in (self.pattern, *self.ranks, *self.alphas):
            try:
                re.compile(pattern)
            except re.error as e:
                require(False, "pattern", repr(pattern), f"not a regular expression ({e})")

    @property
    def pattern(self) -> str:
        return self.targets or TARGETS[self.kind]

    def shape(self, name: str) -> tuple[int, float]:
        """(rank, scale) of the adapter of one matrix."""
        rank = first_fit(self.ranks, name, self.rank)
        alpha = first_fit(self.alphas, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


def first_fit(patterns: dict, name: str, otherwise):
    return next((value for pattern, value in patterns.items() if re.search(pattern, name)), otherwise)


# ---- walking a model ------------------------------------------------------------------------------------------------


def matrices(model: GPT) -> dict[str, nn.Module]:
    """{name: layer} of the matrices in the blocks, plain or adapted, in the order in which they act."""
    return {
        f"blocks.{i}.{name}": block.get_submodule(name)
        for i, block in enumerate(model.blocks)
        for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    }


def matching(names, pattern: str) -> list[str]:
    """The names in which the regular expression is found. InputError with the nearest names if there is none."""
    found = [name for name in names if re.search(pattern, name)]
    if not found:
        wanted = re.sub(
            r"\\.|[^\w.]", lambda m: "." if m[0] == r"\." else "", pattern
        )  # the pattern without its operators
        near = sorted(
            names,
            key=lambda name: (
                -max(difflib.SequenceMatcher(None, wanted, name[i:]).ratio() for i in range(len(name)))
            ),
        )
        raise InputError(
            f"adapter's pattern {pattern!r}: no matrix has such a name; the nearest are {', '.join(near[:3])}"
        )
    return found


def put(model: GPT, name: str, layer):
    parent, child = name.rsplit(".", 1)
    setattr(model.get_submodule(parent), child, layer)


def wrapped(model: GPT) -> bool:
    return isinstance(model.blocks[0].mlp, AdaptedMLP)


def attach(model: GPT, name: str, config: AdapterConfig):
    """Add an adapter at its start and let it act; the base is frozen. Before `compile_blocks`.

    Several may be attached; each is drawn from its own seed. With dropout, recomputation is off: it would drop others.
    """
    if (
        not name or "." in name or hasattr(nn.ModuleDict(), name)
    ):  # its names share their place with a module's attributes
        raise InputError(
            f"adapter {name!r}: not a name for an adapter; choose a word without dots, such as wiki"
        )
    if wrapped(model) and name in model.adapter_configs:
        raise InputError(f"adapter {name!r}: there is one of this name already; choose another")
    names = list(matrices(model))
    targets = matching(names, config.pattern)
    for pattern in (*config.ranks, *config.alphas):
        matching(targets, pattern)
    generator = torch.Generator().manual_seed(config.seed)
    adapters = {
        target: make_adapter(config, target, matrices(model)[target], generator) for target in targets
    }

    if not wrapped(model):
        model.requires_grad_(False)
        for target, layer in matrices(model).items():
            put(model, target, AdaptedLinear(layer))
        for block in model.blocks:
            block.mlp.__class__ = AdaptedMLP
        model.adapter_configs = {}
    for target, layer in matrices(model).items():
        if target in adapters:
            like = next(layer.base.parameters())
            layer.adapters[name] = adapters[target].to(like.device, like.dtype)
    if config.dropout:
        recompute.remove(model)
    model.adapter_configs[name] = config
    use(model, name)


def make_adapter(config: AdapterConfig, name: str, layer, generator) -> LoRA | Triplets | IA3:
    """On the CPU, initialised. InputError if the rank does not fit."""
    with torch.device("cpu"):
        if config.kind == "ia3":
            return IA3(layer.in_features, layer.out_features, "in" if name.endswith(".down") else "out")
        rank, scale = config.shape(name)
        smaller = min(layer.in_features, layer.out_features)
        if rank > smaller:
            raise InputError(
                f"adapter's rank {rank}: {name} is {layer.out_features} x {layer.in_features}; give 1 to {smaller}"
            )
        if config.kind == "lora":
            adapter = LoRA(layer.in_features, layer.out_features, rank, scale, config.dropout)
        else:
            start = min(smaller, math.ceil(config.initial * rank))
            adapter = Triplets(layer.in_features, layer.out_features, start, rank, scale, config.dropout)
        adapter.init(generator)
        return adapter


def adapters_of(model: GPT, name: str) -> dict[str, LoRA | Triplets | IA3]:
    """{matrix: its adapter} of one adapter."""
    there = list(model.adapter_configs) if wrapped(model) else []
    if name not in there:
        raise InputError(f"adapter {name!r}: not attached; there are: {', '.join(there) or 'none'}")
    return {
        target: layer.adapters[name] for target, layer in matrices(model).items() if name in layer.adapters
    }


def use(model: GPT, name: str | None):
    """Let one adapter act; None: the base alone. What was merged is taken out."""
    if name is not None:
        adapters_of(model, name)
    for layer in matrices(model).values() if wrapped(model) else ():
        layer.active = name
        layer.merged = None


def merge(model: GPT):
    """Let the active adapter act from within the matrices: the base's speed. The base is kept apart, so that `unmerge` is exact."""
    layers = matrices(model).values() if wrapped(model) else ()
    folded = [
        (layer, layer.folded()) for layer in layers if layer.adapter is not None
    ]  # all, or none if one cannot be
    for layer, plain in folded:
        layer.merged = plain


def unmerge(model: GPT):
    for layer in matrices(model).values() if wrapped(model) else ():
        layer.merged = None


def remove(model: GPT):
    """The plain base again, to the bit, and trainable; its adapters are gone."""
    use(model, None)
    fold_in(model)


def fold_in(model: GPT):
    """A plain GPT again, and trainable, with the active adapter inside its matrices for good; its config has the ranks they now have."""
    if not wrapped(model):
        return
    plain = {name: layer.folded() for name, layer in matrices(model).items()}
    for name, layer in plain.items():
        put(model, name, layer)
    for block in model.blocks:
        block.mlp.__class__ = MLP
    del model.adapter_configs
    model.requires_grad_(True)
    model.config = config_of_layers(model)


def plain(model: GPT) -> GPT:
    """A plain GPT of its own, no tensor shared, with the active adapter inside its matrices; of a model without adapters that model itself."""
    if not wrapped(model):
        return model
    folded = copy.deepcopy(model)
    fold_in(folded)
    new = on_meta(folded.config)
    new.load_state_dict(
        {name: tensor.clone() for name, tensor in folded.state_dict().items()}, assign=True
    )  # tied layers become copies
    return new


def config_of_layers(model: GPT):
    """The model's config with the ranks of its matrices as they are."""
    config = copy.deepcopy(model.config)
    for matrix in MATRICES:
        ranks = tuple(
            getattr(layer, "rank", 0)
            for name, layer in matrices(model).items()
            if name.endswith(f".{matrix}")
        )
        if any((config.rank(matrix, i) > 0) != (rank > 0) for i, rank in enumerate(ranks)):
            config.matrix_ranks[matrix] = ranks
    return config


def optimizer_groups(model: GPT, name: str, lr: float, weight_decay: float = 0.0) -> list[dict]:
    """Groups for AdamW: one, of all that the adapter trains. Vectors (IA3's scales, AdaLoRA's λ) do not decay: a scale's rest is 1."""
    named = {
        f"{target}.{key}": p
        for target, adapter in adapters_of(model, name).items()
        for key, p in adapter.named_parameters()
    }
    groups = []
    for decay, chosen in (
        (weight_decay, {n: p for n, p in named.items() if p.ndim == 2}),
        (0.0, {n: p for n, p in named.items() if p.ndim < 2}),
    ):
        if chosen:
            groups.append(
                dict(
                    params=list(chosen.values()), names=list(chosen), lr=lr, initial_lr=lr, weight_decay=decay
                )
            )
    return groups


# ---- on disk --------------------------------------------------------------------------------------------------------


def base_state(model: GPT) -> dict[str, torch.Tensor]:
    """The state_dict of the base alone, under the names it has without adapters."""
    return {
        name.replace(".base.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".adapters." not in name and ".merged." not in name
    }


def base_hash(model: GPT) -> str:
    """SHA-256 over names, types, shapes and bytes of the base: attaching, training, switching and merging leave it as it is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(model: GPT, name: str) -> dict:
    """What an adapter is and which base it fits, as JSON has it."""
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
    """Copy tensors of `adapter_state` into an adapter that is attached. InputError if they are not of its names and shapes."""
    own = adapter_state(model, name)
    shapes, given = ({key: tuple(t.shape) for key, t in s.items()} for s in (own, state))
    if shapes != given:
        odd = sorted(key for key in shapes.keys() | given.keys() if shapes.get(key) != given.get(key))
        raise InputError(
            f"adapter {name!r}: the tensors do not fit it: {', '.join(odd[:3])} and {len(odd)} in all"
        )
    for key, tensor in own.items():
        tensor.copy_(state[key])


def attach_saved(model: GPT, name: str, description: dict, state: dict[str, torch.Tensor]):
    """Attach an adapter as `describe` and `adapter_state` gave it. InputError if it was made for another base."""
    found = base_hash(model)
    if description.get("base") != found:
        raise InputError(
            f"adapter {name!r}: made for another base (its hash is {str(description.get('base'))[:12]}, this model's {found[:12]}); "
            "give the checkpoint that it was trained on"
        )
    fields = AdapterConfig.__dataclass_fields__
    attach(model, name, AdapterConfig(**{key: value for key, value in description.items() if key in fields}))
    load_adapter_state(model, name, state)


def save_adapter(path: Path, model: GPT, name: str):
    """One file of the adapter's tensors and its description; nothing of the base."""
    content = io.BytesIO()
    torch.save({"description": describe(model, name), "tensors": adapter_state(model, name)}, content)
    write_atomic(Path(path), content.getvalue())


def load_adapter(path: Path, model: GPT, name: str) -> dict:
    """Attach what `save_adapter` wrote, and let it act; returns its description. Loading executes no code."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        description = saved["description"]
        tensors = saved["tensors"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        raise InputError(f"{path}: not an adapter, or damaged") from None
    attach_saved(model, name, description, tensors)
    return description
