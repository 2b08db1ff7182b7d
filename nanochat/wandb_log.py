"""A run on W&B, beside its record on disk. No trouble with W&B stops or delays the run, or loses its record.

All calls of wandb are made by a process of their own, nanochat.wandb_worker. It reads the run's record as it
grows, so training never waits for W&B. Whatever goes wrong in wandb, its server or the network, the remedy
here is to kill that process. Another one then writes the record offline; `wandb sync` sends it later.

Two variables of wandb limit the waiting, in seconds: WANDB_INIT_TIMEOUT for the server's first answer, while
the run trains, and WANDB_FINISH_TIMEOUT for what is left to send when the run has ended. Both default to 60.
"""

import atexit
import contextlib
import json
import math
import os
import re
import secrets
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nanochat.environment import python_path
from nanochat.errors import first_line
from nanochat.files import write_atomic
from nanochat.wandb_worker import MARK, SentSteps, read_sent

DEFAULT_TIMEOUT = 60.0  # seconds, of both variables
STOPPED_TIMEOUT = 10.0  # to send the rest of a run that was asked to stop: its machine may soon be gone
OFFLINE_TIMEOUT = 30.0  # for an offline folder to begin, and to end
TIMEOUT_MARGIN = 10.0  # wandb reports a timeout of its own a little later
SILENT_SECONDS = 5.0  # of waiting at the end, before a line says so
MESSAGE_POLL = 0.2  # seconds to wait for the worker's messages at a time
PROJECT = "nanochat-lowrank"

# WandbLog sets these itself; in the environment they may be left from another program
OWN_VARIABLES = ("RUN_ID", "RESUME", "PROJECT", "NAME", "DIR", "SERVICE", "FORK_FROM", "RESUME_FROM")
# what an offline folder needs; any other variable may be the cause of the trouble
SWEEP_VARIABLES = ("SWEEP_ID", "SWEEP_PARAM_PATH", "RUN_ID")
OFFLINE_VARIABLES = ("ENTITY", "RUN_GROUP", "TAGS", "JOB_TYPE", "NOTES", *SWEEP_VARIABLES)
# those of wandb's own warnings which say that the server will not get the rest of the run
UPLOAD_FAILED = re.compile("fatal error|not be synced|run `?wandb sync", re.IGNORECASE)


class Trouble(Exception):
    """Says why W&B does not have the run."""


class WandbLog:
    """One run on W&B, from its first step or the step that it resumes from to its end. Only rank 0 has it."""

    def __init__(self, folder: Path, name: str, accounting: dict, offset: int, resumed_step: int):
        """folder: the run folder, with its config.json; name: on the dashboard; accounting: see
        metrics.RunRecord; offset: bytes of metrics.jsonl that earlier starts of the run wrote; resumed_step:
        the step from which it resumes, or 0.
        """
        self.folder = folder.absolute()
        self.pid = os.getpid()
        self.environment = dict(os.environ)  # a copy: the thread may read it later
        self.job: dict[str, Any] = {
            "folder": str(self.folder),
            "name": name[:128],
            "accounting": accounting,
            "offset": offset,
            "resumed_step": resumed_step,
            "pid": self.pid,
            "argv": sys.argv,
            "program": program(),
            "start_seconds": timeout_seconds("INIT"),
            "finish_seconds": timeout_seconds("FINISH"),
        }
        self.status = ""  # how the run ended; "" while it goes on
        self.thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self.thread.start()
        atexit.register(self.close, "failed")  # for a run that ends before its own close()

    def close(self, status: str):
        """The run has ended: finished, stopped, diverged or failed. Waits a limited time until W&B has it."""
        atexit.unregister(self.close)
        if self.status or self.pid != os.getpid():  # a forked child does not close it
            return
        self.status = status
        self.thread.join(SILENT_SECONDS)
        if self.thread.is_alive():
            say("sending what is left, for a limited time")
            self.thread.join()

    def _serve(self):
        """Send the run; if that fails, write it offline and say so.

        Raises no error, and ends a limited time after close().
        """
        try:
            self.job["project"] = project(self.environment)
            self.job["id"] = run_id(self.environment, self.folder)
            self._send(offline=False)
            return
        except Exception as e:
            trouble = first_line(e).rstrip(".")
        if self.status == "stopped":
            say(f"{trouble}; resumed, the run sends what is missing")
            return
        try:
            self._send(offline=True, trouble=trouble)
        except Exception:
            goes_on = "" if self.status else "the run goes on; "
            say(f"{trouble}; {goes_on}{self.folder / 'metrics.jsonl'} has everything")

    def _send(self, offline: bool, trouble: str = ""):
        """Let a worker send the run to its end, or write it offline because of `trouble`. Raises Trouble."""
        # written before W&B gets the id: a run that is killed at any moment resumes as the same line
        write_atomic(self.folder / "wandb_id.txt", self.job["id"] + "\n")
        waiting_since = time.monotonic()  # for the worker to start, then for it to end
        started = False
        with contextlib.closing(Worker(self.job, self.environment, offline)) as worker:
            while True:
                if self.status and not worker.end_sent:
                    worker.end(self.status)
                    if started:
                        waiting_since = time.monotonic()
                limit = self._limit(offline, started)
                if time.monotonic() - waiting_since > limit:
                    raise Trouble(f"no answer from W&B within {limit:.0f} s")
                for message in worker.messages():
                    if "started" in message:
                        started = True
                        waiting_since = time.monotonic()
                        self._say_where(message, trouble)
                    if "trouble" in message:
                        raise Trouble(message["trouble"])
                    if "done" in message:
                        SentSteps(self.job).save(message.get("step", -1))
                        return

    def _limit(self, offline: bool, started: bool) -> float:
        """How many seconds to wait for a worker to start, or to end."""
        if started and not self.status:
            return math.inf
        if self.status == "stopped":
            return STOPPED_TIMEOUT
        if offline:
            return OFFLINE_TIMEOUT
        if started:
            return self.job["finish_seconds"]
        return self.job["start_seconds"] + TIMEOUT_MARGIN

    def _say_where(self, started: dict, trouble: str):
        """Print where the run can be seen, or how to send an offline one."""
        if started["id"] != self.job["id"]:  # wandb has chosen another
            write_atomic(self.folder / "wandb_id.txt", started["id"] + "\n")
        if started["offline"]:
            goes_on = "the run goes on offline; " if trouble and not self.status else ""
            why = f"{trouble}; " if trouble else ""
            folders = f"{shlex.quote(str(self.folder))}/wandb/offline-run-*"
            say(f"{why}{goes_on}send it later with: wandb sync {folders}")
        elif self.environment.get("WANDB_SILENT", "").lower() not in ("true", "1"):
            say(started["url"])


class Worker:
    """A process of nanochat.wandb_worker. close() ends it in any state."""

    def __init__(self, job: dict, environment: dict, offline: bool):
        mode = environment.get("WANDB_MODE", "").replace("dryrun", "offline") or None  # dryrun: its old name
        if offline:
            mode = "offline"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanochat.wandb_worker"],
            env=worker_environment(environment, offline),
            # the current folder may have settings of W&B, which may be the cause of the trouble
            cwd=job["folder"] if offline else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for the run
        )
        self.end_sent = False
        self.text = b""  # the start of the line that is being read
        self.last_line = ""
        self._write_line(json.dumps({**job, "mode": mode}))

    def _write_line(self, line: str):
        pipe = self.process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError):  # it may have ended: messages() notices that
            pipe.write(f"{line}\n".encode())
            pipe.flush()

    def end(self, status: str):
        """Tell it that the run has ended, and how."""
        self.end_sent = True
        self._write_line(status)

    def messages(self) -> list[dict]:
        """New messages of the worker; waits MESSAGE_POLL for them. Raises Trouble if it has died."""
        dead = self.process.poll() is not None
        pipe = self.process.stdout
        assert pipe is not None
        ready, _, _ = select.select([pipe], [], [], 0 if dead else MESSAGE_POLL)
        data = os.read(pipe.fileno(), 2**16) if ready else b""
        *lines, self.text = (self.text + data).split(b"\n")
        messages = []
        for line in (line.decode("utf-8", "replace") for line in lines):
            text, mark, message = line.partition(MARK)
            if mark:
                messages.append(json.loads(message))
            elif text.startswith(("wandb: WARNING", "wandb: ERROR")) and UPLOAD_FAILED.search(text):
                messages.append({"trouble": text.split(maxsplit=2)[2].split(". ")[0]})
            elif not text.startswith("wandb:"):
                self.last_line = text.strip() or self.last_line  # of a traceback
        if dead and not data:
            last_line = self.last_line[:200]
            raise Trouble(f"its process ended with code {self.process.returncode} {last_line}".strip())
        if not dead and ready and not data:
            time.sleep(MESSAGE_POLL)  # it has closed its output and is about to end
        return messages

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # wandb's own processes end with it
            with contextlib.suppress(subprocess.TimeoutExpired):  # the process may hang in a file system
                self.process.wait(5)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


# ---- the environment ---------------------------------------------------------------------------------------


def timeout_seconds(phase: str) -> float:
    """WANDB_<phase>_TIMEOUT, phase INIT or FINISH; DEFAULT_TIMEOUT if it is not set, or no number above 0."""
    try:
        value = float(os.environ.get(f"WANDB_{phase}_TIMEOUT", ""))
    except ValueError:
        return DEFAULT_TIMEOUT
    return value if 0 < value < math.inf else DEFAULT_TIMEOUT


def run_id(environment: dict, folder: Path) -> str:
    """The run's id on W&B: from the agent of a W&B sweep, else from the run folder, else a new one."""
    if environment.get("WANDB_SWEEP_ID") and environment.get("WANDB_RUN_ID"):
        return environment["WANDB_RUN_ID"]
    new = secrets.token_hex(4)
    path = folder / "wandb_id.txt"
    if not path.exists():
        return new
    saved = read_id(path)
    if not is_id(saved):
        saved = read_sent(folder).get("id", "")
        if not is_id(saved):
            say(f"{path}: damaged; the run begins a new line on the dashboard, {new}")
            return new
    return saved


def read_id(path: Path) -> str:
    """The text of wandb_id.txt; '' if it is no ordinary file."""
    if not path.is_file():
        return ""
    with open(path, "rb") as f:
        return f.read(1000).decode("utf-8", "replace").strip()


def is_id(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text) is not None


def project(environment: dict) -> str:
    """WANDB_PROJECT, without characters that W&B does not allow there."""
    name = environment.get("WANDB_PROJECT", "").strip()
    allowed = re.sub(r"[/\\#?%:]+", "-", name)[:128] or PROJECT
    if name and allowed != name:
        say(
            f"WANDB_PROJECT {name!r}: W&B takes at most 128 characters, without / \\ # ? % and :; "
            f"the project is {allowed}"
        )
    return allowed


def tags(text: str) -> str:
    """Tags, separated by commas, made such that W&B takes them: each once, of 1 to 64 characters."""
    return ",".join(dict.fromkeys(tag.strip()[:64].strip() for tag in text.split(",") if tag.strip()))


def program() -> str:
    """What Python runs, for W&B to show beside the arguments: "-m scripts.base_train"."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", "")
    return f"-m {name}" if name else getattr(main, "__file__", None) or sys.argv[0]


def worker_environment(variables: dict, offline: bool) -> dict:
    """The environment of a worker. Values that W&B would refuse are corrected or left out.

    offline: keep only OFFLINE_VARIABLES of W&B's own variables.
    """
    left_out = set(OWN_VARIABLES)
    if variables.get("WANDB_SWEEP_ID"):
        left_out.remove("RUN_ID")  # the agent has set it
    environment = {}
    for name, value in variables.items():
        is_wandbs = name.startswith("WANDB_")
        short_name = name.removeprefix("WANDB_")
        if is_wandbs and short_name in left_out:
            continue
        if is_wandbs and offline and short_name not in OFFLINE_VARIABLES:
            continue
        if name == "WANDB_TAGS":
            value = tags(value)
        if name in ("WANDB_RUN_GROUP", "WANDB_JOB_TYPE"):
            value = value.strip()[:128]
        if value or not is_wandbs:  # W&B refuses empty values
            environment[name] = value
    environment["PYTHONPATH"] = python_path(variables)
    return environment


def say(text: str):
    """Print a line on standard error, even if that is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(f"wandb: {text}", file=sys.stderr, flush=True)
