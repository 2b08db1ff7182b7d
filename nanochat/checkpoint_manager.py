"""Saving and loading checkpoints: runs/<tag>/checkpoints/step_000200/{state.pt, meta.json}.

A checkpoint is written under another name and renamed once it is complete. state.pt holds only tensors and
plain numbers. It is read with weights_only=True, so loading it cannot execute code. meta.json holds the
SHA-256 of state.pt and of its own content, so a truncated or changed file is noticed before it is used.

nanochat/adapters/loading.py builds the model of a checkpoint.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from nanochat.common import out_of_memory
from nanochat.errors import InputError, first_line
from nanochat.files import create_folder, open_new, sha256, sync, sync_folder
from nanochat.processes import print0
from nanochat.run_files import check_owner, read_meta, remove_unfinished, saved_steps, step_folder, write_meta
from nanochat.tokenizer import Tokenizer, load_tokenizer

EVALUATION_OWED = "evaluation_owed"  # in meta.json: the run was stopped before this step's evaluation ended


def step_or_newest(run_folder: Path, step: int, flag: str = "--model-tag") -> int:
    """The step, or the newest saved one for -1. InputError if the run has no checkpoint.

    flag: the one that names the run, for the message.
    """
    if not (steps := saved_steps(run_folder)):
        raise InputError(f"{flag} {run_folder.name}: no checkpoint in {run_folder}")
    return step if step >= 0 else steps[-1]


# ---- writing -----------------------------------------------------------------------------------------------


def save_checkpoint(run_folder: Path, step: int, state: dict, meta: dict, keep: int = -1):
    """Write state (tensors, nested in dicts and lists) and meta (JSON) as the checkpoint of `step`.

    Then remove older checkpoints, so that `keep` are left (-1: keep all). A kill or a power cut at any moment
    leaves the earlier checkpoints unchanged. InputError if the files cannot be written.
    """
    folder = step_folder(run_folder, step)
    building = folder.with_name(f".{folder.name}.building")
    try:
        create_folder(folder.parent)
        remove_unfinished(run_folder)
        building.mkdir()
        with open_new(building / "state.pt") as f:
            torch.save(state, f)
            sync(f)
        write_meta(building, {**meta, "step": step, "sha256": sha256(building / "state.pt")})
        if folder.exists():  # the run resumed from an earlier step and reached this one again
            set_aside(folder)
        building.rename(folder)
        sync_folder(folder.parent)
    except (OSError, RuntimeError) as e:
        shutil.rmtree(building, ignore_errors=True)
        raise InputError(
            f"{folder}: cannot write the checkpoint ({system_error(e)}); "
            f"earlier ones are intact: {saved_steps(run_folder) or 'none'}; "
            "make room or give write permission, and continue with --resume auto"
        ) from None
    if keep > 0:
        # Later steps exist if the run resumed from an earlier one. They do not count as kept.
        earlier = [saved for saved in saved_steps(run_folder) if saved <= step]
        for old in earlier[:-keep]:
            set_aside(step_folder(run_folder, old))
    remove_unfinished(run_folder)


def set_aside(folder: Path):
    """Rename a checkpoint so that it no longer counts as one.

    This takes one step. A process that removes its files one by one may be killed before the last.
    """
    with contextlib.suppress(OSError):
        folder.rename(folder.with_name(f".{folder.name}.before"))


def amend_checkpoint(run_folder: Path, step: int, changes: dict):
    """Change entries of a checkpoint's meta.json. A value of None removes the entry."""
    meta = read_meta(run_folder, step) | changes
    meta = {key: value for key, value in meta.items() if value is not None}
    write_meta(step_folder(run_folder, step), meta)


def system_error(e: BaseException) -> str:
    """The system's message. torch raises its own error for a full disk; the system's is its context."""
    cause: BaseException | None = e
    while cause and not isinstance(cause, OSError):
        cause = cause.__context__
    return getattr(cause, "strerror", "") or first_line(e)


# ---- reading -----------------------------------------------------------------------------------------------


def load_checkpoint(run_folder: Path, step: int, device="cpu") -> tuple[dict, dict]:
    """(state, meta) of a step, compared with its checksums.

    InputError if the checkpoint is missing or damaged, or cannot be read.
    """
    folder = step_folder(run_folder, step)
    if not folder.is_dir():
        raise InputError(
            f"{run_folder.name}: no checkpoint of step {step}; there are: {saved_steps(run_folder) or 'none'}"
        )
    try:
        meta = read_meta(run_folder, step)
        check_owner(run_folder, meta)
        if meta["sha256"] != sha256(folder / "state.pt"):
            raise InputError(
                f"{folder}: damaged checkpoint (its content does not match its checksum); use another step"
            )
        # memory-mapped, so that the processes of one machine share one copy
        state = torch.load(folder / "state.pt", map_location=device, weights_only=True, mmap=True)
    except FileNotFoundError as e:
        missing = Path(e.filename).name
        raise InputError(f"{folder}: damaged checkpoint ({missing} is missing); use another step") from None
    except OSError as e:
        reason = e.strerror or first_line(e)
        raise InputError(f"{folder}: cannot be read ({reason}); use another step") from None
    except Exception as e:  # torch raises many kinds for a file of another program
        if isinstance(e, InputError) or out_of_memory(e):
            raise
        raise InputError(f"{folder}: not a checkpoint of this program ({first_line(e)})") from None
    if not isinstance(state, dict):
        raise InputError(f"{folder}: not a checkpoint of this program; use another step")
    return state, meta


def load_to_resume(run_folder: Path, step: int) -> tuple[dict, dict]:
    """load_checkpoint for a run that continues. InputError also if a tensor is not finite."""
    state, meta = load_checkpoint(run_folder, step)
    if names := not_finite(state):
        raise InputError(
            f"{step_folder(run_folder, step)}: {names[0]} and {len(names)} tensor(s) in all "
            "are not finite; use another step"
        )
    return state, meta


def load_newest(run_folder: Path) -> tuple[dict, dict] | None:
    """The newest checkpoint that a run can continue from, or None. A line names each one that is skipped."""
    for step in reversed(saved_steps(run_folder)):
        try:
            return load_to_resume(run_folder, step)
        except InputError as e:
            print0(f"skipped: {e}")
    return None


def named_tensors(state, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts and lists, each with its keys joined by dots."""
    entries: Iterable[tuple] = ()
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict):
        entries = state.items()
    elif isinstance(state, (list, tuple)):
        entries = enumerate(state)
    for key, value in entries:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def not_finite(state) -> list[str]:
    """Names of the tensors that hold NaN or an infinity."""
    return [name for name, tensor in named_tensors(state) if not tensor.isfinite().all()]


@contextlib.contextmanager
def fitting_together(folder: Path):
    """InputError if the code inside finds another model in a checkpoint than its meta.json says."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as e:
        if out_of_memory(e):
            raise
        raise InputError(
            f"{folder}: does not hold the model that it should "
            f"({type(e).__name__}: {first_line(e)}); use another step"
        ) from None


def load_with_tokenizer(run_folder: Path, step: int, device="cpu") -> tuple[dict, Tokenizer, dict]:
    """(state, the tokenizer the model was trained with, meta) of one checkpoint.

    InputError if the run folder's tokenizer.json is another one.
    """
    tokenizer = load_tokenizer(run_folder / "tokenizer.json")
    state, meta = load_checkpoint(run_folder, step, device)
    expected = meta.get("tokenizer_hash")
    if expected != tokenizer.hash:
        raise InputError(
            f"{run_folder}: the checkpoint was trained with tokenizer {expected}, "
            f"tokenizer.json is {tokenizer.hash}"
        )
    return state, tokenizer, meta
