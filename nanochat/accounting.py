"""What a model costs, known before training: parameters, FLOPs a token, bytes of weights and optimizer."""

import torch
import torch.nn as nn

from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import uses_muon


def account(model: GPT | GPTConfig) -> dict:
    """What a model costs, known before training. Used by --dry-run, the run record and the report.

    params/{total,embedding,lm_head,attention,mlp,other}
    params/trained   those that require a gradient
    params/stored_bits   of a checkpoint's weights
    flops/per_token  FLOPs of training, forward and backward: see `flops_per_token`
    flops/executed_per_token   those that the hardware executes: see `executed_flops_per_token`
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
        "flops/executed_per_token": executed_flops_per_token(model),
        "mem/weights_bytes": 4 * total,
        "mem/grads_bytes": 4 * trained,
        "mem/optimizer_bytes": 4 * moments,
    }


def count_parameters(config: GPTConfig) -> int:
    return account(config)["params/total"]


def on_meta(config: GPTConfig) -> GPT:
    """The model's shapes without its memory."""
    draw = nn.Embedding.reset_parameters
    # drawing random numbers on the meta device would load torch's compiler
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
    return matrix_entries(model.blocks) + matrix_entries(output_head(model))


def matrix_entries(module) -> int:
    """Entries of the matrices, or factors, of blocks or a head; tied ones count once."""
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def output_head(model: GPT):
    """The module that makes the logits. A tied head is the embedding table."""
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
    backward = False
    for layer, backward in positions_and_backward(model):
        flops += matrix_flops(model.blocks[layer], backward)
        flops += (12 if backward else 4) * config.n_embd * config.window(layer)  # H·D = n_embd
    return flops + matrix_flops(output_head(model), backward)


def executed_flops_per_token(model: GPT) -> int:
    """Training FLOPs a token as a GPU executes them, compiled: the numerator of the HFU (PaLM, appendix B).

    Two things differ from `flops_per_token`. Attention counts the keys that a query sees, and 14·H·D a key: 4
    forward and 10 backward, since fused kernels compute the scores again there. And the products count that
    the backward pass makes again, as --recompute asks for. The optimizer does not count in either.
    """
    config = model.config
    flops = 0.0
    backward = False
    for layer, backward in positions_and_backward(model):
        block = model.blocks[layer]
        scores = 4 * config.n_embd * mean_keys(config.sequence_len, config.window(layer))
        flops += matrix_flops(block, backward) + scores
        if backward:
            flops += 2.5 * scores
        if backward and is_recomputed(block, config):
            flops += 2 * recomputed_entries(block, config) + scores
    return round(flops + matrix_flops(output_head(model), backward))


def positions_and_backward(model: GPT):
    """For each position of the stack: (its layer, whether the backward pass reaches it)."""
    backward = model.wte.weight.requires_grad or model.smear.requires_grad
    for layer in model.config.positions:
        backward = backward or any(p.requires_grad for p in model.blocks[layer].parameters())
        yield layer, backward


def mean_keys(T: int, window: int) -> float:
    """Keys that a query sees, the mean over a sequence: query i (from 0) sees min(i + 1, window)."""
    window = min(window, T)
    return (window * (window + 1) / 2 + (T - window) * window) / T


def is_recomputed(block, config: GPTConfig) -> bool:
    """Whether the backward pass computes a block again (see recompute.py)."""
    factored = any(getattr(layer, "rank", 0) for layer in block.modules())
    return config.recompute == "block" or (config.recompute == "bottleneck" and factored)


def recomputed_entries(block, config: GPTConfig) -> int:
    """Entries of the matrices with which a block that is computed again multiplies twice.

    All but the last, whose product nothing asks for, and those whose r-wide products are kept. (Uncompiled,
    the full-rank `down` multiplies twice as well.) Another way to compute again adds its matrices here.
    """
    down = block.mlp.down
    entries = matrix_entries(block) - down.out_features * (down.rank or down.in_features)
    if config.recompute == "bottleneck":
        joint = (block.attn.q, block.attn.k, block.attn.v)  # one product
        for layers in (joint, (block.attn.o,), (block.mlp.up,), (down,)):
            if all(layer.rank for layer in layers):
                entries -= sum(layer.A.numel() for layer in layers)
    return entries


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
