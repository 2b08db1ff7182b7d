"""Memory: how much a machine has, and how much a training step will need at its peak."""

import os
from pathlib import Path

import torch

from nanochat.accounting import account, on_meta
from nanochat.arguments import LARGEST_INTEGER
from nanochat.cpu import by_blocks, tile_rows
from nanochat.errors import InputError
from nanochat.gpt import GPT, GPTConfig, LowRankLinear
from nanochat.ops import rows_at_once
from nanochat.optim import uses_muon


def memory_bytes(device_type: str) -> int:
    """All the memory of a GPU, of the machine, or of this container. A batch system may allow less."""
    if device_type == "cuda":
        if not torch.cuda.is_available():  # `init_process` explains that to the user
            return LARGEST_INTEGER
        return torch.cuda.get_device_properties(0).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit, which reads "max"
        return machine


def check_memory(args, accounting: dict, device_type: str):
    """InputError if the training can never fit into this machine's memory.

    Half of the activations count, because compiled code keeps fewer than `predict_peak` says.
    """
    needed = accounting["mem/weights_bytes"] + accounting["mem/grads_bytes"]
    needed += accounting.get("mem/activations_bytes", 0) // 2
    available = memory_bytes(device_type)
    if needed > available:
        flags = "--depth, --model-dim, --vocab-size, --max-seq-len, --device-batch-size"
        if args.subspace:
            flags += ", --subspace-dim"
        raise InputError(
            f"{flags}: weights, gradients and activations need at least {needed / 2**30:,.1f} "
            f"GiB, and there are {available / 2**30:,.1f} GiB; give less of one of them"
        )


# ---- the peak of a training step ---------------------------------------------------------------------------


def predict_peak(config: GPTConfig, rows: int, dtype_bytes: int = 4, accumulated: bool = False) -> dict:
    """Bytes of tensors at the highest point of a training step, with `rows` rows a pass, without a compiler.

    accumulated: several passes make a step, so that gradients stay in memory during a forward pass.

    The memory of the allocator and of Python comes on top. Compiled code keeps other tensors: on a CPU its
    peak was 3 to 9% higher (dev/LOG.md). The optimizer's state counts as that of one process. The head is
    computed in chunks of the size that a CPU takes.
    """
    model = on_meta(config)
    costs = account(config)
    C = config.n_embd
    N = rows * config.sequence_len  # tokens in a pass
    token = N * dtype_bytes  # bytes of one number for each token
    kept_bytes = []  # of each position, from its forward to its backward pass
    recomputed_bytes = []  # of each position, during its backward pass
    for layer in config.positions:
        kept, recomputed = block_bytes(model, layer, token, dtype_bytes)
        kept_bytes.append(kept)
        recomputed_bytes.append(recomputed)
    activations = sum(kept_bytes) + token * 2 * C  # the embeddings: previous token's share, input of the norm
    grads = costs["mem/grads_bytes"]
    head_width = model.lm_head.rank if isinstance(model.lm_head, LowRankLinear) else C
    head_grad = 4 * config.vocab_size * head_width

    at_head = activations + head_grad + head_bytes(config, head_width, N, dtype_bytes)
    # in a block: what it computes again; the gradient that goes on; of a tile of the MLP two tensors of its
    # inner width, three where relu's output was not kept
    last_block = model.blocks[config.positions[-1]]
    tile = tile_rows(N, config.n_hidden, dtype_bytes) * config.n_hidden * dtype_bytes
    in_block = token * C + (3 if keeps_bottleneck(last_block.mlp.down, config) else 2) * tile
    at_last_block = activations + head_grad + recomputed_bytes[-1] + in_block
    at_first_block = grads + kept_bytes[0] + token * 2 * C + recomputed_bytes[0] + in_block
    at_backward = max(at_last_block, at_first_block)
    if accumulated:
        at_head += grads
        at_backward += grads
    at_update = grads + 6 * largest_muon_group(model)  # Muon computes with about six copies

    always = costs["mem/weights_bytes"] + costs["mem/optimizer_bytes"]
    peak = always + max(at_head, at_backward, at_update)
    return {"mem/activations_bytes": activations, "mem/predicted_peak_bytes": peak}


def head_bytes(config: GPTConfig, width: int, tokens: int, dtype_bytes: int) -> int:
    """Bytes in the head at once: its inputs, their gradients, a few tensors as large as a chunk of logits."""
    V = config.vocab_size
    chunk = min(rows_at_once(torch.empty(0), V), tokens)
    copies = V * (chunk + width) * dtype_bytes if dtype_bytes < 4 else 0  # of logits and weight
    return tokens * dtype_bytes * (2 * config.n_embd + width) + 2 * 4 * V * chunk + copies


def largest_muon_group(model: GPT) -> int:
    """Bytes of the largest group of matrices of one shape: Muon works on all of a group at a time."""
    groups: dict[tuple, int] = {}
    for name, parameter in model.named_parameters():
        if uses_muon(name, parameter):
            key = (name.rsplit(".", 1)[1], *parameter.shape)
            groups[key] = groups.get(key, 0) + 4 * parameter.numel()
    return max(groups.values())


def block_bytes(model: GPT, layer: int, token: int, dtype_bytes: int) -> tuple[int, int]:
    """(bytes that a block keeps from its forward to its backward pass, bytes that it then computes again)

    token: bytes of one number for each token of a pass.
    """
    config = model.config
    block = model.blocks[layer]
    needed = backward_bytes(block, config, token, dtype_bytes)
    factored = any(isinstance(module, LowRankLinear) for module in block.modules())
    if config.recompute == "none" or (config.recompute == "bottleneck" and not factored):
        return token * config.n_embd + needed, 0
    attn = block.attn
    mlp = block.mlp
    numbers = config.n_embd  # the residual stream as it comes in
    if config.has_value_embedding(layer):
        numbers += attn.v.out_features
    joint = (attn.q, attn.k, attn.v)
    for layers in (joint, (attn.o,), (mlp.up,), (mlp.down,)):
        if all(keeps_bottleneck(linear, config) for linear in layers):
            numbers += sum(linear.rank for linear in layers)
    return token * numbers, needed


def keeps_bottleneck(layer, config: GPTConfig) -> bool:
    """Whether a layer's r-wide product is kept while its block is computed again."""
    return config.recompute == "bottleneck" and layer.rank > 0


def backward_bytes(block, config: GPTConfig, token: int, dtype_bytes: int) -> int:
    """Bytes that a block's backward pass needs beside the block's input and the bottlenecks that are kept."""
    attn = block.attn
    mlp = block.mlp
    C = config.n_embd
    K = attn.k.out_features
    # outputs of the norms; q, k, v; attention's output for each token, and torch's kernel keeps a second one
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
