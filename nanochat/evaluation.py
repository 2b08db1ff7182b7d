"""What is measured of a model while it is trained: losses, the CORE metric, text samples."""

from dataclasses import dataclass

from nanochat import agreement
from nanochat.core_bundle import Bundle, Unavailable, open_bundle
from nanochat.core_eval import Question, evaluate_core, questions
from nanochat.loss_eval import evaluate, sample_texts
from nanochat.parallel import any_process
from nanochat.processes import print0
from nanochat.run_setup import TrainingRun
from nanochat.run_state import RunState
from nanochat.signals import StopRequest
from nanochat.trainable import Trainable


@dataclass
class CoreQuestions:
    """The questions that `evaluate_core` asks."""

    bundle: Bundle
    share: list[list[Question]]  # this process asks these


def core_questions(run: TrainingRun) -> CoreQuestions | None:
    """The questions of CORE for this process; None where CORE is not measured."""
    args = run.args
    if args.core_metric_every < 1:
        return None
    try:
        bundle = open_bundle(args.core_dir)
    except Unavailable as e:
        print0(f"CORE is not measured: {e}")
        return None
    remedy = "give all processes the same --core-dir"
    agreement.confirm(run.world, {"CORE bundle": bundle.fingerprint}, remedy)
    _, rank, size = run.world
    limit = args.core_metric_max_per_task
    share = questions(bundle, run.spec.tokenizer, args.max_seq_len, limit, rank, size)
    return CoreQuestions(bundle, share)


def is_multiple(step: int, every: int) -> bool:
    """Whether --eval-every and its like ask for something after this step; -1 = never."""
    return every > 0 and step % every == 0


@dataclass
class Evaluation:
    """What is measured after a step, and after which steps.

    All processes take part. Process 0 alone makes samples.
    """

    run: TrainingRun
    trainable: Trainable
    core: CoreQuestions | None

    def is_due(self, step: int) -> bool:
        args = self.run.args
        if step == self.run.steps or self.core_is_due(step):
            return True
        return is_multiple(step, args.eval_every) or is_multiple(step, args.sample_every)

    def core_is_due(self, step: int) -> bool:
        return self.core is not None and is_multiple(step, self.run.args.core_metric_every)

    def after_step(self, state: RunState, stop: StopRequest) -> dict:
        """Measure what is due, and set `last`, `stopping` and `evaluation_owed` of the state.

        Returns values for the record; {} if nothing is due, or if a request to stop puts it off.
        """
        state.last = False
        state.evaluation_owed = False
        if not self.is_due(state.step):
            return {}
        values = None if state.stopping else self.measure(state.step, stop)
        state.stopping, state.evaluation_owed = any_process(
            self.run.world, state.stopping or stop.is_set(), values is None
        )
        if values is None or state.evaluation_owed:
            return {}
        state.last = self.ends_run(state.step, values)
        return values

    def ends_run(self, step: int, values: dict) -> bool:
        reached = "val/ppl" in values and values["val/ppl"] <= self.run.args.stop_at_ppl
        return reached or step == self.run.steps

    def measure(self, step: int, stop: StopRequest) -> dict | None:
        """Values for the record. None if this process broke off because one was asked to stop.

        Then the values of the other processes have no meaning.
        """
        run = self.run
        args = run.args
        values = {}
        if is_multiple(step, args.eval_every) or step == run.steps:
            losses = self.losses(stop)
            if losses is None:
                return None
            values |= losses | self.trainable.metrics()
        is_last = self.ends_run(step, values)
        if self.core and (self.core_is_due(step) or is_last):
            core = self.core_metric(self.core, stop)
            if core is None:
                return None
            values |= core
        samples_due = is_multiple(step, args.sample_every) or (is_last and args.sample_every > 0)
        if run.is_first_process and samples_due:
            samples = sample_texts(
                self.trainable.model, run.spec.tokenizer, run.text.validation.rows, run.dtype, stop
            )
            if samples is None:
                return None
            values["sample"] = samples
        return values

    def losses(self, stop: StopRequest) -> dict | None:
        run = self.run
        batch_size = run.args.device_batch_size
        return evaluate(self.trainable.model, run.text.validation, batch_size, run.world, run.dtype, stop)

    def core_metric(self, core: CoreQuestions, stop: StopRequest) -> dict | None:
        args = self.run.args
        tokens_at_once = args.device_batch_size * args.max_seq_len
        model = self.trainable.model
        results = evaluate_core(model, core.bundle, core.share, self.run.dtype, tokens_at_once, stop)
        if results is None:
            return None
        scores = {f"centered_results/{label}": score for label, score in results["centered_results"].items()}
        return {"core_metric": results["core_metric"], **scores}


def print_samples(values: dict):
    if "sample" in values:
        print0("\n".join(f"  sample: {text!r}" for text in values["sample"]))
