"""Layer maps: which layer each position of a stack executes. Their texts, the named ones, and whole families of them.

A map is a tuple of layer numbers. Of two checkpoints A and B of n layers each, 0 to n - 1 are A's and n to 2n - 1 are B's; as text
`0,1,1,2`, `A:0,A:1,B:1,B:2`, or a name. What a model under a map is: `with_layer_map` and `with_copied_layers`.
"""

import itertools
import json
import math
import random
import re
from copy import deepcopy
from dataclasses import asdict, replace

import torch
import torch.nn as nn

from nanochat.common import InputError
from nanochat.gpt import GPT, GPTConfig
from nanochat.rank import on_meta

FORM = "give the layer at each position, such as 0,0,1,1 (or A:0,B:0 of two checkpoints), or one of solar, goliath, mobilellm"


# ---- named maps, for any number of layers ---------------------------------------------------------------------------


def solar(n: int) -> tuple[int, ...]:
    """The first n - m layers, then the last n - m, with m = n / 4: 32 -> 48 layers in Depth Up-Scaling (arXiv 2312.15166)."""
    m = round(n / 4)
    return (*range(n - m), *range(m, n))


def goliath(n: int) -> tuple[int, ...]:
    """Slices of A and B in turn: of 2h layers, h = n / 10, each beginning h layers after the one before it.

    As in Goliath-120B (huggingface.co/alpindale/goliath-120b), which made 137 layers of two times 80. There the slices from the third
    on lack their first layer; here their first n / 80 layers.
    """
    h = max(1, round(n / 10))
    less = round(n / 80)
    starts = range(0, max(1, n - h), h)
    return tuple(
        n * (i % 2) + layer
        for i, start in enumerate(starts)
        for layer in range(start + less * (i > 1), min(start + 2 * h, n))
    )


def mobilellm(n: int) -> tuple[int, ...]:
    """Each layer twice in a row (MobileLLM, arXiv 2402.14905)."""
    return tuple(layer for layer in range(n) for _ in range(2))


NAMED = {"solar": solar, "goliath": goliath, "mobilellm": mobilellm}


# ---- texts ----------------------------------------------------------------------------------------------------------


def well_formed(text: str) -> bool:
    """Whether this is the text of a map, for some number of layers."""
    entry = r"([AB]:)?[0-9]{1,9}"
    return text in NAMED or re.fullmatch(f"{entry}(,{entry})*", text) is not None


def of_two(text: str) -> bool:
    """Whether the text speaks of two checkpoints."""
    return text == "goliath" or ":" in text


def parse_map(text: str, layers: int, flag: str = "--layer-map") -> tuple[int, ...]:
    """The map that a text is for models of so many layers. InputError: no map, or a layer that is not there."""
    if not well_formed(text):
        raise InputError(f"{flag} {text}: {FORM}")
    if text in NAMED:
        return NAMED[text](layers)
    entries = [(entry.startswith("B"), int(entry.lstrip("AB:"))) for entry in text.split(",")]
    if absent := [layer for _, layer in entries if layer >= layers]:
        raise InputError(f"{flag} {text}: there is no layer {absent[0]}, the layers are 0 to {layers - 1}")
    return tuple(layers * of_b + layer for of_b, layer in entries)


def map_text(layer_map: tuple[int, ...], layers: int) -> str:
    """The text that `parse_map` reads: with A: and B: only where a layer is B's."""
    if max(layer_map) < layers:
        return ",".join(map(str, layer_map))
    return ",".join(f"{'AB'[layer // layers]}:{layer % layers}" for layer in layer_map)


# ---- families -------------------------------------------------------------------------------------------------------


def monotone(layers: int, positions: int) -> list[tuple[int, ...]]:
    """Every map that takes the layers in order, each at least once in a row: (positions - 1 over layers - 1) of them."""
    cuts = itertools.combinations(range(1, positions), layers - 1)  # where the next layer begins
    return [tuple(sum(place >= cut for cut in at) for place in range(positions)) for at in cuts]


def drawn(layers: int, positions: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Distinct random maps that are not monotone, any layer at any position."""
    rng = random.Random(seed)
    maps = []
    possible = layers**positions - math.comb(layers + positions - 1, positions)  # all but those in order
    while len(maps) < min(count, possible):
        one = tuple(rng.choices(range(layers), k=positions))
        if list(one) != sorted(one) and one not in maps:
            maps.append(one)
    return maps


# ---- models under a map --------------------------------------------------------------------------------------


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
    for name in ("resid_lambdas", "x0_lambdas"):
        setattr(new, name, scalars_of(name, [(model, place) for place in first]))
    return new


def with_copied_layers(model: GPT, layers: tuple[int, ...], second: GPT | None = None) -> GPT:
    """A model of len(layers) layers of its own, each a copy: the same function as `with_layer_map`, to the bit.

    With n layers in each model, numbers from n on are the layers of the second (`nanochat.layer_maps`); everything outside the layers is
    the first model's. Ranks, windows, value tables and adapters are those of the layer copied. InputError: models of unlike shape.
    """
    n = model.config.n_layer
    models = [model] if second is None else [model, second]
    if max(layers) >= n:
        if second is None:
            raise InputError("layer map: takes layers of a second model, and there is none")
        check_same_shape(model.config, second.config)
    return copies(
        model,
        [(models[layer // n], layer % n, first_place(models[layer // n], layer % n)) for layer in layers],
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
