"""The models of the ladder: d20, and what is compared with it."""

import functools
from dataclasses import dataclass, field, replace

import torch
from train_step import RATES, Subject, noise_rows

from gpu.runner import Setting
from nanochat import recompute
from nanochat.accounting import account
from nanochat.compiler import compile_blocks
from nanochat.dataloader import training_batches
from nanochat.fp8 import train_in_float8
from nanochat.gpt import GPT, GPTConfig
from nanochat.mlp_kernel import use_mlp_kernel
from nanochat.optim import build_optimizers
from nanochat.peak import Execution, predict_peak
from nanochat.processes import World

DENSE = "dense"
QUARTER = "r = d/4"
RECIPE = "recipe"
RECOMPUTE = "r = d/4, recompute"
FUSED = "r = d/4, fused MLP"
FULL_CONTEXT = "dense, L"
FP8 = "dense, fp8"
BLOCK = "dense, recompute block"
BUDGET = "dense, activation budget 0.7"
HALF = "dense, half the layers"
NARROW = "dense, narrower"
# Each group takes turns in one process, the most important first. Blocks that differ in the activation budget
# alone would share a compilation, so that model is by itself.
GROUPS = (
    (DENSE, QUARTER, RECIPE, RECOMPUTE, FUSED),
    (DENSE, FP8, FULL_CONTEXT, NARROW, BLOCK, HALF),
    (BUDGET,),
)
EXPLANATIONS = {
    DENSE: "full rank, windows SSSL",
    QUARTER: "attention and MLP at rank d/4",
    RECIPE: "speedrun.sh: attention d/4, MLP 0.297 d, v and o full rank",
    RECOMPUTE: "with --recompute bottleneck",
    FUSED: "with --mlp-kernel fused",
    FULL_CONTEXT: "every layer sees the whole context",
    FP8: "with --fp8",
    BLOCK: "with --recompute block",
    BUDGET: "with --activation-budget 0.7",
    HALF: "half the layers at the same width",
    NARROW: "as many parameters as r = d/4, at a smaller width",
}


class NotHere(RuntimeError):
    """This version, or this machine, cannot run the model."""


@dataclass(frozen=True)
class Variant:
    """A model: its shape, and how it computes."""

    config: GPTConfig
    options: dict = field(default_factory=dict)


def dense_config(tiny: bool) -> GPTConfig:
    if tiny:
        return GPTConfig(64, 512, 4, 2, 2, 128)
    return GPTConfig(2048, 65536, 20, 10, 10, 1280)


def low_rank(config: GPTConfig, attn_rank: float, mlp_rank: float, **changes) -> GPTConfig:
    layers = config.n_layer
    ranks = dict(attn_ranks=(attn_rank,) * layers, mlp_ranks=(mlp_rank,) * layers)
    return replace(config, **ranks, rank_multiple=-1, **changes)


def as_large_as(config: GPTConfig, params: int) -> GPTConfig:
    """The full-rank model whose heads are as many as bring it nearest to so many parameters."""
    head_dim = config.n_embd // config.n_head

    def narrow(heads: int) -> GPTConfig:
        return replace(config, n_head=heads, n_kv_head=heads, n_embd=heads * head_dim)

    def distance(heads: int) -> int:
        return abs(account(narrow(heads))["params/total"] - params)

    return narrow(min(range(1, config.n_head + 1), key=distance))


@functools.cache
def variant(name: str, tiny: bool) -> Variant:
    dense = dense_config(tiny)
    quarter = low_rank(dense, 0.25, 0.25)
    full_rank = (0,) * dense.n_layer
    configs = {
        DENSE: dense,
        QUARTER: quarter,
        RECIPE: low_rank(dense, 0.25, 0.297, matrix_ranks={"v": full_rank, "o": full_rank}),
        RECOMPUTE: replace(quarter, recompute="bottleneck"),
        FUSED: quarter,
        FULL_CONTEXT: replace(dense, window_pattern="L"),
        FP8: dense,
        BLOCK: replace(dense, recompute="block"),
        BUDGET: dense,
        HALF: replace(dense, n_layer=dense.n_layer // 2),
        NARROW: as_large_as(dense, account(quarter)["params/total"]),
    }
    options = {FUSED: {"mlp_kernel": "fused"}, FP8: {"fp8": True}, BUDGET: {"activation_budget": 0.7}}
    return Variant(configs[name], options.get(name, {}))


def two_layers(config: GPTConfig) -> GPTConfig:
    """A block of each kind: its compilation serves the whole model."""
    pattern = "L" if config.window_pattern == "L" else "SL"
    ranks = dict(attn_ranks=config.attn_ranks[:2], mlp_ranks=config.mlp_ranks[:2])
    matrix_ranks = {name: values[:2] for name, values in config.matrix_ranks.items()}
    return replace(config, n_layer=2, window_pattern=pattern, matrix_ranks=matrix_ranks, **ranks)


def apply_options(model: GPT, options: dict):
    """Let a model compute as its options say. NotHere where this version has no such way."""
    if options.get("fp8"):
        if model.smear.device.type != "cuda":
            raise NotHere("float8 needs a GPU")
        train_in_float8(model)
    if options.get("mlp_kernel") == "fused":
        if model.smear.device.type != "cuda":
            raise NotHere("the fused MLP needs a GPU")
        use_mlp_kernel(model, "fused")


def random_model(config: GPTConfig, device) -> GPT:
    """Random weights everywhere: products of zeros take less time, and orthogonal factors long to make."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(config)
        model.init_scalars()
        for p in model.parameters():
            if p.ndim == 2:
                torch.nn.init.uniform_(p, -0.05, 0.05)
    return model


def build(name: str, chosen: Variant, setting: Setting, rows) -> Subject:
    """The compiled model with its optimizers and batches. rows: a `dataloader.Rows`."""
    model = random_model(chosen.config, setting.device)
    recompute.apply(model)
    apply_options(model, chosen.options)
    torch._dynamo.config.recompile_limit = 64  # the default of 8 is for one model
    compile_blocks(model, setting.backend, chosen.options.get("activation_budget", 1.0))
    optimizers = build_optimizers(model, RATES, dtype=setting.dtype)
    batches = training_batches(rows, 0, setting.rows, World(setting.device))
    return Subject(name, model, optimizers, batches, setting.dtype)


def noise(setting: Setting):
    config = dense_config(setting.tiny)
    return noise_rows(config.vocab_size, config.sequence_len)


# ---- what fits ---------------------------------------------------------------------------------------------


def execution(name: str, setting: Setting) -> Execution:
    """How a model is trained here, for `predict_peak`."""
    options = variant(name, setting.tiny).options
    return Execution(
        setting.rows,
        setting.dtype.itemsize,
        device_type=setting.device_type,
        compiled=True,
        budget=options.get("activation_budget", 1.0),
        float8=options.get("fp8", False),
        fused=options.get("mlp_kernel") == "fused",
    )


def common_rows(setting: Setting, gib: float) -> int:
    """Rows of a pass with which the models of each group fit together into a card's memory.

    The states of all stay, and one model computes at a time.
    """
    if setting.tiny:
        return 4
    for rows in (32, 16, 8, 4):
        if max(group_gib(group, replace(setting, rows=rows)) for group in GROUPS) < 0.93 * gib:
            return rows
    return 2


def group_gib(group: tuple, setting: Setting) -> float:
    states = 0
    working = 0
    for name in group:
        config = variant(name, setting.tiny).config
        costs = account(config)
        state = costs["mem/weights_bytes"] + costs["mem/optimizer_bytes"]
        peak = predict_peak(config, execution(name, setting))["mem/predicted_peak_bytes"]
        states += state
        working = max(working, peak - state)
    return (states + working) / 2**30
