"""The processes of one run end together, however they are ended; so do those of a sweep that is killed."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_experiment
from processes import Launched, alive, wait_for

from nanochat import metrics
from nanochat.checkpoint_manager import saved_steps
from nanochat.signals import REQUEUE
from scripts import sweep as sweeps

# a stand-in for a run: it sleeps, saves when it is asked to stop, and starts within a moment
WORKER = """
import os, pathlib, signal, sys, time
from nanochat.common import run_script
from nanochat.processes import print0, process_layout
folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
rank, _, size = process_layout()
def save(*_):
    (folder / f"saved{rank}").touch()
    sys.exit(75)
def main():
    signal.signal(signal.SIGTERM, save if what != "hangs" else signal.SIG_IGN)
    (folder / f"started{rank}").touch()
    while rank == 1 and not (folder / "started0").exists():
        time.sleep(0.05)  # one that fails fails while the other works
    if what == "fails" and rank == 1:
        sys.exit(3)
    if what == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "ends":
        return print0("done by", size)
    time.sleep(60)
run_script(main)
"""
LAUNCHER = """
import sys
from nanochat import signals
from nanochat.sweep import workers
workers.SECONDS_TO_FOLLOW = 1
with signals.stop_signals() as stop:
    code = workers.run_workers([sys.executable, *sys.argv[1:]], 2, stop)
sys.exit(code)
"""


@pytest.fixture
def launch(tmp_path):
    """launch(what) starts two workers that do `what`, from a launcher in a session of its own.

    After the test none of them may be left.
    """
    (tmp_path / "worker.py").write_text(WORKER)

    def start(what, wait=True):
        command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "worker.py"), str(tmp_path), what]
        launcher = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        if wait:
            wait_for(lambda: (tmp_path / "started0").exists() and (tmp_path / "started1").exists())
        return launcher

    yield start
    wait_for(lambda: not alive(str(tmp_path / "worker.py")))


def test_workers_form_a_group_and_end(launch):
    launcher = launch("ends")
    assert launcher.communicate(timeout=20)[0] == "done by 2\n" and launcher.returncode == 0


def test_a_request_to_stop_reaches_every_worker_and_their_answer_is_kept(launch, tmp_path):
    launcher = launch("sleeps")
    launcher.terminate()
    assert launcher.wait(20) == REQUEUE and (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


def test_a_request_to_stop_while_the_workers_still_start(launch, tmp_path):
    launcher = launch("sleeps", wait=False)
    wait_for(lambda: len(alive(str(tmp_path / "worker.py"))) > 1)
    launcher.terminate()
    assert launcher.wait(20) == REQUEUE, launcher.stderr.read()


def test_workers_notice_that_their_launcher_is_gone(launch, tmp_path):
    launch("sleeps").kill()
    wait_for(lambda: (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists())


def test_a_second_signal_of_a_sweep_reaches_every_worker(launch, tmp_path):
    launcher = launch("hangs")
    os.killpg(launcher.pid, signal.SIGKILL)  # as nanochat.sweep.local does it
    wait_for(lambda: not alive(str(tmp_path / "worker.py")), 5)


@pytest.mark.parametrize(
    "what, code, message",
    [("fails", 3, ""), ("killed", 137, "process 1 of 2 was killed by SIGKILL (out of memory?)\n")],
)
def test_one_that_fails_takes_the_others_along(launch, tmp_path, what, code, message):
    launcher = launch(what)
    assert launcher.communicate(timeout=20)[1] == message and launcher.returncode == code
    assert (tmp_path / "saved0").exists()


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="the test looks for processes there")
def test_a_killed_sweep_leaves_no_process_of_a_run_of_two_behind(base_dir, corpus_dir, tmp_path, monkeypatch):
    """(How such a run goes on: test_sweep.py; with another number of processes: test_distributed.py.)"""
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = tiny_experiment(tmp_path / "tiny.toml", "[points.low]\nattn-rank = [4]\n", [1], corpus_dir)
    short = "num-iterations = 6\neval-every = 3"
    text = path.read_text().replace(short, "num-iterations = 300\neval-every = 100")
    path.write_text("baseline = false\nprocesses = 2\n" + text)
    tag = "tiny_low_attn4_s1"
    folder = metrics.runs_dir() / tag
    (sweep,) = Launched(1, tmp_path / "output", sweeps.main, [str(path), "--run", "try"]).processes
    wait_for(lambda: len(metrics.read_history(folder)) >= 10, 60)
    assert len(alive(tag)) >= 3  # the task and its workers
    sweep.kill()
    wait_for(lambda: not alive(tag), 30)
    run = metrics.load_run(folder)
    assert run.summary["status"] == "stopped" and len(run.history) < 300
    assert run.config["device"]["processes"] == 2
    assert saved_steps(folder) == [run.summary["step"]] == [len(run.history)]
    assert list(folder.glob("wandb/offline-run-*"))
