"""The products that a training pass launches on the null GPU: as many FLOPs as the accounting says, in the
formats that --fp8 says, and without a word to the host.
"""

import json

import null_gpu
import pytest

pytestmark = null_gpu.marks

PROGRAM = """
import json, re
import nullgpu, torch
from nanochat import compiler, recompute
from nanochat.accounting import account, mean_keys
from nanochat.fp8 import train_in_float8
from nanochat.gpt import GPT, GPTConfig

def measure(depth, in_float8=False, compiled=False, **changes):
    shape = dict(vocab_size=65536, n_layer=depth, n_head=10, n_kv_head=10, n_embd=1280, window_pattern="L")
    with torch.device("cuda"):
        model = GPT(GPTConfig(**shape, **changes))
        idx = torch.zeros(8, 2048, dtype=torch.long)
    recompute.apply(model)
    if in_float8:
        train_in_float8(model)
    if compiled:
        compiler.compile_blocks(model)
        model(idx, idx, torch.bfloat16).backward()
        model.zero_grad()
    torch.cuda.synchronize()
    nullgpu.log("LOG")
    model(idx, idx, torch.bfloat16).backward()
    nullgpu.log(None)
    flops = {}
    lines = open("LOG").read().splitlines()
    for line in lines:
        if line.startswith("G "):
            m, n, k, batch, kind = map(int, re.findall(r" (\\d+)(?= |$)", line))
            flops[kind] = flops.get(kind, 0) + 2 * m * n * k * batch / idx.numel()
    passes = (3.5 + (changes.get("recompute", "none") != "none")) * 4
    print(json.dumps({
        "products": flops,
        "executed": account(model)["flops/executed_per_token"],
        "attention": passes * depth * 1280 * mean_keys(2048, 2048),
        "waits": [line for line in lines if line.startswith(("SYNC", "CPY sync")) or "pageable" in line],
    }))
"""
E4M3 = "28"  # the library's numbers of formats; the log has that of one factor, which is never a gradient
BFLOAT16 = "14"


def measure(call: str, tmp_path) -> dict:
    program = PROGRAM.replace("LOG", str(tmp_path / "log")) + f"\nmeasure({call})\n"
    return json.loads(null_gpu.run_source(program, tmp_path)[-1])


@pytest.mark.parametrize(
    "call",
    [
        "20",
        "20, attn_ranks=(320,) * 20, mlp_ranks=(320,) * 20",
        "20, attn_ranks=(320,) * 20, mlp_ranks=(320,) * 20, recompute='bottleneck'",
    ],
)
def test_a_pass_of_d20_executes_the_flops_that_are_counted(call, tmp_path):
    measured = measure(call, tmp_path)
    products = sum(measured["products"].values())
    assert products == pytest.approx(measured["executed"] - measured["attention"], rel=1e-6)


def test_float8_blocks_compile_whole_and_multiply_in_float8(tmp_path):
    """All products of the blocks, and those of the head in bfloat16. fullgraph: a break would be an error."""
    measured = measure("2, in_float8=True, compiled=True, recompute='block'", tmp_path)
    block = 12 * 1280**2
    recomputed = 8 * 1280**2  # all but `down`
    in_float8 = measured["products"][E4M3]
    assert in_float8 == 2 * (6 * block + 2 * recomputed)
    assert measured["products"][BFLOAT16] == 6 * 65536 * 1280
    assert in_float8 + 6 * 65536 * 1280 == pytest.approx(
        measured["executed"] - measured["attention"], rel=1e-6
    )
    assert not measured["waits"]
