"""Parts that the benches share: functions that take turns on one clock, quartiles, and what is recorded."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nanochat import devices
from nanochat.common import out_of_memory
from nanochat.engine import KVCache, sample, token_decoder
from nanochat.errors import InputError
from nanochat.gpt import GPT


@dataclass
class Setting:
    """Device, dtype and repeats of all measurements of a bench."""

    device: torch.device
    dtype: torch.dtype  # of the activations
    repeats: int


@contextlib.contextmanager
def explain_out_of_memory(message: str):
    """In this block too little memory, on a GPU or a CPU, is an InputError with this message."""
    try:
        yield
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        raise InputError(message) from None


def machine_description(device, dtype: torch.dtype) -> dict:
    return {
        "device": devices.device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }


def machine_text(machine: dict) -> str:
    """A `machine_description` in words."""
    return "{device}, {threads} thread(s), torch {torch}, {dtype}".format(**machine)


def flags_as_json(args) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def synchronize(device):
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(run: Callable, calls: int, device) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def take_turns(runs: dict, repeats: int, device, sample_seconds: float) -> dict:
    """{variant: {pass: function}} -> {variant: {pass: [seconds per call, one for each repeat]}}.

    The variants take turns, so that other work of the machine slows all of them alike. A sample is as many
    calls as take `sample_seconds`.
    """
    calls = {}
    seconds = {}
    for variant, passes in runs.items():
        seconds[variant] = {name: [] for name in passes}
        for name, run in passes.items():
            seconds_per_call(run, 2, device)  # the first call may still choose its kernel
            # from the fastest: after an interrupted call all samples would be too short
            fastest = min(seconds_per_call(run, 1, device) for _ in range(3))
            calls[variant, name] = max(1, math.ceil(sample_seconds / fastest))
    order = list(runs)
    for repeat in range(repeats):
        first = repeat % len(order)
        for variant in order[first:] + order[:first]:
            for name, run in runs[variant].items():
                seconds[variant][name].append(seconds_per_call(run, calls[variant, name], device))
    return seconds


@torch.inference_mode()
def growing_seconds(forms: dict[str, GPT], batch: int, lengths: list[int], dtype) -> dict[str, dict]:
    """Seconds of one step for `batch` rows after each of these numbers of tokens, which ascend.

    {form: {"lengths", "first", "later"}}, on a GPU of "FORM, eager" too. The forms take turns in rounds.
    first: a form's first round, in which a GPU makes a graph for each part of the cache. later: the faster of
    two more rounds. The caches hold zeros: values do not change the time.
    """
    steps = {}
    device = next(iter(forms.values())).wte.weight.device
    tokens = torch.zeros(batch, dtype=torch.long, device=device)
    for name, form in forms.items():
        cache = KVCache(form.config, batch, lengths[-1] + 1, dtype, device)
        steps[name] = partial(step_after, cache, token_decoder(form, cache, dtype), tokens)
        if device.type == "cuda":
            eager = token_decoder(form, cache, dtype, graphs=False)
            steps[f"{name}, eager"] = partial(step_after, cache, eager, tokens)
    rounds = {name: [] for name in steps}
    for _ in range(3):
        for name, step in steps.items():
            rounds[name].append([seconds_per_call(partial(step, n), 1, device) for n in lengths])
    result = {}
    for name, (first, *later) in rounds.items():
        result[name] = {"lengths": lengths, "first": first, "later": np.min(later, axis=0).tolist()}
    return result


def step_after(cache: KVCache, decode, tokens, length: int) -> list[int]:
    """The likeliest tokens after these, (B,), that come after the first `length` of the cache."""
    cache.length = length
    return sample(decode(tokens), 0, 0, 1, None).tolist()


def spread(values) -> dict:
    """{"median", "low", "high"}: low and high are the quartiles."""
    low, median, high = np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high}
