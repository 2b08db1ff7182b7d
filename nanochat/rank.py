"""Ranks over depth, budgets, and the accounting of what a model costs: parameters, FLOPs, bytes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import Any

import torch
import torch.nn as nn

from nanochat.config import MATRICES
from nanochat.cpu import by_blocks, tile_rows
from nanochat.gpt import GPT, GPTConfig, LowRankLinear
from nanochat.ops import rows_at_once
from nanochat.optim import uses_muon
from nanochat.whole_ranks import AUTOMATIC, rank_step, resolve_rank

# ---- schedules -------------------------------------------------------------------------------------------


def ranks_over_depth(schedule: str, start: float, end: float, depth: int) -> tuple[float, ...]:
    """The rank of each layer, first to last. schedule: one of flag_types.SCHEDULES.

    With t from 0 at the first layer to 1 at the last:

    constant     start everywhere
    linear       start + (end - start)·t
    step         start in the first half of the layers, end in the second
    exponential  start·(end/start)^t
    quadratic    start in the middle, end at both ends: start - (start - end)·(2t - 1)²

    Integer ranks are rounded; if start and end are fractions (of min(in, out)) so are the results.
    """
    ranks = [rank_at(schedule, start, end, layer / max(1, depth - 1)) for layer in range(depth)]
    return tuple(ranks) if 0 < start < 1 else tuple(round(rank) for rank in ranks)


def rank_at(schedule: str, start: float, end: float, t: float) -> float:
    if schedule == "constant":
        return start
    if schedule == "linear":
        return start + (end - start) * t
    if schedule == "step":
        return start if t <= 0.5 else end
    if schedule == "exponential":
        return start * (end / start) ** t if start > 0 and end > 0 else 0
    return start - (start - end) * (2 * t - 1) ** 2  # quadratic


# ---- budgets ---------------------------------------------------------------------------------------------


def count_parameters(config: GPTConfig) -> int:
    return account(config)["params/total"]


GROUPS = {"attn_ranks": MATRICES[:4], "mlp_ranks": MATRICES[4:]}  # field of GPTConfig -> its matrices


def matrices_by_field(config: GPTConfig, group: str) -> dict[str, tuple[str, ...]]:
    """{field that gives ranks: its matrices} of a group: the group, and each matrix named in matrix_ranks."""
    named = [matrix for matrix in GROUPS[group] if config.matrix_ranks.get(matrix)]
    others = tuple(matrix for matrix in GROUPS[group] if matrix not in named)
    fields = {group: others} if others else {}
    return fields | {matrix: (matrix,) for matrix in named}


def ranks_of_field(config: GPTConfig, field: str) -> tuple[float, ...]:
    """One rank a layer, as given; () = full. field: attn_ranks, mlp_ranks, or a matrix of matrix_ranks."""
    return getattr(config, field) if field in GROUPS else config.matrix_ranks[field]


@dataclass
class Level:
    """Matrices of a group (attention or MLP) that are given the same rank: they keep equal ranks.

    Ranks are counted in steps from 1 to `largest`. A step is `unit` ranks; where fractions mean another rank
    for each matrix, it is the fraction 1 / (largest + 1), which is one rank of the largest.
    """

    group: str
    places: list[tuple[str, int]]  # (field that gives the rank, layer)
    shapes: Counter[tuple[int, int]]  # (in, out) of its matrices, counted
    wanted: float  # steps, before scaling
    largest: int
    unit: int  # 0 where a step is a fraction
    multiple: int  # of fractions: see `resolve_rank`

    def rank(self, steps: int) -> float:
        return self.unit * steps if self.unit else steps / (self.largest + 1)

    def parameters(self, steps: int) -> int:
        rank = self.rank(steps)
        total = 0
        for shape, count in self.shapes.items():
            total += count * resolve_rank(rank, *shape, self.multiple) * sum(shape)
        return total


def rank_levels(config: GPTConfig) -> list[Level]:
    """The levels of each factored group, lowest first.

    If nothing is factored, then all matrices that are not named in matrix_ranks are, at their largest rank.
    """
    levels = []
    for group in GROUPS:
        levels += levels_of_group(config, group)
    if levels:
        return levels
    for group in GROUPS:
        if matrices := matrices_by_field(config, group).get(group):
            largest = min(min(config.matrix_shape(matrix)) for matrix in matrices)
            ranks: dict[str, Any] = {group: (largest,) * config.n_layer}
            factored = replace(config, **ranks)
            levels += levels_of_group(factored, group, given_by_user=False)
    return levels


def levels_of_group(config: GPTConfig, group: str, given_by_user: bool = True) -> list[Level]:
    """given_by_user: whether somebody asked for these ranks; whole numbers then allow any whole number."""
    fields = matrices_by_field(config, group)
    given = []
    for field in fields:
        given += [(field, layer, rank) for layer, rank in enumerate(ranks_of_field(config, field)) if rank]
    if not given:
        return []
    sides = {}  # field -> the smaller side of each of its matrices
    for field, _, _ in given:
        sides[field] = [min(config.matrix_shape(matrix)) for matrix in fields[field]]
    distinct = set(chain.from_iterable(sides.values()))
    largest_side = max(distinct)
    fractions = all(rank < 1 for _, _, rank in given)
    stay_fractions = fractions and len(distinct) > 1  # the same fraction is another rank for each matrix
    unit = step_under_budget(config.rank_multiple, min(distinct))
    if given_by_user and not fractions:
        unit = 1

    places_by_rank = {}  # wanted rank; of the largest side where fractions stay fractions
    for field, layer, rank in given:
        side = largest_side if stay_fractions else min(sides[field])
        wanted = rank * side if rank < 1 else rank
        places_by_rank.setdefault(wanted, []).append((field, layer))
    levels = []
    for wanted, places in sorted(places_by_rank.items()):
        shapes = Counter()
        for field, _ in places:
            shapes.update(config.matrix_shape(matrix) for matrix in fields[field])
        if stay_fractions:
            levels.append(Level(group, places, shapes, wanted, largest_side - 1, 0, config.rank_multiple))
        else:
            largest = min(map(min, shapes)) // unit
            levels.append(Level(group, places, shapes, wanted / unit, largest, unit, config.rank_multiple))
    return levels


def step_under_budget(multiple: int, smaller: int) -> int:
    """What solved ranks are multiples of: as `rank_step`, but automatically at most 8.

    With 64, a step in 40 layers of width 1280 is 2% of d20's parameters, which a report does not call equal.
    """
    step = rank_step(multiple, smaller)
    return min(step, 8) if multiple == AUTOMATIC else step


def with_ranks(config: GPTConfig, levels: list[Level], steps: list[int]) -> GPTConfig:
    """The config in which each level has the rank of so many steps."""
    ranks: dict[str, list[float]] = {}  # field -> one rank a layer
    for level, count in zip(levels, steps):
        for field, layer in level.places:
            ranks.setdefault(field, [0] * config.n_layer)[layer] = level.rank(count)
    groups: dict[str, Any] = {field: tuple(values) for field, values in ranks.items() if field in GROUPS}
    single = {field: tuple(values) for field, values in ranks.items() if field not in GROUPS}
    return replace(config, **groups, matrix_ranks=config.matrix_ranks | single)


def solve_rank(config: GPTConfig, budget: int) -> GPTConfig:
    """Scale the ranks of attention and MLP: as many parameters as possible, but at most `budget`.

    All ranks grow from 1 by one common factor, rounded. Where the next rank of some layers costs too much,
    the others go on with what is left. At the end no rank can grow without breaking the budget or the shape:
    matrices of a group that were given equal ranks keep equal ranks, and none passes one that was given more.

    A group at full rank stays so, unless all are: then all are factored. So does a matrix that `matrix_ranks`
    has at 0; one that it gives a rank is scaled as the others. The head stays as it is. Fractions become
    whole ranks, in steps of `step_under_budget`. Where the same fraction is another rank for each matrix, as
    under grouped queries for q and k, they stay fractions.

    ValueError if even the smallest ranks are over the budget.
    """
    levels = rank_levels(config)
    if not levels:
        raise ValueError("no matrix is left whose rank could be chosen")
    steps = [1] * len(levels)
    least = count_parameters(with_ranks(config, levels, steps))
    if least > budget:
        smallest = max(1, *(level.unit for level in levels))
        raise ValueError(f"even rank {smallest} in every layer has {least:,} parameters")
    spare = budget - least
    # (the common factor at which a level's rank rounds to its next step, the level)
    queue = [(1.5 / level.wanted, i) for i, level in enumerate(levels)]
    heapify(queue)
    while queue:
        _, i = heappop(queue)
        level = levels[i]
        larger = steps[i] + 1
        has_level_above = i + 1 < len(levels) and levels[i + 1].group == level.group
        if larger > level.largest or (has_level_above and larger > steps[i + 1]):
            continue
        price = level.parameters(larger) - level.parameters(steps[i])
        if price > spare:
            continue  # for good: what is spare only shrinks
        steps[i] = larger
        spare -= price
        heappush(queue, ((larger + 0.5) / level.wanted, i))
    return with_ranks(config, levels, steps)


def solve_depth(config_at: Callable[[int], GPTConfig], budget: int) -> GPTConfig:
    """The deepest config_at(depth) with at most `budget` parameters. ValueError if the shallowest has more.

    config_at(depth) never has fewer parameters at a greater depth, with one exception: where its width grows
    with the depth, a fraction may become another multiple at the next width, and lose a third of its rank.
    """
    shallowest = config_at(1)
    least = count_parameters(shallowest)
    if least > budget:
        raise ValueError(f"even {shallowest.n_layer} layer(s) have {least:,} parameters")
    low = 1  # within the budget
    high = 2  # beyond it, after this loop
    while count_parameters(config_at(high)) <= budget:
        low = high
        high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if count_parameters(config_at(middle)) <= budget:
            low = middle
        else:
            high = middle
    deepest = config_at(low)
    if config_at(high).n_embd == deepest.n_embd:
        return deepest
    # the exception: look on, as far as a lost third of the rank could make up for
    while (count := count_parameters(config_at(high))) <= 1.5 * budget:
        if count <= budget:
            deepest = config_at(high)
        high += 1
    return deepest


# ---- accounting ------------------------------------------------------------------------------------------


def account(model: GPT | GPTConfig) -> dict:
    """What a model costs, known before training. Used by --dry-run, the run record and the report.

    params/{total,embedding,lm_head,attention,mlp,other}
    params/trained   those that require a gradient
    params/stored_bits   of a checkpoint's weights
    flops/per_token  FLOPs of training, forward and backward: see `flops_per_token`
    mem/weights_bytes    float32 master weights
    mem/grads_bytes      float32 gradients of what is trained
    mem/optimizer_bytes  of what is trained: Muon's momentum and a number for each line of the longer side, or
                         AdamW's two moments
    """
    model = on_meta(model) if isinstance(model, GPTConfig) else model
    params = dict.fromkeys(("embedding", "lm_head", "attention", "mlp", "other"), 0)
    trained = 0
    moments = 0
    for name, parameter in model.named_parameters():
        entries = parameter.numel()
        params[parameter_group(name)] += entries
        if parameter.requires_grad:
            trained += entries
            moments += entries + max(parameter.shape) if uses_muon(name, parameter) else 2 * entries
    total = sum(params.values())
    return {
        "params/total": total,
        **{f"params/{group}": entries for group, entries in params.items()},
        "params/trained": trained,
        "params/stored_bits": 32 * total,
        "flops/per_token": flops_per_token(model),
        "mem/weights_bytes": 4 * total,
        "mem/grads_bytes": 4 * trained,
        "mem/optimizer_bytes": 4 * moments,
    }


def predict_peak(config: GPTConfig, rows: int, dtype_bytes: int = 4, accumulated: bool = False) -> dict:
    """Bytes of tensors at the highest point of a training step, `rows` at a time, without a compiler.

    The allocator's and Python's own memory come on top. Compiled code keeps other tensors: on a CPU its peak
    was 3 to 9% higher (dev/LOG.md).
    accumulated: gradients live on between several passes of a step. Optimizer state not split over processes.
    Logits are taken in chunks of a CPU's size.
    """
    model = on_meta(config)
    costs = account(config)
    C = config.n_embd
    V = config.vocab_size
    M = config.n_hidden
    N = rows * config.sequence_len  # tokens in a pass
    token = N * dtype_bytes  # bytes of one number for each token
    blocks = [(model.blocks[layer], config.has_value_embedding(layer)) for layer in config.positions]
    kept = [kept_by_block(block, config, token, dtype_bytes, has_values) for block, has_values in blocks]
    recomputed = [kept_for_backward(block, config, token, dtype_bytes) for block, _ in blocks]
    activations = sum(kept) + token * 2 * C  # the embeddings: previous token's share, input of the norm
    width = model.lm_head.rank if isinstance(model.lm_head, LowRankLinear) else C
    head_grad = 4 * V * width
    at_once = rows_at_once(torch.empty(0), V)
    # float32, one of them left from the chunk before
    chunks = 4 * V * (3 * at_once if at_once < N else 2 * N)
    # in the head: its inputs, their gradients, a few tensors as large as a chunk of logits
    at_head = activations + token * (2 * C + width) + head_grad + chunks
    at_head += V * width * dtype_bytes if dtype_bytes < 4 else 0
    # in a block: what it computes again; the gradient that goes on; of a tile of the MLP two tensors of its
    # inner width, three where relu's output was not kept
    tile = tile_rows(N, M, dtype_bytes) * M * dtype_bytes
    inside = token * C + (3 if keeps_bottleneck(blocks[-1][0].mlp.down, config) else 2) * tile
    grads = costs["mem/grads_bytes"]
    at_last_block = activations + head_grad + recomputed[-1] + inside
    at_first_block = grads + kept[0] + token * 2 * C + recomputed[0] + inside
    at_backward = max(at_last_block, at_first_block)
    if accumulated:
        at_head += grads
        at_backward += grads
    groups = {}  # Muon works on all matrices of one shape at a time, in about six copies
    for name, p in model.named_parameters():
        if uses_muon(name, p):
            key = (name.rsplit(".", 1)[1], *p.shape)
            groups[key] = groups.get(key, 0) + 4 * p.numel()
    at_update = grads + 6 * max(groups.values())
    own = costs["mem/weights_bytes"] + costs["mem/optimizer_bytes"]
    peak = own + max(at_head, at_backward, at_update)
    return {"mem/activations_bytes": activations, "mem/predicted_peak_bytes": peak}


def recomputes(block, config: GPTConfig) -> bool:
    """Whether a block is computed again in the backward pass: see recompute.py."""
    factored = any(isinstance(layer, LowRankLinear) for layer in block.modules())
    return config.recompute == "block" or (config.recompute == "bottleneck" and factored)


def keeps_bottleneck(layer, config: GPTConfig) -> bool:
    """Whether a layer's product r wide is kept while its block is computed again."""
    return config.recompute == "bottleneck" and layer.rank > 0


def kept_by_block(block, config: GPTConfig, token: int, dtype_bytes: int, has_values: bool) -> int:
    """Bytes that a block keeps from its forward to its backward pass. token: bytes of one number a token."""
    if not recomputes(block, config):
        return token * config.n_embd + kept_for_backward(block, config, token, dtype_bytes, recomputed=False)
    attn = block.attn
    mlp = block.mlp
    numbers = config.n_embd  # the residual stream as it comes in
    if has_values:
        numbers += attn.v.out_features
    joint = (attn.q, attn.k, attn.v)
    for layers in (joint, (attn.o,), (mlp.up,), (mlp.down,)):
        if all(keeps_bottleneck(layer, config) for layer in layers):
            numbers += sum(layer.rank for layer in layers)
    return token * numbers


def kept_for_backward(block, config: GPTConfig, token: int, dtype_bytes: int, recomputed: bool = True) -> int:
    """Bytes that a block's backward pass needs beside its input and, if it is computed again, what it kept.

    recomputed: whether they are to be counted only where the block is computed again.
    """
    if recomputed and not recomputes(block, config):
        return 0
    attn = block.attn
    mlp = block.mlp
    C = config.n_embd
    K = attn.k.out_features
    # outputs of the norms; q, k, v; of attention, by token, and by torch's kernel also by head
    numbers = 2 * C + C + 2 * K + (C if by_blocks(config.sequence_len, block.window) else 2 * C)
    numbers += 0 if keeps_bottleneck(mlp.down, config) else config.n_hidden  # relu's output
    copies = 0
    if dtype_bytes == 4:
        for layer in (attn.q, attn.k, attn.v):  # first factors in one matrix
            copies += layer.A.numel() if layer.rank else layer.weight.numel()
    else:  # a copy of every matrix in the compute dtype
        copies = sum(p.numel() for p in block.parameters())
    for layer in (attn.q, attn.k, attn.v, attn.o, mlp.up, mlp.down):
        if layer.rank:
            numbers += 0 if keeps_bottleneck(layer, config) else layer.rank
            numbers += layer.rank if layer.act != "none" else 0
    return token * numbers + dtype_bytes * copies


def on_meta(config: GPTConfig) -> GPT:
    """The model's shapes without its memory."""
    draw = nn.Embedding.reset_parameters
    # to draw on the meta device would load torch's compiler
    nn.Embedding.reset_parameters = lambda table: None
    try:
        with torch.device("meta"):
            return GPT(config)
    finally:
        nn.Embedding.reset_parameters = draw


def parameter_group(name: str) -> str:
    """Which of account's params/… a parameter counts for, by its name in the model."""
    groups = {
        "wte.": "embedding",
        "value_embeds.": "embedding",
        "lm_head.": "lm_head",
        ".attn.": "attention",
        ".mlp.": "mlp",
    }
    return next((group for part, group in groups.items() if part in name), "other")


def matrix_parameters(model: GPT) -> int:
    """Entries of all matrices that multiply every token: linear layers and head, not the look-up tables."""
    return matrix_entries(model.blocks) + matrix_entries(head_of(model))


def matrix_entries(module) -> int:
    """Entries of the matrices, or factors, of blocks or a head; tied ones count once."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def head_of(model: GPT):
    """What makes the logits; a tied head is the embedding table."""
    return model.lm_head if model.lm_head is not None else model.wte


def flops_per_token(model: GPT) -> int:
    """Training FLOPs a token, forward and backward, of the matrices (factors as they are) and of attention.

    An entry of a matrix costs 6: 2 forward, 2 for the gradient of the input, 2 for its own gradient. The last
    two fall away where nothing asks for them: of a frozen entry, and before the first trained parameter.
    Embedding look-ups do not count. Scores and values of attention: 12·H·D·window a layer, of which 4 forward
    (PaLM, arXiv 2204.02311, appendix B; the causal half of the scores is not taken off).
    """
    config = model.config
    flops = 0
    # whether it comes back to this layer
    backward = model.wte.weight.requires_grad or model.smear.requires_grad
    for layer in config.positions:
        block = model.blocks[layer]
        backward = backward or any(p.requires_grad for p in block.parameters())
        flops += matrix_flops(block, backward)
        flops += (12 if backward else 4) * config.n_embd * config.window(layer)  # H·D = n_embd
    return flops + matrix_flops(head_of(model), backward)


def matrix_flops(module, backward: bool) -> int:
    """FLOPs a token of the matrices of a module. backward: whether its input's gradient is asked for."""
    flops = 0
    for parameter in module.parameters():
        if parameter.ndim == 2:
            flops += 2 * parameter.numel()
            if backward:
                flops += 2 * parameter.numel()
            if parameter.requires_grad:
                flops += 2 * parameter.numel()
    return flops
