"""The runs of a sweep on this machine: one at each place, in a process with its own log.

A run belongs to the process that holds a lock on $NANOCHAT_BASE_DIR/locks/.sweep.<tag>.lock. The child
inherits the lock: it is free only when launcher and child have both ended, in whatever way. So two sweeps
never have the same run, and no lock outlives its holders.
"""

import contextlib
import os
import signal
import socket
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import devices, locks, signals
from nanochat.errors import InputError
from nanochat.files import create_folder
from nanochat.naming import lock_path
from nanochat.processes import usable_cores
from nanochat.signals import ENDING
from nanochat.sweep.display import Display, last_lines, log_path
from nanochat.sweep.experiment import Point, Sweep

CHILD_POLL = 0.5  # seconds between two checks of the children


@dataclass
class Running:
    point: Point
    process: subprocess.Popen
    locks: list  # of the run and of its GPUs
    place: int  # index of its place
    signals: int = 0  # how many stop signals it was sent


def run_all(sweep: Sweep, args, task_command) -> tuple[dict, str]:
    """Run every unfinished point, until no point waits or runs here, or a signal comes.

    task_command(sweep, point, args): the command line of one run. Returns ({tag: (what happened, log file,
    its last lines)} of the failed runs, name of the signal or ""). Signals in ENDING are passed on, so that
    the runs save; a second signal kills them.
    """
    runs = LocalRuns(sweep, args, task_command)
    with StopSignals() as signals:
        while runs.running or (runs.waiting and not signals.numbers):
            runs.collect_ended(stopping=bool(signals.numbers))
            runs.drop_points_without_base()
            if signals.numbers:
                runs.pass_on(len(signals.numbers))
            else:
                runs.start()
            runs.display.update([run.point for run in runs.running], runs.waiting, len(runs.failed))
            signals.wait(CHILD_POLL)
    runs.display.clear()
    return runs.failed, signal.Signals(signals.numbers[0]).name if signals.numbers else ""


class LocalRuns:
    """Which points wait, which run, and which have failed."""

    def __init__(self, sweep: Sweep, args, task_command):
        self.sweep = sweep
        self.args = args
        self.task_command = task_command
        self.places = places(sweep, args.j)
        self.waiting = [point for point in sweep.points if point.status() != "finished"]
        self.running = []
        self.failed = {}  # {tag: (what happened, log file, its last lines)}
        self.display = Display(sweep, self.waiting)

    def collect_ended(self, stopping: bool):
        for run in [run for run in self.running if run.process.poll() is not None]:
            self.running.remove(run)
            for lock in run.locks:
                lock.close()
            outcome = outcome_of_run(run, stopping)
            if outcome == "again":
                self.waiting.insert(0, run.point)
            elif outcome not in ("finished", "stopped"):
                log = log_path(self.sweep, run.point)
                self.failed[run.point.tag] = (outcome, log, last_lines(log))
            self.display.event(run.point, outcome)

    def drop_points_without_base(self):
        """Points whose base has failed fail too."""
        for point in [point for point in self.waiting if point.base in self.failed]:
            self.waiting.remove(point)
            why = f"cannot start: {point.base} failed"
            self.failed[point.tag] = (why, log_path(self.sweep, point), [])
            self.display.event(point, why)

    def pass_on(self, signals: int):
        """The first signal lets the runs save and stop; a further one kills them with all their processes."""
        for run in self.running:
            if signals > run.signals:
                run.signals = signals
                with contextlib.suppress(ProcessLookupError):
                    if signals == 1:
                        run.process.terminate()
                    else:
                        os.killpg(run.process.pid, signal.SIGKILL)

    def start(self):
        """Start a waiting point at each free place whose GPUs no other sweep uses."""
        occupied = {run.place for run in self.running}
        bases = {point.base for point in self.waiting} - {""}
        unfinished = {tag for tag in bases if self.sweep.point(tag).status() != "finished"}
        for number, place in enumerate(self.places):
            if number in occupied:
                continue
            gpus = [claim(lock_path(f"{socket.gethostname()}-{gpu}", "gpu")) for gpu in place["gpus"]]
            started = all(gpus) and self.start_at(number, gpus, unfinished)
            if not started:
                for lock in filter(None, gpus):
                    lock.close()

    def start_at(self, number: int, gpus: list, unfinished: set[str]) -> bool:
        """Start the first waiting point that no other sweep has and whose base is finished, if there is one.

        gpus: the locks of the place; unfinished: tags of bases. Points that another sweep has finished leave
        the queue. Returns whether a point was started.
        """
        for point in list(self.waiting):
            lock = None if point.base in unfinished else claim(claim_path(point.tag))
            if not lock:
                continue
            self.waiting.remove(point)
            if point.status() == "finished":
                lock.close()
                self.display.event(point, "finished elsewhere")
                continue
            self.display.event(point, "starts" if point.status() == "new" else "resumes")
            held_locks = [lock, *gpus]
            process = self.launch(point, self.places[number], held_locks)
            self.running.append(Running(point, process, held_locks, number))
            return True
        return False

    def launch(self, point: Point, place: dict, held_locks: list) -> subprocess.Popen:
        """A process in a session of its own: Ctrl-C in the terminal reaches only the launcher."""
        environment = dict(os.environ)
        if place["gpus"]:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(place["gpus"])
        else:
            environment.setdefault("OMP_NUM_THREADS", str(place["threads"]))
        log = log_path(self.sweep, point)
        create_folder(log.parent)
        command = [*self.task_command(self.sweep, point, self.args), "--launched", str(os.getpid())]
        with open(log, "a", encoding="utf-8") as out:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
                start_new_session=True,
                pass_fds=[lock.fileno() for lock in held_locks],
            )


def outcome_of_run(run: Running, stopping: bool) -> str:
    """'finished', 'stopped' (by our signal), 'again' (another process stopped it), or the failure."""
    code = run.process.returncode
    if run.point.status() == "finished" and code == 0:
        return "finished"
    if stopping:
        return "stopped"
    if code == signals.REQUEUE:
        return "again"
    if code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    return f"exit code {code}" if code else "ended without finishing"


class StopSignals:
    """Counts the signals in ENDING while its block runs. A signal that is ignored (nohup) stays ignored."""

    def __enter__(self):
        self.numbers = []
        self.event = threading.Event()
        self.handlers = {}
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.on_signal)
        return self

    def on_signal(self, number, _frame):
        if number == signal.SIGHUP and self.numbers:
            return  # a closing terminal sends it, and then its shell sends it again
        self.numbers.append(number)
        self.event.set()

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def wait(self, seconds: float):
        """Wait until a signal comes, at most for `seconds`."""
        self.event.wait(seconds)
        self.event.clear()


# ---- places and locks --------------------------------------------------------------------------------------


def places(sweep: Sweep, most: int | None) -> list[dict]:
    """The places for runs: {"gpus": (ids, …), "threads": N or None} for each.

    most: the largest number of places; None: as many as the GPUs allow, or one on a CPU. InputError if there
    are fewer GPUs than one run needs.
    """
    if devices.pick_device_type(sweep.points[0].args.device_type) == "cuda":
        gpus = visible_gpus()
        starts = range(0, len(gpus) - sweep.processes + 1, sweep.processes)
        groups = [tuple(gpus[start : start + sweep.processes]) for start in starts]
        if not groups:
            raise InputError(
                f"{sweep.file}: a run needs {sweep.processes} GPU(s), this machine has {len(gpus)}; "
                "set processes, or use --launcher slurm"
            )
        return [{"gpus": group, "threads": None} for group in groups[:most]]
    count = most or 1
    return [{"gpus": (), "threads": max(1, usable_cores() // (count * sweep.processes))}] * count


def visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def claim_path(tag: str) -> Path:
    """The lock of a run that a sweep is working on."""
    return lock_path(tag, "sweep")


def claim(path: Path):
    """The lock on `path`, for a child to inherit, or None if another process has it."""
    return locks.acquire(path, wait=False)
