"""Ranks over depth, budgets, and the accounting of what a model costs: parameters, FLOPs, bytes."""
from dataclasses import replace

import torch

from nanochat.gpt import GPT, GPTConfig, Linear, LowRankLinear, rows_at_once
from nanochat.optim import uses_muon

SCHEDULES = ("constant", "linear", "step", "exponential", "quadratic")


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
        return {"constant": start, "linear": start + (end - start) * t, "step": start if layer < depth / 2 else end,
                "exponential": start * (end / start) ** t if start > 0 < end else 0,
                "quadratic": start - (start - end) * (2 * t - 1) ** 2}[schedule]
    ranks = [at(layer / max(1, depth - 1), layer) for layer in range(depth)]
    return tuple(ranks) if 0 < start < 1 else tuple(round(r) for r in ranks)


def scaled_ranks(ranks: tuple[float, ...], scale: float, largest: int) -> tuple[int, ...]:
    """Every rank times `scale`, as integers within [1, largest]. Fractions are of `largest`."""
    return tuple(min(largest, max(1, round(scale * (r * largest if r < 1 else r)))) for r in ranks)


# ---- budgets --------------------------------------------------------------------------------------------------------

def count_parameters(config: GPTConfig) -> int:
    return account(config)["params/total"]


def solve_rank(config: GPTConfig, budget: int) -> GPTConfig:
    """Scale all ranks of `config` by one factor so that the total parameters come as near to `budget` as they can from below.

    Ranks keep their proportions over depth and between attention and MLP; groups at full rank stay so, unless both are:
    then both are factored. ValueError if even rank 1 everywhere is over the budget.
    """
    head_dim = config.n_embd // config.n_head
    largest = {"attn_ranks": config.n_kv_head * head_dim, "mlp_ranks": config.n_embd}
    base = {name: getattr(config, name) for name in largest if any(getattr(config, name))}
    base = base or {name: (largest[name],) * config.n_layer for name in largest}

    def at(scale):
        return replace(config, **{name: scaled_ranks(ranks, scale, largest[name]) for name, ranks in base.items()})

    low, high = 0.0, 2.0 * max(largest.values())  # rank 1 everywhere; every rank at its largest
    if count_parameters(at(low)) > budget:
        raise ValueError(f"even rank 1 in every layer has {count_parameters(at(low)):,} parameters")
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if count_parameters(at(middle)) <= budget else (low, middle)
    return at(low)


def solve_depth(config_at, budget: int) -> GPTConfig:
    """The deepest config_at(depth) whose total parameters do not exceed `budget`. ValueError if one layer is too many."""
    if count_parameters(config_at(1)) > budget:
        raise ValueError(f"even one layer has {count_parameters(config_at(1)):,} parameters")
    low, high = 1, 2
    while count_parameters(config_at(high)) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count_parameters(config_at(middle)) <= budget else (low, middle)
    return config_at(low)


# ---- accounting -----------------------------------------------------------------------------------------------------

def account(model: GPT | GPTConfig) -> dict:
    """What a model costs, known before training. Used by --dry-run, the run record and the report.

    params/{total,embedding,lm_head,attention,mlp,other}
    flops/per_token  training FLOPs (forward + backward): 6 for each entry of each matrix that multiplies the token, the
                     factors of a low-rank layer counted as they are, embedding look-ups not counted; plus attention
                     scores and values, 12·H·D·window a layer (PaLM, arXiv 2204.02311, appendix B: the causal half of
                     the scores is not taken off)
    mem/{weights,grads,optimizer}_bytes  float32 masters, their gradients, and Muon's momentum with a number for each line of
                     the longer side, or AdamW's two moments
    """
    model = on_meta(model) if isinstance(model, GPTConfig) else model
    params = dict.fromkeys(("embedding", "lm_head", "attention", "mlp", "other"), 0)
    moments = 0
    for name, parameter in model.named_parameters():
        params[parameter_group(name)] += parameter.numel()
        moments += parameter.numel() + max(parameter.shape) if uses_muon(name, parameter) else 2 * parameter.numel()
    total = sum(params.values())
    return {"params/total": total, **{f"params/{group}": n for group, n in params.items()},
            "flops/per_token": flops_per_token(model),
            "mem/weights_bytes": 4 * total, "mem/grads_bytes": 4 * total, "mem/optimizer_bytes": 4 * moments}


def predict_peak(config: GPTConfig, rows: int, dtype_bytes: int = 4, accumulated: bool = False) -> dict:
    """Bytes of tensors at the highest point of a training step that is not compiled, `rows` at a time; the allocator's and Python's
    own memory come on top. Compiled code keeps less, so there it is an upper bound.

    accumulated: gradients live on between several passes of a step. Optimizer state not split over processes. Logits are taken in
    chunks of a CPU's size. In bfloat16 a CPU keeps the norms' inputs in float32: there it is about an eighth more than this.
    """
    model, costs = on_meta(config), account(config)
    C, K, V, T = config.n_embd, config.n_kv_head * config.n_embd // config.n_head, config.vocab_size, config.sequence_len
    token = rows * T * dtype_bytes  # bytes of one number for each token
    kept = [kept_by_block(block, C, K, token, dtype_bytes) for block in model.blocks]
    activations = sum(kept) + token * 2 * C                    # the embeddings: previous token's share, input of the norm
    width = C if model.lm_head is None else model.lm_head.first_factor().size(0) if config.lm_head_rank else C
    head_grad = 4 * V * width
    at_once = rows_at_once(torch.empty(0), V)
    chunks = 4 * V * (3 * at_once if rows * T > at_once else 2 * rows * T)  # float32, one of them left from the chunk before
    # in the head: its inputs, their gradients, a few tensors as large as a chunk of logits
    at_head = activations + token * (2 * C + width) + head_grad + chunks + (V * width * dtype_bytes if dtype_bytes < 4 else 0)
    # in the MLP's relu²: three tensors as wide as the hidden layer, and the two that were not kept
    last = model.blocks[-1].mlp
    in_mlp = token * (C + 4 * C * (5 if last.recompute else 3))
    grads = costs["mem/grads_bytes"]
    at_backward = max(activations + head_grad, grads + kept[0] + token * 2 * C) + in_mlp  # at its first block; at its last
    if accumulated:
        at_head, at_backward = at_head + grads, at_backward + grads
    groups = {}  # Muon works on all matrices of one shape at a time, in about eight copies
    for name, p in model.named_parameters():
        if uses_muon(name, p):
            key = (name.rsplit(".", 1)[1], *p.shape)
            groups[key] = groups.get(key, 0) + 4 * p.numel()
    at_update = grads + 8 * max(groups.values())
    return {"mem/activations_bytes": activations,
            "mem/predicted_peak_bytes": costs["mem/weights_bytes"] + costs["mem/optimizer_bytes"] + max(at_head, at_backward, at_update)}


def kept_by_block(block, C: int, K: int, token: int, dtype_bytes: int) -> int:
    """Bytes that one block keeps for the backward pass. token: bytes of one number for each token; K: width of keys and values."""
    kept, copies = 3 * C, 0                                    # the residual stream: as it comes in, and into both norms
    for part, first, last, wide in ((block.attn, (block.attn.q, block.attn.k, block.attn.v), block.attn.o,
                                     2 * C + 3 * K + 2 * C),   # q, k before and after their norm, v; y by head and by token
                                    (block.mlp, (block.mlp.up,), block.mlp.down, 2 * 4 * C)):  # relu, and its square
        kept += sum(m.rank for m in (*first, last) if isinstance(m, LowRankLinear))
        if not part.recompute:
            kept += C + wide                                   # C: the norm's output
            copies += sum(m.first_factor().numel() for m in first) if part is block.attn else 0  # q, k, v in one matrix
    if dtype_bytes < 4:                                        # a copy of every matrix in the compute dtype
        copies = sum(p.numel() for p in block.parameters())
    return token * kept + dtype_bytes * copies


def on_meta(config: GPTConfig) -> GPT:
    """The model's shapes without its memory."""
    with torch.device("meta"):
        return GPT(config)


def parameter_group(name: str) -> str:
    for part, group in (("wte.", "embedding"), ("value_embeds.", "embedding"), ("lm_head.", "lm_head"),
                        (".attn.", "attention"), (".mlp.", "mlp")):
        if part in name:
            return group
    return "other"


def matrix_parameters(model: GPT) -> int:
    """Entries of all matrices that multiply every token: the linear layers and the head, not the look-up tables."""
    entries = sum(p.numel() for m in model.modules() if isinstance(m, (Linear, LowRankLinear)) for p in m.parameters())
    return entries + (model.wte.weight.numel() if model.lm_head is None else 0)  # a tied head multiplies too


def flops_per_token(model: GPT) -> int:
    config = model.config
    scores = sum(config.n_embd * config.window(layer) for layer in range(config.n_layer))  # H·D = n_embd
    return 6 * matrix_parameters(model) + 12 * scores
