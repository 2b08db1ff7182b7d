"""What a training run writes into its folder."""

from functools import partial
from typing import NoReturn

from nanochat import checkpoint_writer, continuation, metrics
from nanochat.checkpoint_manager import EVALUATION_OWED, amend_checkpoint, not_finite, save_checkpoint
from nanochat.errors import InputError
from nanochat.optim import optimizer_state
from nanochat.parallel import differing_parameters, gather_masters, gather_state, names_anywhere
from nanochat.processes import print0
from nanochat.run_files import saved_steps
from nanochat.run_setup import TrainingRun
from nanochat.run_state import RunState
from nanochat.trainable import Trainable


class RunOutput:
    """The record and the checkpoints of a run.

    Every process calls its methods: all take part in a save, and process 0 alone writes.
    """

    def __init__(self, run: TrainingRun, trainable: Trainable, meta: dict):
        """Write config.json and tokenizer.json.

        meta: of the checkpoint that training continues from; {} for a new run.
        """
        self.run = run
        self.trainable = trainable
        self.saved_meta = meta
        self.saved_step = meta.get("step", 0)
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

    # ---- the record

    def log(self, entry: dict):
        """Append a line to metrics.jsonl."""
        if self.record:
            self.record.log(entry)

    def summarize(self, status: str):
        """Rewrite summary.json."""
        if self.record:
            self.record.summarize(status)

    def end_diverged(self, state: RunState) -> NoReturn:
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
        """Write the checkpoint of this step.

        InputError if a tensor of a process is not finite, or if the processes have different parameters.
        """
        run = self.run
        self.check_before_save(state.step)
        optimizers = gather_state(self.trainable.optimizers, self.trainable.model, run.world)
        masters = gather_masters(self.trainable.shards, self.trainable.model, run.world)
        self.saved_step = state.step
        if not self.record:
            return
        assert run.lock is not None  # as on every process with a record
        run.lock.check()
        tensors = {**self.trainable.state(), "optimizer": optimizers}
        if masters:  # the model has working weights
            tensors["model"] |= masters
        meta = {
            **state.to_meta(),
            "tokenizer_hash": run.spec.tokenizer.hash,
            "flags": continuation.deciding(vars(run.args)),
            **self.trainable.meta(),
            **self.record.commit(),
        }
        write = partial(save_checkpoint, run.folder, state.step, meta=meta, keep=run.args.keep)
        if checkpoint_writer.under_launcher():
            status = "finished" if state.last else "stopped"
            write_copy = partial(write, checkpoint_writer.on_cpu(tensors))
            checkpoint_writer.write_in_fork(write_copy, run.lock, partial(self.record.summarize, status))
        else:
            write(tensors)

    def check_before_save(self, step: int):
        world = self.run.world
        own_state = {**self.trainable.state(), "optimizer": optimizer_state(self.trainable.optimizers)}
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
