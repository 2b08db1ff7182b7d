"""Items 4, 5 and 7: products by rank, the loss by the size of its chunks, the optimizers alone."""

import torch
import torch.nn.functional as F
from loss_memory import make_inputs, measure_chunks
from train_step import RATES

from gpu import models
from gpu.runner import Setting
from nanochat import compiler, ops
from nanochat.benchmark import spread, take_turns
from nanochat.optim import build_optimizers

RANKS = (320, 380, 384, 448)  # d/4, the recipe's 0.297 d as it is, and multiples of 64 near it
CHUNK_ROWS = (1024, 2048, 4096, 8192, 16384)
SAMPLE_SECONDS = 0.02
REPEATS = 7


def repeats(setting: Setting) -> int:
    return 2 if setting.tiny else REPEATS


# ---- products ----------------------------------------------------------------------------------------------


def products(setting: Setting):
    """Forward and backward time of a layer at each rank, for the two shapes of a block's matrices."""
    config = models.dense_config(setting.tiny)
    C = config.n_embd
    N = setting.rows * config.sequence_len
    ranks = [rank * C // 1280 for rank in RANKS]
    entries = {}
    for out_features in (C, 4 * C):
        x = torch.randn(N, C, device=setting.device, dtype=setting.dtype, requires_grad=True)
        layers = {"full rank": full_rank_layer(x, out_features)}
        for rank in ranks:
            layers[f"r = {rank}"] = low_rank_layer(x, out_features, rank)
        runs = {name: {"pass": run} for name, (run, _) in layers.items()}
        seconds = take_turns(runs, repeats(setting), setting.device, SAMPLE_SECONDS)
        for name, measured in seconds.items():
            flops = 6 * N * layers[name][1]
            pairs = zip(measured["pass"], seconds["full rank"]["pass"])
            entries[f"{C} to {out_features}, {name}"] = {
                "seconds": spread(measured["pass"]),
                "flops per second": flops / spread(measured["pass"])["median"],
                "time to full rank": spread([own / full for own, full in pairs]),
                "flops to full rank": layers[name][1] / layers["full rank"][1],
            }
        yield entries


def full_rank_layer(x, out_features: int):
    """(function: a forward and backward pass, number of weights)"""
    weight = torch.randn(out_features, x.size(1), device=x.device, dtype=x.dtype, requires_grad=True)
    grad = torch.randn(len(x), out_features, device=x.device, dtype=x.dtype)
    return lambda: torch.autograd.grad(F.linear(x, weight), (x, weight), grad), weight.numel()


def low_rank_layer(x, out_features: int, rank: int):
    A = torch.randn(rank, x.size(1), device=x.device, dtype=x.dtype, requires_grad=True)
    B = torch.randn(out_features, rank, device=x.device, dtype=x.dtype, requires_grad=True)
    grad = torch.randn(len(x), out_features, device=x.device, dtype=x.dtype)

    def run():
        torch.autograd.grad(F.linear(F.linear(x, A), B), (x, A, B), grad)

    return run, A.numel() + B.numel()


# ---- the loss ----------------------------------------------------------------------------------------------


def loss_chunks(setting: Setting):
    """Time and peak memory of the loss with its gradients, by the rows of a chunk."""
    config = models.dense_config(setting.tiny)
    N = setting.rows * config.sequence_len
    V = config.vocab_size
    inputs = make_inputs(N, config.n_embd, V, setting.device, setting.dtype)
    default = min(N, ops.rows_at_once(inputs[0], V, compiled=True))
    chunk_rows = (64, 128) if setting.tiny else CHUNK_ROWS
    sizes = sorted({default, *(rows for rows in chunk_rows if rows <= N)})
    chunk = torch.compile(compiler.chunk_loss, dynamic=False, fullgraph=True, backend=setting.backend)
    torch._dynamo.config.recompile_limit = 64  # each size is compiled
    entries = {}
    for rows, entry in measure_chunks(inputs, sizes, chunk, repeats(setting)).items():
        flops = 6 * N * V * config.n_embd
        chosen = {"as in training": rows == default}
        entries[f"{rows} rows"] = entry | chosen | {"flops per second": flops / entry["seconds"]["median"]}
    yield entries


# ---- the optimizers ----------------------------------------------------------------------------------------


def optimizers(setting: Setting):
    """The update alone, by AdamW and by Muon, on random gradients."""
    runs = {}
    for name in (models.DENSE, models.QUARTER):
        model = models.random_model(models.variant(name, setting.tiny).config, setting.device)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        adamw, muon = build_optimizers(model, RATES, dtype=setting.dtype)
        runs[name] = {"AdamW": adamw.step, "Muon": muon.step}
    entries = {}
    for name, measured in take_turns(runs, repeats(setting), setting.device, SAMPLE_SECONDS).items():
        entries[name] = {part: spread(values) for part, values in measured.items()}
    yield entries
