"""The process that sends one run to W&B, from the run's record on disk. nanochat.wandb_log starts it.

It reads metrics.jsonl from the beginning and follows it as it grows. Each row goes to W&B under the run's own
step. What W&B has is not sent again, and what a killed run could not send, the resumed run sends. Offline,
each start of a run writes a folder of its own; `wandb sync` makes one history of them.

Standard input brings the job, one line of JSON, and when the run has ended its status: finished, stopped,
diverged or failed. Standard output carries messages, lines of JSON behind a mark, and whatever wandb prints.
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

from nanochat.errors import InputError
from nanochat.files import Schema, read_json, write_atomic
from nanochat.history import CLOCKS, HistoryRows, parsed
from nanochat.run_files import SUMMARY, read_config
from nanochat.signals import ENDING, REQUEUE

MARK = "\0"  # begins the lines that are messages
RECORD_POLL = 1.0  # seconds between two looks at the record
FLUSH_SECONDS = 60.0  # after so long, a row that was logged offline is on disk: wandb writes every 15 s
SENT = Schema("record of what was sent", {"id": str, "step": int})
EXIT_CODES = {"finished": 0, "stopped": REQUEUE, "diverged": 1, "failed": 1}


def main():
    # a scheduler signals all processes of a job; this one ends when the run tells it to
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    try:
        # unbuffered: what follows the first line stays in the pipe
        with open(0, "rb", buffering=0, closefd=False) as orders:
            job = json.loads(orders.readline())
        send(job)
    except BaseException as e:
        tell(trouble=reason(e))
    os._exit(0)  # without wandb's own exit hooks, which may wait for a server


def tell(**message):
    with contextlib.suppress(OSError):  # the run's process has ended
        os.write(1, f"{MARK}{json.dumps(message)}\n".encode())


def reason(e: BaseException) -> str:
    """An exception in one line, without what pydantic puts around its own."""
    text = " ".join(str(e).split()) or type(e).__name__
    text = re.sub(r"^\d+ validation errors? for Settings ", "settings: ", text).split(" [type=")[0]
    return text[:250] + ("; install it with: pip install wandb" if isinstance(e, ModuleNotFoundError) else "")


# ---- the run on W&B ----------------------------------------------------------------------------------------


def send(job: dict):
    """Start or resume the run on W&B, send its rows as they come, and end it."""
    sent = SentSteps(job)
    # if the run's process, which watches this one, is gone, the alarm ends this one
    signal.alarm(math.ceil(job["start_seconds"]) + 10)
    run = start(job)
    signal.alarm(0)
    if run.disabled:
        tell(done=True)
        return
    tell(started=True, id=run.id, url=run.url, offline=run.offline)
    first, shift = steps_to_send(run, sent)
    record = Record(job)
    status = None
    while status is None:
        status = end_status(job)  # read first: once the run has ended, all of it is in the record
        rows = record.new_rows()
        run.summary.update(record.new_summary())  # read after the rows, sent before them: so newer rows win
        for row in rows:
            if row["step"] + shift >= first:
                numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
                run.log(numbers, step=row["step"] + shift, commit=True)
                write_logs(run, row)
            sent.add(row["step"], run.offline)
        if run.offline:
            sent.save_flushed()
    signal.alarm(math.ceil(job["finish_seconds"]) + 10)
    run.summary["status"] = status
    if status == "stopped":
        run.mark_preempting()  # W&B shows it as preempted, and a W&B sweep hands it out again
    if os.getppid() != job["pid"]:  # nobody reads what wandb prints
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
    run.finish(exit_code=EXIT_CODES[status])
    tell(done=True, step=sent.last)


def start(job: dict):
    import wandb

    def interrupt():  # the dashboard's button to stop a run works like Ctrl-C
        os.kill(job["pid"], signal.SIGINT)

    settings = {
        "console": "off",
        "init_timeout": job["start_seconds"],
        "program": job["program"],
        "x_stats_pid": job["pid"],
        "stop_fn": interrupt,
    }
    known_settings = getattr(wandb.Settings, "model_fields", {})  # they differ between versions of wandb
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
        settings=wandb.Settings(**{key: value for key, value in settings.items() if key in known_settings}),
    )
    for key, _ in CLOCKS:
        run.define_metric(key)
    run.define_metric("*", step_metric="step")
    return run


def steps_to_send(run, sent: "SentSteps") -> tuple[int, int]:
    """(the first step that W&B lacks, by its own count; its count minus the run's).

    The two counts differ only in runs that an earlier version of this program began: it let W&B count rows.
    """
    if run.offline:
        return sent.step + 1, 0
    last = dict(run.summary)
    if isinstance(last.get("_step"), int) and isinstance(last.get("step"), int):
        return run.step, last["_step"] - last["step"]
    return run.step, 0


def write_logs(run, row: dict):
    """Show the row as a line, and samples of the model's text, under Logs on the dashboard."""
    if hasattr(run, "write_logs"):
        names = [name for name in ("train/loss", "val/ppl", "val/bpb") if row.get(name) is not None]
        line = " | ".join([f"step {row['step']}", *(f"{name} {row[name]:.4f}" for name in names)])
        run.write_logs("\n".join([line, *(f"  sample: {text!r}" for text in row.get("sample", ()))]))


# ---- the run on disk ---------------------------------------------------------------------------------------


def end_status(job: dict) -> str | None:
    """The status of an ended run, "failed" if its process died; None while it runs. Waits RECORD_POLL."""
    ready, _, _ = select.select([0], [], [], RECORD_POLL)
    if ready:
        status = os.read(0, 100).decode().strip()
        return status if status in EXIT_CODES else "failed"
    return None if os.getppid() == job["pid"] else "failed"  # the pipe may be open in its children


class Record:
    """The record in a run folder, as it grows."""

    def __init__(self, job: dict):
        """job: its parts are described in nanochat.wandb_log."""
        self.folder = Path(job["folder"])
        self.offset = job["offset"]
        self.resumed_step = job["resumed_step"]
        self.file = open(self.folder / "metrics.jsonl", "rb")  # noqa: SIM115  read until the process ends
        # time and inode of the summary.json that was read last
        self.summary_version: tuple[int, int] | None = None

    def new_rows(self) -> Iterator[dict]:
        """The rows of complete lines since the last call. The first call has those of earlier starts too."""
        earlier = HistoryRows(self._earlier_rows())
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
        """Rows up to the step from which the run resumes: later ones are computed again."""
        while self.file.tell() < self.offset and (line := self.file.readline()):
            row, _ = parsed(line)
            if row and row["step"] <= self.resumed_step:
                yield row

    def new_summary(self) -> dict:
        """summary.json if it was written since the last call, else {}.

        Its step is left out: on W&B that is the step of the last row there, see steps_to_send.
        """
        path = self.folder / "summary.json"
        version = (path.stat().st_mtime_ns, path.stat().st_ino) if path.exists() else None
        if version == self.summary_version:
            return {}
        self.summary_version = version
        try:
            summary = read_json(path, SUMMARY)
        except InputError:  # damaged; the run will write it again
            return {}
        return {key: value for key, value in summary.items() if key != "step"}


def read_sent(folder: Path) -> dict:
    """wandb/sent.json of a run folder: {"id", "step"}; {} where it is missing, or damaged."""
    path = folder / "wandb" / "sent.json"
    try:
        return read_json(path, SENT) if path.is_file() else {}
    except InputError:
        return {}


class SentSteps:
    """The last step that W&B, or an offline folder of this run, surely has. It is kept in wandb/sent.json.

    Offline, W&B cannot tell it. After a kill it may be too low: then some rows are in two folders.
    """

    def __init__(self, job: dict):
        self.path = Path(job["folder"]) / "wandb" / "sent.json"
        self.id = job["id"]
        self.rows = []  # [(step, when it was logged)], since the last save
        self.step = self.last = -1
        saved = read_sent(Path(job["folder"]))
        if saved and saved.get("id") == self.id:
            self.step = saved["step"]
        elif not saved and list(self.path.parent.glob(f"offline-run-*-{self.id}")):
            self.step = job["resumed_step"]  # an earlier version of this program did not write sent.json
        self.save(self.step)

    def add(self, step: int, offline: bool):
        if offline:  # else W&B itself tells what it has
            self.rows.append((step, time.monotonic()))
        self.last = max(self.last, step)

    def save_flushed(self):
        """Save the last step that is on disk by now. Called often while a run is written offline."""
        if self.rows and time.monotonic() - self.rows[0][1] > 2 * FLUSH_SECONDS:
            flushed = [step for step, when in self.rows if time.monotonic() - when > FLUSH_SECONDS]
            self.rows = self.rows[len(flushed) :]
            self.save(flushed[-1])

    def save(self, step: int):
        """All steps up to this one are sent."""
        self.step = max(self.step, step)
        write_atomic(self.path, json.dumps({"id": self.id, "step": self.step}) + "\n")


if __name__ == "__main__":
    main()
