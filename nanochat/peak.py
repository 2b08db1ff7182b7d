"""The peak of a training step, predicted: what is in memory at each of its high points.

A step has four of them. In the head, a chunk of logits stands on all that the blocks have kept. In the
backward pass of the last block nothing of the other blocks is freed yet; in that of the first block all
gradients are there. In the update there are gradients and the copies that Muon computes with. Weights and
optimizer state are always there.

The parts follow from what the code keeps for its backward pass. Of compiled blocks torch's partitioner
decides it: the tensors are those that it saves for the block of gpt.py (tests/test_cuda_stub_peak.py
measures them). Counts are numbers a token, of the dtype of the activations.

Shapes: N tokens of a pass, C width, K width of keys, M width inside the MLP, V vocabulary, r rank.
"""

from dataclasses import dataclass

from nanochat.accounting import account, is_recomputed, on_meta
from nanochat.cpu import by_blocks, tile_rows
from nanochat.exchange import LEAVING
from nanochat.fp8 import suits
from nanochat.gpt import GPT, GPTConfig, LowRankLinear
from nanochat.mlp_kernel import backward_rows, fits
from nanochat.ops import chunk_rows
from nanochat.shards import make_buckets, uses_muon

LIBRARIES = 2**26  # bytes that cuBLAS takes from torch's allocator


@dataclass(frozen=True)
class Execution:
    """How a model is trained, as far as its memory depends on it."""

    rows: int  # of a pass
    dtype_bytes: int = 4  # of a number of the activations
    accumulated: bool = False  # several passes make a step: gradients stay in memory during a forward pass
    device_type: str = "cpu"
    compiled: bool = False
    budget: float = 1.0  # --activation-budget
    processes: int = 1
    float8: bool = False  # --fp8
    fused: bool = False  # --mlp-kernel fused
    masked: bool = False  # attention by SDPA with a mask: --attn-kernel mask, and whatever is in float32

    @property
    def on_gpu(self) -> bool:
        return self.device_type == "cuda"

    @property
    def partitioned(self) -> bool:
        """Whether torch's partitioner decides what a block keeps. On a CPU our own functions do."""
        return self.compiled and self.on_gpu

    @property
    def casts(self) -> bool:
        """Whether weights are cast where they are used. Of several processes each keeps them in the dtype."""
        return self.dtype_bytes < 4 and self.processes == 1

    def token_bytes(self, config: GPTConfig) -> int:
        """Bytes of one number for each token of a pass."""
        return self.rows * config.sequence_len * self.dtype_bytes


def execution(args, plan: dict, device_type: str, dtype_bytes: int, processes: int = 1) -> Execution:
    """As the flags and the plan of a run say."""
    return Execution(
        plan["device_batch_size"],
        dtype_bytes,
        plan["grad_accum_steps"] > 1,
        device_type,
        args.compile != "off",
        args.activation_budget,
        processes,
        args.fp8,
        args.mlp_kernel == "fused",
        device_type == "cuda" and (args.attn_kernel == "mask" or dtype_bytes == 4),
    )


def predict_peak(model: GPT | GPTConfig, run: Execution, costs: dict | None = None) -> dict:
    """Bytes of tensors at the highest point of a training step of one process.

    costs: what `account` says of the model, if that is known.
    CUDA's own memory and that of Python come on top. On a CPU this is without a compiler, whose code keeps 3
    to 17% more (dev/LOG.md).
    """
    model = on_meta(model) if isinstance(model, GPTConfig) else model
    config = model.config
    costs = costs or account(model)
    blocks = [model.blocks[layer] for layer in config.positions]
    C = config.n_embd
    token = run.token_bytes(config)
    kept = [kept_bytes(block, config, layer, run) for block, layer in zip(blocks, config.positions)]
    # the embedding that all blocks add is the first one's input; the smear keeps the previous token's
    activations = sum(kept) + token * C
    grads, own_grads, travelling = gradient_bytes(model, costs, run)
    head_width = model.lm_head.rank if isinstance(model.lm_head, LowRankLinear) else C
    head_grad = 4 * config.vocab_size * head_width

    first_block = backward_bytes(blocks[0], config, run)
    last_block = backward_bytes(blocks[-1], config, run)
    at_head = activations + head_grad + head_bytes(config, head_width, run)
    at_last_norm = activations + head_grad + token * C * (8 if run.dtype_bytes < 4 else 3)
    at_last_block = activations + head_grad + last_block
    at_first_block = own_grads + travelling + kept[0] + token * 2 * C + first_block
    at_backward = max(at_last_norm, at_last_block, at_first_block)
    if run.accumulated:
        at_head += grads
        at_backward += grads
    always = state_bytes(costs, run)
    peak = always + max(at_head, at_backward, update_bytes(model, own_grads, costs, run))
    return {"mem/activations_bytes": activations, "mem/predicted_peak_bytes": peak}


# ---- weights, gradients, optimizer -------------------------------------------------------------------------


def state_bytes(costs: dict, run: Execution) -> int:
    """Bytes that are always there: weights, optimizer's state, and what libraries take."""
    weights = costs["mem/weights_bytes"]
    if run.dtype_bytes < 4 and not run.casts:  # the masters are their owner's
        weights = weights // 2 + weights // run.processes
    state = weights + costs["mem/optimizer_bytes"] // run.processes
    return state + LIBRARIES if run.on_gpu else state


def gradient_bytes(model: GPT, costs: dict, run: Execution) -> tuple[int, int, int]:
    """(of all gradients of a process, of those that it owns, of the buckets in which the others leave)"""
    grads = costs["mem/grads_bytes"]
    if run.processes == 1:
        return grads, grads, 0
    largest = max(bucket.length for bucket in make_buckets(model, run.processes)) * run.processes
    return grads, grads // run.processes, largest * (4 + LEAVING * run.dtype_bytes)


def update_bytes(model: GPT, own_grads: int, costs: dict, run: Execution) -> int:
    """Bytes in the update: gradients, what Muon computes with, and the new values on their way."""
    copies = 4.5 if run.on_gpu else 6  # of a group of matrices; on a GPU in bfloat16
    update = own_grads + int(copies * largest_muon_group(model)) // run.processes
    if run.processes > 1:
        update += costs["params/trained"] * run.dtype_bytes
    return update


# ---- a block -----------------------------------------------------------------------------------------------


def kept_bytes(block, config: GPTConfig, layer: int, run: Execution) -> int:
    """Bytes that a block keeps from its forward to its backward pass."""
    numbers = config.n_embd  # the residual stream as it comes in
    copies = 0
    if is_recomputed(block, config):
        numbers += sum(kept_products(block, config).values())
        if config.has_value_embedding(layer):
            numbers += block.attn.v.out_features
    elif run.partitioned:
        numbers += numbers_of_partitioner(block, config, run)
        copies = copies_of_partitioner(block, run) + mask_entries(block, config, run)
    else:
        numbers += numbers_for_backward(block, config, run)
        copies = copied_weights(block, run) + mask_entries(block, config, run)
    return run.token_bytes(config) * numbers + run.dtype_bytes * copies


def kept_products(block, config: GPTConfig) -> dict[str, int]:
    """{matrices: width} of the r-wide products that stay while the rest of a block is computed again."""
    attn = block.attn
    mlp = block.mlp
    ranks = {
        "qkv": [attn.q.rank, attn.k.rank, attn.v.rank],
        "o": [attn.o.rank],
        "up": [mlp.up.rank],
        "down": [mlp.down.rank],
    }
    if config.recompute != "bottleneck":
        return {}
    return {name: sum(widths) for name, widths in ranks.items() if all(widths)}


def numbers_for_backward(block, config: GPTConfig, run: Execution) -> int:
    """What the backward pass of an eager block needs beside its input and the products that are kept."""
    attn = block.attn
    mlp = block.mlp
    C = config.n_embd
    kept = kept_products(block, config)
    numbers = 2 * C + attention_width(attn, run)  # outputs of the norms, which the products take; q, k, v
    # attention's output for each token; torch's kernel for a CPU keeps a second one, by head
    numbers += C if run.on_gpu or by_blocks(config.sequence_len, block.window) else 2 * C
    numbers += 0 if "down" in kept else hidden_width(block, run)  # relu's output
    numbers += statistics(config, run)
    parts = {"qkv": (attn.q, attn.k, attn.v), "o": (attn.o,), "up": (mlp.up,), "down": (mlp.down,)}
    for name, layers in parts.items():
        numbers += after_activation(layers)
        if in_float8(layers, run):  # what the products take, a byte a number
            numbers += (layers[0].in_features + ranks(layers)) // 2
        elif name not in kept:
            numbers += joint_product(layers)
    return numbers


def numbers_of_partitioner(block, config: GPTConfig, run: Execution) -> int:
    """What torch's partitioner keeps of a compiled block beside its input."""
    attn = block.attn
    mlp = block.mlp
    C = config.n_embd
    M = hidden_width(block, run)
    # q, k, v, attention's output, the MLP's first product
    least = attention_width(attn, run) + C + M + statistics(config, run)
    on_top = C  # where all may be kept: the norms' outputs, relu's square
    of_attention = (attn.q, attn.k, attn.v, attn.o)
    of_mlp = (mlp.up, mlp.down)
    if in_float8(of_attention, run):  # what products take is made again, but for what is r wide
        least += (ranks(of_attention) + after_activation(of_attention)) // 2
    else:
        least += joint_product(of_attention[:3]) + attn.o.rank
        on_top += C + after_activation(of_attention)
    if in_float8(of_mlp, run):
        least += (ranks(of_mlp) + after_activation(of_mlp)) // 2
    else:
        least += ranks(of_mlp)
        on_top += M + after_activation(of_mlp)
    if run.budget == 1:
        return least + on_top
    share = int(run.budget * (least + on_top))
    if run.float8:  # little can be computed again without a product: the partitioner keeps less, as measured
        return share - (least + on_top) // 5 if run.budget > 0.5 else share * 3 // 5
    # what costs no product is computed again first, which takes the residual stream after attention
    return min(least + C, least + on_top) if least + C < share else share


def attention_width(attn, run: Execution) -> int:
    """Numbers of q, k and v, as attention keeps them: with a mask the heads share no keys."""
    C = attn.q.out_features
    return 3 * C if run.masked else C + 2 * attn.k.out_features


def in_float8(layers, run: Execution) -> bool:
    return run.float8 and all(suits(layer.in_features, layer.out_features, layer.rank) for layer in layers)


def hidden_width(block, run: Execution) -> int:
    """Width of the MLP's hidden layer, as far as it is ever in memory whole."""
    return 0 if is_fused(block, run) else block.mlp.up.out_features


def is_fused(block, run: Execution) -> bool:
    return run.fused and run.on_gpu and fits(block.mlp)


def joint_product(layers) -> int:
    """Numbers of the product that first factors and full matrices share: second factors keep all of it."""
    if ranks(layers) == 0:
        return 0
    return sum(layer.rank or layer.out_features for layer in layers)


def ranks(layers) -> int:
    """Numbers of the products r wide."""
    return sum(layer.rank for layer in layers)


def after_activation(layers) -> int:
    """Numbers behind the function between two factors, beside those before it."""
    return sum(layer.rank for layer in layers if layer.rank and layer.act != "none")


def statistics(config: GPTConfig, run: Execution) -> int:
    """float32 numbers of the norms of the stream, q and k and of attention, in numbers of the dtype."""
    return (2 + 2 * config.n_head + config.n_kv_head) * 4 // run.dtype_bytes


def copied_weights(block, run: Execution) -> int:
    """Entries of matrices that an eager block keeps a copy of."""
    if run.casts:
        return sum(p.numel() for p in block.parameters())
    return joined_weights(block)


def joined_weights(block) -> int:
    """Entries of the matrix by which q, k and v have one product."""
    return sum(first_factor(layer).numel() for layer in (block.attn.q, block.attn.k, block.attn.v))


def mask_entries(block, config: GPTConfig, run: Execution) -> int:
    """Entries of the mask that a layer with a window keeps."""
    return config.sequence_len**2 if run.masked and block.window < config.sequence_len else 0


def copies_of_partitioner(block, run: Execution) -> int:
    """Likewise of a compiled block; the last matrix of the MLP is cast again."""
    if not run.casts or run.budget < 1 or run.float8:
        return joined_weights(block)
    return sum(p.numel() for p in block.parameters()) - first_factor(block.mlp.down).numel()


def first_factor(layer):
    return layer.A if layer.rank else layer.weight


def backward_bytes(block, config: GPTConfig, run: Execution) -> int:
    """Bytes that come on top of what a block has kept, at the highest point of its backward pass."""
    in_mlp = mlp_backward_bytes(block, config, run)
    if run.on_gpu and is_recomputed(block, config):  # attention may be the last to be computed again
        return max(in_mlp, run.token_bytes(config) * attention_backward_numbers(block, config, run))
    return in_mlp


def mlp_backward_bytes(block, config: GPTConfig, run: Execution) -> int:
    """While it is in the MLP."""
    token = run.token_bytes(config)
    C = config.n_embd
    kept = kept_products(block, config)
    if run.partitioned and "up" in kept:
        # the MLP's hidden layer follows from up's product: attention is computed again later
        return token * 5 * C + hidden_bytes(block, config, run, 2)
    # the gradient that goes on; of the MLP's hidden layer two tensors, three where relu's output was not kept
    wide = 3 if "down" in kept else 2
    if run.partitioned and not is_recomputed(block, config):
        wide = 1 if run.budget == 1 else 2
    if in_float8((block.mlp.up, block.mlp.down), run) and not (
        run.partitioned and is_recomputed(block, config)
    ):
        wide += 2  # rounded copies, also of transposed tensors
    extra = token * C + hidden_bytes(block, config, run, wide)
    if is_recomputed(block, config):
        extra += token * numbers_for_backward(block, config, run)
        extra += run.dtype_bytes * (copied_weights(block, run) + mask_entries(block, config, run))
    return extra


def hidden_bytes(block, config: GPTConfig, run: Execution, tensors: int) -> int:
    """Bytes of so many tensors of the MLP's hidden layer, for the rows that have it at a time."""
    width = block.mlp.up.out_features
    rows = run.rows * config.sequence_len
    if is_fused(block, run):
        rows = min(rows, backward_rows(width))
        tensors = 2
    elif not run.on_gpu:
        rows = tile_rows(rows, width, run.dtype_bytes)
    return tensors * rows * width * run.dtype_bytes


def attention_backward_numbers(block, config: GPTConfig, run: Execution) -> int:
    """Numbers a token while it is in attention, which has been computed again."""
    C = config.n_embd
    attn = block.attn
    kept = kept_products(block, config)
    in_float32 = C * 4 // run.dtype_bytes
    if not run.partitioned:  # with the gradients of the stream and of attention, and the norm's float32
        mlp = 0 if "down" in kept else hidden_width(block, run)
        return numbers_for_backward(block, config, run) - mlp + 2 * C + 3 * in_float32
    qkv = attention_width(attn, run)
    # the stream and its gradient; q, k, v and output with theirs; the gradient of q is a float32 sum
    numbers = 2 * C + 2 * (qkv + C) + in_float32
    numbers += 0 if "qkv" in kept else joint_product((attn.q, attn.k, attn.v))
    return numbers + (0 if "o" in kept else attn.o.rank)


# ---- head and update ---------------------------------------------------------------------------------------


def head_bytes(config: GPTConfig, width: int, run: Execution) -> int:
    """Bytes in the head at once: its input, its gradients, tensors as large as a chunk of logits."""
    V = config.vocab_size
    tokens = run.rows * config.sequence_len
    chunk = min(chunk_rows(width, V, run.on_gpu, run.compiled), tokens)
    logits = 0 if run.partitioned else 2 * 4  # bytes for each: in float32, and
    copies = 0
    if run.dtype_bytes < 4:  # one in the dtype
        logits += run.dtype_bytes
    if run.casts:
        copies = V * width * run.dtype_bytes
    return run.token_bytes(config) * (config.n_embd + 2 * width) + V * chunk * logits + copies


def largest_muon_group(model: GPT) -> int:
    """Bytes of the largest group of matrices of one shape: Muon works on all of a group at a time."""
    groups: dict[tuple, int] = {}
    for name, parameter in model.named_parameters():
        if uses_muon(name, parameter):
            key = (name.rsplit(".", 1)[1], *parameter.shape)
            groups[key] = groups.get(key, 0) + 4 * parameter.numel()
    return max(groups.values())
