"""Memory under a stub of CUDA: what is kept, what is launched, and what is said when a GPU is full."""

import re

import null_gpu
import pytest

pytestmark = null_gpu.marks

BUDGETS = """
import nullgpu
import torch

from nanochat import compiler
from nanochat.gpt import GPT, GPTConfig

shape = dict(sequence_len=256, vocab_size=512, n_layer=6, n_head=2, n_kv_head=2, n_embd=256)
for ranks in ((), (64,) * 6):
    for budget in (1.0, 0.7):
        with torch.device("cuda"):
            model = GPT(GPTConfig(window_pattern="L", attn_ranks=ranks, mlp_ranks=ranks, **shape))
            model.init_weights()
            x = torch.zeros(64, 256, dtype=torch.long)
        torch._dynamo.reset()  # else the code of the budget before serves
        compiler.compile_blocks(model, budget=budget)
        model(x, x, torch.bfloat16).backward()
        torch.cuda.reset_peak_memory_stats()
        nullgpu.log(LOG)
        model(x, x, torch.bfloat16).backward()
        nullgpu.log(None)
        with open(LOG) as log:
            products = sum(line.startswith(("G ", "MARK CUDNN")) for line in log)
        print(products, torch.cuda.max_memory_allocated())
        open(LOG, "w").close()
        del model
"""


def test_a_budget_of_070_repeats_no_product(tmp_path):
    lines = null_gpu.run_source(BUDGETS.replace("LOG", repr(str(tmp_path / "log"))), tmp_path)[-4:]
    counts = [tuple(map(int, line.split())) for line in lines]  # (products and attention, peak bytes)
    for (products, peak), (products_within_budget, peak_within_budget) in (counts[:2], counts[2:]):
        assert products_within_budget == products > 0
        assert peak_within_budget < 0.85 * peak


# the last process may have 64 MiB, as if other programs had the rest
LAST_IS_FULL = """
import os, torch
rank = int(os.environ.get("RANK", 0))
if rank == PROCESSES - 1:
    torch.cuda.set_per_process_memory_fraction(1 / 16 / 79.1, rank)
"""


@pytest.mark.parametrize("choice, processes", [("off", 1), ("on", 1), ("off", 2)])
def test_a_full_gpu_ends_a_run_in_one_line(choice, processes, base_dir, corpus_dir, tmp_path):
    # the stub's collectives do not wait: the first process goes on until it is told
    steps = 2 if processes == 1 else 1000
    flags = f"""--data {corpus_dir} --depth 2 --model-dim 256 --head-dim 64 --max-seq-len 256
        --num-iterations {steps} --device-batch-size 64 --total-batch-size {2**14 * processes}
        --window-pattern L --compile {choice}"""
    command = ["-m", "scripts.base_train", *flags.split()]
    if processes > 1:
        command.insert(2, "--")
    hook = tmp_path / "hook.py"
    hook.write_text(LAST_IS_FULL.replace("PROCESSES", str(processes)))
    result = null_gpu.run(*command, processes=processes, NULLGPU_HOOK=f"{null_gpu.HOOK}:{hook}")
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr[-3000:]
    assert lines[0].startswith("error: process 1 of 2: --device" if processes == 2 else "error: --device")
    assert "-batch-size 64: out of memory: GPU" in lines[0]
    assert "MiB more asked for; give a smaller --device-batch-size" in lines[0]
    assert result.returncode == (2 if processes == 1 else 1)  # torchrun's own
    if processes == 1:
        assert "Traceback" not in result.stderr


def test_what_cannot_fit_is_refused_before_any_work(base_dir, corpus_dir):
    flags = f"--data {corpus_dir} --depth 2 --model-dim 256 --head-dim 64 --max-seq-len 256"
    result = null_gpu.run("-m", "scripts.base_train", *flags.split(), gib=0.15)
    assert result.returncode == 2
    assert re.search(r"activations need at least 0\.\d GiB, and there are 0.1 GiB; give less", result.stderr)
