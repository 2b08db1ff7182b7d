"""The loss of the head in compiled code, on a GPU that computes nothing: what it holds and launches."""

import json

import null_gpu
import pytest

pytestmark = null_gpu.marks

PROGRAM = """
import json
from functools import partial

import nullgpu
import torch

from nanochat.compiler import chunk_loss, compiled_loss
from nanochat.ops import rows_at_once

N, C, V = 16384, 1280, 65536
x = torch.zeros(N, C, device="cuda", dtype=torch.bfloat16, requires_grad=True)
weight = torch.zeros(V, C, device="cuda", dtype=torch.bfloat16, requires_grad=True)
targets = torch.zeros(N, device="cuda", dtype=torch.long)
loss = partial(compiled_loss, torch.compile(chunk_loss, dynamic=False, fullgraph=True))
loss(x, weight, targets).backward()
x.grad = weight.grad = None
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_allocated()
launches = nullgpu.launches()
result = loss(x, weight, targets)
entry = {"launches": nullgpu.launches() - launches, "chunks": N // rows_at_once(x, V, compiled=True)}
result.backward()
entry["peak"] = torch.cuda.max_memory_allocated() - before
print(json.dumps(entry))
"""


def test_a_chunk_of_logits_its_gradients_and_the_sum_of_the_heads_are_all_that_the_loss_holds(tmp_path):
    result = json.loads(null_gpu.run_source(PROGRAM, tmp_path)[-1])
    N = 16384
    C = 1280
    V = 65536
    assert result["chunks"] == 4
    # logits and gradient of x in bfloat16, that of the head in float32
    assert result["peak"] == pytest.approx(2 * 4096 * V + 2 * N * C + 4 * V * C, rel=0.02)
    # three products, three kernels of compiled code and a sum of the loss for each chunk
    assert result["launches"] <= 7 * result["chunks"] + 3
