"""A run that is killed at any moment ends with the weights of one that was not.

Slow: python -m pytest tests -m faults
"""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, losses
from processes import Launched

from nanochat import metrics
from nanochat.checkpoint_manager import load_checkpoint, saved_steps
from scripts import base_train

STEPS = 400
KILLS = 20
FLAGS = ["--num-iterations", str(STEPS), "--eval-every", "-1", "--device-batch-size", "4"]


def start(processes: int, corpus_dir, *flags):
    module = ["-m", "scripts.base_train", *TINY, "--data", str(corpus_dir), *FLAGS, *flags]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if processes > 1
        else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, *module],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def family(pid: int) -> list[int]:
    """The launcher, its processes and the writers of their checkpoints, which have sessions of their own.
    Asked of the kernel (Linux): to start a program that looks takes longer than to write a checkpoint.
    """
    with contextlib.suppress(OSError):
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        return [pid, *(descendant for child in children for descendant in family(child))]
    return [pid]


def kill(process, pids: list[int]):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.0005)


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("rank", [[], ["--attn-rank", "4", "--mlp-rank", "8"]], ids=["dense", "lowrank"])
def test_killed_twenty_times_it_ends_with_the_weights_of_an_uninterrupted_run(
    base_dir, corpus_dir, processes, rank
):
    straight = start(processes, corpus_dir, *rank, "--model-tag", "straight")
    assert straight.wait() == 0, straight.stderr.read()[-2000:]

    rng = random.Random(1)
    folder = metrics.runs_dir() / "killed"
    flags = [*rank, "--model-tag", "killed", "--save-every", "1", "--resume", "auto"]
    landed = []
    for i in range(KILLS):
        run = start(processes, corpus_dir, *flags)
        before = saved_steps(folder)
        if i % 5 == 4:  # while it starts
            time.sleep(rng.uniform(0.5, 5))
            pids = family(run.pid)
        else:  # while it trains; every other time in the middle of writing a checkpoint
            wait_for(lambda: saved_steps(folder)[-1:] > before[-1:], run)
            time.sleep(rng.uniform(0, 0.2))
            if i % 2:
                wait_for(lambda: list((folder / "checkpoints").glob(".step_*.building")), run)
            pids = family(run.pid)
        assert run.poll() is None, "it finished before it could be killed"
        kill(run, pids)
        landed.append((saved_steps(folder)[-1:], len(list((folder / "checkpoints").glob(".step_*")))))
    print(f"newest checkpoint and half-written ones after each kill: {landed}")
    assert sum(half for _, half in landed) >= 3, "some kills fell into the writing of a checkpoint"

    final = start(processes, corpus_dir, *flags)
    assert final.wait() == 0, final.stderr.read()[-2000:]
    a, b = (load_checkpoint(metrics.runs_dir() / tag, STEPS)[0] for tag in ("straight", "killed"))
    for name, weight in a["model"].items():
        assert torch.equal(weight, b["model"][name]), name
    for name, entries in a["optimizer"].items():
        assert all(torch.equal(value, b["optimizer"][name][key]) for key, value in entries.items()), name
    assert losses(metrics.load_run(metrics.runs_dir() / "straight")) == losses(metrics.load_run(folder))


def train_on_a_full_disk(flags, errors):
    """No file may grow beyond 200 kB: the write fails for real, in the middle of a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    base_train.main(flags)


def test_a_disk_that_is_full_is_one_line_and_the_checkpoint_before_stays(train, corpus_dir, tmp_path):
    straight = train(tag="straight")
    flags = [*TINY, "--data", str(corpus_dir), "--save-every", "3", "--model-tag", "full"]
    launched = Launched(1, tmp_path / "output", train_on_a_full_disk, flags, tmp_path / "errors")
    assert launched.codes() == [2]
    errors = (tmp_path / "errors").read_text()
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert "step_000003: cannot write the checkpoint (File too large)" in errors
    assert "--resume auto" in errors
    assert saved_steps(metrics.runs_dir() / "full") == []
    assert losses(train("--save-every", 3, "--resume", "auto", tag="full")) == losses(straight)
