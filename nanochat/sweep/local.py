"""The runs of a sweep on this machine: as many at once as there are places, each a process of its own with a log of its own.

A run belongs to the process that holds a lock on $NANOCHAT_BASE_DIR/locks/.sweep.<tag>.lock. The child
inherits the lock, so it is free only when launcher and child are both gone, however they went: two sweeps
never have the same run, and no lock is ever stale.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat import common, locks
from nanochat.common import InputError, printable
from nanochat.files import create_folder
from nanochat.naming import lock_path
from nanochat.rank import account
from nanochat.run_files import read_summary
from nanochat.signals import ENDING
from nanochat.sweep.experiment import Point, Sweep
from nanochat.units import TIME, human

POLL = 0.5  # seconds between two looks at the children
REPORT_EVERY = 60  # seconds between two lines where there is no terminal


@dataclass
class Running:
    point: Point
    process: subprocess.Popen
    held: list  # open files: the locks of the run and of its GPUs
    place: int
    told: int = 0  # how often it was told to stop


def run_all(sweep: Sweep, args, task_command) -> tuple[dict, str]:
    """Run every point that is not finished; return when none is left, here or in another sweep, or after a signal.

    task_command(sweep, point, args): the command line of one run. Returns ({tag: (what happened, log file,
    its last lines)} of the failed runs, name of the signal or ""). The signals in ENDING are passed on, so
    that the runs save; a second one kills them.
    """
    here = places(sweep, args.j)
    waiting = [p for p in sweep.points if p.status() != "finished"]
    running = []
    failed = {}
    show = Display(sweep, waiting)
    with Signals() as asked:
        while running or (waiting and not asked):
            for run in [r for r in running if r.process.poll() is not None]:
                running.remove(run)
                for lock in run.held:
                    lock.close()
                outcome = outcome_of(run, bool(asked))
                if outcome == "again":
                    waiting.insert(0, run.point)
                elif outcome not in ("finished", "stopped"):
                    failed[run.point.tag] = (
                        outcome,
                        log_of(sweep, run.point),
                        last_lines(log_of(sweep, run.point)),
                    )
                show.event(run.point, outcome)
            for point in [p for p in waiting if p.base in failed]:
                waiting.remove(point)
                failed[point.tag] = (f"cannot start: {point.base} failed", log_of(sweep, point), [])
                show.event(point, failed[point.tag][0])
            if asked:
                pass_on(running, len(asked))
            else:
                running += start(sweep, args, waiting, here, {r.place for r in running}, task_command, show)
            show(running, waiting, failed)
            asked.wait(POLL)
    show.end()
    return failed, signal.Signals(asked[0]).name if asked else ""


class Signals(list):
    """Numbers of the signals that asked to stop since `with` began."""

    def __enter__(self):
        self.event = threading.Event()
        self.before = {}
        for number in ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
                self.before[number] = signal.signal(number, self.hear)
        return self

    def hear(self, number, _frame):
        if number == signal.SIGHUP and self:
            return  # a terminal that closes sends it, and the shell in it once more
        self.append(number)
        self.event.set()

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def wait(self, seconds: float):
        """At most `seconds`; less when a signal comes."""
        self.event.wait(seconds)
        self.event.clear()


def pass_on(running: list[Running], times: int):
    for run in running:
        if times > run.told:
            run.told = times
            with contextlib.suppress(ProcessLookupError):
                run.process.terminate() if times == 1 else os.killpg(run.process.pid, signal.SIGKILL)


# ---- places and locks -----------------------------------------------------------------------------------------------


def places(sweep: Sweep, j: int | None) -> list[dict]:
    """Where a run can go: for each place {"gpus": (ids…), "threads": N or None}. j: at most so many (None: a CPU has one).

    InputError where there are fewer GPUs than one run wants.
    """
    if common.pick_device_type(sweep.points[0].args.device_type) == "cuda":
        gpus = visible_gpus()
        groups = [
            tuple(gpus[i : i + sweep.processes])
            for i in range(0, len(gpus) - sweep.processes + 1, sweep.processes)
        ]
        if not groups:
            raise InputError(
                f"{sweep.file}: a run wants {sweep.processes} GPU(s), this machine has {len(gpus)}; "
                "set processes, or use --launcher slurm"
            )
        return [{"gpus": group, "threads": None} for group in groups[:j]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    j = j or 1
    return [{"gpus": (), "threads": max(1, cores // (j * sweep.processes))}] * j


def visible_gpus() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [gpu.strip() for gpu in given.split(",") if gpu.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def claim_path(tag: str) -> Path:
    return lock_path(tag, "sweep")


def claim(path: Path):
    """The lock on `path`, for a child to inherit, or None if another process has it."""
    return locks.acquire(path, wait=False)


def start(
    sweep: Sweep, args, waiting: list[Point], here: list[dict], taken: set[int], task_command, show
) -> list[Running]:
    """Fill the free places with the first waiting points that no other sweep has, and whose base is finished. Removes them, and those found
    finished, from `waiting`.
    """
    started = []
    bases = {p.base for p in waiting} - {""}
    unfinished = {tag for tag in bases if sweep.point(tag).status() != "finished"}
    for number in (n for n in range(len(here)) if n not in taken):
        gpus = [claim(lock_path(f"{socket.gethostname()}-{gpu}", "gpu")) for gpu in here[number]["gpus"]]
        for point in list(waiting) if all(gpus) else ():
            lock = None if point.base in unfinished else claim(claim_path(point.tag))
            if not lock:
                continue
            waiting.remove(point)
            if point.status() == "finished":
                lock.close()
                show.event(point, "finished elsewhere")
                continue
            show.event(point, "resumes" if point.status() != "new" else "starts")
            held = [lock, *gpus]
            gpus = []
            started.append(
                Running(point, launch(sweep, point, args, here[number], held, task_command), held, number)
            )
            break
        for lock in filter(None, gpus):
            lock.close()
    return started


def launch(sweep: Sweep, point: Point, args, place: dict, held: list, task_command) -> subprocess.Popen:
    """A process in a session of its own: a Ctrl-C in the terminal reaches the launcher, which lets the runs save."""
    environment = dict(os.environ)
    if place["gpus"]:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(place["gpus"])
    else:
        environment.setdefault("OMP_NUM_THREADS", str(place["threads"]))
    log = log_of(sweep, point)
    create_folder(log.parent)
    with open(log, "a", encoding="utf-8") as out:
        return subprocess.Popen(
            [*task_command(sweep, point, args), "--launched", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,
            pass_fds=[lock.fileno() for lock in held],
        )


def outcome_of(run: Running, asked: bool) -> str:
    """'finished', 'stopped' (as we were asked), 'again' (somebody else stopped it), or what went wrong."""
    code = run.process.returncode
    if run.point.status() == "finished" and code == 0:
        return "finished"
    if asked:
        return "stopped"
    if code == common.REQUEUE:
        return "again"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (
            " (out of memory?)" if -code == signal.SIGKILL else ""
        )
    return f"exit code {code}" if code else "ended without finishing"


def log_of(sweep: Sweep, point: Point) -> Path:
    return sweep.folder / "logs" / f"{point.tag}.log"


def last_lines(path: Path, count: int = 5) -> list[str]:
    return [printable(line[:300]) for line in tail(path).splitlines() if line.strip()][-count:]


def tail(path: Path, size: int = 2**16) -> str:
    """The last `size` bytes of a file that may be long, or not be there."""
    if not path.exists():
        return ""
    with open(path, "rb") as f:
        f.seek(max(0, path.stat().st_size - size))
        return f.read().decode("utf-8", errors="replace")


# ---- what is seen of it ---------------------------------------------------------------------------------------------


def finished_rate(sweep: Sweep) -> tuple[float, str]:
    """(FLOP/s of one process, in words from what) of the finished runs of this sweep; 0 if there are none."""
    flops = seconds = count = 0
    for point in sweep.points:
        if point.status() == "finished":
            summary = read_summary(point.folder)
            flops = flops + summary["total_training_flops"]
            seconds = seconds + summary["total_training_time"] * sweep.processes
            count = count + 1
    return (flops / seconds, f"as in {count} finished run(s)") if seconds else (0.0, "")


def progress(point: Point) -> dict:
    """Step, perplexity and training seconds so far, from the end of a run's metrics.jsonl; {} before the first step."""
    seen = {}
    for line in tail(point.folder / "metrics.jsonl").splitlines():
        with contextlib.suppress(ValueError, TypeError):
            entry = json.loads(line)
            seen |= {key: entry[key] for key in ("step", "val/ppl", "total_training_time") if key in entry}
    return seen


class Display:
    """On a terminal a table that is drawn anew again and again; elsewhere a line for what happens and one a minute."""

    def __init__(self, sweep: Sweep, waiting: list[Point]):
        self.sweep, self.total = sweep, len(sweep.points)
        self.done = self.total - len(waiting)
        self.flops = {p.tag: p.plan["tokens"] * account(p.config)["flops/per_token"] for p in waiting}
        self.began, self.at_first = time.monotonic(), sum(self.left(p, progress(p)) for p in waiting)
        self.live, self.drawn, self.last = sys.stdout.isatty(), 0, time.monotonic()
        self.command = getattr(sys.stdout, "command", sys.stdout.write)  # a protected stream has one
        self.say(f"{sweep.name}: {self.total} runs, {self.done} finished; logs in {sweep.folder / 'logs'}")

    def __call__(self, running: list[Running], waiting: list[Point], failed: dict):
        if time.monotonic() - self.last < (1 if self.live else REPORT_EVERY):
            return
        self.last = time.monotonic()
        seen = {p.tag: progress(p) for p in (*(r.point for r in running), *waiting)}
        lines = [
            f"{self.done} of {self.total} finished, {len(running)} running, {len(waiting)} waiting, {len(failed)} failed"
            + self.eta(sum(self.left(p, seen[p.tag]) for p in self.sweep.points if p.tag in seen)),
            *(self.line(r.point, seen[r.point.tag]) for r in running),
        ]
        if waiting and not running:
            lines.append(
                f"waiting for {', '.join(p.tag for p in waiting[:3])}{', …' if len(waiting) > 3 else ''}: in another process"
            )
        if self.live:
            self.clear()
            width = shutil.get_terminal_size().columns
            print("\n".join(line[: width - 1] for line in lines), flush=True)
            self.drawn = len(lines)
        else:
            print("; ".join(line.strip() for line in lines), flush=True)

    def left(self, point: Point, seen: dict) -> float:
        """FLOPs."""
        return self.flops[point.tag] * (1 - seen.get("step", 0) / point.plan["num_iterations"])

    def eta(self, left: float) -> str:
        """Of the sweep: what is left at the speed so far, starts and evaluations included."""
        speed = (self.at_first - left) / (time.monotonic() - self.began)
        return f", about {human(left / speed, TIME)} left" if speed > 0 else ""

    def line(self, point: Point, seen: dict) -> str:
        steps = point.plan["num_iterations"]
        if not seen.get("step"):  # step 0: an adapter's model, evaluated before it is trained
            return f"  {point.tag}  starting"
        left = (steps - seen["step"]) * seen["total_training_time"] / seen["step"]
        ppl = f"  ppl {seen['val/ppl']:.2f}" if "val/ppl" in seen else ""
        return f"  {point.tag}  step {seen['step']}/{steps}{ppl}  ETA {human(left, TIME)}"

    def event(self, point: Point, what: str):
        self.done += what.startswith("finished")
        if what == "finished":
            what += f", perplexity {read_summary(point.folder).get('val/ppl', float('nan')):.2f}"
        self.say(f"{time.strftime('%H:%M:%S')} {point.tag}: {what}")

    def say(self, line: str):
        self.clear()
        print(line, flush=True)

    def clear(self):
        """Take the table away, so that a line can be printed above the next one."""
        if self.drawn:
            self.command(f"\033[{self.drawn}F\033[J")
        self.drawn = 0

    def end(self):
        self.clear()
