"""The files of a run folder: where they are, what they hold, and what they say together.

A checkpoint is the one commit of a run. It appears whole, by one rename, after what it vouches for: its
tensors, the rows of metrics.jsonl up to its step, the summary at that step, and whether the run ends with it.
summary.json repeats that for readers. After a kill it may be older.
"""
import hashlib
import json
import shutil
from pathlib import Path

from nanochat.common import InputError
from nanochat.files import Schema, read_json, write_json

REMEDY = "restore it, or remove the folder"
CONFIG = Schema("run's config.json", {"flags": dict},
                {"derived": dict, "given": list, "git": dict, "versions": dict, "device": dict, "seed": int,
                 "text": dict, "tokenizer": dict, "reference_losses": dict}, remedy=REMEDY)
SUMMARY = Schema("run's summary.json", {"status": str}, {"step": int}, remedy=REMEDY)
META = Schema("checkpoint's meta.json", {"step": int, "sha256": str},
              {"meta_sha256": str, "total_training_time": float, "bad_steps": int, "bad_steps_in_a_row": int,
               "tokenizer_hash": str, "model": dict, "adapter": dict, "subspace": dict,
               "evaluation_owed": bool, "last": bool, "summary": dict, "record": dict},
              format=2, remedy="use another step")


def read_config(folder: Path) -> dict:
    return read_json(folder / "config.json", CONFIG)


# ---- checkpoints -------------------------------------------------------------------------------------------

def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step:06d}"


def saved_steps(run_folder: Path) -> list[int]:
    """Steps with a checkpoint, ascending; not yet verified."""
    names = (f.name.removeprefix("step_") for f in (run_folder / "checkpoints").glob("step_*"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def remove_unfinished(run_folder: Path):
    """Remove what is no checkpoint, or none any more, among them. Nobody may be writing one now."""
    for left in (run_folder / "checkpoints").glob(".step_*"):
        shutil.rmtree(left, ignore_errors=True)


def read_meta(run_folder: Path, step: int) -> dict:
    """meta.json of a checkpoint. InputError if it is damaged, OSError if it cannot be read."""
    path = step_folder(run_folder, step) / "meta.json"
    meta = read_json(path, META)
    if meta["step"] != step:
        raise InputError(f"{path}: is of step {meta['step']}; use another step")
    if meta.get("format", 1) > 1 or "meta_sha256" in meta:  # earlier versions wrote no sum
        if meta.get("meta_sha256") != own_sum(meta):
            raise InputError(f"{path}: damaged (its content does not match its checksum); use another step")
    return meta


def write_meta(folder: Path, meta: dict):
    """meta.json into the folder of a checkpoint, which may be one that is being built."""
    meta = {**meta, "format": META.format}
    write_json(folder / "meta.json", {**meta, "meta_sha256": own_sum(meta)})


def own_sum(meta: dict) -> str:
    """The sum of all else that a meta.json holds."""
    content = {key: value for key, value in meta.items() if key != "meta_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- how far a run is --------------------------------------------------------------------------------------

def read_summary(folder: Path) -> dict:
    """The last values of a run and its status: running (or killed), stopped, diverged, finished.

    From summary.json or, where it is missing, damaged or older, from the newest checkpoint.
    """
    committed = newest_commit(folder)
    path = folder / "summary.json"
    if not path.exists():
        return committed or {"status": "running"}
    try:
        summary = read_json(path, SUMMARY)
    except InputError:
        if committed:
            return committed
        raise
    is_older = committed.get("step", -1) > summary.get("step", -1)
    return committed if is_older or committed.get("status") == "finished" else summary


def complete_summary(folder: Path):
    """Write the summary.json of a finished run where its process was killed before that."""
    if not summary_says_finished(folder):
        write_json(folder / "summary.json", read_summary(folder))


def summary_says_finished(folder: Path) -> bool:
    """Whether summary.json is whole and says so."""
    path = folder / "summary.json"
    try:
        return path.exists() and read_json(path, SUMMARY)["status"] == "finished"
    except InputError:
        return False


def newest_commit(folder: Path) -> dict:
    """The summary in the newest checkpoint; {} if there is none, as in those of earlier versions."""
    for step in reversed(saved_steps(folder)):
        try:
            return committed_summary(read_meta(folder, step))
        except (InputError, OSError):  # who loads it says why
            continue
    return {}


def committed_summary(meta: dict) -> dict:
    if "summary" not in meta:
        return {}
    return {"status": "finished" if meta.get("last") else "running", **meta["summary"]}
