"""What is known of one training step: the entry in metrics.jsonl, and the line on the console."""

import math
from dataclasses import dataclass

import torch

from nanochat import devices
from nanochat.run_setup import TrainingRun
from nanochat.run_state import RunState
from nanochat.trainable import Trainable


@dataclass
class StepResult:
    """The same on every process, except for the seconds: loss and gradients are means over all."""

    loss: float
    grad_norm: float  # before clipping
    lrm: float  # learning rate multiplier
    seconds: float = 0.0

    @property
    def is_finite(self) -> bool:
        """Else the update is not applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def clocks(run: TrainingRun, state: RunState) -> dict:
    """How far the run is: in steps, tokens, seconds and FLOPs."""
    tokens = state.step * run.plan["total_batch_size"]
    return {
        "step": state.step,
        "total_tokens": tokens,
        "total_training_time": state.seconds,
        "total_training_flops": tokens * run.spec.accounting["flops/per_token"],
    }


def step_entry(run: TrainingRun, state: RunState, result: StepResult) -> dict:
    """The entry of a step in metrics.jsonl, before any evaluation."""
    tokens_per_second = run.plan["total_batch_size"] / result.seconds
    entry = clocks(run, state) | {
        "train/lrm": result.lrm,
        "train/dt": result.seconds,
        "train/tok_per_sec": tokens_per_second,
        "train/epoch": state.step * run.rows_per_step / run.text.train_rows.count,
    }
    if result.is_finite:
        entry |= {"train/loss": result.loss, "train/grad_norm": result.grad_norm}
    else:
        entry["train/bad_steps"] = state.bad_steps
    if peak := devices.peak_flops(run.config["device"]["name"]):
        costs = run.spec.accounting
        peak_of_all = peak * run.world.size
        entry["train/mfu"] = tokens_per_second * costs["flops/per_token"] / peak_of_all
        entry["train/hfu"] = tokens_per_second * costs["flops/executed_per_token"] / peak_of_all
    return entry


def peak_memory(run: TrainingRun) -> dict:
    return {"mem/peak_bytes": devices.peak_memory_bytes(run.world.device)}


def memory_entry(trainable: Trainable) -> dict:
    """Bytes of this process's weights and optimizer state, once a step has made all of them."""
    model = trainable.model
    masters = [shard.master for shard in trainable.shards if shard.has_separate_master]
    states = [state for optimizer in trainable.optimizers for state in optimizer.state.values()]
    return {
        "mem/weights_bytes": tensor_bytes([*model.parameters(), *model.buffers(), *masters]),
        "mem/optimizer_bytes": tensor_bytes([value for state in states for value in state.values()]),
    }


def tensor_bytes(values: list) -> int:
    """Bytes of the tensors among the values."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


def step_line(run: TrainingRun, state: RunState, result: StepResult) -> str:
    tokens_per_second = run.plan["total_batch_size"] / result.seconds
    minutes = (run.steps - state.step) * state.seconds / state.step / 60
    line = (
        f"step {state.step:05d}/{run.steps:05d} | loss {result.loss:.4f} | "
        f"{tokens_per_second:,.0f} tok/s | ETA {minutes:.1f} min"
    )
    if not result.is_finite:
        line += f" | not finite (gradient norm {result.grad_norm}): not applied"
    return line


def evaluation_words(values: dict) -> str:
    """What an evaluation adds to the line."""
    words = ""
    if "val/ppl" in values:
        words += f" | val ppl {values['val/ppl']:.2f}, bpb {values['val/bpb']:.4f}"
    if "core_metric" in values:
        words += f" | CORE {values['core_metric']:.4f}"
    return words
