"""Progress of a sweep's runs on this machine: lines on the terminal, ends of log files."""

import contextlib
import json
import shutil
import sys
import time
from pathlib import Path

from nanochat.accounting import account
from nanochat.errors import printable
from nanochat.run_files import read_summary
from nanochat.sweep.experiment import Point, Sweep
from nanochat.units import TIME, human

REPORT_EVERY = 60  # seconds between two progress lines without a terminal
REDRAW_EVERY = 1  # seconds between two tables on a terminal
TAIL_BYTES = 2**16


class Display:
    """On a terminal a table that is redrawn; elsewhere a line for each event and one a minute."""

    def __init__(self, sweep: Sweep, waiting: list[Point]):
        self.sweep = sweep
        self.total = len(sweep.points)
        self.finished = self.total - len(waiting)
        self.flops = {p.tag: p.plan["tokens"] * account(p.config)["flops/per_token"] for p in waiting}
        self.start_time = time.monotonic()
        self.start_flops = sum(self.remaining_flops(point, progress(point)) for point in waiting)
        self.is_terminal = sys.stdout.isatty()
        self.lines_drawn = 0
        self.last_update = time.monotonic()
        # for our own commands to the terminal: console.PlainText shows those in other texts as plain
        # characters
        self.write_command = getattr(sys.stdout, "command", sys.stdout.write)
        logs = sweep.folder / "logs"
        self.print_line(f"{sweep.name}: {self.total} runs, {self.finished} finished; logs in {logs}")

    def update(self, running: list[Point], waiting: list[Point], failed: int):
        """Show the progress of the runs, if enough time has passed. failed: how many have failed."""
        if time.monotonic() - self.last_update < (REDRAW_EVERY if self.is_terminal else REPORT_EVERY):
            return
        self.last_update = time.monotonic()
        states = {point.tag: progress(point) for point in (*running, *waiting)}
        remaining = sum(self.remaining_flops(p, states[p.tag]) for p in self.sweep.points if p.tag in states)
        lines = [
            f"{self.finished} of {self.total} finished, {len(running)} running, "
            f"{len(waiting)} waiting, {failed} failed{self.time_left(remaining)}",
            *(run_line(point, states[point.tag]) for point in running),
        ]
        if waiting and not running:
            more = ", …" if len(waiting) > 3 else ""
            tags = ", ".join(point.tag for point in waiting[:3])
            lines.append(f"waiting for {tags}{more}: in another process")
        if self.is_terminal:
            self.clear()
            width = shutil.get_terminal_size().columns
            print("\n".join(line[: width - 1] for line in lines), flush=True)
            self.lines_drawn = len(lines)
        else:
            print("; ".join(line.strip() for line in lines), flush=True)

    def remaining_flops(self, point: Point, state: dict) -> float:
        return self.flops[point.tag] * (1 - state.get("step", 0) / point.plan["num_iterations"])

    def time_left(self, remaining_flops: float) -> str:
        """For the whole sweep, at its speed so far, which includes starts and evaluations."""
        speed = (self.start_flops - remaining_flops) / (time.monotonic() - self.start_time)
        return f", about {human(remaining_flops / speed, TIME)} left" if speed > 0 else ""

    def event(self, point: Point, event: str):
        """A line with the time: 'starts', 'resumes', or how a run ended."""
        if event.startswith("finished"):
            self.finished += 1
        if event == "finished":
            event += f", perplexity {read_summary(point.folder).get('val/ppl', float('nan')):.2f}"
        self.print_line(f"{time.strftime('%H:%M:%S')} {point.tag}: {event}")

    def print_line(self, line: str):
        self.clear()
        print(line, flush=True)

    def clear(self):
        """Erase the table, so that a line can be printed above the next one."""
        if self.lines_drawn:
            self.write_command(f"\033[{self.lines_drawn}F\033[J")
        self.lines_drawn = 0


def run_line(point: Point, state: dict) -> str:
    """One run in the table. state: see `progress`."""
    steps = point.plan["num_iterations"]
    if not state.get("step"):  # step 0 is the evaluation of an adapter's model before its training
        return f"  {point.tag}  starting"
    seconds_left = (steps - state["step"]) * state["total_training_time"] / state["step"]
    ppl = f"  ppl {state['val/ppl']:.2f}" if "val/ppl" in state else ""
    return f"  {point.tag}  step {state['step']}/{steps}{ppl}  ETA {human(seconds_left, TIME)}"


def progress(point: Point) -> dict:
    """Step, perplexity and training seconds, from the end of metrics.jsonl; {} before the first step."""
    state = {}
    for line in tail(point.folder / "metrics.jsonl").splitlines():
        with contextlib.suppress(ValueError, TypeError):  # a line that is being written, or is damaged
            entry = json.loads(line)
            state |= {key: entry[key] for key in ("step", "val/ppl", "total_training_time") if key in entry}
    return state


def log_path(sweep: Sweep, point: Point) -> Path:
    """The file with the output of a point's run."""
    return sweep.folder / "logs" / f"{point.tag}.log"


def last_lines(path: Path, count: int = 5) -> list[str]:
    return [printable(line[:300]) for line in tail(path).splitlines() if line.strip()][-count:]


def tail(path: Path) -> str:
    """The last TAIL_BYTES of a file; "" if there is none."""
    if not path.exists():
        return ""
    with open(path, "rb") as f:
        f.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return f.read().decode("utf-8", errors="replace")
