"""Checkpoints: runs/<tag>/checkpoints/step_000200/{state.pt, meta.json}, each appearing whole by one rename.

state.pt holds tensors and plain numbers only (read with weights_only=True: loading cannot execute code); meta.json holds
its SHA-256, so a truncated or altered file is noticed before it is used.
"""
import json
import os
import shutil
from pathlib import Path

import torch

from nanochat.adapters import attach_saved
from nanochat.common import InputError, first_line, print0
from nanochat.factorize import stacked
from nanochat.files import sha256, write_atomic
from nanochat.gpt import GPT, GPTConfig
from nanochat.subspace import restore
from nanochat.tokenizer import load_tokenizer


OWED = "evaluation_owed"  # in meta: the run was stopped before this step's evaluation was through


def step_folder(run_folder: Path, step: int) -> Path:
    return run_folder / "checkpoints" / f"step_{step:06d}"


def saved_steps(run_folder: Path) -> list[int]:
    """Steps with a checkpoint, ascending; not yet verified."""
    names = (f.name.removeprefix("step_") for f in (run_folder / "checkpoints").glob("step_*"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def step_or_newest(run_folder: Path, step: int, flag: str = "--model-tag") -> int:
    """The step or, of -1, the newest one. InputError if the run, which the flag named, has no checkpoint at all."""
    if not (steps := saved_steps(run_folder)):
        raise InputError(f"{flag} {run_folder.name}: no checkpoint in {run_folder}")
    return step if step >= 0 else steps[-1]


def save_checkpoint(run_folder: Path, step: int, state: dict, meta: dict, keep: int = -1):
    """Write state (tensors, nested in dicts and lists) and meta (JSON) as the checkpoint of `step`; then remove all but the
    newest `keep` (-1: none). Killed at any moment it leaves the earlier ones as they were.
    """
    folder = step_folder(run_folder, step)
    building = folder.with_name(f".{folder.name}.building")
    try:
        for left in folder.parent.glob(".step_*"):  # by a process that was killed here
            shutil.rmtree(left, ignore_errors=True)
        building.mkdir(parents=True)
        with open(building / "state.pt", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        write_atomic(building / "meta.json", json.dumps({**meta, "step": step, "sha256": sha256(building / "state.pt")}, indent=2) + "\n")
        if folder.exists():  # a damaged one of the same step, reached again after a resume from before it
            folder.rename(folder.with_name(f".{folder.name}.damaged"))
        building.rename(folder)
        sync_folder(folder.parent)
    except (OSError, RuntimeError) as e:
        shutil.rmtree(building, ignore_errors=True)
        raise InputError(f"{folder}: cannot write the checkpoint ({system_error(e)}); "
                         f"earlier ones are intact: {saved_steps(run_folder) or 'none'}; "
                         "make room or give write permission, and continue with --resume auto") from None
    for old in saved_steps(run_folder)[:-keep] if keep > 0 else ():
        shutil.rmtree(step_folder(run_folder, old), ignore_errors=True)


def system_error(e: BaseException) -> str:
    """What the system said. Of a full disk torch makes an error of its own; the system's is its context."""
    cause = e
    while cause and not isinstance(cause, OSError):
        cause = cause.__context__
    return (cause.strerror if cause else "") or first_line(e)


def clear_owed_evaluation(run_folder: Path, step: int):
    """Strike out of a checkpoint's meta.json that the evaluation of its step is owed: it was made."""
    path = step_folder(run_folder, step) / "meta.json"
    meta = json.loads(path.read_text("utf-8"))
    del meta[OWED]
    write_atomic(path, json.dumps(meta, indent=2) + "\n")


def sync_folder(folder: Path):
    """Make the names in a folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def load_checkpoint(run_folder: Path, step: int, device="cpu") -> tuple[dict, dict]:
    """(state, meta) of a step, verified. InputError if it is missing or damaged."""
    folder = step_folder(run_folder, step)
    if not folder.is_dir():
        raise InputError(f"{run_folder.name}: no checkpoint of step {step}; there are: {saved_steps(run_folder) or 'none'}")
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        intact = meta["sha256"] == sha256(folder / "state.pt")
    except (OSError, ValueError, KeyError):
        intact = False
    if not intact:
        raise InputError(f"{folder}: damaged checkpoint (its content does not match its checksum); use another step")
    # memory-mapped: the processes of a machine share one copy of what they read
    return torch.load(folder / "state.pt", map_location=device, weights_only=True, mmap=True), meta


def load_newest(run_folder: Path, device="cpu") -> tuple[dict, dict] | None:
    """The newest checkpoint that is intact, naming those that are skipped; None if there is none."""
    for step in reversed(saved_steps(run_folder)):
        try:
            return load_checkpoint(run_folder, step, device)
        except InputError as e:
            print0(f"skipped: {e}")
    return None


def load_model(run_folder: Path, step: int, device="cpu", **changes) -> tuple:
    """(model, the tokenizer it was trained with, meta) of a step; of an adapter run its base, from the folder beside it, with the
    adapter acting. changes: of the model's config, such as `recompute`. InputError if they do not belong together.
    """
    tokenizer = load_tokenizer(run_folder / "tokenizer.json")
    state, meta = load_checkpoint(run_folder, step, device)
    if meta["tokenizer_hash"] != tokenizer.hash:
        raise InputError(f"{run_folder}: the checkpoint was trained with tokenizer {meta['tokenizer_hash']}, tokenizer.json is {tokenizer.hash}")
    if "adapter" in meta:
        return adapted(run_folder.parent, meta["adapter"], state["adapter"], device, **changes), tokenizer, meta
    with torch.device(device):
        model = GPT(GPTConfig(**meta["model"] | changes))
    if "subspace" in meta:
        restore(model, meta["subspace"], state["model"])
    else:
        model.load_state_dict(state["model"])
    return model, tokenizer, meta


# ---- adapter runs ---------------------------------------------------------------------------------------------------

ADAPTER = "adapter"  # its name in the models of adapter runs


def load_bases(runs: Path, bases: list[dict], device="cpu", **changes) -> list[GPT]:
    """The models that an adapter run begins with: {"tag", "step", "sha256"} of each. InputError if a checkpoint is no longer the one of the sum."""
    models = []
    for base in bases:
        model, _, meta = load_model(runs / base["tag"], base["step"], device, **changes)
        if meta["sha256"] != base["sha256"]:
            raise InputError(f"{runs / base['tag']}: step {base['step']} is another base than the adapter was trained on "
                             f"(its sum is {meta['sha256'][:12]}, that one's {base['sha256'][:12]}); restore that checkpoint, or train the adapter again")
        models.append(model)
    return models


def adapted(runs: Path, said: dict, tensors: dict, device, **changes) -> GPT:
    """The base of an adapter run with its adapter. said, tensors: what its checkpoint has under "adapter", of meta and of state.

    said: {"description" (`adapters.describe`), "origin": {"bases", "layer_map": layers at each position ([] = the base's own), "tied"}}.
    """
    origin = said["origin"]
    model = stacked(*load_bases(runs, origin["bases"], device, **changes), layers=tuple(origin["layer_map"]), tied=origin["tied"])
    attach_saved(model, ADAPTER, said["description"], tensors)
    return model
