"""Saving and loading checkpoints: the folders runs/<tag>/checkpoints/step_000200.

A checkpoint is written under another name and renamed once it is complete. Its tensors are in the files that
nanochat/checkpoint_files.py describes. meta.json holds the SHA-256 of each of them and of its own content, so
a truncated or changed file is noticed before it is used. Loading executes no code.

Earlier versions wrote all tensors into one file, state.pt. It is read with weights_only=True.

nanochat/checkpoint_writer.py writes while training goes on; nanochat/adapters/loading.py builds the model of
a checkpoint.
"""

import contextlib
import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from nanochat import locks
from nanochat.checkpoint_files import (
    Piece,
    StoredState,
    data_file,
    leaves,
    list_file,
    open_state,
    read_list,
    write_shard,
    write_torch_index,
)
from nanochat.common import out_of_memory
from nanochat.errors import InputError, ProcessLost, first_line
from nanochat.files import create_folder, sha256, sync_folder
from nanochat.processes import print0
from nanochat.run_files import (
    check_owner,
    read_meta,
    remove_hidden,
    remove_unfinished,
    saved_steps,
    step_folder,
    write_meta,
)
from nanochat.tokenizer import Tokenizer, load_tokenizer

EVALUATION_OWED = "evaluation_owed"  # in meta.json: the run was stopped before this step's evaluation ended
SHOWN_AFTER = 5.0  # seconds until a network file system shows what another machine has written


def step_or_newest(run_folder: Path, step: int, flag: str = "--model-tag") -> int:
    """The step, or the newest saved one for -1. InputError if the run has no checkpoint.

    flag: the one that names the run, for the message.
    """
    if not (steps := saved_steps(run_folder)):
        raise InputError(f"{flag} {run_folder.name}: no checkpoint in {run_folder}")
    return step if step >= 0 else steps[-1]


# ---- writing -----------------------------------------------------------------------------------------------


def new_key() -> str:
    return secrets.token_hex(6)


class NewCheckpoint:
    """A checkpoint that is being written. Each process writes its shard, and process 0 commits it.

    A kill or a power cut at any moment leaves the earlier checkpoints unchanged.
    """

    def __init__(self, run_folder: Path, step: int, key: str, rank: int = 0, ranks: int = 1):
        """key: the same in all processes, and one that no earlier attempt at this step had.

        Writers of a run that was killed may still be writing, into the folder of an attempt of theirs.
        rank, ranks: of this process, and how many write.
        """
        self.run_folder = run_folder
        self.step = step
        self.rank = rank
        self.ranks = ranks
        self.folder = step_folder(run_folder, step)
        self.building = self.folder.with_name(f".{self.folder.name}.{key}.building")

    def begin(self):
        """On process 0, before the others claim their shards: make the folder."""
        with self.failing():
            create_folder(self.folder.parent)
            self.building.mkdir(exist_ok=True)

    def claim(self) -> locks.Lock | None:
        """The lock that shows process 0 that this process still writes. Process 0 needs none: None."""
        with self.failing():
            return locks.acquire(self.lock_path(self.rank), wait=False) if self.rank else None

    def lock_path(self, rank: int) -> Path:
        return self.building / f".shard_{rank}.lock"

    def write(self, pieces: list[Piece]):
        """Write this process's shard. InputError if that cannot be done."""
        with self.failing():
            write_shard(self.building, self.rank, pieces)

    def commit(self, meta: dict, keep: int = -1, check=lambda: None):
        """On process 0: wait for all shards, and make them a checkpoint. meta: JSON.

        Then remove older checkpoints, so that `keep` are left (-1: keep all). check() raises an error if this
        process may not write into the run folder any more.
        """
        with self.failing():
            for rank in range(1, self.ranks):
                self.wait_for_shard(rank)
            sums = self.checksums()
            check()
            digest = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
            write_meta(self.building, {**meta, "step": self.step, "sha256": digest, "files": sums})
            remove_hidden(self.run_folder, ".step_*.before")
            if self.folder.exists():  # the run resumed from an earlier step and reached this one again
                set_aside(self.folder)
            self.building.rename(self.folder)
            sync_folder(self.folder.parent)
        if keep > 0:
            # Later steps exist if the run resumed from an earlier one. They do not count as kept.
            earlier = [saved for saved in saved_steps(self.run_folder) if saved <= self.step]
            for old in earlier[:-keep]:
                set_aside(step_folder(self.run_folder, old))
        remove_hidden(self.run_folder, ".step_*.before")

    def wait_for_shard(self, rank: int):
        """Wait until another process has written its shard. ProcessLost if it has ended without that."""
        lock = locks.acquire(self.lock_path(rank), wait=True)
        assert lock is not None  # as it waits
        lock.close()
        self.lock_path(rank).unlink()
        deadline = time.monotonic() + SHOWN_AFTER
        while not (self.building / list_file(rank)).exists():
            if time.monotonic() > deadline:
                raise ProcessLost(
                    f"{self.folder}: process {rank} did not write its shard; continue with --resume auto"
                )
            time.sleep(0.1)

    def checksums(self) -> dict[str, str]:
        """{file: its SHA-256} of all files that are read. The writers have computed those of the tensors."""
        write_torch_index(self.building, self.ranks)
        sums = {}
        for rank in range(self.ranks):
            sums[list_file(rank)] = sha256(self.building / list_file(rank))
            sums[data_file(rank)] = read_list(self.building, rank)["sha256"]
        return sums

    @contextlib.contextmanager
    def failing(self):
        """InputError in place of a failed file operation. What is written of the checkpoint is removed."""
        try:
            with self.removed_on_error():
                yield
        except (OSError, RuntimeError) as e:
            if self.rank and not self.building.exists():
                raise ProcessLost(f"{self.folder}: process 0 has given up this checkpoint") from None
            raise InputError(
                f"{self.folder}: cannot write the checkpoint ({system_error(e)}); "
                f"earlier ones are intact: {saved_steps(self.run_folder) or 'none'}; "
                "make room or give write permission, and continue with --resume auto"
            ) from None

    @contextlib.contextmanager
    def removed_on_error(self):
        """Process 0 removes the folder if the code inside fails. The others' files in it go with it."""
        try:
            yield
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(self.building, ignore_errors=True)
            raise


def save_checkpoint(run_folder: Path, step: int, state: dict, meta: dict, keep: int = -1):
    """Write state (tensors and plain values, nested in dicts) and meta (JSON) as the checkpoint of `step`.

    By a process that works alone. InputError if the files cannot be written.
    """
    remove_unfinished(run_folder)
    new = NewCheckpoint(run_folder, step, new_key())
    new.begin()
    new.write([Piece(path, value) for path, value in leaves(state)])
    new.commit(meta, keep)


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


def load_checkpoint(run_folder: Path, step: int, device="cpu") -> tuple[StoredState, dict]:
    """(state, meta) of a step, compared with its checksums. The tensors are read when they are asked for.

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
        if "files" in meta:
            return open_state(folder, meta["files"], device), meta
        return open_state_file(folder, meta["sha256"], device), meta
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


def open_state_file(folder: Path, expected: str, device) -> StoredState:
    """The state in the one file of an earlier version. expected: its SHA-256."""
    if expected != sha256(folder / "state.pt"):
        raise InputError(
            f"{folder}: damaged checkpoint (its content does not match its checksum); use another step"
        )
    # memory-mapped, so that the processes of one machine share one copy
    state = torch.load(folder / "state.pt", map_location=device, weights_only=True, mmap=True)
    if not isinstance(state, dict):
        raise InputError(f"{folder}: not a checkpoint of this program; use another step")
    return StoredState(state)


def load_to_resume(run_folder: Path, step: int) -> tuple[StoredState, dict]:
    """load_checkpoint for a run that continues. InputError also if a tensor is not finite."""
    state, meta = load_checkpoint(run_folder, step)
    if names := not_finite(state):
        raise InputError(
            f"{step_folder(run_folder, step)}: {names[0]} and {len(names)} tensor(s) in all "
            "are not finite; use another step"
        )
    return state, meta


def load_newest(run_folder: Path) -> tuple[StoredState, dict] | None:
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
    elif isinstance(state, Mapping):
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


def load_with_tokenizer(run_folder: Path, step: int, device="cpu") -> tuple[StoredState, Tokenizer, dict]:
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
