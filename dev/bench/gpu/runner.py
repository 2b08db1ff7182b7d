"""Runs the items of a call, each in a process of its own, and rewrites the report after each.

So an item that fails, hangs, runs out of memory or leaves the card in an error stops nobody but itself. The
processes are forks of one that has loaded torch and has never touched the card: to start one takes no second.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanochat import common, processes
from nanochat.errors import first_line
from nanochat.files import write_atomic

POLL = 0.05  # seconds between two looks at the processes
LEAST = 5.0  # seconds: with less left, an item is not started


@dataclass(frozen=True)
class Setting:
    """What all items of a call share."""

    device_type: str
    tiny: bool  # small shapes, float32, no compiler: to try the program itself
    rows: int = 4  # of a pass of the d20 models
    data: Path | None = None  # the folder that prepare.py made

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_type, 0) if self.device_type == "cuda" else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.tiny else torch.bfloat16

    @property
    def backend(self) -> str:
        """The compiler of the models: on a CPU in miniature, one that needs no C++ compiler."""
        return "aot_eager" if self.tiny else "inductor"


@dataclass(frozen=True)
class Item:
    """A measurement. measure: a generator function that yields what it knows so far, the last time all."""

    name: str
    measure: Callable  # (setting) -> iterator of JSON entries
    seconds: float  # the most that it may take


@dataclass
class Report:
    """The entries of a call, and their two files."""

    folder: Path
    call: str
    markdown: Callable  # (entries) -> str
    entries: dict = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def save(self):
        self.entries["seconds"] = round(time.monotonic() - self.started, 1)
        write_atomic(self.folder / f"call{self.call}.json", json.dumps(self.entries, indent=1) + "\n")
        write_atomic(self.folder / f"call{self.call}.md", self.markdown(self.entries))


class Running:
    """An item's process. Its results come through a file, which outlives it."""

    def __init__(self, item: Item, setting: Setting, folder: Path, log: Path, deadline: float):
        self.item = item
        self.path = folder / f"{item.name.replace(' ', '_').replace('/', '_')}.json"
        self.started = time.monotonic()
        self.deadline = min(self.started + item.seconds, deadline)
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=measure_alone, args=(item, setting, self.path, log))
        self.process.start()

    def is_over(self) -> bool:
        """Whether it has ended. After its deadline it is ended."""
        if self.process.is_alive() and time.monotonic() < self.deadline:
            return False
        end_group(self.process)
        return True

    def entry(self) -> dict:
        """{"status": "ok", or in words what went wrong; "seconds"; "result": as far as it came}."""
        state = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        seconds = round(time.monotonic() - self.started, 1)
        status = state.get("status", "unfinished")
        if status == "unfinished":
            code = self.process.exitcode
            status = f"ended after {seconds:.0f} s, its limit"
            if code is not None and time.monotonic() < self.deadline:
                status = f"its process died (exit code {code})"
        return {"status": status, "seconds": seconds, "result": state.get("result")}


def end_group(process):
    """End a process and those that it started, compilers and trainings among them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # before it became the leader of a group, or after its end
    process.join()


def measure_alone(item: Item, setting: Setting, path: Path, log: Path):
    """In the item's process: measure, and write what is known after each part."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):  # of compilers and trainings too
        os.dup2(output, stream)
    sys.stdout = sys.stderr = os.fdopen(output, "a", buffering=1, encoding="utf-8")
    state = {"status": "unfinished"}
    try:
        processes.init_process(setting.device_type)  # as scripts do: precision of float32, kernels
        for result in item.measure(setting):
            state["result"] = result
            write_atomic(path, json.dumps(state))
        state["status"] = "ok"
    except Exception as error:
        print(f"---- {item.name}", file=sys.stderr)
        traceback.print_exc()
        memory = isinstance(error, RuntimeError) and common.out_of_memory(error)
        reason = "out of memory" if memory else type(error).__name__
        state["status"] = f"{reason}: {first_line(error)[:200]}"
    write_atomic(path, json.dumps(state))
    os._exit(0)  # not the exit handlers of the process that was forked


def run_items(items: list[Item], setting: Setting, report: Report, deadline: float, together: int = 1):
    """Run the items in order, `together` at a time; each one's entry goes into the report when it ends."""
    log = report.folder / f"call{report.call}.log"
    waiting = list(items)
    running: list[Running] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < together:
                    item = waiting.pop(0)
                    if time.monotonic() + LEAST > deadline:
                        report.entries["items"][item.name] = {"status": "not begun: no time left"}
                        report.save()
                        continue
                    running.append(Running(item, setting, Path(folder), log, deadline))
                for run in [run for run in running if run.is_over()]:
                    running.remove(run)
                    entry = run.entry()
                    report.entries["items"][run.item.name] = entry
                    report.save()
                    print(f"{entry['seconds']:6.1f} s  {run.item.name}: {entry['status']}", flush=True)
                time.sleep(POLL)
        finally:
            for run in running:
                end_group(run.process)
