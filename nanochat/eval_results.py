"""What scripts.base_eval writes, eval_<step>.json and core_<step>.json in a run folder: read and checked."""

import re
from pathlib import Path

from nanochat.common import InputError, print0, shortened
from nanochat.files import Schema, is_kind, read_json

REMEDY = "it counts as missing"
LOSSES = {
    "train/loss",
    "train/ppl",
    "train/bpb",
    "train/tokens",
    "val/loss",
    "val/ppl",
    "val/bpb",
    "val/tokens",
}
EVAL = Schema(
    "result of an evaluation",
    {"settings": dict},
    {
        **dict.fromkeys(LOSSES, float),
        "train/tokens": int,
        "val/tokens": int,
        "sample": list,
        "data": str,
        "text_of_the_run": bool,
    },
    remedy=REMEDY,
)
CORE = Schema(
    "result of CORE",
    {"settings": dict},
    {
        "core_metric": float,
        "core_metric_interval": list,
        "tasks": dict,
        "centered_results": dict,
        "bundle_sha256": (str, type(None)),
    },
    remedy=REMEDY,
)
TASK = Schema(
    "result of CORE",
    {"accuracy": float, "centered": float, "centered_interval": list, "examples": int},
    remedy=REMEDY,
)
SETTINGS = Schema("result of CORE", {"step": int, "bundle": str, "max_per_task": int}, remedy=REMEDY)


def read_eval(path: Path) -> dict:
    """An eval_<step>.json. InputError if it is none, or of another step."""
    results = read_json(path, EVAL)
    check_step(path, results)
    if 0 < len(LOSSES & results.keys()) < len(LOSSES):
        missing = ", ".join(sorted(LOSSES - results.keys()))
        raise InputError(f"{path}: not a {EVAL.name} ({missing}: missing); {REMEDY}")
    if not all(isinstance(text, str) for text in results.get("sample", ())):
        raise InputError(f"{path}: not a {EVAL.name} (sample: not a list of texts); {REMEDY}")
    return results


def read_core(path: Path) -> dict:
    """A core_<step>.json. InputError if it is none, or of another step."""
    results = read_json(path, CORE)
    SETTINGS.check(f"{path}: settings", results["settings"])
    check_step(path, results)
    if not results.get("tasks"):
        raise InputError(f"{path}: not a {CORE.name} (no tasks); {REMEDY}")
    check_interval(path, "core_metric", results)
    for label, task in results["tasks"].items():
        where = f"{path}: task {shortened(label)}"
        check_interval(where, "centered", TASK.check(where, task))
    return results


def check_step(path: Path, results: dict):
    step = results["settings"].get("step")
    if step != step_of(path):
        raise InputError(f"{path}: not a {EVAL.name} (of step {shortened(repr(step))}); {REMEDY}")


def check_interval(where, key: str, results: dict):
    """InputError unless a number stands there, and under key_interval its two ends."""
    interval = results.get(f"{key}_interval")
    numbers = [results.get(key), *(interval if isinstance(interval, list) else ())]
    if len(numbers) != 3 or not all(is_kind(number, float) and abs(number) < 1e9 for number in numbers):
        raise InputError(f"{where}: not a {CORE.name} ({key}, or its interval, is no number); {REMEDY}")


def step_of(path: Path) -> int:
    """-1 where the name of the file has none."""
    match = re.fullmatch(r"(?:core|eval)_(\d{1,18})\.json", path.name)
    return int(match[1]) if match else -1


def newest_core(folder: Path) -> dict:
    """The run's result of CORE at the newest step that has one; {} without. A line names a damaged one."""
    for path in sorted(folder.glob("core_*.json"), key=step_of, reverse=True):
        if results := earlier_results(path, read_core):
            return results
    return {}


def earlier_results(path: Path, read) -> dict:
    """What an evaluation has found, as `read` reads it; {} without. A damaged file is named in a line."""
    try:
        return read(path) if path.is_file() else {}
    except InputError as e:
        print0(f"note: {e}")
        return {}


def under(settings: dict, results: dict) -> dict:
    """The results, if they were found under these settings; else the settings alone."""
    return results if results.get("settings") == settings else {"settings": settings}
