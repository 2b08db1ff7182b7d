"""The files of a run folder: where they are, what they hold, and what they say together.

A checkpoint is the one commit of a run. It appears whole, by one rename, after what it vouches for: its
tensors, the rows of metrics.jsonl up to its step, the summary at that step, and whether the run ends with it.
summary.json repeats that for readers. After a kill it may be older.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from nanochat.common import InputError, shortened
from nanochat.files import Schema, read_json, write_json

REMEDY = "restore it, or remove the folder"
CONFIG = Schema(
    "run's config.json",
    {"flags": dict},
    {
        "derived": dict,
        "given": list,
        "git": dict,
        "versions": dict,
        "device": dict,
        "seed": int,
        "text": dict,
        "tokenizer": dict,
        "reference_losses": dict,
    },
    remedy=REMEDY,
)
SUMMARY = Schema("run's summary.json", {"status": str}, {"step": int}, remedy=REMEDY)
META = Schema(
    "checkpoint's meta.json",
    {"step": int, "sha256": str},
    {
        "meta_sha256": str,
        "total_training_time": float,
        "bad_steps": int,
        "bad_steps_in_a_row": int,
        "tokenizer_hash": str,
        "model": dict,
        "adapter": dict,
        "subspace": dict,
        "evaluation_owed": bool,
        "last": bool,
        "summary": dict,
        "record": dict,
        "flags": dict,
    },
    format=2,
    remedy="use another step",
)


RECORD = Schema(f"{META.name}: record", {"bytes": int, "sha256": str}, remedy=META.remedy)
PARTS = {
    "flags": Schema(
        f"{CONFIG.name}: flags", {}, {"data": str, "eval_tokens": int, "seed": int}, remedy=REMEDY
    ),
    "derived": Schema(
        f"{CONFIG.name}: derived",
        {},
        {"model": dict, "corpus": dict, "tokenizer_hash": str, "source": dict},
        remedy=REMEDY,
    ),
}
HASH = (str, type(None))  # none: the text is not known
CORPUS = Schema(
    f"{CONFIG.name}: derived.corpus",
    {},
    {"name": str, "path": str, "train_fingerprint": HASH, "val_fingerprint": HASH},
    remedy=REMEDY,
)


class Part(dict):
    """An object of a config.json. A key that a program needs and that is not there is one line."""

    def __init__(self, where: str, content: dict):
        super().__init__(content)
        self.where = where

    def __missing__(self, key: str):
        raise InputError(f"{self.where}.{key} is missing; {REMEDY}")


def read_config(folder: Path) -> dict:
    path = folder / "config.json"
    config = read_json(path, CONFIG)
    for name, schema in PARTS.items():
        config[name] = Part(f"{path}: {name}", schema.check(str(path), config.get(name, {})))
    derived = config["derived"]
    if "corpus" in derived:
        corpus = CORPUS.check(str(path), derived["corpus"])
        derived["corpus"] = Part(f"{path}: derived.corpus", corpus)
    return config


# ---- checkpoints -------------------------------------------------------------------------------------------


def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step:06d}"


def saved_steps(run_folder: Path) -> list[int]:
    """Steps with a checkpoint, ascending; not yet verified. OSError where that cannot be seen: a run would
    begin again.
    """
    steps = []
    with contextlib.suppress(FileNotFoundError), os.scandir(run_folder / "checkpoints") as entries:
        for entry in entries:
            number = re.fullmatch("step_([0-9]{6,18})", entry.name)
            if number and entry.name == step_folder(run_folder, int(number[1])).name and entry.is_dir():
                steps.append(int(number[1]))
    return sorted(steps)


def remove_unfinished(run_folder: Path):
    """Remove what is no checkpoint, or none any more, among them. Nobody may be writing one now."""
    for left in (run_folder / "checkpoints").glob(".step_*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def read_meta(run_folder: Path, step: int) -> dict:
    """meta.json of a checkpoint. InputError if it is damaged, OSError if it cannot be read."""
    path = step_folder(run_folder, step) / "meta.json"
    meta = read_json(path, META)
    RECORD.check(str(path), meta.get("record", {"bytes": 0, "sha256": ""}))
    if meta["step"] != step:
        raise InputError(f"{path}: is of step {meta['step']}; use another step")
    if meta.get("format", 1) > 1 or "meta_sha256" in meta:  # earlier versions wrote no sum
        if meta.get("meta_sha256") != own_sum(meta):
            raise InputError(f"{path}: damaged (its content does not match its checksum); use another step")
    return meta


def check_owner(run_folder: Path, meta: dict):
    """InputError if a checkpoint was made under other flags than config.json has: one of the two is another
    run's, or damaged. Checkpoints of earlier versions do not say.
    """
    if "flags" not in meta or not (run_folder / "config.json").exists():
        return
    flags = read_config(run_folder)["flags"]
    for name, value in meta["flags"].items():
        if name in flags and flags[name] != value:
            there = shortened(repr(flags[name]))
            raise InputError(
                f"{step_folder(run_folder, meta['step'])}: was made with {name} "
                f"{shortened(repr(value))}, config.json has {there}: one of them is of another "
                "run, or damaged; restore it, or use another step"
            )


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


def check_ending(folder: Path):
    """InputError if the newest checkpoint is not the last of this run, though summary.json says finished.

    One of the two may be of another run, or the last checkpoint is gone.
    """
    steps = saved_steps(folder)
    meta = {}
    with contextlib.suppress(InputError, OSError):  # who loads it says why
        meta = read_meta(folder, steps[-1]) if steps else {}
    check_owner(folder, meta)
    if meta.get("last") is False:
        raise InputError(
            f"{folder / 'summary.json'}: says finished, and the checkpoint of step {steps[-1]} "
            "that it is not the last; restore the last one, or remove summary.json to go on"
        )


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
