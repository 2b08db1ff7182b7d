"""Ranks over depth, budgets, and the accounting of what a model costs: parameters, FLOPs, bytes."""
from dataclasses import replace

import torch

from nanochat.gpt import GPT, GPTConfig, Linear, LowRankLinear
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
