"""Item 2: does the card compute what a CPU computes? And meanwhile the compiler works for item 6."""

import copy
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from loss_memory import measure as measure_loss
from train_step import RATES

from gpu import models
from gpu.runner import Item, Setting
from nanochat import recompute
from nanochat.compiler import compile_blocks
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import build_optimizers

# largest relative differences from the CPU in float32: (first loss, gradients, loss after the steps). After
# the steps they are larger, since Muon orthogonalises in bfloat16 on a GPU
TOLERANCES = {"float32": (1e-4, 1e-3, 0.02), "bfloat16": (1e-2, 0.05, 0.05)}
# of gradients in bfloat16, or in float8, from those in float64 on a CPU; compiled ones also by the error of
# eager ones
LARGEST_ERROR = {"bfloat16": 0.05, "float8": 0.25}
LARGEST_ERROR_RATIO = 1.5
SHAPE = GPTConfig(256, 1024, 2, 2, 2, 256, window_pattern="SL")
LOW = dict(attn_ranks=(64,) * 2, mlp_ranks=(64,) * 2)
BLOCKS = {
    "windows S and L": {},
    "grouped queries": {"n_kv_head": 1},
    "T = 192": {"sequence_len": 192},
    "low rank": LOW,
    "low rank, recompute bottleneck": LOW | {"recompute": "bottleneck"},
    "recompute block": {"recompute": "block"},
    "value embeddings": {"value_embeddings": True},
    "fused MLP": LOW,
    "fused MLP, recompute bottleneck": LOW | {"recompute": "bottleneck"},
    "float8": {},
    "float8, low rank": dict(attn_ranks=(128,) * 2, mlp_ranks=(128,) * 2),
}
OPTIONS = {  # as of `models.apply_options`
    "fused MLP": {"mlp_kernel": "fused"},
    "fused MLP, recompute bottleneck": {"mlp_kernel": "fused"},
    "float8": {"fp8": True},
    "float8, low rank": {"fp8": True},
}


def items(tiny: bool) -> list[Item]:
    """The compilations first: they take longest."""
    compilers = [] if tiny else compilations()  # the compiler in miniature keeps nothing
    checks = [Item("check: training steps", training_steps, 60), Item("check: loss", loss_in_chunks, 60)]
    for name, changes in BLOCKS.items():
        options = OPTIONS.get(name, {})
        checks.append(Item(f"check: {name}", partial(compiled_gradients, changes, options), 80))
    return compilers + checks


def compilations() -> list[Item]:
    """Items that compile a block of each kind of each model of item 6; what they make is found there."""
    names = dict.fromkeys(chain(*models.GROUPS))
    return [Item(f"compile: {name}", partial(compile_one, name), 80) for name in names]


def compile_one(name: str, setting: Setting):
    rows = models.noise(setting)
    chosen = models.variant(name, setting.tiny)
    chosen = replace(chosen, config=models.two_layers(chosen.config))
    subject = models.build(name, chosen, setting, rows)
    subject.step(lambda part: None)
    yield {}


def wake(model: GPT):
    """Draw the matrices that begin as zeros, so that every gradient is a test."""
    for block in model.blocks:
        block.attn.o.init()
        block.mlp.down.init()
    model.lm_head.init()


# ---- steps against the CPU ---------------------------------------------------------------------------------


def training_steps(setting: Setting):
    """An entry for each model and dtype: the relative differences of the device from the CPU in float32."""
    if setting.device_type == "cuda":
        torch.set_float32_matmul_precision("highest")  # float32 without TF32
    entries = []
    for name, rank in (("full rank", 0), ("low rank", 32)):
        torch.manual_seed(0)
        ranks = (rank,) * 2
        model = GPT(GPTConfig(128, 1024, 2, 2, 2, 128, attn_ranks=ranks, mlp_ranks=ranks))
        model.init_weights()
        wake(model)
        first, gradient, last = train_steps(model, torch.device("cpu"), torch.float32)
        for dtype_name, limits in TOLERANCES.items():
            values = train_steps(model, setting.device, getattr(torch, dtype_name))
            differences = {
                "first loss": abs(values[0] / first - 1),
                "gradients": relative_difference(values[1], gradient),
                "loss after steps": abs(values[2] / last - 1),
            }
            ok = all(difference <= limit for difference, limit in zip(differences.values(), limits))
            entries.append({"what": f"{name}, {dtype_name}", **differences, "ok": ok})
            yield entries


def train_steps(model: GPT, device, dtype, steps: int = 5):
    """(first loss, its gradients, loss after the steps) on one random batch."""
    model = copy.deepcopy(model).to(device)
    optimizers = build_optimizers(model, RATES)
    tokens = torch.randint(1024, (4, 129), generator=torch.Generator().manual_seed(1)).to(device)
    losses = []
    for step in range(steps):
        loss = model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), dtype)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            gradient = all_gradients(model)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return losses[0], gradient, losses[-1]


def all_gradients(model: GPT):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double().cpu()


def relative_difference(value, reference) -> float:
    return ((value - reference).norm() / reference.norm()).item()


# ---- compiled blocks ---------------------------------------------------------------------------------------


def compiled_gradients(changes: dict, options: dict, setting: Setting):
    """Gradients of eager and of compiled blocks in the training's dtype, against float64 on the CPU."""
    torch.manual_seed(0)
    config = replace(SHAPE, **changes)
    model = GPT(config)
    model.init_weights()
    wake(model)
    reference = gradients(copy.deepcopy(model).double(), torch.float64)
    model = model.to(setting.device)
    recompute.apply(model)
    models.apply_options(model, options)
    eager = relative_difference(gradients(model, setting.dtype), reference)
    model.zero_grad()
    compile_blocks(model, backend=setting.backend)
    compiled = relative_difference(gradients(model, setting.dtype), reference)
    largest = LARGEST_ERROR["float8" if options.get("fp8") else "bfloat16"]
    ok = eager <= largest and compiled <= max(LARGEST_ERROR_RATIO * eager, 1e-3)
    yield {"eager": eager, "compiled": compiled, "ok": ok}


def gradients(model: GPT, dtype):
    T = model.config.sequence_len
    tokens = torch.randint(1024, (4, T + 1), generator=torch.Generator().manual_seed(1))
    tokens = tokens.to(model.smear.device)
    model(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), dtype).backward()
    return all_gradients(model)


# ---- the loss ----------------------------------------------------------------------------------------------


def loss_in_chunks(setting: Setting):
    """The loss in chunks against the plain one: agreement, time, peak."""
    entries = []
    N, C, V = (256, 32, 512) if setting.tiny else (8192, 768, 32768)
    for dtype_name, limit in (("float32", 1e-4), ("bfloat16", 0.02)):
        if setting.device_type == "cuda":
            torch.set_float32_matmul_precision("highest")
        result = measure_loss(N, C, V, setting.device, getattr(torch, dtype_name), repeats=3)
        ok = max(result["relative difference"].values()) <= limit
        entries.append({"what": f"{dtype_name}, {N} x {C}, vocabulary {V}", **result, "ok": ok})
        yield entries
