"""The two commands as a newcomer calls them, at a size of seconds."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, losses
from processes import alive, free_port, wait_for

from nanochat import metrics
from nanochat.checkpoint_manager import saved_steps

SMALL = dict(
    VOCAB_SIZE="300",
    DEPTH="2",
    MODEL_DIM="32",
    HEAD_DIM="16",
    MAX_SEQ_LEN="32",
    ATTN_RANK="8",
    MLP_RANK="0.25",
    DEVICE_BATCH_SIZE="4",
    TOTAL_BATCH_SIZE="256",
    NUM_ITERATIONS="6",
    EVAL_EVERY="3",
    EVAL_TOKENS="512",
    SAVE_EVERY="3",
    PPL_THRESHOLDS="250,10",
    NPROC="1",
)


pytestmark = pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="made by dev/test.sh")


def start(folder, **changes):
    """speedrun.sh, called from a folder that is not its own."""
    usual = {"OMP_NUM_THREADS": "1", "NANOCHAT_BASE_DIR": str(folder / "base")}
    env = {**os.environ, **SMALL, **usual, **changes}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ["bash", ROOT / "speedrun.sh"], cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True
    )


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def speedrun(folder, **changes):
    """(exit code, stdout, stderr) of it."""
    process = start(folder, **changes)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


@pytest.fixture
def folder(tmp_path, corpus_dir):
    """Where the user stands; the text is in a folder there whose name has a space."""
    (tmp_path / "my stories #1").symlink_to(corpus_dir)
    return tmp_path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"DATA": "nonesuch"}, "error: --data {folder}/nonesuch: "),
        ({"NPROC": "two"}, "error: NPROC=two: give a whole number"),
        ({"NNODES": "a[$(touch pwned)]\x1b"}, r"error: NNODES=$'a[$(touch pwned)]\E': give a whole number"),
        ({"NPROC": "0"}, "error: NPROC=0 NNODES=1 NODE_RANK=0: give a process or more"),
    ],
)
def test_speedrun_stops_at_a_bad_setting_with_its_line(folder, changes, message):
    code, _, stderr = speedrun(folder, **changes)
    assert code == 2 and stderr.strip().startswith(message.format(folder=folder)) and stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["speedrun.sh", "dev/test.sh"])
def test_another_shell_is_told_to_be_bash(script):
    shell = shutil.which("dash") or pytest.skip("no other shell here")
    done = subprocess.run([shell, ROOT / script], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f"error: {script} is written for bash: bash {script}\n"


@pytest.mark.long
def test_a_signal_to_speedrun_alone_stops_all_processes_with_their_state_saved(folder):
    process = start(
        folder,
        DATA="./my stories #1/.",
        NPROC="2",
        WANDB_RUN="try",
        WANDB_MODE="offline",
        NUM_ITERATIONS="100000",
        SAVE_EVERY="-1",
        EVAL_EVERY="-1",
    )
    wait_for(lambda: len(list(folder.glob("base/runs/*/metrics.jsonl"))) == 1, 100)
    (run,) = folder.glob("base/runs/*")
    wait_for(lambda: len(metrics.read_history(run)) >= 5)
    family = alive(run.name)
    assert len(family) == 3  # torchrun and its workers
    for _ in range(2):  # as a terminal that closes does, and the shell in it
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    launcher = next(pid for pid in family if "torchrun" in command_of(pid))
    os.kill(launcher, signal.SIGUSR1)  # as Slurm does to every process of a step: torchrun knows of it
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr[-2000:]  # torchrun's own code, not that of a killed process
    assert "closing signal SIGTERM" in stderr
    assert not alive(run.name)
    stopped = metrics.load_run(run)
    assert stopped.summary["status"] == "stopped" and stopped.config["device"]["processes"] == 2
    assert saved_steps(run) == [stopped.summary["step"]] and list(run.glob("wandb/offline-run-*"))
    assert len(list(folder.glob("base/runs/*"))) == 1  # nothing new began


@pytest.mark.faults
def test_two_processes_and_two_nodes_give_the_losses_of_one(folder):
    """Their steps are the same up to rounding; what is made once is made once, whichever node comes first.
    A second call trains nothing again.
    """
    assert speedrun(folder, DATA="my stories #1")[0] == 0
    code, output, _ = speedrun(folder, DATA="my stories #1")
    assert code == 0 and output.count("already finished") == 2 and "already trained" in output, output
    places = {"DATA": "my stories #1", "WANDB_RUN": "try", "WANDB_MODE": "offline"}
    code, _, stderr = speedrun(folder, **places, NPROC="2", NANOCHAT_BASE_DIR="two")
    assert code == 0, stderr[-3000:]
    port = str(free_port())
    nodes = [
        start(folder, **places, NNODES="2", NODE_RANK=node, MASTER_PORT=port, NANOCHAT_BASE_DIR="nodes")
        for node in ("1", "0")
    ]
    for node in nodes:
        out, err = node.communicate(timeout=280)
        assert node.returncode == 0, err[-3000:]
    assert "report: " in out  # of the first node, the last in this list
    for base in ("two", "nodes"):
        assert (folder / base / "report/report.html").exists()
        assert len(list((folder / base / "runs").iterdir())) == 2
        for run in (folder / base / "runs").iterdir():
            one = metrics.load_run(folder / "base/runs" / run.name)
            assert np.abs(np.subtract(losses(metrics.load_run(run)), losses(one))).max() < 1e-4
