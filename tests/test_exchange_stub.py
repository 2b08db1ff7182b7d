"""Two processes on imaginary GPUs: gradients leave while the backward pass launches its kernels."""

import re

import null_gpu
import pytest

pytestmark = null_gpu.marks

PROGRAM = """
import nullgpu
import torch
from nanochat import compiler, processes, signals
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Rates
from nanochat.trainable import Trainable
from scripts import base_train

world = processes.init_process("cuda")
with torch.device(world.device):
    model = GPT(GPTConfig(sequence_len=256, vocab_size=8192, n_layer=12, n_head=4, n_kv_head=4, n_embd=512))
    model.init_weights()
    rows = torch.zeros(2, 256, dtype=torch.long)
trainable = Trainable(model, Rates(0.1, 0.01, 0.02, 0.01))
trainable.make_optimizers(world, torch.bfloat16)
if COMPILE:
    compiler.compile_blocks(model)
batches = iter([(rows, rows)] * 4)
for step in range(2):  # the first one makes the optimizer's state
    nullgpu.log(f"FOLDER/log{world.rank}" if step else None)
    nullgpu.mark("forward and backward")
    base_train.forward_backward(trainable, batches, 2, torch.bfloat16, signals.NEVER)
    nullgpu.mark("update")
    base_train.gradient_norm(trainable, 1.0)
    base_train.update(trainable, 0, 1.0)
    nullgpu.log(None)
    trainable.exchange.clear()
if world.rank == 0:
    print("parameters", sum(p.numel() for p in model.parameters()))
    print("vectors", sum(p.numel() for p in model.parameters() if p.ndim == 1))
    print("kept bytes", sum(p.nbytes for p in model.parameters()))
processes.end_process()
"""
DTYPES = {"7": "float32", "8": "float64", "9": "bfloat16"}  # NCCL's numbers


def collectives(log: list[str]) -> list[str]:
    return [line.rsplit(" rank", 1)[0] for line in log if line.startswith("N ")]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_leave_while_the_backward_pass_goes_on(tmp_path, compiled):
    source = PROGRAM.replace("FOLDER", str(tmp_path)).replace("COMPILE", str(compiled))
    printed = null_gpu.run_source(source, tmp_path, processes=2)
    words = dict(line.rsplit(" ", 1) for line in printed)
    sizes = {name: int(value) for name, value in words.items()}
    logs = [(tmp_path / f"log{rank}").read_text("utf-8").splitlines() for rank in range(2)]
    assert collectives(logs[0]) == collectives(logs[1])  # one order on both

    update = next(i for i, line in enumerate(logs[0]) if "MARK update" in line)
    sent = [i for i, line in enumerate(logs[0]) if line.startswith("N ReduceScatter")]
    assert len(sent) >= 5 and sent[-1] < update
    for first, second in zip(sent[:4], sent[1:]):
        kernels = [line for line in logs[0][first:second] if line.startswith("K ")]
        assert len(kernels) > 10, "the backward pass goes on between two buckets"

    entries = {}
    for line in collectives(logs[0]):
        name, count, dtype = re.fullmatch(r"N (\w+) count (\d+) type (\d+)", line).groups()
        key = name, DTYPES[dtype]
        entries[key] = entries.get(key, 0) + int(count) * (1 if name == "AllReduce" else 2)
    for name in ("ReduceScatter", "AllGather"):
        matrices = sizes["parameters"] - sizes["vectors"]
        assert matrices <= entries[name, "bfloat16"] <= 1.0625 * matrices
        assert sizes["vectors"] <= entries[name, "float32"] <= sizes["vectors"] + 4
    assert entries["AllReduce", "float32"] == 3 and entries["AllReduce", "float64"] == 1
    assert sizes["kept bytes"] == 2 * sizes["parameters"] + 2 * sizes["vectors"]
    waits = [line for line in logs[0] if line.startswith("SYNC")]
    assert len(waits) <= 3, "the program waits for the loss, for the norm, and for nothing else"
