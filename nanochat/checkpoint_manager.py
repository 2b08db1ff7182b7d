"""Checkpoints: runs/<tag>/checkpoints/step_000200/{state.pt, meta.json}, each appearing whole by one rename.

state.pt holds tensors and plain numbers only (read with weights_only=True: loading cannot execute code); meta.json holds
its SHA-256 and its own, so a truncated or altered file is noticed before it is used.
"""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from nanochat.adapters.attach import attach_saved
from nanochat.common import InputError, first_line, out_of_memory, print0
from nanochat.files import create_folder, open_new, sha256, sync, sync_folder
from nanochat.gpt import GPT, GPTConfig
from nanochat.layer_maps import stacked
from nanochat.naming import check_tag
from nanochat.run_files import check_owner, read_meta, remove_unfinished, saved_steps, step_folder, write_meta
from nanochat.subspace.model import restore
from nanochat.tokenizer import load_tokenizer

OWED = "evaluation_owed"  # in meta: the run was stopped before this step's evaluation was through


def step_or_newest(run_folder: Path, step: int, flag: str = "--model-tag") -> int:
    """The step or, of -1, the newest one. InputError if the run, which the flag named, has no checkpoint at all."""
    if not (steps := saved_steps(run_folder)):
        raise InputError(f"{flag} {run_folder.name}: no checkpoint in {run_folder}")
    return step if step >= 0 else steps[-1]


# ---- writing -----------------------------------------------------------------------------------------------


def save_checkpoint(run_folder: Path, step: int, state: dict, meta: dict, keep: int = -1):
    """Write state (tensors, nested in dicts and lists) and meta (JSON) as the checkpoint of `step`; then remove all but the
    newest `keep` (-1: none). Killed, or without power, at any moment it leaves the earlier ones as they were.
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
        if folder.exists():  # of the same step, reached again after a resume from before it
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
    # later ones, of a run that went back, or damaged, do not count: they must not push this one out
    up_to_here = [saved for saved in saved_steps(run_folder) if saved <= step]
    for old in up_to_here[:-keep] if keep > 0 else ():
        set_aside(step_folder(run_folder, old))
    remove_unfinished(run_folder)


def set_aside(folder: Path):
    """Let a checkpoint be one no more, at once: a process that removes it file by file may be killed."""
    with contextlib.suppress(OSError):
        folder.rename(folder.with_name(f".{folder.name}.before"))


def amend_checkpoint(run_folder: Path, step: int, changes: dict):
    """Change entries of a checkpoint's meta.json; an entry of None is struck out."""
    meta = read_meta(run_folder, step) | changes
    meta = {key: value for key, value in meta.items() if value is not None}
    write_meta(step_folder(run_folder, step), meta)


def system_error(e: BaseException) -> str:
    """What the system said. Of a full disk torch makes an error of its own; the system's is its context."""
    cause: BaseException | None = e
    while cause and not isinstance(cause, OSError):
        cause = cause.__context__
    return getattr(cause, "strerror", "") or first_line(e)


# ---- reading -----------------------------------------------------------------------------------------------


def load_checkpoint(run_folder: Path, step: int, device="cpu") -> tuple[dict, dict]:
    """(state, meta) of a step, verified. InputError if it is missing, damaged or cannot be read."""
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
        # memory-mapped: the processes of a machine share one copy of what they read
        state = torch.load(folder / "state.pt", map_location=device, weights_only=True, mmap=True)
    except FileNotFoundError as e:
        missing = Path(e.filename).name
        raise InputError(f"{folder}: damaged checkpoint ({missing} is missing); use another step") from None
    except OSError as e:
        reason = e.strerror or first_line(e)
        raise InputError(f"{folder}: cannot be read ({reason}); use another step") from None
    except Exception as e:  # torch's, of a file that is none of its own
        if isinstance(e, InputError) or out_of_memory(e):
            raise
        raise InputError(f"{folder}: not a checkpoint of this program ({first_line(e)})") from None
    if not isinstance(state, dict):
        raise InputError(f"{folder}: not a checkpoint of this program; use another step")
    return state, meta


def load_to_resume(run_folder: Path, step: int) -> tuple[dict, dict]:
    """load_checkpoint for a run that goes on. InputError also where it holds what is not finite."""
    state, meta = load_checkpoint(run_folder, step)
    if names := not_finite(state):
        raise InputError(
            f"{step_folder(run_folder, step)}: {names[0]} and {len(names)} tensor(s) in all "
            "are not finite; use another step"
        )
    return state, meta


def load_newest(run_folder: Path) -> tuple[dict, dict] | None:
    """The newest checkpoint that a run can go on from; those skipped are named. None if there is none."""
    for step in reversed(saved_steps(run_folder)):
        try:
            return load_to_resume(run_folder, step)
        except InputError as e:
            print0(f"skipped: {e}")
    return None


def named_tensors(state, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts and lists, by the keys that lead to them."""
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
    """InputError where a checkpoint does not hold what its meta.json, or the run, says that it holds."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as e:
        if out_of_memory(e):
            raise
        raise InputError(
            f"{folder}: does not hold the model that it should "
            f"({type(e).__name__}: {first_line(e)}); use another step"
        ) from None


def load_model(run_folder: Path, step: int, device="cpu", **changes) -> tuple:
    """(model, the tokenizer it was trained with, meta) of a step; of an adapter run its base, from the folder beside it, with the
    adapter acting. changes: of the model's config, such as `recompute`. InputError if they do not belong together.
    """
    tokenizer = load_tokenizer(run_folder / "tokenizer.json")
    state, meta = load_checkpoint(run_folder, step, device)
    if meta.get("tokenizer_hash") != tokenizer.hash:
        trained_with = meta.get("tokenizer_hash")
        raise InputError(
            f"{run_folder}: the checkpoint was trained with tokenizer {trained_with}, "
            f"tokenizer.json is {tokenizer.hash}"
        )
    with fitting_together(step_folder(run_folder, step)):
        if "adapter" in meta:
            model = adapted(run_folder.parent, meta["adapter"], state["adapter"], device, **changes)
            return model, tokenizer, meta
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
        check_tag("the base that meta.json names:", base.get("tag"))
        model, _, meta = load_model(runs / base["tag"], base["step"], device, **changes)
        if meta["sha256"] != base["sha256"]:
            raise InputError(
                f"{runs / base['tag']}: step {base['step']} is another base than the adapter was trained on "
                f"(its sum is {meta['sha256'][:12]}, that one's {base['sha256'][:12]}); restore that checkpoint, or train the adapter again"
            )
        models.append(model)
    return models


def adapted(runs: Path, said: dict, tensors: dict, device, **changes) -> GPT:
    """The base of an adapter run with its adapter. said, tensors: what its checkpoint has under "adapter", of meta and of state.

    said: {"description" (`adapters.describe`), "origin": {"bases", "layer_map": layers at each position ([] = the base's own), "tied"}}.
    """
    origin = said["origin"]
    model = stacked(
        *load_bases(runs, origin["bases"], device, **changes),
        layers=tuple(origin["layer_map"]),
        tied=origin["tied"],
    )
    attach_saved(model, ADAPTER, said["description"], tensors)
    return model
