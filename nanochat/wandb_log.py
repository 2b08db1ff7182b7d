"""A run on W&B, beside its record on disk. No trouble with W&B stops, stalls or loses the run.

A process of its own, nanochat.wandb_worker, makes all calls of wandb. It reads the run's record and follows
it, so training never waits for W&B. Whatever wandb, its server or the network do, the worst that there is to
do here is to kill that process. Another one then writes the record offline; `wandb sync` sends that later.

Two variables of wandb itself limit the waiting, in seconds: WANDB_INIT_TIMEOUT for the server's first answer,
while the run trains, and WANDB_FINISH_TIMEOUT for what is left to send when the run has ended. Both are 60
where they are not set.
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

from nanochat.common import first_line
from nanochat.files import write_atomic
from nanochat.wandb_worker import MARK, Sent, saved_sent

SECONDS = 60.0  # what the two variables are where they are not set
SECONDS_STOPPED = 10.0  # for what is left of a run that was asked to stop: its machine may soon be gone
SECONDS_OFFLINE = 30.0  # for an offline folder to begin, and to end
SECONDS_LATER = 10.0  # wandb says why W&B did not answer a little after its own limit
SECONDS_QUIET = 5.0  # of waiting at the end, before a line says so
POLL = 0.2  # seconds between two looks at the worker
PROJECT = "nanochat-lowrank"

# what WandbLog itself tells wandb, and what another program may have left in the environment
NOT_THE_USERS = ("RUN_ID", "RESUME", "PROJECT", "NAME", "DIR", "SERVICE", "FORK_FROM", "RESUME_FROM")
# what an offline folder needs; anything else may be the very trouble
KEPT_OFFLINE = ("ENTITY", "RUN_GROUP", "TAGS", "JOB_TYPE", "NOTES", "SWEEP_ID", "SWEEP_PARAM_PATH", "RUN_ID")
# of wandb's own warnings, those that say that the server will not have the rest of the run
GIVEN_UP = re.compile("fatal error|not be synced|run `?wandb sync", re.IGNORECASE)


class Trouble(Exception):
    """Why W&B does not have the run."""


class WandbLog:
    """One run on W&B, from its first step, or the step that it goes on from, to its end. Lives on rank 0."""

    def __init__(self, folder: Path, name: str, accounting: dict, offset: int, resumed_step: int):
        """folder: of the run, with config.json in it; name: on the dashboard; accounting:
        see metrics.RunRecord.

        offset: bytes of metrics.jsonl that earlier starts of the run wrote; resumed_step: the step from which
        it goes on, 0 where it begins.
        """
        self.folder = folder.absolute()
        self.pid = os.getpid()
        self.environment = dict(os.environ)  # of now: the thread may look later
        self.job: dict[str, Any] = {
            "folder": str(self.folder),
            "name": name[:128],
            "accounting": accounting,
            "offset": offset,
            "resumed_step": resumed_step,
            "pid": self.pid,
            "argv": sys.argv,
            "program": program(),
            "start_seconds": seconds("INIT"),
            "finish_seconds": seconds("FINISH"),
        }
        self.status = ""  # how the run ended; "" while it goes on
        self.thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
        self.thread.start()
        atexit.register(self.close, "failed")  # where the run does not get as far as its own close()

    def close(self, status: str):
        """The run has ended: finished, stopped, diverged or failed. Waits, not for ever, until W&B has it."""
        atexit.unregister(self.close)
        if self.status or self.pid != os.getpid():  # a forked child has no part in it
            return
        self.status = status
        self.thread.join(SECONDS_QUIET)
        if self.thread.is_alive():
            say("sending what is left, for a limited time")
            self.thread.join()

    def _serve(self):
        """Send the run. Where that fails, write it offline and say so.

        It never raises an error, and ends a limited time after close().
        """
        try:
            self.job["project"] = project(self.environment)
            self.job["id"] = run_id(self.environment, self.folder)
            return self._send(offline=False)
        except Exception as e:
            trouble = first_line(e).rstrip(".")
        if self.status == "stopped":
            return say(f"{trouble}; resumed, the run sends what is missing")
        try:
            self._send(offline=True, trouble=trouble)
        except Exception:
            goes_on = "" if self.status else "the run goes on; "
            say(f"{trouble}; {goes_on}{self.folder / 'metrics.jsonl'} has everything")

    def _send(self, offline: bool, trouble: str = ""):
        """Let a worker send the run to its end, or write it offline because of `trouble`. Raises Trouble."""
        # kept before W&B hears of it: a run that is killed at any moment goes on as the same line
        write_atomic(self.folder / "wandb_id.txt", self.job["id"] + "\n")
        waits_since = time.monotonic()  # for the worker to begin, then for it to end
        started = False
        with contextlib.closing(Worker(self.job, self.environment, offline)) as worker:
            while True:
                if self.status and not worker.said_end:
                    worker.end(self.status)
                    if started:
                        waits_since = time.monotonic()
                limit = self._limit(offline, started)
                if time.monotonic() - waits_since > limit:
                    raise Trouble(f"no answer from W&B within {limit:.0f} s")
                for message in worker.messages():
                    if "started" in message:
                        started = True
                        waits_since = time.monotonic()
                        self._say_where(message, trouble)
                    if "trouble" in message:
                        raise Trouble(message["trouble"])
                    if "done" in message:
                        return Sent(self.job).save(message.get("step", -1))

    def _limit(self, offline: bool, started: bool) -> float:
        """For how many seconds to wait for a worker to begin, or to end."""
        if started and not self.status:
            return math.inf
        if self.status == "stopped":
            return SECONDS_STOPPED
        if offline:
            return SECONDS_OFFLINE
        if started:
            return self.job["finish_seconds"]
        return self.job["start_seconds"] + SECONDS_LATER

    def _say_where(self, started: dict, trouble: str):
        """Where the run is to be seen; of an offline one, how to send it."""
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
    """A process of nanochat.wandb_worker. close() ends it, however it is."""

    def __init__(self, job: dict, environment: dict, offline: bool):
        given = environment.get("WANDB_MODE", "").replace("dryrun", "offline")  # an old name of it
        mode = "offline" if offline else given or None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanochat.wandb_worker"],
            env=worker_environment(environment, offline),
            cwd=job["folder"] if offline else None,  # another folder may have settings of W&B
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # a Ctrl-C in the terminal is for the run
        self.said_end = False
        self.text = b""  # of the line that is being read
        self.last_line = ""
        self._order(json.dumps({**job, "mode": mode}))

    def _order(self, line: str):
        pipe = self.process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError):  # it may be gone: messages() says so
            pipe.write(f"{line}\n".encode())
            pipe.flush()

    def end(self, status: str):
        """The run has ended."""
        self.said_end = True
        self._order(status)

    def messages(self) -> list[dict]:
        """What it has said by now; waits POLL for it. Trouble where it has died."""
        dead = self.process.poll() is not None
        pipe = self.process.stdout
        assert pipe is not None
        ready, _, _ = select.select([pipe], [], [], 0 if dead else POLL)
        data = os.read(pipe.fileno(), 2**16) if ready else b""
        *lines, self.text = (self.text + data).split(b"\n")
        messages = []
        for line in (line.decode("utf-8", "replace") for line in lines):
            before, mark, message = line.partition(MARK)
            if mark:
                messages.append(json.loads(message))
            elif before.startswith(("wandb: WARNING", "wandb: ERROR")) and GIVEN_UP.search(before):
                messages.append({"trouble": before.split(maxsplit=2)[2].split(". ")[0]})
            elif not before.startswith("wandb:"):
                self.last_line = before.strip() or self.last_line  # of a traceback
        if dead and not data:
            last_line = self.last_line[:200]
            raise Trouble(f"its process ended with code {self.process.returncode} {last_line}".strip())
        if not dead and ready and not data:
            time.sleep(POLL)  # it has closed its output and is about to end
        return messages

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # wandb's own process ends with it
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in a file system
                self.process.wait(5)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()


# ---- what the environment says -----------------------------------------------------------------------------


def seconds(what: str) -> float:
    """WANDB_INIT_TIMEOUT or WANDB_FINISH_TIMEOUT; SECONDS where it is not set, or no number above 0."""
    try:
        value = float(os.environ.get(f"WANDB_{what}_TIMEOUT", ""))
    except ValueError:
        return SECONDS
    return value if 0 < value < math.inf else SECONDS


def run_id(environment: dict, folder: Path) -> str:
    """What W&B knows the run by: what a W&B sweep's agent says, else what the run folder says, else new."""
    if environment.get("WANDB_SWEEP_ID") and environment.get("WANDB_RUN_ID"):
        return environment["WANDB_RUN_ID"]
    new = secrets.token_hex(4)
    path = folder / "wandb_id.txt"
    if not path.exists():
        return new
    kept = kept_id(path)
    if not is_id(kept):
        kept = saved_sent(folder).get("id", "")
        if not is_id(kept):
            say(f"{path}: damaged; the run begins a new line on the dashboard, {new}")
            return new
    return kept


def kept_id(path: Path) -> str:
    """The text of wandb_id.txt; '' if it is no ordinary file."""
    if not path.is_file():
        return ""
    with open(path, "rb") as f:
        return f.read(1000).decode("utf-8", "replace").strip()


def is_id(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-]{1,128}", text) is not None


def project(environment: dict) -> str:
    """WANDB_PROJECT, without what W&B does not allow there."""
    given = environment.get("WANDB_PROJECT", "").strip()
    allowed = re.sub(r"[/\\#?%:]+", "-", given)[:128] or PROJECT
    if given and allowed != given:
        say(
            f"WANDB_PROJECT {given!r}: W&B takes at most 128 characters, without / \\ # ? % and :; "
            f"the project is {allowed}"
        )
    return allowed


def tags(text: str) -> str:
    """Tags, separated by commas, as W&B takes them: each once, of 1 to 64 characters."""
    return ",".join(dict.fromkeys(tag.strip()[:64].strip() for tag in text.split(",") if tag.strip()))


def program() -> str:
    """How Python was told what to run, as W&B shows it beside the arguments: "-m scripts.base_train"."""
    main = sys.modules["__main__"]
    name = getattr(getattr(main, "__spec__", None), "name", "")
    return f"-m {name}" if name else getattr(main, "__file__", None) or sys.argv[0]


def worker_environment(given: dict, offline: bool) -> dict:
    """The environment of a worker: what W&B would refuse in it is mended or left out.

    offline: of W&B's own variables only KEPT_OFFLINE, as any other may be the trouble.
    """
    left_out = set(NOT_THE_USERS)
    if given.get("WANDB_SWEEP_ID"):
        left_out.remove("RUN_ID")  # the agent's
    environment = {}
    for name, value in given.items():
        what = name.removeprefix("WANDB_")
        if name.startswith("WANDB_") and (what in left_out or (offline and what not in KEPT_OFFLINE)):
            continue
        if name == "WANDB_TAGS":
            value = tags(value)
        if name in ("WANDB_RUN_GROUP", "WANDB_JOB_TYPE"):
            value = value.strip()[:128]
        if value or not name.startswith("WANDB_"):  # an empty value is refused, where leaving it out is not
            environment[name] = value
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, given.get("PYTHONPATH")]))
    return environment


def say(text: str):
    """One line on standard error, whatever that is or has become."""
    with contextlib.suppress(OSError, ValueError):
        print(f"wandb: {text}", file=sys.stderr, flush=True)
