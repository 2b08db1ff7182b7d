"""The benchmarks run, and what they write hangs together; nothing here depends on how fast the machine is."""

import json
import os
import shlex
import subprocess
import sys
import time
import weakref
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from processes import alive

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
    modules = {name: import_module(name) for name in ("train_step", "loss_memory", "core_speed")}
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


# ---- the ladder of a graphics card -------------------------------------------------------------------------


def call_ladder(out, *arguments) -> dict:
    """Run dev/bench/gpu.sh in miniature on the CPU; returns its JSON."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OUT": str(out),
        "PYTHON": sys.executable,
        "LIMIT": "900",
    }
    command = ["bash", str(BENCH / "gpu.sh"), *map(str, arguments)]
    command += ["--tiny", "--device-type", "cpu", "--seconds", "850"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    call = arguments[0]
    text = (out / f"call{call}.md").read_text("utf-8")
    assert text.startswith(f"# The ladder, call {call}") and text in done.stdout
    return json.loads((out / f"call{call}.json").read_text("utf-8"))


@pytest.mark.bench
def test_the_ladder_measures_d20_in_miniature(tmp_path):
    report = call_ladder(tmp_path, 1)
    items = report["items"]
    for name, item in items.items():
        assert item["status"] == "ok" or item["status"].startswith("NotHere: "), name
    checks = [item["result"] for name, item in items.items() if name.startswith("check: ") and item["result"]]
    entries = [entry for result in checks for entry in (result if isinstance(result, list) else [result])]
    assert len(entries) == 13 and all(entry["ok"] for entry in entries)
    for number, names in enumerate(import_ladder("models").GROUPS, 1):
        group = items[f"steps {number}"]["result"]
        cheaper = {name: ratio for name, ratio in group["ratios"].items() if ratio["flops"] < 1}
        as_wide = {"dense, L", "dense, recompute block"}
        assert set(group["ratios"]) - set(cheaper) == as_wide & set(names)
        check(group | {"ratios": cheaper})
        assert set(group["models"]) | set(group["failed"]) == set(names)
        assert all("NotHere: " in reason for reason in group["failed"].values())
    peaks = {name: model["memory"]["peak"] for name, model in items["steps 1"]["result"]["models"].items()}
    assert peaks["r = d/4, recompute"] < peaks["r = d/4"] < peaks["dense"]
    text = (tmp_path / "call1.md").read_text("utf-8")
    assert (
        "| r = d/4: step / dense |" in text
        and "| dense, windows SSSL: MFU |  | >= 0.50 | not measured |" in text
    )


@pytest.mark.bench
def test_the_ladder_kills_resumes_and_trains(tmp_path, corpus_dir):
    data = tmp_path / "data"
    import_ladder("prepare").main(["--data", str(corpus_dir), "--out", str(data), "--tiny"])
    report = call_ladder(tmp_path / "out", 2, "--data", data)
    items = report["items"]
    assert {item["status"] for item in items.values()} == {"ok"}
    losses = items["first losses"]["result"]
    assert losses["same start"] and losses["float32"] == pytest.approx(losses["cpu"], abs=1e-3)
    for run in items["kill and resume"]["result"].values():
        assert run["ok"] and run["largest difference"] == 0
    for seed in (1, 2):
        for run in items[f"training, seed {seed}"]["result"].values():
            assert run["exit code"] == 0 and run["steps"] == report["steps"]
    assert "| recipe |" in (tmp_path / "out/call2.md").read_text("utf-8")


def import_ladder(module: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        return import_module(f"gpu.{module}")


def works(setting):
    yield {"half": 1}
    yield {"half": 1, "whole": 2}


def fails(setting):
    yield {"half": 1}
    raise ValueError("on purpose\nin two lines")


def dies(setting):
    yield {"half": 1}
    os.kill(os.getpid(), 9)


def hangs(setting):
    subprocess.Popen(["sleep", "61.75"])
    yield {"child": 1}
    time.sleep(60)


def test_an_item_that_fails_dies_or_hangs_stops_no_other(tmp_path, capsys):
    runner = import_ladder("runner")
    report = runner.Report(tmp_path, "9", json.dumps, {"items": {}})
    items = [runner.Item(m.__name__, m, 30 if m is not hangs else 1) for m in (fails, dies, hangs, works)]
    late = runner.Item("late", works, 30)
    deadline = time.monotonic() + 60
    runner.run_items(items, runner.Setting("cpu", True), report, deadline, together=2)
    runner.run_items([late], runner.Setting("cpu", True), report, time.monotonic() + 1)
    written = json.loads((tmp_path / "call9.json").read_text("utf-8"))["items"]
    assert {name: item["status"] for name, item in written.items()} == {
        "fails": "ValueError: on purpose",
        "dies": "its process died (exit code -9)",
        "hangs": "ended after 1 s, its limit",
        "works": "ok",
        "late": "not begun: no time left",
    }
    assert written["fails"]["result"] == written["dies"]["result"] == {"half": 1}
    assert written["works"]["result"] == {"half": 1, "whole": 2}
    assert written["hangs"]["result"] == {"child": 1} and not alive("sleep 61.75")
    assert "in two lines" in (tmp_path / "call9.log").read_text("utf-8")


def test_the_ladders_models_are_what_the_tables_call_them():
    models = import_ladder("models")
    configs = {name: models.variant(name, False).config for name in models.EXPLANATIONS}
    params = {name: account(config)["params/total"] for name, config in configs.items()}
    assert configs[models.QUARTER].whole_rank("up", 0) == 320
    assert configs[models.RECIPE].whole_rank("v", 0) == 0 and configs[models.RECIPE].whole_rank("q", 0) == 320
    assert params[models.NARROW] == pytest.approx(params[models.QUARTER], rel=0.05)
    card = import_ladder("runner").Setting("cuda", False)
    assert [models.common_rows(card, gib) for gib in (24, 79, 140)] == [2, 16, 32]
    task = import_ladder("text").Task()
    training = import_ladder("training")
    arms = {name: training.parameters(task, flags) for name, flags in training.arms(task).items()}
    assert arms["full rank, narrower"] == pytest.approx(arms["recipe"], rel=0.005)
    assert arms["recipe"] < 0.7 * arms["full rank"]


# ---- its item on decoding ----------------------------------------------------------------------------------


def test_figures_with_graphs_stand_only_where_graphs_were_recorded():
    decode = import_ladder("decode")
    report = import_ladder("report")
    *_, entries = decode.measure(import_ladder("runner").Setting("cpu", True))
    assert [entry["graphs"] for entry in entries.values()] == [None, None]  # a CPU records none
    items = {"items": {"decode": {"result": json.loads(json.dumps(entries))}}}
    for line in report.decode_lines(items)[2:4]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[3] == cells[5] == "not recorded" and float(cells[4].split()[0]) > 0
    aim = "decoding at batch 1, r = d/4: tokens/s / dense"
    assert aim not in report.aim_figures(items)
    for name, seconds in (("dense", 0.002), ("r = d/4", 0.001)):
        items["items"]["decode"]["result"][name]["graphs"] = dict.fromkeys(("median", "low", "high"), seconds)
    assert report.decode_lines(items)[3].endswith("| 1,000 |") and report.aim_figures(items)[aim] == 2
    items["items"]["decode"]["result"]["dense"]["graphs"] = None
    assert aim not in report.aim_figures(items)


def test_what_models_share_is_loaded_before_the_first_text(monkeypatch):
    """Each model generates once beforehand, and no length of that text comes again in the timed one."""
    decode = import_ladder("decode")
    texts = []

    def generate(model, prompts, count, *args, **options):
        # the lengths of the cache of which a step makes one more
        texts.append((model, set(range(len(prompts[0]), len(prompts[0]) + count - 1))))
        return original(model, prompts, count, *args, **options)

    original = decode.generate
    monkeypatch.setattr(decode, "generate", generate)
    next(decode.measure(import_ladder("runner").Setting("cpu", True)))
    dense, quarter = (model for model, _ in texts[:2])
    assert dense is not quarter and [model for model, _ in texts[2:]] == [dense, quarter]
    for (_, beforehand), (_, timed) in zip(texts[:2], texts[2:]):
        assert len(beforehand) == decode.WARMUP and beforehand.isdisjoint(timed)


def test_a_decoder_that_falls_back_gives_no_figure_with_graphs(monkeypatch):
    decode = import_ladder("decode")
    models = import_ladder("models")
    setting = import_ladder("runner").Setting("cpu", True)
    model = models.random_model(models.dense_config(True), setting.device).requires_grad_(False)

    class FallsBack:
        """In the middle of a text, as where the next part of the cache cannot be recorded."""

        def __init__(self, model, cache, dtype, graphs):
            self.graphs = graphs
            self.steps = 0

        def __call__(self, tokens):
            self.steps += 1
            self.graphs = self.graphs and self.steps < last_with_graphs
            return torch.zeros(1, model.config.vocab_size)

    monkeypatch.setattr(decode, "token_decoder", FallsBack)
    last_with_graphs = 10
    assert decode.step_seconds(model, True, setting) is None
    assert decode.step_seconds(model, False, setting) > 0
    last_with_graphs = 1000
    assert decode.step_seconds(model, True, setting) > 0


# ---- its items on training steps ---------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """The module, without the compiler and with a small product for the ceiling. One thread, as above."""
    module = import_ladder("steps")
    monkeypatch.setattr(module.models, "compile_blocks", lambda *args: None)
    monkeypatch.setitem(import_module("train_step").MATMUL_WIDTHS, "cpu", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


def compare(steps, group) -> dict:
    *_, found = steps.measure(group, 60, import_ladder("runner").Setting("cpu", True))
    return json.loads(json.dumps(found))


def fail_once(monkeypatch, steps, function: str, name: str, call: int, error: type, words: str):
    """Let one call of a function raise when it comes to a model for the `call`-th time.

    Returns a list that gets, once memory was released, whether the failed model is still in it.
    """
    original = getattr(steps, function)
    release = steps.release
    calls = []
    failed = []
    alive = []

    def run(subject, device):
        if subject.name == name:
            calls.append(name)
            if len(calls) == call:
                failed.append(weakref.ref(subject.model))
                raise error(words)
        return original(subject, device)

    def release_and_look(device):
        release(device)
        alive.append(failed[0]() is not None)

    monkeypatch.setattr(steps, function, run)
    monkeypatch.setattr(steps, "release", release_and_look)
    return alive


def test_a_model_whose_memory_cannot_be_measured_drops_out_alone(steps, monkeypatch):
    error = (torch.OutOfMemoryError, "CUDA out of memory")
    alive = fail_once(monkeypatch, steps, "measure_memory", "dense", 1, *error)
    found = compare(steps, ("dense", "recipe"))
    assert found["failed"] == {"dense": "out of memory"} and found["rounds"] == 2
    assert list(found["models"]) == ["recipe"] and found["ratios"] == {} and alive == [False]


@pytest.mark.parametrize("name", ["dense", "recipe"])
def test_a_model_that_fails_in_a_round_keeps_its_earlier_rounds(steps, monkeypatch, name):
    alive = fail_once(monkeypatch, steps, "timed_step", name, steps.WARMUP + 2, ValueError, "on purpose")
    found = compare(steps, ("dense", "r = d/4", "recipe"))
    assert found["failed"] == {name: "ValueError: on purpose, after round 1"} and found["rounds"] == 2
    assert alive == [False]
    check(found)
    for model, seconds in found["seconds by round"].items():
        assert {len(values) for values in seconds.values()} == {1 if model == name else 2}
    dense = found["seconds by round"]["dense"]["step"]
    quarter = found["seconds by round"]["r = d/4"]["step"]
    expected = np.median([own / whole for own, whole in zip(quarter, dense)])
    assert found["ratios"]["r = d/4"]["seconds"]["step"]["median"] == pytest.approx(expected)
    assert set(found["ratios"]) == {"r = d/4", "recipe"}
    text = "\n".join(import_ladder("report").step_lines({"items": {"steps 1": {"result": found}}}))
    assert f"| {name} | ValueError: on purpose, after round 1 |" in text and "| r = d/4 | 0" in text


def test_a_group_of_which_all_models_fail_says_why(steps, monkeypatch):
    def fail(*args):
        raise MemoryError("out of memory")

    monkeypatch.setattr(steps, "timed_step", fail)
    found = compare(steps, ("dense", "recipe"))
    assert set(found["failed"]) == {"dense", "recipe"} and found["rounds"] == 0 and found["models"] == {}
