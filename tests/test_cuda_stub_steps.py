"""What a d20 training step costs on the null GPU: memory, launches, waits, graphs. They may fall, not rise.

d20: 20 layers, width 1280, vocabulary 65,536, 32 rows of 2,048 tokens, bfloat16. The models are those of
null_gpu_steps.py, measured in one process.
"""

import json

import null_gpu
import pytest

pytestmark = null_gpu.marks
# model: {how: (GiB at the peak, launches a step)}, a hair above what was measured. Lower them when they fall.
CEILINGS = {
    "dense": {"eager": (42.2, 4500), "compiled": (54.3, 1400)},
    "r = d/4": {"eager": (44.6, 5050), "compiled": (56.9, 1960)},
    "r = d/4, recompute": {"eager": (14.4, 6200), "compiled": (13.5, 2400)},
    "dense, block": {"eager": (11.7, 5600), "compiled": (11.7, 1720)},
}


@pytest.fixture(scope="module")
def costs():
    result = null_gpu.run(null_gpu.HOOK.with_name("null_gpu_steps.py"), 20, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("model", CEILINGS)
def test_memory_and_launches_of_a_d20_step(costs, model, how):
    most_memory, most_launches = CEILINGS[model][how]
    cost = costs[model][how]
    assert 0.5 * most_memory < cost["peak GiB"] <= most_memory
    assert 0.5 * most_launches < cost["launches"] <= most_launches


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("model", CEILINGS)
def test_the_host_waits_for_the_gpu_twice_a_step(costs, model, how):
    # once to read the loss beside the requests to stop, once to read the norm of the gradients
    waits = [line for line in costs[model][how]["waits"] if line.startswith(("SYNC", "CPY sync"))]
    assert waits == ["SYNC stream", "SYNC stream"]


@pytest.mark.parametrize("model", CEILINGS)
def test_blocks_compile_without_graph_breaks(costs, model):
    # of blocks that see half of the context, of those that see all of it, and of the loss
    assert costs[model]["compiled"]["graphs"] == 3
    assert costs[model]["compiled"]["graph breaks"] == 0
