"""What a training run writes into its folder."""

import time
from pathlib import Path
from typing import NoReturn

from nanochat import agreement, continuation, metrics, signals
from nanochat.checkpoint_files import Piece
from nanochat.checkpoint_manager import EVALUATION_OWED, NewCheckpoint, amend_checkpoint, new_key, not_finite
from nanochat.checkpoint_writer import CheckpointWriter
from nanochat.errors import InputError
from nanochat.parallel import any_process, differing_parameters, names_anywhere
from nanochat.processes import print0
from nanochat.run_files import saved_steps
from nanochat.run_setup import TrainingRun
from nanochat.run_state import RunState
from nanochat.trainable import Trainable


class RunOutput:
    """The record and the checkpoints of a run.

    Every process calls its methods. Each writes its shard of a checkpoint, and process 0 alone all else.
    """

    def __init__(self, run: TrainingRun, trainable: Trainable, meta: dict):
        """Write config.json and tokenizer.json.

        meta: of the checkpoint that training continues from; {} for a new run.
        """
        self.run = run
        self.trainable = trainable
        self.saved_meta = meta
        self.saved_step = meta.get("step", 0)
        self.writer = CheckpointWriter(run.lock)
        self.record = None
        if run.is_first_process:
            spec = run.spec
            spec.tokenizer.save(run.folder / "tokenizer.json")
            self.record = metrics.RunRecord(
                run.folder,
                run.config,
                spec.accounting,
                run.args.run,
                run.args.ppl_thresholds,
                self.saved_step,
                run.lock,
            )
        self.folder, self.key = shared_folder(run)

    # ---- the record

    def log(self, entry: dict):
        """Append a line to metrics.jsonl. InputError if a checkpoint could not be written meanwhile."""
        self.writer.check()
        if self.record:
            self.record.log(entry)

    def summarize(self, status: str):
        """Rewrite summary.json."""
        if self.record:
            self.record.summarize(status)

    def end_diverged(self, state: RunState) -> NoReturn:
        self.wait_for_writers()
        self.summarize("diverged")
        raise InputError(
            f"step {state.step}: loss or gradient not finite in {state.bad_steps_in_a_row} steps in a row "
            f"(--max-bad-steps {self.run.args.max_bad_steps}); {self.recovery_hint()}"
        )

    def recovery_hint(self) -> str:
        folder = self.run.folder
        return (
            f"the last good weights are in {folder / 'checkpoints'}: {saved_steps(folder) or 'none'}; "
            "lower the learning rates or set --grad-clip 1.0"
        )

    def close(self, state: RunState):
        """Close the record, and print how the run ended."""
        if not self.record:
            return
        self.record.close()
        line = f"stopped after step {state.step} as asked; continue with --resume auto"
        if state.last:
            line = f"finished: {self.run.folder}"
            if state.bad_steps:
                bad_steps = f"{state.bad_steps} of {state.step} steps"
                line += f"; {bad_steps} were not applied, loss or gradient not finite"
        print0(line)

    # ---- checkpoints

    def save(self, state: RunState):
        """Begin to write the checkpoint of this step: training waits until its tensors are copied.

        InputError if a tensor of a process is not finite, if the processes have different parameters, or if
        an earlier checkpoint could not be written.
        """
        run = self.run
        world = run.world
        new = NewCheckpoint(self.folder, state.step, self.key, world.rank, world.size)
        with new.removed_on_error():
            if world.rank == 0:
                new.begin()
            # A run that is asked to stop may have little time: its next writer waits for the last.
            self.wait_for_writers(until_stopped=True)
            own_lock = new.claim()
            pieces = self.trainable.pieces(world)
            self.check_before_save(state.step, pieces)  # now each process has its lock
            meta = self.meta(state)
        pieces = [piece.on_cpu() for piece in pieces]
        self.saved_step = state.step

        def write():
            new.write(pieces)
            if run.lock:
                new.commit(meta, run.args.keep, run.lock.check)

        def summarize_alone():
            if state.last or state.stopping:
                self.summarize("finished" if state.last else "stopped")

        self.writer.start(write, summarize_alone, own_lock)

    def wait_for_writers(self, until_stopped: bool = False):
        """Wait until no process writes a checkpoint, and raise what went wrong with one.

        Collectives have a time limit. So the processes look together, again and again, until all are done.
        until_stopped: or until one is asked to stop.
        """

        def goes_on(is_busy: bool) -> bool:
            is_asked = until_stopped and signals.is_asked_to_stop()
            any_busy, any_asked = any_process(self.run.world, is_busy, is_asked)
            return any_busy and not any_asked

        self.writer.wait(goes_on)

    def meta(self, state: RunState) -> dict:
        """What meta.json holds, on process 0. It vouches for the record up to this step."""
        if not self.record:
            return {}
        run = self.run
        assert run.lock is not None  # as on every process with a record
        run.lock.check()
        return {
            **state.to_meta(),
            "tokenizer_hash": run.spec.tokenizer.hash,
            "flags": continuation.deciding(vars(run.args)),
            **self.trainable.meta(),
            **self.record.commit(),
        }

    def check_before_save(self, step: int, pieces: list[Piece]):
        world = self.run.world
        own_state = {".".join(piece.path): piece.value for piece in pieces}
        if broken := names_anywhere(world, not_finite(own_state)):
            raise InputError(
                f"step {step}: {broken[0]} and {len(broken)} tensor(s) in all are not finite; "
                f"nothing was saved; {self.recovery_hint()}"
            )
        if names := differing_parameters(self.trainable.model, world):
            raise InputError(
                f"step {step}: the processes hold different values of {', '.join(names[:3])} and "
                f"{len(names)} parameter(s) in all; nothing was saved: continue from the checkpoint before "
                "with --resume auto"
            )

    def settle_evaluation(self, state: RunState):
        """Note in the checkpoint of this step that its evaluation is made up for."""
        if self.record:
            changes = {EVALUATION_OWED: None, "last": state.last, **self.record.commit()}
            amend_checkpoint(self.run.folder, state.step, changes)

    def declare_last(self):
        """Mark the checkpoint that training continued from as the last of the run.

        A run that diverged in its last step gets here if it is resumed with a larger --max-bad-steps.
        """
        if self.record and self.saved_meta.get("last") is False:
            amend_checkpoint(self.run.folder, self.saved_step, {"last": True})


def shared_folder(run: TrainingRun) -> tuple[Path, str]:
    """(the run folder as process 0 names it, a key for `NewCheckpoint`): the same in all processes.

    All write their shards of a checkpoint into that folder. InputError on a process that does not see it. A
    network directory may show it some seconds late.
    """
    folder, key = agreement.from_first(run.world, lambda: (run.folder.absolute(), new_key()))
    deadline = time.monotonic() + agreement.LOAD_PATIENCE
    while not (folder / "config.json").exists():
        if time.monotonic() > deadline:
            raise InputError(
                f"{folder}: process 0 writes the run there, and this process does not see it; put "
                "NANOCHAT_BASE_DIR on a file system that all machines share"
            )
        time.sleep(0.2)
    return folder, key
