"""The process that sends one run to W&B, from the run's record on disk. nanochat.wandb_log starts it.

It reads metrics.jsonl from the beginning and follows it as it grows. Each row goes to W&B under the run's own
step. What W&B has is not sent again: whatever a killed run could not send, the resumed run sends. Offline,
each start of a run writes a folder of its own; `wandb sync` makes the whole history of them.

On standard input come the job, one line of JSON, and at the end of the run its status: finished, stopped,
diverged or failed. On standard output go messages, lines of JSON behind a mark, and whatever wandb prints.
"""

import contextlib
import itertools
import json
import math
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nanochat.common import REQUEUE, InputError
from nanochat.files import Schema, read_json, write_atomic
from nanochat.history import CLOCKS, Rows, parsed
from nanochat.run_files import SUMMARY, read_config
from nanochat.signals import ENDING

MARK = "\0"  # begins the lines that are messages
POLL = 1.0  # seconds between two looks at the record
FLUSHED = 60.0  # seconds after which a row that was logged offline is on disk: wandb writes every 15 s
SENT = Schema("record of what was sent", {"id": str, "step": int})
EXIT_CODES = {"finished": 0, "stopped": REQUEUE, "diverged": 1, "failed": 1}


def main():
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)  # a scheduler signals all of a job; the run says when it ends
    orders = open(0, "rb", buffering=0, closefd=False)  # unbuffered: what follows the line stays in the pipe
    try:
        send(json.loads(orders.readline()))
    except BaseException as e:
        tell(trouble=reason(e))
    os._exit(0)  # without wandb's own exit hooks, which may wait for a server


def tell(**message):
    with contextlib.suppress(OSError):  # the run's process is gone
        os.write(1, f"{MARK}{json.dumps(message)}\n".encode())


def reason(e: BaseException) -> str:
    """An exception in one line, without what pydantic puts around its own."""
    text = " ".join(str(e).split()) or type(e).__name__
    text = re.sub(r"^\d+ validation errors? for Settings ", "settings: ", text).split(" [type=")[0]
    return text[:250] + ("; install it with: pip install wandb" if isinstance(e, ModuleNotFoundError) else "")


# ---- the run on W&B ----------------------------------------------------------------------------------------


def send(job: dict):
    """The whole life of a run on W&B: begin or resume it, send what comes, end it."""
    sent = Sent(job)
    signal.alarm(math.ceil(job["start_seconds"]) + 10)  # for where the run, which watches it, is gone
    run = start(job)
    signal.alarm(0)
    if run.disabled:
        return tell(done=True)
    tell(started=True, id=run.id, url=run.url, offline=run.offline)
    first, shift = (sent.step + 1, 0) if run.offline else steps_to_send(run)
    record = Record(job)
    status = None
    while status is None:
        status = ended(job)  # asked first: once the run has ended, all of it is in the record
        rows = record.new_rows()
        run.summary.update(record.new_summary())  # read after the rows, sent before them: newer rows win
        for row in rows:
            if row["step"] + shift >= first:
                numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
                run.log(numbers, step=row["step"] + shift, commit=True)
                write_logs(run, row)
            sent.logged(row["step"], run.offline)
        if run.offline:
            sent.save_flushed()
    signal.alarm(math.ceil(job["finish_seconds"]) + 10)
    run.summary["status"] = status
    if status == "stopped":
        run.mark_preempting()  # W&B shows it as preempted, and a W&B sweep deals it out again
    if os.getppid() != job["pid"]:  # nobody reads what wandb prints
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    run.finish(exit_code=EXIT_CODES[status])
    tell(done=True, step=sent.last)


def start(job: dict):
    import wandb

    def interrupt():  # the button on the dashboard that stops a run is like Ctrl-C
        os.kill(job["pid"], signal.SIGINT)

    settings = {
        "console": "off",
        "init_timeout": job["start_seconds"],
        "program": job["program"],
        "x_stats_pid": job["pid"],
        "stop_fn": interrupt,
    }
    known = getattr(wandb.Settings, "model_fields", {})  # other versions of wandb have other settings
    sys.argv = job["argv"]  # W&B shows it as the run's command
    folder = Path(job["folder"])
    config = read_config(folder)
    run = wandb.init(
        project=job["project"],
        name=job["name"],
        id=job["id"],
        dir=folder,
        mode=job["mode"],
        resume=None if job["mode"] == "offline" else "allow",
        config={**config, "tag": folder.name, "accounting": job["accounting"]},
        settings=wandb.Settings(**{key: value for key, value in settings.items() if key in known}),
    )
    for key, _ in CLOCKS:
        run.define_metric(key)
    run.define_metric("*", step_metric="step")
    return run


def steps_to_send(run) -> tuple[int, int]:
    """(the first step, as W&B counts, that it lacks; W&B's count minus the run's).

    The two are the same, except in runs that an earlier version of this program began: it let W&B count rows.
    """
    last = dict(run.summary)
    if isinstance(last.get("_step"), int) and isinstance(last.get("step"), int):
        return run.step, last["_step"] - last["step"]
    return run.step, 0


def write_logs(run, row: dict):
    """The row's line, and the samples of the model's text, under Logs on the dashboard."""
    if hasattr(run, "write_logs"):
        names = [name for name in ("train/loss", "val/ppl", "val/bpb") if row.get(name) is not None]
        line = " | ".join([f"step {row['step']}", *(f"{name} {row[name]:.4f}" for name in names)])
        run.write_logs("\n".join([line, *(f"  sample: {text!r}" for text in row.get("sample", ()))]))


# ---- the run on disk ---------------------------------------------------------------------------------------


def ended(job: dict) -> str | None:
    """The status of a run that has ended, "failed" if its process died; None while it goes on. Waits POLL."""
    ready, _, _ = select.select([0], [], [], POLL)
    if ready:
        status = os.read(0, 100).decode().strip()
        return status if status in EXIT_CODES else "failed"
    return None if os.getppid() == job["pid"] else "failed"  # its children may hold the pipe open


class Record:
    """What a run folder says, as it grows."""

    def __init__(self, job: dict):
        """job: as nanochat.wandb_log describes its parts."""
        self.folder = Path(job["folder"])
        self.offset = job["offset"]
        self.resumed_step = job["resumed_step"]
        self.file = open(self.folder / "metrics.jsonl", "rb")
        self.written: tuple[int, int] | None = None  # when summary.json was, and its inode

    def new_rows(self) -> Iterator[dict]:
        """The rows of whole lines since the last call; at first also those of earlier starts, before them."""
        earlier = Rows(self._earlier_rows())
        rows = []
        while line := self.file.readline():
            if not line.endswith(b"\n"):  # still being written
                self.file.seek(-len(line), os.SEEK_CUR)
                break
            row, _ = parsed(line)
            if row:
                rows.append(row)
        return itertools.chain(earlier, rows)

    def _earlier_rows(self):
        """Up to the step that the run goes on from: the rest is run again."""
        while self.file.tell() < self.offset and (line := self.file.readline()):
            row, _ = parsed(line)
            if row and row["step"] <= self.resumed_step:
                yield row

    def new_summary(self) -> dict:
        """summary.json if it was written anew since the last call, else {}.

        Its step is left out: on W&B it is that of the last row there, see steps_to_send.
        """
        path = self.folder / "summary.json"
        written = (path.stat().st_mtime_ns, path.stat().st_ino) if path.exists() else None
        if written == self.written:
            return {}
        self.written = written
        try:
            summary = read_json(path, SUMMARY)
        except InputError:  # somebody damaged it; the run writes it anew
            return {}
        return {key: value for key, value in summary.items() if key != "step"}


def saved_sent(folder: Path) -> dict:
    """wandb/sent.json of a run folder: {"id", "step"}; {} where it is missing, or damaged."""
    path = folder / "wandb" / "sent.json"
    try:
        return read_json(path, SENT) if path.is_file() else {}
    except InputError:
        return {}


class Sent:
    """The last step that W&B, or an offline folder of this run, surely has; in wandb/sent.json, beside these.

    Offline nobody can ask W&B. After a kill it may be too low: some rows are then in two folders.
    """

    def __init__(self, job: dict):
        self.path = Path(job["folder"]) / "wandb" / "sent.json"
        self.id = job["id"]
        self.rows = []  # [(step, when it was logged)], since the last save
        self.step = self.last = -1
        saved = saved_sent(Path(job["folder"]))
        if saved and saved.get("id") == self.id:
            self.step = saved["step"]
        elif not saved and list(self.path.parent.glob(f"offline-run-*-{self.id}")):
            self.step = job["resumed_step"]  # an earlier version of this program wrote it, without this file
        self.save(self.step)

    def logged(self, step: int, offline: bool):
        if offline:  # else W&B itself says what it has
            self.rows.append((step, time.monotonic()))
        self.last = max(self.last, step)

    def save_flushed(self):
        """Called now and then while a run is written offline."""
        if self.rows and time.monotonic() - self.rows[0][1] > 2 * FLUSHED:
            flushed = [step for step, when in self.rows if time.monotonic() - when > FLUSHED]
            self.rows = self.rows[len(flushed) :]
            self.save(flushed[-1])

    def save(self, step: int):
        """All up to this step is sent."""
        self.step = max(self.step, step)
        write_atomic(self.path, json.dumps({"id": self.id, "step": self.step}) + "\n")


if __name__ == "__main__":
    main()
