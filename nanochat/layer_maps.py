"""Layer maps: which layer each position of a stack executes.

A map is a tuple of layer numbers. Of two checkpoints A and B of n layers each, 0 to n - 1 are A's layers and
n to 2n - 1 are B's. As text it is `0,1,1,2`, `A:0,A:1,B:1,B:2`, or a name. First come texts, named maps and
families of maps; then models under a map: `with_layer_map` (shared weights), `with_copied_layers` (copies)
and `stacked`.
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

from nanochat.accounting import on_meta
from nanochat.errors import InputError
from nanochat.gpt import GPT, GPTConfig

MAP_FORMAT = (
    "give the layer at each position, such as 0,0,1,1 (or A:0,B:0 of two checkpoints), "
    "or one of solar, goliath, mobilellm"
)


# ---- named maps, for any number of layers ------------------------------------------------------------------


def solar(n: int) -> tuple[int, ...]:
    """The first n - m layers, then the last n - m, with m = n / 4: 32 -> 48 layers.

    Depth Up-Scaling (arXiv 2312.15166).
    """
    m = round(n / 4)
    return (*range(n - m), *range(m, n))


def goliath(n: int) -> tuple[int, ...]:
    """Slices of A and B in turn: of 2h layers, h = n / 10, each beginning h layers after the one before it.

    As in Goliath-120B (huggingface.co/alpindale/goliath-120b), which made 137 layers of two times 80. There
    the slices from the third on lack their first layer; here their first n / 80 layers.
    """
    h = max(1, round(n / 10))
    layers = []
    for i, start in enumerate(range(0, max(1, n - h), h)):
        first = start + round(n / 80) if i > 1 else start
        offset = n if i % 2 else 0  # B's turn
        layers += range(offset + first, offset + min(start + 2 * h, n))
    return tuple(layers)


def mobilellm(n: int) -> tuple[int, ...]:
    """Each layer twice in a row (MobileLLM, arXiv 2402.14905)."""
    return tuple(layer for layer in range(n) for _ in range(2))


NAMED_MAPS = {"solar": solar, "goliath": goliath, "mobilellm": mobilellm}


# ---- texts -------------------------------------------------------------------------------------------------


def well_formed(text: str) -> bool:
    """Whether this is the text of a map, for some number of layers."""
    entry = r"([AB]:)?[0-9]{1,9}"
    return text in NAMED_MAPS or re.fullmatch(f"{entry}(,{entry})*", text) is not None


def takes_two_runs(text: str) -> bool:
    """Whether the map takes layers of two checkpoints."""
    return text == "goliath" or ":" in text


def parse_map(text: str, layers: int, flag: str = "--layer-map") -> tuple[int, ...]:
    """The map of a text, for models of so many layers. InputError for wrong texts and layers."""
    if not well_formed(text):
        raise InputError(f"{flag} {text}: {MAP_FORMAT}")
    if text in NAMED_MAPS:
        return NAMED_MAPS[text](layers)
    layer_map = []
    for entry in text.split(","):
        layer = int(entry.lstrip("AB:"))
        if layer >= layers:
            raise InputError(f"{flag} {text}: there is no layer {layer}, the layers are 0 to {layers - 1}")
        layer_map.append(layers + layer if entry.startswith("B") else layer)
    return tuple(layer_map)


def map_text(layer_map: tuple[int, ...], layers: int) -> str:
    """The text that `parse_map` reads, with A: and B: only where a layer is B's."""
    if max(layer_map) < layers:
        return ",".join(map(str, layer_map))
    return ",".join(f"{'AB'[layer // layers]}:{layer % layers}" for layer in layer_map)


# ---- families ----------------------------------------------------------------------------------------------


def monotone_maps(layers: int, positions: int) -> list[tuple[int, ...]]:
    """Every map that takes the layers in order, each at least once: (positions - 1 over layers - 1)."""
    maps = []
    for starts in itertools.combinations(range(1, positions), layers - 1):  # where the next layer begins
        ends = (*starts, positions)
        repeats = [end - start for start, end in zip((0, *starts), ends)]
        maps.append(tuple(layer for layer, count in enumerate(repeats) for _ in range(count)))
    return maps


def random_maps(layers: int, positions: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Distinct random maps that are not monotone, any layer at any position."""
    rng = random.Random(seed)
    maps = []
    possible = layers**positions - math.comb(layers + positions - 1, positions)  # all but those in order
    while len(maps) < min(count, possible):
        layer_map = tuple(rng.choices(range(layers), k=positions))
        if list(layer_map) != sorted(layer_map) and layer_map not in maps:
            maps.append(layer_map)
    return maps


# ---- models under a map ------------------------------------------------------------------------------------


def first_position(model: GPT, layer: int) -> int:
    """The first position that executes a layer; under another map the layer keeps that position's scalars.

    InputError if no position executes it.
    """
    if layer not in model.config.positions:
        executed = ", ".join(map(str, sorted(set(model.config.positions))))
        raise InputError(
            f"layer map: layer {layer} is at none of the model's positions, so it has no scalars; "
            f"there are: {executed}"
        )
    return model.config.positions.index(layer)


def with_layer_map(model: GPT, layers: tuple[int, ...]) -> GPT:
    """The model that executes these of its layers, in this order, and shares its weights with them.

    The scalars of a position are those that its layer had where it first stood. Nothing is trained.
    """
    first = [first_position(model, layer) for layer in layers]
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}  # adapters included
    new = deepcopy(model, shared)
    new.config = replace(model.config, layer_map=tuple(layers))
    for name in ("resid_lambdas", "x0_lambdas"):
        setattr(new, name, position_scalars(name, [(model, position) for position in first]))
    return new


def with_copied_layers(model: GPT, layers: tuple[int, ...], second: GPT | None = None) -> GPT:
    """A model whose layers are copies of these: the same function as `with_layer_map`, to the bit.

    With n layers in each model, numbers from n on are the second model's layers; everything outside the
    layers is the first's. Ranks, windows, value tables and adapters are those of the layer copied. InputError
    for models of different shapes.
    """
    n = model.config.n_layer
    models = [model] if second is None else [model, second]
    if max(layers) >= n:
        if second is None:
            raise InputError("layer map: takes layers of a second model, and there is none")
        check_same_shape(model.config, second.config)
    origins = []
    for entry in layers:
        source = models[entry // n]
        layer = entry % n
        origins.append((source, layer, first_position(source, layer)))
    return copies(model, origins)


def without_layer_map(model: GPT) -> GPT:
    """The model without a layer map: a layer for each position, the same function to the bit."""
    return copies(model, [(model, layer, position) for position, layer in enumerate(model.config.positions)])


def copies(model: GPT, origins: list[tuple[GPT, int, int]]) -> GPT:
    """The model with copies of layers. origins: (model, layer, position whose scalars the copy gets)."""
    config = model.config
    layers = [layer for _, layer, _ in origins]

    def copied_ranks(ranks):
        return tuple(ranks[layer] for layer in layers) if ranks else ()

    new_config = replace(
        config,
        n_layer=len(layers),
        layer_map=(),
        layer_kinds=(),
        attn_ranks=copied_ranks(config.attn_ranks),
        mlp_ranks=copied_ranks(config.mlp_ranks),
        matrix_ranks={name: copied_ranks(ranks) for name, ranks in config.matrix_ranks.items()},
    )
    kinds = tuple(config.kind(layer) for layer in layers)
    if kinds != tuple(new_config.kind(layer) for layer in range(new_config.n_layer)):
        new_config = replace(new_config, layer_kinds=kinds)
    new = deepcopy(model)
    new.config = new_config
    new.blocks = nn.ModuleList(deepcopy(source.blocks[layer]) for source, layer, _ in origins)
    new.value_embeds = nn.ModuleDict()
    for i, (source, layer, _) in enumerate(origins):
        if new_config.has_value_embedding(i):
            new.value_embeds[str(i)] = deepcopy(source.value_embeds[str(layer)])
    for name in ("resid_lambdas", "x0_lambdas"):
        setattr(new, name, position_scalars(name, [(source, position) for source, _, position in origins]))
    return new


def position_scalars(name: str, positions: list[tuple[GPT, int]]) -> nn.Parameter:
    """resid_lambdas or x0_lambdas with one entry for each (model, position).

    Entry by entry: on the meta device torch.stack and cat would load torch's compiler.
    """
    example = getattr(positions[0][0], name)
    scalars = torch.empty(len(positions), dtype=example.dtype, device=example.device)
    for i, (model, position) in enumerate(positions):
        scalars[i : i + 1].copy_(getattr(model, name).detach()[position : position + 1])
    return nn.Parameter(scalars, example.requires_grad)


def stacked(base: GPT, second: GPT | None = None, *, layers: tuple[int, ...] = (), tied: bool = True) -> GPT:
    """The base with a module at each position of a map, so that each position can have its adapter.

    layers: the map; () = the base's own positions. tied: positions that execute one layer share its weights,
    as in `with_layer_map`; else each has a copy. The same function, to the bit.
    """
    positions = layers or base.config.positions
    if second is None and positions == tuple(range(base.config.n_layer)) and not base.config.layer_map:
        return base
    model = with_copied_layers(base, layers, second) if layers else without_layer_map(base)
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


def weight_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in on_meta(config).named_parameters()}


def check_same_shape(config: GPTConfig, second: GPTConfig, name: str = "second model"):
    """InputError, beginning with the name, unless layers of one fit into the other as they are."""
    first_fields = json_form(config)
    second_fields = json_form(second)
    ignored = {"layer_map", "recompute"}
    if weight_shapes(config) == weight_shapes(replace(config, rank_multiple=second.rank_multiple)):
        ignored.add("rank_multiple")
    differing = [
        f"{key} ({second_fields[key]} there, {value} here)"
        for key, value in first_fields.items()
        if second_fields[key] != value and key not in ignored
    ]
    if differing:
        raise InputError(
            f"{name}: of another shape than the first, so their layers do not go together: "
            f"{', '.join(differing)}"
        )


def json_form(config: GPTConfig) -> dict:
    """The config as JSON has it: one read from a file has lists for tuples."""
    return json.loads(json.dumps(asdict(config)))
