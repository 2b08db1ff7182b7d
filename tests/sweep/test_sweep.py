"""A sweep goes from a file to a report: alone, beside another one, through failures, kills and resumes."""

import json
import os
import signal
import sys
import time
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
from conftest import tiny_experiment
from processes import Launched, wait_for

from nanochat import metrics
from nanochat.errors import InputError
from nanochat.signals import REQUEUE
from nanochat.sweep import costs, local
from nanochat.sweep.experiment import read_experiment
from scripts import sweep as sweeps


@pytest.fixture
def experiment(tmp_path, base_dir, corpus_dir):
    """experiment(text) -> path of a file of tiny runs under seeds 1 and 2, with these points."""

    def write(text, seeds=(1, 2)):
        return tiny_experiment(tmp_path / "tiny.toml", text, seeds, corpus_dir)

    return write


def status(tag):
    return json.loads((metrics.runs_dir() / tag / "summary.json").read_text())["status"]


# ---- the local launcher, with a stand-in for training

STAND_IN = """
import json, pathlib, signal, sys, time
folder, seconds, log = pathlib.Path(sys.argv[1]), float(sys.argv[2]), pathlib.Path(sys.argv[3])
with open(log, "a") as f:
    print(folder.name, file=f)
if folder.name in sys.argv[4].split(","):
    print("working\\nerror: --learning-rate: too hot", flush=True)
    sys.exit(2)
def end(status, code):
    summary = {"status": status, "val/ppl": 9.0, "total_training_flops": 50, "total_training_time": 1}
    (folder / "partial").write_text(json.dumps(summary))
    (folder / "partial").rename(folder / "summary.json")  # atomic: the sweep may be reading it
    sys.exit(code)
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text("{}")
signal.signal(signal.SIGTERM, lambda *_: end("stopped", 75))
row = {"step": 3, "total_training_time": 1.0, "val/ppl": 12.5}
(folder / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
time.sleep(seconds)
end("finished", 0)
"""


@pytest.fixture
def stand_in(tmp_path, experiment, monkeypatch):
    """run(seconds, failing, j) -> what run_all returns of four points with the stand-in.

    run.sweep: the sweep; run.starts(): the tags started so far.
    """
    monkeypatch.setattr(local, "CHILD_POLL", 0.02)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    sweep = read_experiment(experiment("[points.full]\n[points.low]\nattn-rank = 4\n"))

    def run(seconds=0.1, failing="", j=1):
        def command(sweep, point, args):
            script = tmp_path / "stand_in.py"
            words = [script, point.folder, seconds, tmp_path / "starts", failing]
            return [sys.executable, *map(str, words)]

        return local.run_all(sweep, SimpleNamespace(j=j, run="dummy"), command)

    def starts():
        path = tmp_path / "starts"
        return path.read_text().split() if path.exists() else []

    run.sweep = sweep
    run.starts = starts
    return run


def test_runs_are_started_in_order_once_and_finished_ones_are_skipped(stand_in, capfd):
    assert stand_in() == ({}, "")
    assert stand_in.starts() == ["tiny_full_s1", "tiny_low_s1", "tiny_full_s2", "tiny_low_s2"]
    assert "tiny_low_s1: finished, perplexity 9.00" in capfd.readouterr().out
    assert stand_in() == ({}, "") and len(stand_in.starts()) == 4
    assert "4 runs, 4 finished" in capfd.readouterr().out
    assert costs.finished_rate(stand_in.sweep)[0] == 50


def test_a_failed_run_is_named_with_its_last_lines_stops_no_other_and_is_tried_again(stand_in):
    failed, stopped = stand_in(failing="tiny_full_s1")
    assert list(failed) == ["tiny_full_s1"] and not stopped
    why, log, last_lines = failed["tiny_full_s1"]
    assert why == "exit code 2" and log == stand_in.sweep.folder / "logs" / "tiny_full_s1.log"
    assert last_lines == ["working", "error: --learning-rate: too hot"]
    assert len(stand_in.starts()) == 4 and status("tiny_low_s2") == "finished"
    assert stand_in() == ({}, "") and stand_in.starts()[4:] == ["tiny_full_s1"]


def test_two_sweeps_on_one_file_share_its_runs_and_both_wait_for_all(stand_in):
    other = get_context("fork").Process(target=stand_in, kwargs={"seconds": 0.6})
    other.start()
    answer = stand_in(seconds=0.6)
    assert answer == ({}, "") and all(status(p.tag) == "finished" for p in stand_in.sweep.points)
    other.join(20)
    assert other.exitcode == 0 and sorted(stand_in.starts()) == sorted(p.tag for p in stand_in.sweep.points)


# a terminal that closes says it twice
@pytest.mark.parametrize("number, times", [(signal.SIGTERM, 1), (signal.SIGHUP, 2)])
def test_a_signal_is_passed_on_and_the_same_command_goes_on(stand_in, number, times):
    other = get_context("fork").Process(
        target=lambda: os._exit(stand_in(seconds=60, j=2) == ({}, number.name))
    )
    other.start()
    wait_for((metrics.runs_dir() / "tiny_full_s1" / "metrics.jsonl").exists)
    wait_for((metrics.runs_dir() / "tiny_low_s1" / "metrics.jsonl").exists)
    for _ in range(times):
        os.kill(other.pid, number)
        time.sleep(0.05)
    other.join(20)
    assert other.exitcode == 1 and status("tiny_full_s1") == status("tiny_low_s1") == "stopped"
    assert stand_in() == ({}, "") and len(stand_in.starts()) == 6


def test_a_run_whose_launcher_was_killed_is_left_to_itself_until_it_ends(stand_in):
    other = get_context("fork").Process(target=stand_in, kwargs={"seconds": 1})
    other.start()
    wait_for(lambda: stand_in.starts() == ["tiny_full_s1"])
    other.kill()
    other.join()
    assert stand_in() == ({}, "")  # the stand-in, which heeds no launcher, holds its lock until it is done
    assert sorted(stand_in.starts()) == sorted(p.tag for p in stand_in.sweep.points)


def test_where_runs_go(stand_in, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert local.places(stand_in.sweep, None) == [{"gpus": (), "threads": 8}]
    assert local.places(stand_in.sweep, 4)[3]["threads"] == 2
    monkeypatch.setattr("nanochat.devices.pick_device_type", lambda _: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    assert [p["gpus"] for p in local.places(stand_in.sweep, None)] == [("2",), ("3",), ("5",)]
    assert len(local.places(stand_in.sweep, 2)) == 2
    two = SimpleNamespace(points=stand_in.sweep.points, processes=2, file="tiny.toml")
    assert [p["gpus"] for p in local.places(two, None)] == [("2", "3")]
    two.processes = 4
    with pytest.raises(InputError, match=r"needs 4 GPU\(s\), this machine has 3"):
        local.places(two, None)


# ---- the whole way, training included


def test_plan_lists_every_run_and_its_cost_and_starts_nothing(experiment, capsys):
    path = experiment("[points.low]\nattn-rank = 4\n[points.lr]\nmatrix-lr = [0.02, -1]\n")
    sweeps.main([str(path), "--plan"])
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("tiny_")}
    points = ("low", "lr_lr0.02", "lr_lr-1")  # the last is the partner
    assert list(lines) == [f"tiny_{label}_s{seed}" for seed in (1, 2) for label in points]
    assert lines["tiny_low_s1"][1] == "new"
    assert "6 runs," in out and "FLOP/s a run, measured on 2 layers of width 32" in out
    assert not metrics.runs_dir().exists()


@pytest.mark.long
def test_a_killed_sweep_leaves_no_run_behind_and_the_same_command_goes_on_to_the_report(
    experiment, tmp_path, capsys
):
    path = experiment("[points.low]\nattn-rank = 4\n", seeds=[1])
    path.write_text(
        "baseline = false\n"
        + path.read_text()
        .replace("num-iterations = 6\neval-every = 3", "num-iterations = 150\neval-every = 50")
        .replace("device-batch-size = 4", "device-batch-size = 8")
    )
    low = metrics.runs_dir() / "tiny_low_s1"
    (sweep,) = Launched(1, tmp_path / "output", sweeps.main, [str(path)]).processes
    wait_for(lambda: len(metrics.read_history(low)) >= 20, 60)
    sweep.kill()
    wait_for(lambda: status(low.name) == "stopped")  # without its launcher it saves and stops by itself
    assert 20 <= len(metrics.read_history(low)) < 150
    sweeps.main([str(path)])
    out = capsys.readouterr().out
    assert "tiny_low_s1: resumes" in out and "1 runs, 0 finished" in out
    run = metrics.load_run(low)
    assert run.summary["status"] == "finished" and [e["step"] for e in run.history] == list(range(1, 151))
    report = sweeps.load(sweeps.build_parser().parse_args([str(path)])).folder / "report"
    assert (report / "report.html").stat().st_size > 10_000
    assert "tiny_low_s1" in (report / "report.csv").read_text()


def test_failed_runs_are_listed_after_the_report_and_a_stopped_sweep_makes_none(
    experiment, monkeypatch, capsys
):
    path = experiment("[points.low]\nattn-rank = 4\n", seeds=[1])
    reports = []
    monkeypatch.setattr(sweeps, "make_report", lambda *_: reports.append(1))
    failed = {"tiny_low_s1": ("exit code 2", "logs/tiny_low_s1.log", ["error: too hot"])}
    monkeypatch.setattr(sweeps, "run_all", lambda *_: (failed, ""))
    with pytest.raises(SystemExit) as end:
        sweeps.main([str(path)])
    assert end.value.code == 1 and reports == [1]
    out = capsys.readouterr().out
    assert "1 of 2 runs failed" in out
    assert "tiny_low_s1: exit code 2, logs/tiny_low_s1.log\n    error: too hot" in out
    for name, code in (("SIGINT", 130), ("SIGTERM", REQUEUE)):
        monkeypatch.setattr(sweeps, "run_all", lambda *_, name=name: ({}, name))
        with pytest.raises(SystemExit) as end:
            sweeps.main([str(path)])
        assert end.value.code == code and reports == [1]


def test_when_all_runs_fail_they_are_named_with_the_ends_of_their_logs(experiment, monkeypatch, capsys):
    path = experiment("[points.low]\nattn-rank = 4\n", seeds=[1])
    failed = {
        f"tiny_{label}_s1": ("exit code 2", f"logs/{label}.log", ["error: too hot"])
        for label in ("full", "low")
    }
    monkeypatch.setattr(sweeps, "run_all", lambda *_: (failed, ""))
    with pytest.raises(SystemExit) as end:
        sweeps.main([str(path)])
    out = capsys.readouterr().out
    assert end.value.code == 1 and "2 of 2 runs failed" in out
    assert "no run is finished" in out.splitlines()[-1]
    assert "tiny_full_s1: exit code 2, logs/full.log\n    error: too hot" in out
    assert "tiny_low_s1: exit code 2, logs/low.log\n    error: too hot" in out


def test_one_task_runs_in_the_foreground_with_its_names_for_wandb(experiment, monkeypatch):
    path = experiment("[points.low]\nattn-rank = 4\n", seeds=[1])
    for name in ("WANDB_RUN_GROUP", "WANDB_TAGS", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # what the task sets is taken back after the test
        monkeypatch.delenv(name)
    seen = []
    monkeypatch.setattr("scripts.base_train.main", seen.append)
    sweeps.main([str(path), "--task", "tiny_low_s1", "--run", "mine"])
    argv = seen[0]
    assert argv[argv.index("--run") + 1] == "mine-low_s1"
    assert argv[argv.index("--model-tag") + 1] == "tiny_low_s1"
    assert os.environ["WANDB_RUN_GROUP"] == "tiny" and os.environ["WANDB_TAGS"] == "attn-rank=4"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(os.environ["NANOCHAT_BASE_DIR"])
    lock = local.claim(local.claim_path("tiny_low_s1"))
    with pytest.raises(InputError, match="--task tiny_low_s1: this run is in use by process"):
        sweeps.main([str(path), "--task", "tiny_low_s1"])
    lock.close()
    with pytest.raises(InputError, match="has no such point; did you mean tiny_low_s1"):
        sweeps.main([str(path), "--task", "tiny_low_s3"])


def test_what_does_not_belong_to_the_sweep_is_refused_before_it_begins(experiment, train):
    train("--attn-rank", 8, tag="tiny_low_s1")
    path = experiment("[points.low]\nattn-rank = 4\n", seeds=[1])
    with pytest.raises(InputError, match=r"tiny_low_s1: .* is another run: attn_rank \(8 there, 4 now\)"):
        sweeps.main([str(path)])
    path.write_text(path.read_text().replace("vocab-size = 300", "vocab-size = 301"))
    with pytest.raises(InputError, match="has 300 tokens, .* asks for vocab-size 301; .* NANOCHAT_BASE_DIR"):
        sweeps.main([str(path)])
    with pytest.raises(InputError, match="no run is finished"):
        sweeps.main([str(experiment("[points.new]\ndepth = 1\n")), "--report"])


def test_a_sweep_says_that_its_tokenizer_is_of_another_text(experiment, base_dir, tmp_path, capsys):
    text = tmp_path / "other"
    text.mkdir()
    for name in ("a", "val"):
        sentence = "the quick brown fox jumps over the lazy dog again and again. "
        (text / f"{name}.txt").write_text(sentence * 200)
    path = tiny_experiment(tmp_path / "moved.toml", "[points.full]\n", [1], text)
    sweeps.prepare(sweeps.load(sweeps.build_parser().parse_args([str(path)])))
    assert "this text is other: it takes more tokens" in capsys.readouterr().out
