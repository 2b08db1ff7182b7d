"""The state of a run between two steps."""

from dataclasses import dataclass

from nanochat.checkpoint_manager import EVALUATION_OWED


@dataclass
class RunState:
    """How far a run is. Checkpoints keep this in meta.json, and a resumed run takes it from there."""

    step: int = 0  # finished updates
    seconds: float = 0.0  # of training: without evaluations and checkpoints
    bad_steps: int = 0  # steps that were not applied, because loss or gradient was not finite
    bad_steps_in_a_row: int = 0
    evaluation_owed: bool = False  # a request to stop came before this step's evaluation was through
    last: bool = False  # the run ends with this step
    stopping: bool = False  # a process was asked to stop: the run ends here for now

    @classmethod
    def from_meta(cls, meta: dict) -> "RunState":
        """meta: of a checkpoint; of a new run {}."""
        return cls(
            meta.get("step", 0),
            meta.get("total_training_time", 0.0),
            meta.get("bad_steps", 0),
            meta.get("bad_steps_in_a_row", 0),
            EVALUATION_OWED in meta,
        )

    def to_meta(self) -> dict:
        """The entries for this step's checkpoint, which adds the step itself."""
        meta = {
            "total_training_time": self.seconds,
            "bad_steps": self.bad_steps,
            "bad_steps_in_a_row": self.bad_steps_in_a_row,
            "last": self.last,
        }
        return meta | ({EVALUATION_OWED: True} if self.evaluation_owed else {})

    def count_step(self, seconds: float, is_applied: bool):
        self.step += 1
        self.seconds += seconds
        if is_applied:
            self.bad_steps_in_a_row = 0
        else:
            self.bad_steps += 1
            self.bad_steps_in_a_row += 1
