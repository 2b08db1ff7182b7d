"""Ranks over depth, budgets, and the accounting of what a model costs: parameters, FLOPs, bytes."""

from collections import Counter
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import Any

import torch

from nanochat.attention import by_blocks
from nanochat.functional import hidden_rows_at_once, rows_at_once
from nanochat.gpt import GPT, MATRICES, GPTConfig, LowRankLinear
from nanochat.optim import uses_muon
from nanochat.whole_ranks import AUTOMATIC, rank_step, resolve_rank

# ---- schedules ------------------------------------------------------------------------------------------------------


def ranks_over_depth(schedule: str, start: float, end: float, depth: int) -> tuple[float, ...]:
    """The rank of each layer, first to last. With t from 0 at the first layer to 1 at the last:

    constant     start everywhere
    linear       start + (end - start)·t
    step         start in the first half of the layers, end in the second
    exponential  start·(end/start)^t
    quadratic    start in the middle, end at both ends: start - (start - end)·(2t - 1)²

    Integer ranks are rounded; if start and end are fractions (of min(in, out)) so are the results.
    """

    def at(t, layer):
        return {
            "constant": start,
            "linear": start + (end - start) * t,
            "step": start if layer < depth / 2 else end,
            "exponential": start * (end / start) ** t if start > 0 < end else 0,
            "quadratic": start - (start - end) * (2 * t - 1) ** 2,
        }[schedule]

    ranks = [at(layer / max(1, depth - 1), layer) for layer in range(depth)]
    return tuple(ranks) if 0 < start < 1 else tuple(round(r) for r in ranks)


# ---- budgets --------------------------------------------------------------------------------------------------------


def count_parameters(config: GPTConfig) -> int:
    return account(config)["params/total"]


GROUPS = {"attn_ranks": MATRICES[:4], "mlp_ranks": MATRICES[4:]}  # field of GPTConfig -> its matrices


def matrices_by_field(config: GPTConfig, group: str) -> dict[str, tuple[str, ...]]:
    """{field that gives ranks: its matrices} of a group: itself, and each matrix named in matrix_ranks."""
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
    """The levels of each factored group, lowest first. If nothing is factored, then all matrices that are not
    named in matrix_ranks are, at their largest rank.
    """
    levels = [level for group in GROUPS for level in levels_of_group(config, group)]
    if levels:
        return levels
    for group in GROUPS:
        if matrices := matrices_by_field(config, group).get(group):
            largest = min(min(config.matrix_shape(matrix)) for matrix in matrices)
            field: dict[str, Any] = {group: (largest,) * config.n_layer}
            factored = replace(config, **field)
            levels += levels_of_group(factored, group, given_by_user=False)
    return levels


def levels_of_group(config: GPTConfig, group: str, given_by_user: bool = True) -> list[Level]:
    """given_by_user: whether somebody asked for these ranks; whole numbers then allow any whole number."""
    fields = matrices_by_field(config, group)
    given = []
    for field in fields:
        given += [(field, layer, rank) for layer, rank in enumerate(ranks_of_field(config, field)) if rank]
    smaller = {field: [min(config.matrix_shape(matrix)) for matrix in fields[field]] for field, _, _ in given}
    sides = set(chain.from_iterable(smaller.values()))
    fractions = all(rank < 1 for _, _, rank in given)
    apart = fractions and len(sides) > 1  # the same fraction is another rank for each of them
    any_number = apart or (given_by_user and not fractions)
    unit = 1 if any_number or not given else step_under_budget(config.rank_multiple, min(sides))

    by_rank = {}  # wanted rank, of the longest of the smaller sides if they are apart -> places
    for field, layer, rank in given:
        whole = max(sides) if apart else min(smaller[field])
        by_rank.setdefault(rank * whole if rank < 1 else rank, []).append((field, layer))
    levels = []
    for wanted, places in sorted(by_rank.items()):
        shapes = Counter(config.matrix_shape(matrix) for field, _ in places for matrix in fields[field])
        if apart:
            levels.append(Level(group, places, shapes, wanted, max(sides) - 1, 0, config.rank_multiple))
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
    ranks: dict[str, list[float]] = {
        field: [0] * config.n_layer for level in levels for field, _ in level.places
    }
    for level, n in zip(levels, steps):
        for field, layer in level.places:
            ranks[field][layer] = level.rank(n)
    groups: dict[str, Any] = {field: tuple(values) for field, values in ranks.items() if field in GROUPS}
    single = {field: tuple(values) for field, values in ranks.items() if field not in GROUPS}
    return replace(config, **groups, matrix_ranks=config.matrix_ranks | single)


def solve_rank(config: GPTConfig, budget: int) -> GPTConfig:
    """Scale the ranks of attention and MLP so that the total parameters come as near to `budget` as they can from below.

    All ranks grow from 1 by one common factor, rounded. Where the next rank of some layers is too much, the others go on with
    what is left, so that at the end no rank can grow without breaking the budget or the shape: matrices of a
    group that were given equal ranks keep equal ranks, and none passes one that was given more.
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
    queue = [
        (1.5 / level.wanted, i) for i, level in enumerate(levels)
    ]  # the common factor at which a level rounds to its next rank
    heapify(queue)
    while queue:
        _, i = heappop(queue)
        level = levels[i]
        n = steps[i]
        above = i + 1 if i + 1 < len(levels) and levels[i + 1].group == level.group else None
        if n == level.largest or (above is not None and steps[above] == n):
            continue
        price = level.parameters(n + 1) - level.parameters(n)
        if price <= spare:  # else never again: what is spare only shrinks
            steps[i] = n + 1
            spare = spare - price
            heappush(queue, ((n + 1.5) / level.wanted, i))
    return with_ranks(config, levels, steps)


def solve_depth(config_at, budget: int) -> GPTConfig:
    """The deepest config_at(depth) whose total parameters do not exceed `budget`. ValueError if the shallowest is too much.

    config_at(depth) never has fewer parameters at a greater depth, with one exception: where its width grows
    with the depth, a fraction may become another multiple at the next width, and lose a third of its rank.
    """
    least = config_at(1)
    if count_parameters(least) > budget:
        raise ValueError(f"even {least.n_layer} layer(s) have {count_parameters(least):,} parameters")
    low = 1
    high = 2
    while count_parameters(config_at(high)) <= budget:
        low = high
        high = 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_parameters(config_at(middle)) <= budget else (low, middle)
    deepest = config_at(low)
    if config_at(high).n_embd == deepest.n_embd:
        return deepest
    while (count := count_parameters(config_at(high))) <= 1.5 * budget:
        deepest = config_at(high) if count <= budget else deepest
        high += 1
    return deepest


# ---- accounting -----------------------------------------------------------------------------------------------------


def account(model: GPT | GPTConfig) -> dict:
    """What a model costs, known before training. Used by --dry-run, the run record and the report.

    params/{total,embedding,lm_head,attention,mlp,other}
    params/trained   those that require a gradient
    params/stored_bits   of a checkpoint's weights
    flops/per_token  training FLOPs (forward + backward): 6 for each entry of each matrix that multiplies the token, the
                     factors of a low-rank layer counted as they are, embedding look-ups not counted; plus attention
                     scores and values, 12·H·D·window a layer (PaLM, arXiv 2204.02311, appendix B: the causal half of
                     the scores is not taken off). Of a frozen entry 4: it has no gradient, but passes one on; where nothing
                     before it is trained 2, and a third of the attention
    mem/{weights,grads,optimizer}_bytes  float32 masters; of what is trained the gradients, and Muon's momentum with a number for
                     each line of the longer side, or AdamW's two moments
    """
    model = on_meta(model) if isinstance(model, GPTConfig) else model
    params = dict.fromkeys(("embedding", "lm_head", "attention", "mlp", "other"), 0)
    trained = moments = 0
    for name, parameter in model.named_parameters():
        params[parameter_group(name)] += parameter.numel()
        if parameter.requires_grad:
            trained += parameter.numel()
            moments += (
                parameter.numel() + max(parameter.shape)
                if uses_muon(name, parameter)
                else 2 * parameter.numel()
            )
    total = sum(params.values())
    return {
        "params/total": total,
        **{f"params/{group}": n for group, n in params.items()},
        "params/trained": trained,
        "params/stored_bits": 32 * total,
        "flops/per_token": flops_per_token(model),
        "mem/weights_bytes": 4 * total,
        "mem/grads_bytes": 4 * trained,
        "mem/optimizer_bytes": 4 * moments,
    }


def predict_peak(config: GPTConfig, rows: int, dtype_bytes: int = 4, accumulated: bool = False) -> dict:
    """Bytes of tensors at the highest point of a training step that is not compiled, `rows` at a time; the allocator's and Python's
    own memory come on top. Compiled code keeps other tensors: on a CPU its peak was 3 to 9% higher (dev/LOG.md).

    accumulated: gradients live on between several passes of a step. Optimizer state not split over processes. Logits are taken in
    chunks of a CPU's size.
    """
    model = on_meta(config)
    costs = account(config)
    C = config.n_embd
    K = config.n_kv_head * config.n_embd // config.n_head
    V = config.vocab_size
    T = config.sequence_len
    token = rows * T * dtype_bytes  # bytes of one number for each token
    kept = [
        kept_by_block(
            model.blocks[layer], C, K, config.n_hidden, by_blocks(T, config.window(layer)), token, dtype_bytes
        )
        for layer in config.positions
    ]
    activations = sum(kept) + token * 2 * C  # the embeddings: previous token's share, input of the norm
    width = C if model.lm_head is None else model.lm_head.first_factor().size(0) if config.lm_head_rank else C
    head_grad = 4 * V * width
    at_once = rows_at_once(torch.empty(0), V)
    chunks = (
        4 * V * (3 * at_once if rows * T > at_once else 2 * rows * T)
    )  # float32, one of them left from the chunk before
    # in the head: its inputs, their gradients, a few tensors as large as a chunk of logits
    at_head = (
        activations
        + token * (2 * C + width)
        + head_grad
        + chunks
        + (V * width * dtype_bytes if dtype_bytes < 4 else 0)
    )
    # in the MLP: the gradient that goes on, and of a part of the rows two tensors as wide as the hidden layer, three if that was not kept
    last = model.blocks[config.positions[-1]].mlp
    hidden = config.n_hidden
    part = hidden_rows_at_once(
        torch.empty(rows * T, 0, dtype=torch.float32 if dtype_bytes == 4 else torch.bfloat16), hidden
    )
    in_mlp = token * C + (2 + last.recompute) * part * hidden * dtype_bytes
    grads = costs["mem/grads_bytes"]
    at_backward = (
        max(activations + head_grad, grads + kept[0] + token * 2 * C) + in_mlp
    )  # at its first block; at its last
    if accumulated:
        at_head = at_head + grads
        at_backward = at_backward + grads
    groups = {}  # Muon works on all matrices of one shape at a time, in about six copies
    for name, p in model.named_parameters():
        if uses_muon(name, p):
            key = (name.rsplit(".", 1)[1], *p.shape)
            groups[key] = groups.get(key, 0) + 4 * p.numel()
    at_update = grads + 6 * max(groups.values())
    return {
        "mem/activations_bytes": activations,
        "mem/predicted_peak_bytes": costs["mem/weights_bytes"]
        + costs["mem/optimizer_bytes"]
        + max(at_head, at_backward, at_update),
    }


def kept_by_block(block, C: int, K: int, N: int, by_blocks: bool, token: int, dtype_bytes: int) -> int:
    """Bytes that one block keeps for the backward pass. token: bytes of one number for each token; K, N: widths of keys and values, and of the MLP."""
    kept = C  # the residual stream as it comes in
    copies = 0
    y = C if by_blocks else 2 * C  # by token, and by torch's kernel also by head
    for part, first, last, wide in (
        (block.attn, (block.attn.q, block.attn.k, block.attn.v), block.attn.o, C + 2 * K + y),
        (block.mlp, (block.mlp.up,), block.mlp.down, N),
    ):  # relu
        factored = [m for m in (*first, last) if isinstance(m, LowRankLinear)]
        kept += C + sum(m.rank for m in factored)  # C: the norm's output or, recomputing, its input
        kept += sum(
            m.rank
            for m in factored
            if m.act != "none" and (m is last or part is block.mlp or not part.recompute)
        )
        if not part.recompute:
            kept += wide
            copies += (
                sum(m.first_factor().numel() for m in first) if part is block.attn else 0
            )  # q, k, v in one matrix
    if dtype_bytes < 4:  # a copy of every matrix in the compute dtype
        copies = sum(p.numel() for p in block.parameters())
    return token * kept + dtype_bytes * copies


def on_meta(config: GPTConfig) -> GPT:
    """The model's shapes without its memory."""
    with torch.device("meta"):
        return GPT(config)


def parameter_group(name: str) -> str:
    for part, group in (
        ("wte.", "embedding"),
        ("value_embeds.", "embedding"),
        ("lm_head.", "lm_head"),
        (".attn.", "attention"),
        (".mlp.", "mlp"),
    ):
        if part in name:
            return group
    return "other"


def matrix_entries(module) -> int:
    """Entries of the matrices, or factors, of blocks or a head; tied ones once."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def head_of(model: GPT):
    return model.lm_head if model.lm_head is not None else model.wte  # a tied head multiplies too


def matrix_parameters(model: GPT) -> int:
    """Entries of all matrices that multiply every token: the linear layers and the head, not the look-up tables."""
    return matrix_entries(model.blocks) + matrix_entries(head_of(model))


def flops_per_token(model: GPT) -> int:
    config = model.config
    flops = 0
    reached = (
        model.wte.weight.requires_grad or model.smear.requires_grad
    )  # by the backward pass: something before is trained
    for layer in config.positions:
        block = model.blocks[layer]
        reached = reached or trains(block)
        flops += multiplications(block, reached) + (12 if reached else 4) * config.n_embd * config.window(
            layer
        )  # H·D = n_embd
    return flops + multiplications(head_of(model), reached)


def trains(module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def multiplications(module, reached: bool) -> int:
    """FLOPs of its matrices: forward 2 an entry, backward 2 for the input's gradient, where that is asked for, and 2 for its own."""
    return sum(
        (2 + 2 * reached + 2 * p.requires_grad) * p.numel() for p in module.parameters() if p.ndim == 2
    )
