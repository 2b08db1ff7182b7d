"""Item 6: training steps of d20 and of what is compared with it, in turn: time by part, peak memory."""

import gc
import time

import torch
from train_step import PARTS, WARMUP, matmul_rate, measure_memory, ratios, summary, timed_step

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
    state = {"rows": setting.rows, "models": {}, "ratios": {}, "failed": {}, "rounds": 0}
    rows = models.noise(setting)
    subjects = {}
    for name in group:
        try:
            subject = models.build(name, models.variant(name, setting.tiny), setting, rows)
            for _ in range(WARMUP):
                timed_step(subject, setting.device)
            subjects[name] = subject
        except Exception as error:  # the other models go on
            state["failed"][name] = reason(error)
            subject = None
            release(setting.device)
        yield state
    raw = {"ceiling": [], "usual ceiling": [], "seconds": {}, "memory": {}}
    for name, subject in subjects.items():
        raw["memory"][name] = measure_memory(subject, setting.device)
        raw["seconds"][name] = {part: [] for part in (*PARTS, "step")}
    for turn in range(2 if setting.tiny else MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.monotonic() - started > seconds:
            break
        one_round(subjects, raw, turn, setting)
        yield state | results(subjects, raw, setting)


def reason(error: Exception) -> str:
    if isinstance(error, RuntimeError) and common.out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def release(device):
    gc.collect()  # models and batch generators refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()


def one_round(subjects: dict, raw: dict, turn: int, setting: Setting):
    """A matrix product, then a step of each model; each is first in turn."""
    raw["ceiling"].append(matmul_rate(setting.device, setting.dtype))
    names = list(subjects)
    first = turn % len(names)
    for name in names[first:] + names[:first]:
        for part, value in timed_step(subjects[name], setting.device).items():
            raw["seconds"][name][part].append(value)


def results(subjects: dict, raw: dict, setting: Setting) -> dict:
    measured = {}
    for name, subject in subjects.items():
        prediction = predict_peak(subject.model.config, models.execution(name, setting))
        own = {"predicted peak": prediction["mem/predicted_peak_bytes"]}
        measured[name] = summary(subject, raw, setting.rows) | own
    to_dense = {}
    for name in measured:
        if name != DENSE and DENSE in measured:
            to_dense[name] = {"to": DENSE, **ratios(name, DENSE, raw, measured)}
    return {
        "ceiling flops per second": spread(raw["ceiling"]),
        "rounds": len(raw["ceiling"]),
        "models": measured,
        "ratios": to_dense,
        "seconds by round": raw["seconds"],
    }
