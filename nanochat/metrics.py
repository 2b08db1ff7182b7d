"""The run record: one folder a run, the same names on wandb, time to a threshold, memory.

runs/<model-tag>/config.json     written once, before the first step
                 metrics.jsonl   append-only, one JSON object a line
                 summary.json    rewritten at every checkpoint and at the end
                 wandb_id.txt    so that a resumed run continues the same line on the dashboard
"""

import contextlib
import math
import os
import platform
import resource
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.common import InputError, get_base_dir
from nanochat.files import remove_temporary, write_json
from nanochat.history import CLOCKS, History, read_history
from nanochat.history_file import HistoryFile
from nanochat.run_files import read_config, read_summary, remove_unfinished

# what only the process that has the run's lock writes
WRITTEN = ("config.json", "summary.json", "tokenizer.json", "wandb_id.txt")


def runs_dir() -> Path:
    return get_base_dir() / "runs"


@dataclass(frozen=True)
class Run:
    """A run as read from its folder."""

    name: str
    config: dict  # {"flags", "derived", "git", "versions", "device", "seed"}
    summary: dict  # flat metric names -> last values, "status": see run_files.read_summary
    history: History | list[dict]  # one dict a step, in order; keys as in design section 6
    core: dict = field(default_factory=dict)  # in the report: see eval_results.newest_core


def load_run(folder: Path) -> Run:
    """Read a run folder. InputError if it is none. A line half-written by a killed process is skipped."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a run folder (no config.json)")
    return Run(folder.name, read_config(folder), read_summary(folder), read_history(folder))


def remove_left_overs(folder: Path):
    """Remove what killed processes left half-written in a run folder. This process has the run's lock."""
    remove_temporary(folder, *WRITTEN)
    remove_unfinished(folder)


def dtype_so_far(folder: Path, device_type: str) -> str:
    """The dtype that the run in this folder began with on a device of this type; '' if there is none."""
    device = read_config(folder).get("device", {}) if (folder / "config.json").exists() else {}
    return device.get("dtype", "") if device.get("type") == device_type else ""


class RunRecord:
    """Writes a run folder and, unless the wandb name is 'dummy', the same to wandb. Lives on rank 0 only."""

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
        """config: as stored in config.json. accounting: flat params/…, flops/…, mem/… known before the first
        step. lock: the locks.Lock by which this process holds the folder.
        """
        self.folder = folder
        self.thresholds = thresholds
        self.lock = lock
        self.latest = dict(accounting)
        self.evals = []
        for entry in read_history(folder):
            if entry["step"] <= resumed_step:  # what the checkpoint knows of; later steps are run again
                self._remember(entry)
        write_json(folder / "config.json", config)
        self.file = HistoryFile(folder / "metrics.jsonl")
        self.status = "running"
        self.wandb = None
        if wandb_run != "dummy":
            from nanochat.wandb_log import WandbLog  # what runs without W&B need not pay for

            self.wandb = WandbLog(folder, wandb_run, accounting, self.file.size, resumed_step)

    def _check_lock(self):
        if self.lock:
            self.lock.check()

    def _remember(self, metrics):
        self.latest.update(metrics)
        if "val/ppl" in metrics:
            self.evals.append(metrics)

    def log(self, metrics: dict):
        """Append one line. metrics must hold `step` and the clocks in CLOCKS. InputError if another process
        has the folder by now.
        """
        self._check_lock()
        self._remember(metrics)
        self.file.append(metrics)

    def summary(self) -> dict:
        """The last value of every metric, and the thresholds reached."""
        values = {k: v for k, v in self.latest.items() if isinstance(v, (int, float, str, dict))}
        return values | time_to_ppl(self.evals, self.thresholds)

    def commit(self) -> dict:
        """What a checkpoint's meta.json holds of this record, which is on the disk by then."""
        return {"record": self.file.commit(), "summary": self.summary()}

    def summarize(self, status: str):
        """Rewrite summary.json, also for W&B. InputError if another process has the folder by now."""
        self._check_lock()
        self.status = status
        write_json(self.folder / "summary.json", {"status": status, **self.summary()})

    def close(self):
        """The run has ended, as the last summarize() said. W&B gets a limited time to have all of it."""
        self.file.close()
        if self.wandb:
            self.wandb.close("failed" if self.status == "running" else self.status)


def time_to_ppl(evals: list[dict], thresholds: list[float]) -> dict:
    """{time_to_ppl/P/{seconds,step,tokens,flops}: value at the first evaluation with val/ppl <= P}.

    `…_interpolated` beside each is where log perplexity, taken as linear between the two evaluations around P, crosses
    it; absent when the very first evaluation is already below P. Thresholds not reached have no entry. A row
    that lacks a clock, or whose perplexity is none, counts as no evaluation: a damaged file may hold it.
    """
    out = {}
    evals = [e for e in evals if all(key in e for key, _ in CLOCKS) and not (e["val/ppl"] or 0) <= 0]
    for threshold in thresholds:
        i = next((i for i, e in enumerate(evals) if e["val/ppl"] <= threshold), None)
        if i is None:
            continue
        for key, name in CLOCKS:
            out[f"time_to_ppl/{threshold:g}/{name}"] = evals[i][key]
            if i > 0:
                high = math.log(evals[i - 1]["val/ppl"])
                low = math.log(evals[i]["val/ppl"])
                share = (high - math.log(threshold)) / (high - low)
                out[f"time_to_ppl/{threshold:g}/{name}_interpolated"] = evals[i - 1][key] + share * (
                    evals[i][key] - evals[i - 1][key]
                )
    return out


# bfloat16 peak of one device in FLOP/s, without sparsity, from the makers' data sheets; for train/mfu
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


# ---- what a run ran on ----------------------------------------------------------------------------------------------


def peak_flops(device_name: str) -> float | None:
    """Of a GPU of this name; None if it is not known, or a CPU."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)


def reset_peak_memory(device):
    """Start measuring the peak afresh where the platform can (CUDA, Linux)."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif os.path.exists("/proc/self/clear_refs"):
        try:
            # sets VmHWM, the peak, to the present resident size
            Path("/proc/self/clear_refs").write_text("5", "utf-8")
        except OSError:
            pass  # containers may forbid it: the peak then counts from the start of the process


def peak_memory_bytes(device) -> int:
    """CUDA: most bytes allocated by torch on this process's GPU. CPU: peak resident set of this whole process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


def git_state(root: Path = Path(__file__).resolve().parents[1]) -> dict:
    """Commit and dirty flag of this program's own repository, with the top folder `root`; None without one.

    A copy of the program inside another repository, or an installed one, does not have that one's commit.
    """
    # git must not look elsewhere: not in the folders above, and not where a hook or a script has pointed it
    pointers = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY"}
    environment = {name: value for name, value in os.environ.items() if name not in pointers}
    environment |= {"GIT_CEILING_DIRECTORIES": str(root.parent), "GIT_OPTIONAL_LOCKS": "0"}

    def git(*args):
        done = subprocess.run(
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
        return done.stdout.strip()

    state: dict[str, str | bool | None] = {"commit": None, "dirty": None}
    if not (root / ".git").exists():
        return state
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git("ls-files", "--error-unmatch", "nanochat/metrics.py")  # fails in a repository of other files
        state["commit"] = git("rev-parse", "HEAD")
        state["dirty"] = bool(git("status", "--porcelain"))
    return state


def versions() -> dict:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("nanochat-lowrank", "torch", "numpy", "tiktoken", "rustbpe", "wandb"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
