"""Layer maps: which layer each position of a stack executes. Their texts, the named ones, and whole families of them.

A map is a tuple of layer numbers. Of two checkpoints A and B of n layers each, 0 to n - 1 are A's and n to 2n - 1 are B's; as text
`0,1,1,2`, `A:0,A:1,B:1,B:2`, or a name. What a model under a map is: `nanochat.factorize`, with_layer_map and with_copied_layers.
"""

import itertools
import math
import random
import re

from nanochat.common import InputError

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
