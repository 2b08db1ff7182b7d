"""Training steps on the null GPU, as scripts.base_train makes them; prints what they cost as a line of JSON.

    run.sh tests/null_gpu_steps.py DEPTH [MODEL…]      # of MODELS below; default: all

For each model, eager and then compiled: the allocator's peak in GiB, and from the stub's log of one step its
launches, its collectives and the times that the host waits for the device.
"""

import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import nullgpu
import torch
from torch._dynamo.utils import counters
from train_step import RATES, noise_rows

from nanochat import compiler, processes, recompute
from nanochat.dataloader import training_batches
from nanochat.gpt import GPT, GPTConfig
from nanochat.processes import World
from nanochat.signals import StopRequest
from nanochat.trainable import Trainable
from scripts import base_train

DEVICE = torch.device("cuda", 0)
WORLD = World(DEVICE)
ROWS = 32
DENSE = GPTConfig(sequence_len=2048, vocab_size=65536, n_layer=2, n_head=10, n_kv_head=10, n_embd=1280)
FACTORED = dict(attn_ranks=(0.25,), mlp_ranks=(0.25,))
MODELS = {
    "dense": {},
    "r = d/4": FACTORED,
    "r = d/4, recompute": FACTORED | {"recompute": "bottleneck"},
    "dense, block": {"recompute": "block"},
}


def config_of(name: str, depth: int) -> GPTConfig:
    changes = {}
    for field, value in MODELS[name].items():
        changes[field] = value * depth if isinstance(value, tuple) else value
    return replace(DENSE, n_layer=depth, **changes)


def build(config: GPTConfig) -> Trainable:
    with torch.device(DEVICE):
        model = GPT(config)
        model.init_weights()
    recompute.apply(model)
    trainable = Trainable(model, RATES)
    trainable.make_optimizers(WORLD, torch.bfloat16)
    return trainable


def one_step(trainable: Trainable, batches):
    """What `base_train.train_steps` does between two steps' lines."""
    stop = StopRequest()
    base_train.forward_backward(trainable, batches, 1, torch.bfloat16, stop)
    base_train.gradient_norm(trainable, 0.0)
    trainable.before_update()
    base_train.update(trainable, 0, 1.0)
    trainable.after_update()
    trainable.model.zero_grad()


def logged(run) -> list[str]:
    """The stub's log of run()."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log")
        torch.cuda.synchronize()
        nullgpu.log(str(path))
        run()
        nullgpu.log(None)
        return path.read_text("utf-8").splitlines()


def measure(trainable: Trainable, batches) -> dict:
    for _ in range(2):  # the second step has optimizer state
        one_step(trainable, batches)
    next(batches)  # the thread that loads data may still copy one
    gc.collect()  # a compilation leaves tensors in cycles
    torch.cuda.reset_peak_memory_stats()
    lines = logged(lambda: one_step(trainable, batches))
    kinds = [line.split(" ", 1)[0] for line in lines]
    waits = [line for line in lines if line.startswith(("SYNC", "CPY sync")) or "pageable" in line]
    return {
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        "launches": sum(kind in ("K", "T", "G", "S", "SET") for kind in kinds),
        "waits": waits,
        "marks": sorted({line for line in lines if line.startswith("MARK")}),
    }


def main():
    depth = int(sys.argv[1])
    processes.init_process("cuda")  # chooses the kernels of attention
    rows = noise_rows(DENSE.vocab_size, DENSE.sequence_len)
    results = {}
    for name in sys.argv[2:] or MODELS:
        trainable = build(config_of(name, depth))
        batches = training_batches(rows, 0, ROWS, WORLD)
        torch._dynamo.reset()
        counters.clear()
        results[name] = {"eager": measure(trainable, batches)}
        compiler.compile_blocks(trainable.model)
        results[name]["compiled"] = measure(trainable, batches) | {
            "graphs": counters["stats"]["unique_graphs"],
            "graph breaks": sum(counters["graph_break"].values()),
        }
        del trainable, batches
        gc.collect()  # models and optimizers refer to each other
        print(json.dumps(results), flush=True)


main()
