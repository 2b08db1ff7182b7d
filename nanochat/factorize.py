"""A finished model in another form: factors multiplied out, matrices cut down to factors by their singular values, layers in another order."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace

import torch
import torch.nn as nn

from nanochat.adapters import plain
from nanochat.common import InputError
from nanochat.gpt import GPT, MATRICES, GPTConfig, Linear, LowRankLinear
from nanochat.rank import on_meta


def linear_layers(model: GPT) -> dict[str, Linear | LowRankLinear]:
    """{name: layer}: blocks.0.attn.q, …, blocks.0.mlp.up, …, and lm_head unless it is tied."""
    return {
        name: layer for name, layer in model.named_modules() if isinstance(layer, (Linear, LowRankLinear))
    }


def block_matrix(matrix: str, layer: int) -> str:
    """The name of q, k, v, o, up or down of a layer."""
    return f"blocks.{layer}.{'mlp' if matrix in ('up', 'down') else 'attn'}.{matrix}"


def rank_of(layer: Linear | LowRankLinear) -> int:
    """0 = full."""
    return layer.rank if isinstance(layer, LowRankLinear) else 0


def product(layer: Linear | LowRankLinear) -> torch.Tensor:
    """The matrix that it applies, (out, in) float64, so that reduced-precision float32 matmuls (TF32) play no part."""
    return deepcopy(layer).double().dense_weight()


def check_linear(model: GPT):
    """ValueError if a layer has a nonlinearity between its factors: no matrix does what it does."""
    for name, layer in linear_layers(model).items():
        if rank_of(layer) and layer.act != "none":
            raise ValueError(
                f"{name} has {layer.act} between its factors, so their product is not what it applies"
            )


@torch.no_grad()
def merge(model: GPT) -> GPT:
    """The same function with every product BA as one matrix, and an adapter inside it. ValueError: see `check_linear`."""
    model = plain(model)
    check_linear(model)
    return rebuild(
        model, {name: (product(layer),) for name, layer in linear_layers(model).items() if rank_of(layer)}
    )


@torch.no_grad()
def truncate(model: GPT, choose: dict[str, Callable]) -> tuple[GPT, dict[str, float]]:
    """The nearest model of lower rank, matrix by matrix (Eckart-Young), with balanced factors: W = U S Vᵀ, B = U √S, A = √S Vᵀ.

    choose: {name of a layer: function from its singular values, largest first, to a rank}. A layer stays as it is where the factors
    would have no fewer parameters than it has, or be all zeros, which could never learn.
    Returns (model, {name of a layer cut: share of its energy Σ S² that is kept}). ValueError: see `check_linear`.
    """
    check_linear(model)
    layers = linear_layers(model)
    factors = {}
    kept = {}
    for name, rank_from in choose.items():
        layer = layers[name]
        U, S, Vt = torch.linalg.svd(
            product(layer), full_matrices=False
        )  # (out, m), (m,), (m, in); m = min(in, out)
        r = rank_from(S)
        if S[0] > 0 and r * (layer.in_features + layer.out_features) < sum(
            p.numel() for p in layer.parameters()
        ):
            root = S[:r].sqrt()
            energy = S.square()
            factors[name] = (root[:, None] * Vt[:r], U[:, :r] * root)  # A: (r, in), B: (out, r)
            kept[name] = (energy[:r].sum() / energy.sum()).item()
    return rebuild(model, factors), kept


def rank_of_energy(energy: float, S: torch.Tensor) -> int:
    """The smallest rank whose singular values have at least this share of Σ S². energy: in (0, 1)."""
    sums = S.square().cumsum(0)
    return int((sums < energy * sums[-1]).sum()) + 1


def rebuild(model: GPT, weights: dict[str, tuple[torch.Tensor, ...]]) -> GPT:
    """The model with other weights in some of its linear layers, {name: (W,) or (A, B)}; all others are shared with it."""
    ranks = {name: rank_of(layer) for name, layer in linear_layers(model).items()}
    ranks |= {name: 0 if len(parts) == 1 else len(parts[0]) for name, parts in weights.items()}
    state = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in weights}
    for name, parts in weights.items():
        keys = ("weight",) if len(parts) == 1 else ("A", "B")
        state |= {
            f"{name}.{key}": part.to(model.wte.weight.dtype).contiguous() for key, part in zip(keys, parts)
        }
    new = on_meta(with_layer_ranks(model.config, ranks))
    new.load_state_dict(state, assign=True)
    return new


# ---- layers in another order, or more than once ---------------------------------------------------------------------


def first_place(model: GPT, layer: int) -> int:
    """The first position that executes a layer: its scalars are those that the layer has under another map. InputError if there is none."""
    if layer not in model.config.positions:
        raise InputError(
            f"layer map: layer {layer} is at none of the model's positions, so it has no scalars; there are: "
            f"{', '.join(map(str, sorted(set(model.config.positions))))}"
        )
    return model.config.positions.index(layer)


def with_layer_map(model: GPT, layers: tuple[int, ...]) -> GPT:
    """The model that executes these of its layers, in this order, and shares its weights with them; scalars of a position are those that
    its layer had where it first stood. No training in between.
    """
    first = [first_place(model, layer) for layer in layers]
    new = deepcopy(
        model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    )  # adapters included
    new.config = replace(model.config, layer_map=tuple(layers))
    new.compiled = False
    for name in ("resid_lambdas", "x0_lambdas"):
        setattr(new, name, scalars_of(name, [(model, place) for place in first]))
    return new


def with_copied_layers(model: GPT, layers: tuple[int, ...], second: GPT | None = None) -> GPT:
    """A model of len(layers) layers of its own, each a copy: the same function as `with_layer_map`, to the bit.

    With n layers in each model, numbers from n on are the layers of the second (`nanochat.layer_maps`); everything outside the layers is
    the first model's. Ranks, windows, value tables and adapters are those of the layer copied. InputError: models of unlike shape.
    """
    n = model.config.n_layer
    both = (model, second)
    if max(layers) >= n:
        if second is None:
            raise InputError("layer map: takes layers of a second model, and there is none")
        check_same_shape(model.config, second.config)
    return copies(
        model, [(both[layer // n], layer % n, first_place(both[layer // n], layer % n)) for layer in layers]
    )


def copied_out(model: GPT) -> GPT:
    """The model without a layer map: each of its positions a layer of its own, the same function to the bit."""
    return copies(model, [(model, layer, place) for place, layer in enumerate(model.config.positions)])


def copies(model: GPT, origins: list[tuple[GPT, int, int]]) -> GPT:
    """The model with copies of these for its layers. origins: (model, layer, position whose scalars it gets)."""
    config = model.config
    layers = [layer for _, layer, _ in origins]

    def of_layers(ranks):
        return tuple(ranks[layer] for layer in layers) if ranks else ()

    own = replace(
        config,
        n_layer=len(layers),
        layer_map=(),
        layer_kinds=(),
        attn_ranks=of_layers(config.attn_ranks),
        mlp_ranks=of_layers(config.mlp_ranks),
        matrix_ranks={name: of_layers(ranks) for name, ranks in config.matrix_ranks.items()},
    )
    kinds = tuple(config.kind(layer) for layer in layers)
    if kinds != tuple(own.kind(layer) for layer in range(own.n_layer)):
        own = replace(own, layer_kinds=kinds)
    new = deepcopy(model)
    new.config = own
    new.compiled = False
    new.blocks = nn.ModuleList(deepcopy(source.blocks[layer]) for source, layer, _ in origins)
    new.value_embeds = nn.ModuleDict(
        {
            str(i): deepcopy(source.value_embeds[str(layer)])
            for i, (source, layer, _) in enumerate(origins)
            if own.has_value_embedding(i)
        }
    )
    for name in ("resid_lambdas", "x0_lambdas"):
        setattr(new, name, scalars_of(name, [(source, place) for source, _, place in origins]))
    return new


def scalars_of(name: str, places: list[tuple[GPT, int]]) -> nn.Parameter:
    """resid_lambdas or x0_lambdas, of positions of models. (On the meta device torch.stack and cat would load torch's compiler.)"""
    like = getattr(places[0][0], name)
    scalars = torch.empty(len(places), dtype=like.dtype, device=like.device)
    for i, (model, place) in enumerate(places):
        scalars[i : i + 1].copy_(getattr(model, name).detach()[place : place + 1])
    return nn.Parameter(scalars, like.requires_grad)


def stacked(base: GPT, second: GPT | None = None, *, layers: tuple[int, ...] = (), tied: bool = True) -> GPT:
    """The base with a module of its own at each position of a map (() = its own positions), so that each position can be adapted by
    itself. tied: positions that execute one layer share its weights, as in `with_layer_map`; else each has a copy. Same function, to the bit.
    """
    positions = layers or base.config.positions
    if second is None and positions == tuple(range(base.config.n_layer)) and not base.config.layer_map:
        return base
    model = with_copied_layers(base, layers, second) if layers else copied_out(base)
    if tied:
        for i, layer in enumerate(positions):
            share(model.blocks[i], base.blocks[layer])
            if str(i) in model.value_embeds:
                share(model.value_embeds[str(i)], base.value_embeds[str(layer)])
    return model


def share(module: nn.Module, source: nn.Module):
    """Let a copy of a module hold the very parameters of the other."""
    for name, parameter in source.named_parameters():
        owner, _, key = name.rpartition(".")
        setattr(module.get_submodule(owner), key, parameter)


def shapes_of_weights(config: GPTConfig) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in on_meta(config).named_parameters()}


def check_same_shape(config: GPTConfig, second: GPTConfig, name: str = "second model"):
    """InputError, beginning with the name, unless layers of one fit into the other as they are."""
    here, there = (
        json.loads(json.dumps(asdict(c))) for c in (config, second)
    )  # a config read from a file has lists for tuples
    alike = {"layer_map", "recompute"}
    if shapes_of_weights(config) == shapes_of_weights(replace(config, rank_multiple=second.rank_multiple)):
        alike.add("rank_multiple")
    differing = [key for key in here if there[key] != here[key] and key not in alike]
    if unlike := [f"{key} ({there[key]} there, {here[key]} here)" for key in differing]:
        raise InputError(
            f"{name}: of another shape than the first, so their layers do not go together: {', '.join(unlike)}"
        )


def with_layer_ranks(config: GPTConfig, ranks: dict[str, int]) -> GPTConfig:
    """The config of a model with these ranks, {name as in `linear_layers`: rank}, and nothing between the factors.

    attn_ranks and mlp_ranks where all matrices of the group have one rank in all layers, else matrix_ranks.
    """
    groups = {"attn_ranks": (), "mlp_ranks": ()}
    single = {}
    for group, matrices in (("attn_ranks", MATRICES[:4]), ("mlp_ranks", MATRICES[4:])):
        own = {
            matrix: tuple(ranks[block_matrix(matrix, layer)] for layer in range(config.n_layer))
            for matrix in matrices
        }
        distinct = set().union(*own.values())
        if len(distinct) > 1:
            single |= own
        elif any(distinct):
            groups[group] = own[matrices[0]]
    return replace(
        config, **groups, matrix_ranks=single, lm_head_rank=ranks.get("lm_head", 0), factor_act="none"
    )
