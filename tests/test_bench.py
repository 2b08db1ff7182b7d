"""The benchmarks run, and what they write hangs together; nothing here depends on how fast the machine is."""

import json
import os
import shlex
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from nanochat.accounting import account
from nanochat.compiler import chunk_loss
from nanochat.errors import InputError
from nanochat.gpt import GPTConfig

BENCH = ROOT / "dev/bench"
TINY = shlex.split(
    "--depth 2 --model-dim 64 --head-dim 32 --max-seq-len 64 --device-batch-size 4 --vocab-size 512 "
    "--device-type cpu"
)


@pytest.fixture(scope="module")
def bench_modules():
    """The scripts as modules, found as they find each other.

    One thread: beside other work two would mostly wait for each other.
    """
    sys.path.insert(0, str(BENCH))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    modules = {name: import_module(name) for name in ("train_step", "gpu", "loss_memory", "core_speed")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(modules["train_step"].MATMUL_WIDTHS, "cpu", 64)
        yield SimpleNamespace(**modules)
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCH))


def check(result: dict):
    """A result of train_step.compare."""
    for model in result["models"].values():
        cost = account(GPTConfig(**model["config"]))
        assert model["accounting"] == cost
        assert all(
            0 < spread["low"] <= spread["median"] <= spread["high"] for spread in model["seconds"].values()
        )
        memory = model["memory"]
        assert (
            memory["weights"] == memory["gradients"] == cost["mem/weights_bytes"] == cost["mem/grads_bytes"]
        )
        # AdamW's step counters
        assert cost["mem/optimizer_bytes"] <= memory["optimizer state"] < cost["mem/optimizer_bytes"] + 1000
        assert memory["activations + temporaries"] > 0
        assert memory["peak"] == sum(
            memory[part] for part in ("weights", "gradients", "optimizer state", "activations + temporaries")
        )
        assert memory["peak"] == max(memory["peak by part"].values())
        assert model["flops per second"]["median"] > 0 and 0 < model["share of ceiling"]["median"] < 1.5
    shares = []
    for rounds in result["seconds by round"].values():
        parts = zip(rounds["data"], rounds["forward"], rounds["backward"], rounds["optimizer"])
        shares += [sum(seconds) / whole for seconds, whole in zip(parts, rounds["step"])]
    assert 0.9 < max(shares) <= 1  # a step may lose the processor between two clocks, not every step
    for low, ratio in result["ratios"].items():
        a = result["models"][low]
        b = result["models"][ratio["to"]]
        assert ratio["flops"] == a["accounting"]["flops/per_token"] / b["accounting"]["flops/per_token"] < 1
        assert ratio["memory"]["peak"] == a["memory"]["peak"] / b["memory"]["peak"]
        assert ratio["step over flops"] == pytest.approx(ratio["seconds"]["step"]["median"] / ratio["flops"])


def test_train_step_table_and_json(bench_modules, tmp_path, capsys):
    bench_modules.train_step.main(
        [
            *TINY,
            *shlex.split("--repeats 3 --attn-rank 0.25 --mlp-rank 24 --mlp-ratio 3 --recompute bottleneck"),
            "--out",
            str(tmp_path / "step.json"),
        ]
    )
    stdout = capsys.readouterr().out
    result = json.loads((tmp_path / "step.json").read_text())
    check(result)
    dense, low = (result["models"][name]["config"] for name in ("dense", "low-rank"))
    assert (dense["mlp_ranks"], dense["mlp_ratio"], dense["recompute"]) == ([0, 0], 4, "none")
    assert (low["mlp_ranks"], low["mlp_ratio"], low["recompute"]) == ([24, 24], 3, "bottleneck")
    assert len(result["seconds by round"]["dense"]["step"]) == 3
    for line in ("| tokens/s |", "| optimizer, ms |", "| activations + temporaries, MB |", "| / dense |"):
        assert line in stdout


def test_bad_flags_are_one_line(bench_modules, command):
    code, _, stderr = command("dev/bench/train_step.py", "--device-type", "cpu", "--head-dim", "48")
    assert (
        code == 2 and stderr.startswith("error: --model-dim 256: not a multiple") and stderr.count("\n") == 1
    )
    for flags, words in (
        (["--reference", "--depth", "3"], "--depth: --reference"),
        (["--mlp-rank", "999"], "rank 999"),
        (["--window-pattern", "SX"], "SX"),
    ):
        with pytest.raises(InputError, match=words):
            bench_modules.train_step.main(["--device-type", "cpu", *flags])


def test_targets_of_the_reference_task(bench_modules):
    def model(share, speed):
        return {
            "tokens per second": {"median": speed},
            "share of ceiling": {"median": 0.5},
            "memory": {"peak": 1e9},
            "predicted peak": 1.05e9,
            "share of step": {"optimizer": {"median": share}, "data": {"median": 0.001}},
        }

    result = {
        "usual ceiling": {"median": 96.5e9},  # half of the published machine's, so half its speed is asked
        "models": {
            "dense 256": model(0.12, 2800),
            "dense 512": model(0.2, 900),
            "low-rank 512": model(0.1, 1500),
        },
        "ratios": {
            "low-rank 512": {"step over flops": 1.1, "seconds": {"step": {"median": 0.55}}, "flops": 0.5}
        },
        "resident peak": {"dense 256": {"peak": 0.8e9}},
    }
    found = bench_modules.train_step.targets(result, "float32")
    assert [t["ok"] for t in found] == [True, False, True, False, True, True] and found[0][
        "target"
    ] == ">= 2,730"
    assert bench_modules.train_step.target_table(found).count("not reached") == 2


def test_allocated_on_the_cpu_sees_the_peak_inside_each_part(bench_modules):
    def work(boundary):
        boundary("first")
        kept = torch.empty(1000)
        torch.empty(5000)  # gone at once
        boundary("second")
        torch.empty(2000)
        del kept
        boundary("end")

    found = bench_modules.train_step.allocated(work, torch.device("cpu"))
    assert set(found) == {"first", "second"}
    assert found["first"] == pytest.approx(24000, abs=300) and found["second"] == pytest.approx(
        12000, abs=300
    )


def test_loss_memory(bench_modules, tmp_path):
    bench_modules.loss_memory.main(
        [
            *shlex.split(
                "--vocab-size 4096 --device-batch-size 4 --max-seq-len 256 "
                "--model-dim 32 --repeats 2 --device-type cpu"
            ),
            "--out",
            str(tmp_path / "loss.json"),
        ]
    )
    result = json.loads((tmp_path / "loss.json").read_text())
    assert max(result["relative difference"].values()) < 1e-5
    assert result["peak bytes"]["plain"] > 3 * 4 * 1024 * 4096  # the logits, three times at least
    assert (
        result["peak ratio"] == result["peak bytes"]["chunked"] / result["peak bytes"]["plain"]
        and result["time ratio"]["median"] > 0
    )


def test_sizes_of_loss_chunks_are_compared(bench_modules):
    loss_memory = bench_modules.loss_memory
    inputs = loss_memory.make_inputs(1500, 16, 512, torch.device("cpu"), torch.float32)
    results = loss_memory.measure_chunks(inputs, [100, 1500], chunk_loss, repeats=1)
    assert results[1500]["peak bytes"] - results[100]["peak bytes"] > 1400 * 512 * 4  # logits in float32
    assert all(result["seconds"]["median"] > 0 and not result["chosen"] for result in results.values())


def test_core_speed_finds_equal_losses_and_says_how_much_faster(bench_modules, capsys):
    bench_modules.core_speed.main(
        shlex.split("--depth 2 --model-dim 64 --vocab-size 50 --prompt-tokens 20 --questions 5 --repeats 1")
    )
    lines = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("| multiple", "| schema", "| language"))
    ]
    assert len(lines) == 3 and all(float(line.split("|")[2].split()[0]) > 0 for line in lines)
    with pytest.raises(InputError, match="--model-dim 96: not a multiple of 64"):
        bench_modules.core_speed.main(["--model-dim", "96"])


@pytest.mark.bench
def test_gpu_bench_on_the_cpu(tmp_path):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
    }
    done = subprocess.run(
        ["bash", str(BENCH / "gpu.sh"), "--device-type", "cpu", "--tiny"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/gpu.json").read_text())
    assert all(entry["ok"] for entry in report["smoke"] + report["loss"]) and len(report["smoke"]) == 4
    assert report["skipped"] == [] and list(report["sizes"]["tiny"]["comparisons"]) == [
        "d/4",
        "d/3",
        "d/2",
        "d/8",
    ]
    for label, result in report["sizes"]["tiny"]["comparisons"].items():
        check(result)
        low = f"r = {label}"
        recompute = f"r = {label}, recompute"
        assert set(result["ratios"]) == {low, recompute}
        assert result["models"][recompute]["memory"]["peak"] < result["models"][low]["memory"]["peak"]
    text = (tmp_path / "out/gpu.md").read_text()
    assert "| dense | full |" in text and "r = d/2, recompute" in text and "Skipped: nothing" in text


def test_gpu_bench_says_what_it_had_no_time_for(bench_modules, tmp_path, monkeypatch):
    for name in ("smoke", "loss_check"):  # shown above
        monkeypatch.setattr(bench_modules.gpu, name, lambda *_: [])
    bench_modules.gpu.main(["--device-type", "cpu", "--tiny", "--seconds", "1", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "gpu.json").read_text())["skipped"][-1] == "tiny, rank d/8: no time left"
