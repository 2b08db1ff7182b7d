"""Whoever ends a run, and whenever: it ends within seconds, its state is saved, and the resumed run is the
uninterrupted one to the bit.
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, losses
from processes import Launched, environment, free_port

from nanochat import common, locks, loss_eval, metrics, processes, signals
from nanochat.checkpoint_manager import load_checkpoint, saved_steps
from nanochat.checkpoint_writer import CheckpointWriter
from nanochat.errors import InputError
from scripts import adapter_train, base_train

FLAGS = [*TINY, "--device-batch-size", "2"]


def final_weights(run):
    return load_checkpoint(metrics.runs_dir() / run.name, run.summary["step"])[0]["model"]


def assert_same_run(resumed, straight):
    assert resumed.summary["status"] == straight.summary["status"] == "finished"
    assert losses(resumed) == losses(straight)
    assert [entry.get("val/loss") for entry in resumed.history] == [
        entry.get("val/loss") for entry in straight.history
    ]
    for name, weight in final_weights(straight).items():
        assert torch.equal(weight, final_weights(resumed)[name]), name


def wait_until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_free(path) -> bool:
    """Whether no process holds this lock."""
    lock = locks.acquire(path, wait=False)
    if lock:
        lock.close()
    return lock is not None


def lines_of(path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture
def launch(base_dir, corpus_dir, tmp_path):
    """launch(processes, function, '--flag', …): a Launched whose processes call function(flags)."""

    def start(processes, function, *flags):
        return Launched(
            processes, tmp_path / "output", function, [*FLAGS, "--data", str(corpus_dir), *map(str, flags)]
        )

    return start


def send(launched, number, ranks=None):
    for process in launched.processes if ranks is None else [launched.processes[rank] for rank in ranks]:
        os.kill(process.pid, number)


# ---- in the processes


def slow_to_save(seconds):
    """fsync of a checkpoint's tensors takes so long."""
    fsync = os.fsync

    def slow(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("__0_0.distcp"):
            time.sleep(seconds)
        fsync(descriptor)

    os.fsync = slow


def train_and_save_slowly(flags):
    slow_to_save(30)
    base_train.main(flags)


def train_and_evaluate_slowly(flags):
    make_batch = loss_eval.make_batch

    def slow(rows, device):
        time.sleep(2)
        return make_batch(rows, device)

    loss_eval.make_batch = slow
    base_train.main(flags)


def compute_without_an_end(_flags):
    """The main thread is in one call of a library; Python's handlers, which run in it, do not."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.ENDING)
    print("computing", flush=True)
    ctypes.CDLL(None).sleep(60)


# ---- one process


@pytest.mark.parametrize("number", signals.ENDING, ids=signals.signal_name)
def test_each_signal_saves_the_run_and_says_so_in_its_code(launch, number):
    folder = metrics.runs_dir() / "stopped"
    launched = launch(
        1, base_train.main, "--num-iterations", 5000, "--eval-every", -1, "--model-tag", "stopped"
    )
    wait_until(lambda: lines_of(folder / "metrics.jsonl") >= 3)
    send(launched, number)
    assert launched.codes() == [130 if number == signal.SIGINT else 75]
    run = metrics.load_run(folder)
    assert run.summary["status"] == "stopped" and saved_steps(folder) == [run.history[-1]["step"]]
    output = launched.output.read_text()
    assert (
        f"{signal.Signals(number).name}: the run saves its state and ends" in output
        and "Traceback" not in output
    )


def test_a_second_ctrl_c_leaves_at_once(launch):
    folder = metrics.runs_dir() / "left"
    launched = launch(
        1, train_and_save_slowly, "--num-iterations", 5000, "--eval-every", -1, "--model-tag", "left"
    )
    wait_until(lambda: lines_of(folder / "metrics.jsonl") >= 3)
    send(launched, signal.SIGINT)
    wait_until(lambda: list(folder.glob("checkpoints/.step_*")))
    time.sleep(3 * signals.ECHO_SECONDS)
    began = time.monotonic()
    send(launched, signal.SIGINT)
    assert launched.codes() == [130] and time.monotonic() - began < 20
    output = launched.output.read_text()
    assert (
        "once more leaves at once" in output
        and output.endswith("SIGINT again: left without saving\n")
        and "Traceback" not in output
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_with_nothing_to_save_a_signal_ends_a_process_in_seconds_whatever_it_does(launch, number):
    launched = launch(1, compute_without_an_end)
    wait_until(lambda: launched.output.exists() and "computing" in launched.output.read_text())
    began = time.monotonic()
    send(launched, number)
    assert launched.codes() == [130 if number == signal.SIGINT else 75] and time.monotonic() - began < 30
    assert launched.output.read_text() == f"computing\nstopped by {signal.Signals(number).name}\n"


SCRIPT = """
import os, signal, sys, time
{before}
from nanochat.common import run_script
def main():
    {body}
run_script(main, *sys.argv[1:])
"""


def script(body, before="", **options):
    """A script of this package, without torch: (exit code, stdout, stderr)."""
    text = SCRIPT.format(body=body.replace("\n", "\n    "), before=before)
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=common.Path(__file__).parents[1],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        **{"stdout": subprocess.PIPE, **options},
    )
    return done.returncode, done.stdout, done.stderr


IMPORTING = """
class Finder:
    def find_spec(self, name, *_):
        if name == "nanochat.agreement":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder())
"""
MAKING_A_CLASS = """
class Name:
    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGTERM)
class Named:
    name = Name()
"""


def test_a_signal_during_an_import_ends_the_script_without_a_traceback():
    assert script("print('begins')", IMPORTING) == (-signal.SIGTERM, "", "")
    assert script(MAKING_A_CLASS) == (75, "", "stopped by SIGTERM\n")


def test_under_nohup_a_closed_terminal_is_no_signal_except_from_torchrun():
    body = "os.kill(os.getpid(), signal.SIGHUP)\nprint('goes on')"
    before = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    assert script(body, before) == (0, "goes on\n", "")
    assert script(body, before, env={**os.environ, "TORCHELASTIC_RUN_ID": "1"}) == (
        75,
        "",
        "stopped by SIGHUP\n",
    )


def test_after_a_ctrl_c_a_launcher_that_dies_is_no_second_one():
    body = (
        "with signals.stop_signals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    stop.wait()\n"
        "    signals.launcher_gone()\n    time.sleep(0.3)\n    print('saved')"
    )
    code, output, errors = script(
        body, "from nanochat import signals", env={**os.environ, "TORCHELASTIC_RUN_ID": "1"}
    )
    assert (code, output) == (0, "saved\n") and errors.startswith("SIGINT: the run saves its state and ends")


SLOW_START = """
import os, time
import scripts  # as python -m scripts.base_train does
open("started", "w").close()
while os.getppid() == int(os.environ["LAUNCHER"]):
    time.sleep(0.05)  # torch is imported
from nanochat.common import run_script
run_script(lambda: time.sleep(60))
"""


def test_a_process_whose_launcher_dies_while_torch_is_imported_ends(tmp_path):
    """Else it would look for the others of its run for half an hour."""
    shell = 'export LAUNCHER=$$; "$@"; exit'
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "TORCHELASTIC_RUN_ID": "1",
    }
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            ["bash", "-c", shell, "bash", sys.executable, "-c", SLOW_START],
            cwd=tmp_path,
            env=environment,
            stderr=log,
        )
    wait_until((tmp_path / "started").exists)
    launcher.kill()
    launcher.wait()
    wait_until(lambda: (tmp_path / "log").read_text() == "stopped by SIGTERM\n", 20)


def test_a_process_whose_launcher_died_before_says_so(monkeypatch):
    place = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": free_port(),
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(InputError, match=r"MASTER_PORT=\d+: torchrun was there and is gone; start again"):
        processes.init_process("cpu")


def test_a_script_that_is_stopped_clears_away_what_is_half_written():
    body = (
        "try:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\nfinally:\n    print('cleared')"
    )
    assert script(body) == (75, "cleared\n", "stopped by SIGTERM\n")


def test_a_library_that_lets_no_thread_run_is_ended_too():
    body = (
        "os.system(f'(sleep 0.5; kill -TERM {os.getpid()}) > /dev/null 2>&1 &')\n"
        # PyDLL keeps the interpreter's lock
        "with signals.default_handlers():\n    ctypes.PyDLL(None).sleep(30)"
    )
    assert script(body, "import ctypes\nfrom nanochat import signals") == (-signal.SIGTERM, "", "")


# ---- several processes


def test_an_evaluation_is_broken_off_on_all_processes_when_one_is_asked(launch):
    assert launch(2, base_train.main, "--model-tag", "straight").codes() == [0, 0]
    folder = metrics.runs_dir() / "stopped"
    launched = launch(2, train_and_evaluate_slowly, "--model-tag", "stopped")  # 8 batches a process: 16 s
    wait_until(lambda: lines_of(folder / "metrics.jsonl") >= 2)
    time.sleep(1)
    began = time.monotonic()
    send(launched, signal.SIGTERM, ranks=[1])
    assert launched.codes() == [75, 75] and time.monotonic() - began < 12
    stopped = metrics.load_run(folder)
    assert (
        stopped.summary["status"] == "stopped"
        and saved_steps(folder) == [3]
        and "val/loss" not in stopped.history[2]
    )
    resumed = launch(2, base_train.main, "--model-tag", "stopped", "--resume", "auto")
    assert resumed.codes() == [0, 0], resumed.output.read_text()
    assert_same_run(metrics.load_run(folder), metrics.load_run(metrics.runs_dir() / "straight"))


def write_for_two_seconds(folder):
    """A training process that in the end waits for its writer."""

    def write():
        time.sleep(2)
        (folder / "checkpoint").touch()

    with common.claimed(folder / "lock", "the run") as lock:
        with CheckpointWriter(lock) as writer:
            writer.start(write, (folder / "summary").touch)
            print("training", flush=True)
        print("written", flush=True)


def refuse_to_write(folder):
    def write():
        raise InputError(f"{folder}: cannot write the checkpoint")

    with common.claimed(folder / "lock", "the run") as lock, CheckpointWriter(lock) as writer:
        writer.start(write)


def test_the_writer_outlives_the_process_that_started_it_and_keeps_its_lock(tmp_path, capsys):
    for killed in (False, True):
        launched = Launched(1, tmp_path / "output", write_for_two_seconds, tmp_path)
        wait_until(lambda: launched.output.exists() and "training" in launched.output.read_text())
        time.sleep(0.5)
        if killed:
            send(launched, signal.SIGTERM)  # is raised once the writer is done
            send(launched, signal.SIGKILL)
            with common.claimed(tmp_path / "lock", "the run"):
                assert (tmp_path / "checkpoint").exists() and (tmp_path / "summary").exists()
            assert re.fullmatch(
                r"the run: waiting for process \d+ on \S+, which writes a checkpoint\n",
                capsys.readouterr().out,
            )
            launched.codes()
        else:
            assert launched.codes() == [0] and launched.output.read_text() == "training\nwritten\n"
            assert not (tmp_path / "summary").exists()
            (tmp_path / "checkpoint").unlink()
            launched.output.unlink()


def test_what_the_writer_cannot_do_is_the_same_line(tmp_path):
    launched = Launched(1, tmp_path / "output", refuse_to_write, tmp_path)
    assert (
        launched.codes() == [2]
        and launched.output.read_text() == f"error: {tmp_path}: cannot write the checkpoint\n"
    )


def test_an_adapter_stopped_while_its_base_is_evaluated_begins_again(train, monkeypatch):
    train(tag="base")
    flags = [
        "--model-tag",
        "base",
        "--run-tag",
        "adapter",
        "--num-iterations",
        "2",
        "--eval-every",
        "-1",
        "--sample-every",
        "-1",
        "--resume",
        "auto",
        "--total-batch-size",
        "256",
        "--device-batch-size",
        "4",
        "--eval-tokens",
        "1024",
    ]
    with monkeypatch.context() as asked:
        request = signals.StopRequest()
        request.hear(signal.SIGINT)
        asked.setattr(signals, "stop_signals", lambda: contextlib.nullcontext(request))
        with pytest.raises(SystemExit) as e:
            adapter_train.main(flags)
    folder = metrics.runs_dir() / "adapter"
    assert (
        e.value.code == 130
        and metrics.load_run(folder).summary["status"] == "stopped"
        and saved_steps(folder) == []
    )
    adapter_train.main(flags)
    run = metrics.load_run(folder)
    assert run.summary["status"] == "finished" and [
        entry["step"] for entry in run.history if "val/loss" in entry
    ] == [0, 2]


SLOW_STEPS = """
import time
from nanochat.common import run_script
from scripts import base_train
forward_backward = base_train.forward_backward
def slow(*args):
    time.sleep(0.4)
    return forward_backward(*args)
base_train.forward_backward = slow
run_script(base_train.main)
"""
SLOW_DISK = """
import os
if "RANK" in os.environ:
    import time
    fsync = os.fsync
    def slow(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("__0_0.distcp"):
            while not os.path.exists(os.environ["DISK_GOES_ON"]):
                time.sleep(0.05)
        fsync(descriptor)
    os.fsync = slow
"""


def torchrun(log, *program, **variables):
    """torchrun with two processes that run the program; their output goes to the file `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *program]
    with open(log, "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment(**variables))


@pytest.mark.long
def test_killed_or_asked_torchrun_loses_nothing_also_where_a_save_outlasts_its_patience(
    launch, corpus_dir, tmp_path, base_dir
):
    flags = ["--num-iterations", 30, "--save-every", 10, "--eval-every", -1]
    assert launch(2, base_train.main, *flags, "--model-tag", "straight").codes() == [0, 0]
    folder = metrics.runs_dir() / "slow"
    log = tmp_path / "log"
    given = [*FLAGS, "--data", str(corpus_dir), *map(str, flags), "--model-tag", "slow", "--resume", "auto"]

    # a signal that torchrun does not know kills it
    (tmp_path / "slow_steps.py").write_text(SLOW_STEPS)
    launcher = torchrun(log, str(tmp_path / "slow_steps.py"), *given, PYTHONPATH=ROOT)
    wait_until(lambda: lines_of(folder / "metrics.jsonl") >= 3 or launcher.poll() is not None)
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait() == -signal.SIGUSR1, log.read_text()
    wait_until(lambda: is_free(base_dir / "locks/slow.lock"), 10)
    stopped = metrics.load_run(folder)
    assert stopped.summary["status"] == "stopped" and saved_steps(folder) == [stopped.summary["step"]]
    assert 3 <= stopped.summary["step"] < 10

    # one that it knows: its patience ends before the disk's work
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    launcher = torchrun(
        log,
        "-m",
        "scripts.base_train",
        "--",
        *given,
        "--run",
        "offline",
        PYTHONPATH=tmp_path,
        DISK_GOES_ON=tmp_path / "goes_on",
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1,
        WANDB_MODE="offline",
    )
    wait_until(
        lambda: (
            list(folder.glob("checkpoints/.step_000010.*.building/__0_0.distcp"))
            or launcher.poll() is not None
        )
    )
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) != 0, log.read_text()
    assert "forcefully exiting via" in log.read_text() and 10 not in saved_steps(folder)
    resumed = launch(2, base_train.main, *flags, "--model-tag", "slow", "--resume", "auto")
    waits = re.compile(r"slow: waiting for process \d+ on \S+, which writes a checkpoint\n")
    wait_until(lambda: waits.search(resumed.output.read_text()))
    (tmp_path / "goes_on").touch()
    assert resumed.codes() == [0, 0], resumed.output.read_text()
    # from step 10, or a later one: training went on, and the next writer waited for this one
    assert int(re.search(r"from step (\d+)", resumed.output.read_text())[1]) >= 10
    assert_same_run(metrics.load_run(folder), metrics.load_run(metrics.runs_dir() / "straight"))
