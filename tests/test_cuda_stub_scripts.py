"""The scripts' own command lines on the null GPU: what runs on a CPU finds its tensors on a GPU too."""

import json
import shlex

import null_gpu
import pytest
from conftest import TINY
from null_gpu import HOOK

from nanochat import metrics

pytestmark = null_gpu.marks
HOOKS = f"{HOOK}:{HOOK.with_name('null_gpu_training_hook.py')}"
# a head of 128 channels is what the GPU's kernels are made for
SHAPE = [*TINY, "--model-dim", "256", "--head-dim", "128", "--core-metric-every", "-1"]


@pytest.fixture
def run(base_dir, corpus_dir):
    """run(*arguments, **options): a program whose values decide nothing; returns what it printed."""

    def run(*arguments, **options):
        result = null_gpu.run(*arguments, NULLGPU_HOOK=HOOKS, **options)
        assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
        return result.stdout

    return run


def recorded_steps(tag: str) -> list[int]:
    return [entry["step"] for entry in metrics.load_run(metrics.runs_dir() / tag).history]


def test_a_compiled_run_from_start_to_end(run, corpus_dir):
    output = run("-m", "scripts.base_train", *SHAPE, "--data", corpus_dir, "--model-tag", "one")
    record = metrics.load_run(metrics.runs_dir() / "one")
    assert record.config["device"]["type"] == "cuda" and "H100" in record.config["device"]["name"]
    assert record.config["device"]["dtype"] == "bfloat16"
    assert record.summary["status"] == "finished" and recorded_steps("one") == [1, 2, 3, 4, 5, 6]
    assert "uncompiled" not in output
    assert record.history[-1]["mem/peak_bytes"] > record.config["derived"]["model"]["n_embd"] ** 2 * 12 * 2


def test_two_processes_die_and_resume(run, corpus_dir):
    flags = ["-m", "scripts.base_train", *SHAPE, "--data", corpus_dir, "--model-tag", "two"]
    flags += ["--compile", "off", "--save-every", "3", "--fp8"]
    died = null_gpu.run(*flags, processes=2, NULLGPU_HOOK=HOOKS, NULL_GPU_DIES_AT="5")
    assert died.returncode != 0 and "step 00004/00006" in died.stdout
    folder = metrics.runs_dir() / "two"
    assert json.loads((folder / "summary.json").read_text("utf-8"))["status"] == "running"
    output = run(*flags, "--resume", "auto", processes=2)
    assert "2 process(es), bfloat16, from step 3" in output
    assert metrics.load_run(folder).summary["status"] == "finished"
    assert recorded_steps("two") == [1, 2, 3, 4, 5, 6]


def test_tensors_meet_on_the_gpu_in_every_script(run, corpus_dir):
    training = shlex.join([*SHAPE, "--num-iterations", "2", "--compile", "off", "--data", str(corpus_dir)])
    # the stub records no CUDA graphs, and torch draws no random numbers after a recording that failed: what
    # generates comes last
    lines = [
        f"base_train {training} --model-tag low --attn-rank 0.25 --mlp-rank 0.25 --n-kv-head 1 "
        "--value-embeddings --recompute bottleneck",
        f"base_train {training} --model-tag map --layer-map 0,0,1 --lm-head-rank 16 --factor-act silu "
        "--attn-rank 32 --mlp-rank 32 --recompute block",
        f"base_train {training} --model-tag subspace --subspace fastfood --subspace-dim 1000",
        "materialize --model-tag low --out-tag full",
        "adapter_train --model-tag low --run-tag adapter --num-iterations 2 --compile off "
        "--device-batch-size 4 --total-batch-size 256 --eval-tokens 1024",
        "layer_bench --model-dim 128 --vocab-size 300 --repeats 1",
        "base_eval --model-tag low --eval bpb,sample --eval-tokens 1024 --device-batch-size 4",
    ]
    for part in (lines, ["generate --model-tag low --prompt the --max-tokens 40 --top-k 5"]):
        output = run(HOOK.with_name("null_gpu_scripts.py"), *part)
        assert output.count(": done in ") == len(part)
    output = run("-m", "scripts.infer_bench", *shlex.split("--batch-sizes 1,2 --prompt-tokens 8 --repeats 1"))
    assert "materialised, eager" in output
