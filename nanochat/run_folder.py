"""The folder of a run that begins or continues: who holds it, and which checkpoint training starts from."""

import contextlib
from functools import partial
from pathlib import Path

from nanochat import agreement, common, continuation, metrics, naming
from nanochat.arguments import as_whole_number
from nanochat.checkpoint_manager import load_checkpoint, load_newest, load_to_resume
from nanochat.errors import InputError
from nanochat.history_writer import check_history
from nanochat.processes import World
from nanochat.run_files import (
    check_ending,
    complete_summary,
    read_config,
    remove_unfinished,
    saved_steps,
    step_folder,
    summary_says_finished,
)
from nanochat.run_setup import TrainingRun

FINISHED = "finished"
NO_RESUME = "-1"  # --resume


def check_resume(resume: str):
    if resume not in (NO_RESUME, "auto") and (as_whole_number(resume) or 0) < 1:
        raise InputError(f"--resume {resume}: use auto, or the number of a saved step")


@contextlib.contextmanager
def lock_folder(run: TrainingRun):
    """Process 0 locks the run folder for as long as this lasts.

    Yields the same in all processes: None for a new run, FINISHED, or (state, meta) of the checkpoint to
    continue from.
    """
    spec = run.spec
    checkpoint = None
    with contextlib.ExitStack() as stack:
        if run.is_first_process:
            claim = common.claimed(naming.lock_path(spec.tag), f"{spec.flag}: {run.folder}")
            run.lock = stack.enter_context(claim)
            # a checkpoint that an earlier process was still writing is whole by now, or gone
            checkpoint = find_start(run.folder, spec.flag, run.config, spec.args.resume)
            metrics.remove_unfinished_files(run.folder)
            remove_unfinished(run.folder)
        yield follow_first(run.world, run.folder, checkpoint)


def find_start(folder: Path, flag: str, config: dict, resume: str):
    """None for a new run, FINISHED, or (state, meta) of the checkpoint to continue from.

    flag: the flag that names the run, with its tag. config: of this run's config.json.
    InputError: another config under this tag, a tag with checkpoints and no --resume, or a damaged record.
    """
    steps = saved_steps(folder)
    if not (folder / "config.json").exists():
        if steps:
            raise InputError(
                f"{flag}: has checkpoints {steps} and no config.json, which says of what; "
                f"restore {folder / 'config.json'}, or choose another tag"
            )
        if resume not in (NO_RESUME, "auto"):
            raise InputError(f"--resume {resume}: there is no run {folder.name}")
        return None
    if differing := continuation.differences(read_config(folder), config["flags"], config["derived"]):
        raise InputError(
            f"{flag}: exists with another config: {'; '.join(differing)}; "
            f"choose another tag, or remove {folder}"
        )
    if summary_says_finished(folder):
        check_ending(folder)
        return FINISHED
    if resume == NO_RESUME:
        if steps:
            raise InputError(
                f"{flag}: has checkpoints {steps} and is not finished; "
                "continue it with --resume auto, or choose another tag"
            )
        return None
    return find_checkpoint(folder, flag, steps, resume)


def find_checkpoint(folder: Path, flag: str, steps: list[int], resume: str):
    """(state, meta) of the checkpoint that --resume names.

    None if the run has saved none yet. FINISHED if the checkpoint is the last of the run.
    """
    checkpoint = load_newest(folder) if resume == "auto" else load_to_resume(folder, int(resume))
    if not checkpoint:
        if steps:  # they may be unreadable for a while only
            raise InputError(
                f"{flag}: none of its checkpoints {steps} can be used; restore one, or remove "
                f"{folder / 'checkpoints'} to begin again"
            )
        return None
    _, meta = checkpoint
    check_history(folder, meta)
    if meta.get("last"):  # killed after its last checkpoint, before its summary
        complete_summary(folder)
        return FINISHED
    return checkpoint


def follow_first(world: World, folder: Path, checkpoint):
    """Return in all processes what process 0 has found. Each reads the checkpoint by itself."""
    meta = checkpoint[1] if isinstance(checkpoint, tuple) else checkpoint
    meta = agreement.from_first(world, lambda: meta)
    if world.rank == 0:
        return checkpoint
    if not isinstance(meta, dict):
        return meta
    load = partial(load_checkpoint, folder, meta["step"])
    return agreement.load_confirmed(load, step_folder(folder, meta["step"]), meta)
