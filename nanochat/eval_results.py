"""Reading and checking the files that scripts.base_eval writes: eval_<step>.json and core_<step>.json."""

import re
from pathlib import Path

from nanochat.errors import InputError, shortened
from nanochat.files import Schema, is_kind, read_json
from nanochat.processes import print0

DAMAGED_REMEDY = "it counts as missing"
LOSSES = {f"{split}/{key}" for split in ("train", "val") for key in ("loss", "ppl", "bpb", "tokens")}
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
    remedy=DAMAGED_REMEDY,
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
    remedy=DAMAGED_REMEDY,
)
TASK = Schema(
    "result of CORE",
    {"accuracy": float, "centered": float, "centered_interval": list, "examples": int},
    remedy=DAMAGED_REMEDY,
)
SETTINGS = Schema("result of CORE", {"step": int, "bundle": str, "max_per_task": int}, remedy=DAMAGED_REMEDY)


def read_eval(path: Path) -> dict:
    """The content of an eval_<step>.json. InputError if the file is damaged or of another step."""
    results = read_json(path, EVAL)
    check_step(path, results)
    if 0 < len(LOSSES & results.keys()) < len(LOSSES):
        missing = ", ".join(sorted(LOSSES - results.keys()))
        raise InputError(f"{path}: not a {EVAL.name} ({missing}: missing); {DAMAGED_REMEDY}")
    if not all(isinstance(text, str) for text in results.get("sample", ())):
        raise InputError(f"{path}: not a {EVAL.name} (sample: not a list of texts); {DAMAGED_REMEDY}")
    return results


def read_core(path: Path) -> dict:
    """The content of a core_<step>.json. InputError if the file is damaged or of another step."""
    results = read_json(path, CORE)
    SETTINGS.check(f"{path}: settings", results["settings"])
    check_step(path, results)
    if not results.get("tasks"):
        raise InputError(f"{path}: not a {CORE.name} (no tasks); {DAMAGED_REMEDY}")
    check_interval(path, "core_metric", results)
    for label, task in results["tasks"].items():
        where = f"{path}: task {shortened(label)}"
        check_interval(where, "centered", TASK.check(where, task))
    return results


def check_step(path: Path, results: dict):
    step = results["settings"].get("step")
    if step != file_step(path):
        raise InputError(f"{path}: not a {EVAL.name} (of step {shortened(repr(step))}); {DAMAGED_REMEDY}")


def check_interval(where, key: str, results: dict):
    """InputError unless results[key] is a number and results[key_interval] a list of two numbers."""
    interval = results.get(f"{key}_interval")
    numbers = [results.get(key), *interval] if isinstance(interval, list) else []
    if len(numbers) != 3 or not all(is_kind(value, float) and abs(value) < 1e9 for value in numbers):
        raise InputError(
            f"{where}: not a {CORE.name} ({key}, or its interval, is no number); {DAMAGED_REMEDY}"
        )


def file_step(path: Path) -> int:
    """The step in a file's name, or -1."""
    match = re.fullmatch(r"(?:core|eval)_(\d{1,18})\.json", path.name)
    return int(match[1]) if match else -1


def newest_core(folder: Path) -> dict:
    """CORE's result at the run's newest step that has one, or {}. A line names each damaged file."""
    for path in sorted(folder.glob("core_*.json"), key=file_step, reverse=True):
        if results := earlier_results(path, read_core):
            return results
    return {}


def earlier_results(path: Path, read) -> dict:
    """The results in a file, read by `read`; {} if there is none. A line names a damaged file."""
    try:
        return read(path) if path.is_file() else {}
    except InputError as e:
        print0(f"note: {e}")
        return {}


def matching_results(settings: dict, results: dict) -> dict:
    """The results, if they were measured with these settings; else the settings alone."""
    return results if results.get("settings") == settings else {"settings": settings}
