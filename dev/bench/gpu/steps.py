"""Item 6: training steps of d20 and of what is compared with it, in turn: time by part, peak memory."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from train_step import PARTS, WARMUP, Subject, matmul_rate, measure_memory, ratios, summary, timed_step

from gpu import models
from gpu.models import DENSE
from gpu.runner import Setting
from nanochat import common
from nanochat.benchmark import spread
from nanochat.errors import first_line
from nanochat.peak import predict_peak

LEAST_ROUNDS = 3
MOST_ROUNDS = 20


def measure(group: tuple, seconds: float, setting: Setting):
    """The models of a group, in turn. seconds: begin no round after so many."""
    started = time.monotonic()
    comparison = Comparison(setting)
    start = partial(comparison.start, rows=models.noise(setting))
    for name in group:
        comparison.attempt(start, name)
        yield comparison.results()
    for name in list(comparison.subjects):
        comparison.attempt(comparison.measure_memory, name)
        yield comparison.results()
    most_rounds = 2 if setting.tiny else MOST_ROUNDS
    while comparison.subjects and comparison.rounds < most_rounds:
        if comparison.rounds >= LEAST_ROUNDS and time.monotonic() - started > seconds:
            break
        comparison.one_round()
        yield comparison.results()


@dataclass
class Comparison:
    """Models that take their steps in turn, and what was measured of each.

    The states of all lie on the card together, so one that fails gives its memory back, and the others go on.
    Its figures from earlier rounds stay.
    """

    setting: Setting
    subjects: dict[str, Subject] = field(default_factory=dict)  # those that still take part
    failed: dict[str, str] = field(default_factory=dict)  # name -> why
    memory: dict[str, dict] = field(default_factory=dict)
    seconds: dict[str, dict] = field(default_factory=dict)  # name -> part -> one for each of its rounds
    ceiling: list[float] = field(default_factory=list)  # one for each round
    models: dict[str, dict] = field(default_factory=dict)  # name -> its entry in the JSON

    @property
    def rounds(self) -> int:
        return len(self.ceiling)

    def attempt(self, run: Callable, name: str):
        """run(name); None if it fails, and then the model takes no further part."""
        try:
            return run(name)
        except Exception as error:
            after = f", after round {self.rounds}" if self.rounds else ""
            self.failed[name] = reason(error) + after
        # not in the block above: there the error still holds the tensors of the functions that it left
        self.subjects.pop(name, None)
        release(self.setting.device)
        return None

    def start(self, name: str, rows):
        """Build a model and take its first steps. rows: a `dataloader.Rows`."""
        subject = models.build(name, models.variant(name, self.setting.tiny), self.setting, rows)
        for _ in range(WARMUP):
            timed_step(subject, self.setting.device)
        self.subjects[name] = subject

    def measure_memory(self, name: str):
        self.memory[name] = measure_memory(self.subjects[name], self.setting.device)
        self.seconds[name] = {part: [] for part in (*PARTS, "step")}

    def step(self, name: str) -> dict:
        return timed_step(self.subjects[name], self.setting.device)

    def one_round(self):
        """A matrix product, then a step of each model; each is first in turn.

        A round in which a model fails counts for none: the others have to wait for memory in it.
        """
        ceiling = matmul_rate(self.setting.device, self.setting.dtype)
        names = list(self.subjects)
        first = self.rounds % len(names)
        steps = {name: self.attempt(self.step, name) for name in names[first:] + names[:first]}
        if len(self.subjects) < len(names):
            for name in list(self.subjects):  # they ask for memory again, so the next round need not
                self.attempt(self.step, name)
            return
        self.ceiling.append(ceiling)
        for name, step in steps.items():
            for part, value in step.items():
                self.seconds[name][part].append(value)

    def results(self) -> dict:
        state = {"rows": self.setting.rows, "models": self.models, "ratios": {}, "failed": self.failed}
        state["rounds"] = self.rounds
        if not self.rounds:
            return state
        raw = {"ceiling": self.ceiling, "seconds": self.seconds, "memory": self.memory}
        for name, subject in self.subjects.items():
            prediction = predict_peak(subject.model.config, models.execution(name, self.setting))
            own = {"predicted peak": prediction["mem/predicted_peak_bytes"]}
            self.models[name] = summary(subject, raw, self.setting.rows) | own
        for name in self.models:
            if name != DENSE and DENSE in self.models:
                shared = {"seconds": shared_rounds(self.seconds, (name, DENSE))}
                state["ratios"][name] = {"to": DENSE, **ratios(name, DENSE, shared, self.models)}
        state["ceiling flops per second"] = spread(self.ceiling)
        state["seconds by round"] = self.seconds
        return state


def shared_rounds(seconds: dict, names: tuple) -> dict:
    """`Comparison.seconds` of these models in the rounds in which all of them took part, the first ones."""
    count = min(len(seconds[name]["step"]) for name in names)
    shared = {}
    for name in names:
        shared[name] = {part: values[:count] for part, values in seconds[name].items()}
    return shared


def reason(error: Exception) -> str:
    if isinstance(error, RuntimeError) and common.out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def release(device):
    gc.collect()  # models and batch generators refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
