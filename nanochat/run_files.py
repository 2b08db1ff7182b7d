"""The files of a run folder: their paths, their contents, and the state of the run that they show.

Only a checkpoint commits a run's progress. One rename makes it visible, after everything that it refers to is
on the disk: its tensors, the rows of metrics.jsonl up to its step, the summary at that step, and whether the
run ends there. summary.json repeats the summary for readers. After a kill it may be older.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from nanochat.errors import InputError, shortened
from nanochat.files import Schema, read_json, write_json

FOLDER_REMEDY = "restore it, or remove the folder"
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
    remedy=FOLDER_REMEDY,
)
SUMMARY = Schema("run's summary.json", {"status": str}, {"step": int}, remedy=FOLDER_REMEDY)
CHECKPOINT_META = Schema(
    "checkpoint's meta.json",
    {"step": int, "sha256": str},
    {
        "meta_sha256": str,
        "files": dict,
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
    format=3,
    remedy="use another step",
)


RECORD_META = Schema(
    f"{CHECKPOINT_META.name}: record", {"bytes": int, "sha256": str}, remedy=CHECKPOINT_META.remedy
)
CONFIG_PARTS = {
    "flags": Schema(
        f"{CONFIG.name}: flags", {}, {"data": str, "eval_tokens": int, "seed": int}, remedy=FOLDER_REMEDY
    ),
    "derived": Schema(
        f"{CONFIG.name}: derived",
        {},
        {"model": dict, "corpus": dict, "tokenizer_hash": str, "source": dict},
        remedy=FOLDER_REMEDY,
    ),
}
HASH_OR_NONE = (str, type(None))  # None: the text is not known
CORPUS_SCHEMA = Schema(
    f"{CONFIG.name}: derived.corpus",
    {},
    {"name": str, "path": str, "train_fingerprint": HASH_OR_NONE, "val_fingerprint": HASH_OR_NONE},
    remedy=FOLDER_REMEDY,
)


class Part(dict):
    """An object of a config.json. Reading a key that is not there is an InputError."""

    def __init__(self, where: str, content: dict):
        super().__init__(content)
        self.where = where

    def __missing__(self, key: str):
        raise InputError(f"{self.where}.{key} is missing; {FOLDER_REMEDY}")


def read_config(folder: Path) -> dict:
    """The content of config.json. InputError if it is damaged."""
    path = folder / "config.json"
    config = read_json(path, CONFIG)
    for name, schema in CONFIG_PARTS.items():
        config[name] = Part(f"{path}: {name}", schema.check(str(path), config.get(name, {})))
    derived = config["derived"]
    if "corpus" in derived:
        corpus = CORPUS_SCHEMA.check(str(path), derived["corpus"])
        derived["corpus"] = Part(f"{path}: derived.corpus", corpus)
    return config


# ---- checkpoints -------------------------------------------------------------------------------------------


def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step:06d}"


def saved_steps(run_folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending. The files are not verified.

    OSError if the folder cannot be read: with an empty list instead, a run would begin again.
    """
    steps = []
    with contextlib.suppress(FileNotFoundError), os.scandir(run_folder / "checkpoints") as entries:
        for entry in entries:
            match = re.fullmatch("step_([0-9]{6,18})", entry.name)
            if match and entry.name == step_folder(run_folder, int(match[1])).name and entry.is_dir():
                steps.append(int(match[1]))
    return sorted(steps)


def remove_unfinished(run_folder: Path):
    """Remove checkpoints that are unfinished or set aside. The caller knows that no process writes one."""
    remove_hidden(run_folder, ".step_*")


def remove_hidden(run_folder: Path, pattern: str):
    """Remove the hidden folders beside the checkpoints with such names."""
    for path in (run_folder / "checkpoints").glob(pattern):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def read_meta(run_folder: Path, step: int) -> dict:
    """meta.json of a checkpoint. InputError if it is damaged, OSError if it cannot be read."""
    path = step_folder(run_folder, step) / "meta.json"
    meta = read_json(path, CHECKPOINT_META)
    RECORD_META.check(str(path), meta.get("record", {"bytes": 0, "sha256": ""}))
    if meta["step"] != step:
        raise InputError(f"{path}: is of step {meta['step']}; use another step")
    has_checksum = meta.get("format", 1) > 1 or "meta_sha256" in meta  # earlier versions wrote none
    if has_checksum and meta.get("meta_sha256") != meta_checksum(meta):
        raise InputError(f"{path}: damaged (its content does not match its checksum); use another step")
    return meta


def check_owner(run_folder: Path, meta: dict):
    """InputError if a checkpoint was made with other flags than config.json has.

    One of the two is damaged or belongs to another run. Checkpoints of earlier versions hold no flags.
    """
    if "flags" not in meta or not (run_folder / "config.json").exists():
        return
    flags = read_config(run_folder)["flags"]
    for name, value in meta["flags"].items():
        if name in flags and flags[name] != value:
            raise InputError(
                f"{step_folder(run_folder, meta['step'])}: was made with {name} {shortened(repr(value))}, "
                f"config.json has {shortened(repr(flags[name]))}: one of them is of another run, or damaged; "
                "restore it, or use another step"
            )


def write_meta(folder: Path, meta: dict):
    """Write meta.json into the folder of a checkpoint, which may be unfinished."""
    meta = {**meta, "format": CHECKPOINT_META.format}
    write_json(folder / "meta.json", {**meta, "meta_sha256": meta_checksum(meta)})


def meta_checksum(meta: dict) -> str:
    """The SHA-256 of a meta.json's entries, without the entry for it."""
    content = {key: value for key, value in meta.items() if key != "meta_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---- the state of a run ------------------------------------------------------------------------------------


def read_summary(folder: Path) -> dict:
    """The last values of a run and its status: running (or killed), stopped, diverged, finished.

    They come from summary.json or, if that is missing, damaged or older, from the newest checkpoint.
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
    """Write the summary.json of a finished run if its process was killed before it could."""
    if not summary_says_finished(folder):
        write_json(folder / "summary.json", read_summary(folder))


def summary_says_finished(folder: Path) -> bool:
    """Whether summary.json is undamaged and has the status finished."""
    path = folder / "summary.json"
    try:
        return path.exists() and read_json(path, SUMMARY)["status"] == "finished"
    except InputError:
        return False


def check_ending(folder: Path):
    """InputError if summary.json says finished, but the newest checkpoint is not the last of a run.

    Then the last checkpoint is missing, or one of the two belongs to another run.
    """
    steps = saved_steps(folder)
    meta = {}
    with contextlib.suppress(InputError, OSError):  # whoever loads the checkpoint reports it
        meta = read_meta(folder, steps[-1]) if steps else {}
    check_owner(folder, meta)
    if meta.get("last") is False:
        raise InputError(
            f"{folder / 'summary.json'}: says finished, and the checkpoint of step {steps[-1]} "
            "that it is not the last; restore the last one, or remove summary.json to go on"
        )


def newest_commit(folder: Path) -> dict:
    """The summary in the newest readable checkpoint; {} if it has none. Earlier versions wrote none."""
    for step in reversed(saved_steps(folder)):
        try:
            return committed_summary(read_meta(folder, step))
        except (InputError, OSError):  # whoever loads the checkpoint reports it
            continue
    return {}


def committed_summary(meta: dict) -> dict:
    if "summary" not in meta:
        return {}
    return {"status": "finished" if meta.get("last") else "running", **meta["summary"]}
