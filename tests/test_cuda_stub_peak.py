"""The predicted peak of a training step against the allocator, under a stub of CUDA: d12 and d20, whole."""

import json

import null_gpu
import pytest

pytestmark = null_gpu.marks

# steps as base_train makes them, the second with the optimizer's state from the start
STEPS = """
import itertools, json
import torch
from nanochat import compiler
from nanochat.fp8 import train_in_float8
from nanochat.gpt import GPTConfig
from nanochat.mlp_kernel import use_mlp_kernel
from nanochat.optim import Rates
from nanochat.peak import Execution, predict_peak
from nanochat.processes import end_process, init_process, print0
from nanochat.signals import NEVER
from nanochat.trainable import Trainable
from scripts.base_train import build_model, forward_backward, gradient_norm, update

world = init_process("cuda")
for case in json.loads(CASES):
    run = Execution(32, 2, device_type="cuda", processes=world.size, **case["run"])
    config = GPTConfig(**case["config"])
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    model = build_model(config, 1, world.device)
    if run.float8:
        train_in_float8(model)
    use_mlp_kernel(model, "fused" if run.fused else "auto")
    trainable = Trainable(model, Rates(0.3, 0.004, 0.02, 0.1))
    trainable.make_optimizers(world, torch.bfloat16)
    if run.compiled:
        torch._dynamo.reset()
        compiler.compile_blocks(model, budget=run.budget)
    x = torch.zeros(run.rows, config.sequence_len, dtype=torch.long, device=world.device)
    batches = itertools.repeat((x, x))
    for step in range(2):
        torch.cuda.reset_peak_memory_stats()
        forward_backward(trainable, batches, 1 + run.accumulated, torch.bfloat16, NEVER)
        gradient_norm(trainable, -1)
        update(trainable, step, 1.0)
        trainable.exchange.clear()
    predicted = predict_peak(config, run)["mem/predicted_peak_bytes"]
    print0(json.dumps([torch.cuda.max_memory_allocated() - base, predicted]))
    compiler.make_eager(model)
    del model, trainable, x, batches
end_process()
"""

BUDGET = dict(budget=0.7)
CONFIGURATIONS = {
    "full rank, windows": ({}, {}),
    "full rank": (dict(window_pattern="L"), {}),
    "r = d/4": (dict(attn=0.25, mlp=0.25), {}),
    "r = d/4, bottleneck": (dict(attn=0.25, mlp=0.25, recompute="bottleneck"), {}),
    "full rank, block": (dict(recompute="block"), {}),
    "half": (dict(attn=0.25, mlp=0.297, vo=0), {}),
    "half, bottleneck": (dict(attn=0.25, mlp=0.297, vo=0, recompute="bottleneck"), {}),
    "2 key/value heads": (dict(n_kv_head=2), {}),
    "full rank, budget": (dict(window_pattern="L"), BUDGET),
    "r = d/4, budget": (dict(attn=0.25, mlp=0.25, window_pattern="L"), BUDGET),
    "full rank, float8": (dict(window_pattern="L"), dict(float8=True)),
    "r = d/4, float8": (dict(attn=0.25, mlp=0.25, window_pattern="L"), dict(float8=True)),
    "r = d/4, fused": (dict(attn=0.25, mlp=0.25, window_pattern="L"), dict(fused=True)),
    "r = d/4, fused, block": (dict(attn=0.25, mlp=0.25, recompute="block"), dict(fused=True)),
    "two processes": (dict(window_pattern="L", recompute="block"), dict(processes=2)),
    "two processes, two passes": (dict(window_pattern="L"), dict(processes=2, accumulated=True)),
    "full rank, two passes": (dict(window_pattern="L"), dict(accumulated=True)),
}


def shape(depth: int, attn=0, mlp=0, vo=None, **changes) -> dict:
    """The shapes of base_train at this depth; attn, mlp, vo: ranks, of v and o alone where they differ."""
    heads = depth // 2  # of width 128
    sizes = dict(sequence_len=2048, vocab_size=65536, n_layer=depth, n_head=heads, n_kv_head=heads)
    ranks = dict(attn_ranks=[attn] * depth, mlp_ranks=[mlp] * depth, rank_multiple=-1)
    if vo is not None:
        ranks["matrix_ranks"] = dict(v=[vo] * depth, o=[vo] * depth)
    return dict(sizes | ranks | changes, n_embd=64 * depth)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_predicted_peak_is_within_a_tenth_of_the_allocators(name, tmp_path):
    changes, options = CONFIGURATIONS[name]
    options = dict(options)
    processes = options.pop("processes", 1)
    cases = []
    for depth in (12, 20):
        for compiled in (True,) if "budget" in options else (False, True):
            run = dict(compiled=compiled, **options)
            cases.append(dict(config=shape(depth, **changes), run=run))
    lines = null_gpu.run_source(
        STEPS.replace("CASES", repr(json.dumps(cases))), tmp_path, processes=processes, timeout=900
    )
    results = [json.loads(line) for line in lines if line.startswith("[")]
    assert len(results) == len(cases)
    for case, (measured, predicted) in zip(cases, results):
        label = f"{name}, d{case['config']['n_layer']}, {'compiled' if case['run']['compiled'] else 'eager'}"
        print(f"{label}: {measured / 2**30:.2f} GiB, predicted {predicted / measured - 1:+.1%}")
    for measured, predicted in results:
        assert predicted == pytest.approx(measured, rel=0.1)
