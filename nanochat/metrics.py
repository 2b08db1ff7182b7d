"""The record of a run: its folder, the same values on W&B, the time to a perplexity, versions of programs.

runs/<model-tag>/config.json     written once, before the first step
                 metrics.jsonl   one JSON object a line; lines are only added
                 summary.json    rewritten at every checkpoint and at the end
                 wandb_id.txt    lets a resumed run continue the same line on the dashboard
"""

import contextlib
import math
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.common import get_base_dir
from nanochat.errors import InputError
from nanochat.files import remove_temporary, write_json
from nanochat.history import CLOCKS, History, read_history
from nanochat.history_writer import HistoryWriter
from nanochat.run_files import read_config, read_summary, remove_unfinished

# the files that only the process with the run's lock writes
LOCKED_FILES = ("config.json", "summary.json", "tokenizer.json", "wandb_id.txt")


def runs_dir() -> Path:
    return get_base_dir() / "runs"


@dataclass(frozen=True)
class Run:
    """A run as read from its folder."""

    name: str
    config: dict  # {"flags", "derived", "git", "versions", "device", "seed"}
    summary: dict  # flat metric names -> last values, "status": see run_files.read_summary
    history: History | list[dict]  # one dict a step, in order; keys as in design section 6
    core: dict = field(default_factory=dict)  # only in the report: see eval_results.newest_core


def load_run(folder: Path) -> Run:
    """Read a run folder. InputError if it is none. Incomplete lines of killed processes are skipped."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a run folder (no config.json)")
    return Run(folder.name, read_config(folder), read_summary(folder), read_history(folder))


def remove_unfinished_files(folder: Path):
    """Remove the unfinished files of killed processes in a run folder. The caller has the run's lock."""
    remove_temporary(folder, *LOCKED_FILES)
    remove_unfinished(folder)


def dtype_so_far(folder: Path, device_type: str) -> str:
    """The dtype of the run in this folder, if it began on this type of device; else ''."""
    device = read_config(folder).get("device", {}) if (folder / "config.json").exists() else {}
    return device.get("dtype", "") if device.get("type") == device_type else ""


class RunRecord:
    """Writes a run folder, and the same values to W&B unless its name for the run is 'dummy'.

    It exists on rank 0 only.
    """

    def __init__(
        self,
        folder: Path,
        config: dict,
        accounting: dict,
        wandb_run: str,
        thresholds: list[float],
        resumed_step: int = 0,
        lock=None,
    ):
        """config: the content of config.json. accounting: the params/…, flops/… and mem/… values that are
        known before the first step. lock: this process's locks.Lock on the folder.
        """
        self.folder = folder
        self.thresholds = thresholds
        self.lock = lock
        self.latest = dict(accounting)
        self.evals = []
        for entry in read_history(folder):
            if entry["step"] <= resumed_step:  # later steps are run again
                self._remember(entry)
        write_json(folder / "config.json", config)
        self.file = HistoryWriter(folder / "metrics.jsonl")
        self.status = "running"
        self.wandb = None
        if wandb_run != "dummy":
            from nanochat.wandb_log import WandbLog  # here: it takes time that other runs need not spend

            self.wandb = WandbLog(folder, wandb_run, accounting, self.file.size, resumed_step)

    def _check_lock(self):
        if self.lock:
            self.lock.check()

    def _remember(self, metrics):
        self.latest.update(metrics)
        if "val/ppl" in metrics:
            self.evals.append(metrics)

    def log(self, metrics: dict):
        """Append one line. metrics must have `step` and the clocks in CLOCKS.

        InputError if another process has taken the folder.
        """
        self._check_lock()
        self._remember(metrics)
        self.file.append(metrics)

    def summary(self) -> dict:
        """The last value of every metric, and the times to the thresholds that were reached."""
        values = {k: v for k, v in self.latest.items() if isinstance(v, (int, float, str, dict))}
        return values | time_to_ppl(self.evals, self.thresholds)

    def commit(self) -> dict:
        """This record's entries for a checkpoint's meta.json. The record itself is on the disk by then."""
        return {"record": self.file.commit(), "summary": self.summary()}

    def summarize(self, status: str):
        """Rewrite summary.json; W&B reads it too. InputError if another process has taken the folder."""
        self._check_lock()
        self.status = status
        write_json(self.folder / "summary.json", {"status": status, **self.summary()})

    def close(self):
        """End the record with the status of the last summarize(). W&B has a limited time to send the rest."""
        self.file.close()
        if self.wandb:
            self.wandb.close("failed" if self.status == "running" else self.status)


def time_to_ppl(evals: list[dict], thresholds: list[float]) -> dict:
    """{time_to_ppl/P/{seconds,step,tokens,flops}: value at the first evaluation with val/ppl <= P}

    Beside each stands `…_interpolated`: the value at which log perplexity crosses P, taken as linear between
    the two evaluations around it. It is missing if the first evaluation is already below P. A threshold that
    was not reached has no entry. An evaluation without a clock or a perplexity is ignored: a damaged file may
    have one.
    """
    times = {}
    evals = [e for e in evals if is_complete(e)]
    for threshold in thresholds:
        i = next((i for i, e in enumerate(evals) if e["val/ppl"] <= threshold), None)
        if i is None:
            continue
        for key, name in CLOCKS:
            times[f"time_to_ppl/{threshold:g}/{name}"] = evals[i][key]
            if i > 0:
                high = math.log(evals[i - 1]["val/ppl"])
                low = math.log(evals[i]["val/ppl"])
                share = (high - math.log(threshold)) / (high - low)
                previous = evals[i - 1][key]
                crossing = previous + share * (evals[i][key] - previous)
                times[f"time_to_ppl/{threshold:g}/{name}_interpolated"] = crossing
    return times


def is_complete(evaluation: dict) -> bool:
    """Whether an evaluation has all clocks, and a perplexity that is not known to be wrong."""
    return all(key in evaluation for key, _ in CLOCKS) and not (evaluation["val/ppl"] or 0) <= 0


# ---- versions ----------------------------------------------------------------------------------------------


def git_state(root: Path | None = None) -> dict:
    """Commit and dirty flag of this program's own repository, of which `root` is the top folder.

    Both are None without one. A copy of the program inside another repository does not have its commit.
    """
    root = root or Path(__file__).resolve().parents[1]
    # git must not look in the folders above, nor where a hook or a script has pointed it
    pointers = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY"}
    environment = {name: value for name, value in os.environ.items() if name not in pointers}
    environment |= {"GIT_CEILING_DIRECTORIES": str(root.parent), "GIT_OPTIONAL_LOCKS": "0"}

    def git(*args):
        result = subprocess.run(
            ["git", *args],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=5,
            check=True,
        )
        return result.stdout.strip()

    state: dict[str, str | bool | None] = {"commit": None, "dirty": None}
    if not (root / ".git").exists():
        return state
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", "nanochat/metrics.py")  # fails in a repository of other files
        state["commit"] = git("rev-parse", "HEAD")
        state["dirty"] = bool(git("status", "--porcelain"))
    return state


def versions() -> dict:
    """The versions of Python and of the packages that matter for a run; None for a missing package."""
    from importlib.metadata import PackageNotFoundError, version

    packages: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("nanochat-lowrank", "torch", "numpy", "tiktoken", "rustbpe", "wandb"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return packages
