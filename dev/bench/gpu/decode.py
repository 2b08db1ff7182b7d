"""Item 8: decoding at batch 1, 64 tokens after a prompt, so every step has another length."""

import time

import torch

from gpu import models
from gpu.runner import Setting
from nanochat.benchmark import spread, synchronize
from nanochat.engine import GREEDY, generate, prefill, token_decoder
from nanochat.gpt import GPT

TOKENS = 64
PROMPT = 512
REPEATS = 5
WARMUP = 3  # tokens until a CUDA graph is recorded


def measure(setting: Setting):
    """For each model, seconds a token: of whole texts, of which the first meets new lengths, and of steps.

    "graphs" is None for a model of which a step could not be recorded.
    """
    forms = {}
    for name in (models.DENSE, models.QUARTER):
        config = models.variant(name, setting.tiny).config
        forms[name] = models.random_model(config, setting.device).to(setting.dtype).requires_grad_(False)
    for model in forms.values():
        load_kernels(model, setting)
    entries = {name: {"first text": text_seconds(model, setting)} for name, model in forms.items()}
    yield entries
    seconds = {name: {"later texts": [], "graphs": [], "eager": []} for name in forms}
    for _ in range(2 if setting.tiny else REPEATS):
        for name, model in forms.items():
            seconds[name]["later texts"].append(text_seconds(model, setting))
            for way in ("graphs", "eager"):
                seconds[name][way].append(step_seconds(model, way == "graphs", setting))
        for name, values in seconds.items():
            for key, value in values.items():
                entries[name][key] = None if None in value else spread(value)
        yield entries


def prompt_of(model: GPT, setting: Setting) -> list[int]:
    return torch.randint(model.config.vocab_size, (8 if setting.tiny else PROMPT,)).tolist()


def token_count(setting: Setting) -> int:
    return TOKENS // 4 if setting.tiny else TOKENS


def load_kernels(model: GPT, setting: Setting):
    """Load what the texts need of libraries and kernels, and record a step.

    Else the first text of the first model would pay alone for what all models share. This text begins where
    the timed ones end. So it has no length of theirs, nor as many slots in its cache, and what a new length
    costs is still to be paid.
    """
    tokens = WARMUP + 1  # the first comes from the prompt's pass
    prompt = prompt_of(model, setting) + [0] * token_count(setting)
    for _ in generate(model, [prompt], tokens, GREEDY, dtype=setting.dtype):
        pass


def text_seconds(model: GPT, setting: Setting) -> float:
    """A token of `generate`, with its preparation; the first token comes from the prompt's pass."""
    prompt = prompt_of(model, setting)
    tokens = generate(model, [prompt], token_count(setting), GREEDY, dtype=setting.dtype)
    next(tokens)
    synchronize(setting.device)
    started = time.perf_counter()
    count = sum(1 for _ in tokens)
    synchronize(setting.device)
    return (time.perf_counter() - started) / count


@torch.inference_mode()
def step_seconds(model: GPT, graphs: bool, setting: Setting) -> float | None:
    """A token once all is prepared, each read on the host. None: graphs are asked for and not recorded."""
    prompt = prompt_of(model, setting)
    count = token_count(setting)
    logits, cache = prefill(model, [prompt], len(prompt) + WARMUP + count, setting.dtype)
    decode = token_decoder(model, cache, setting.dtype, graphs)
    for _ in range(WARMUP):
        logits = decode(logits.argmax(dim=-1))
    synchronize(setting.device)
    started = time.perf_counter()
    for _ in range(count):
        tokens = logits.argmax(dim=-1)
        tokens.tolist()
        logits = decode(tokens)
    synchronize(setting.device)
    # where a recording fails, or on a CPU, the decoder goes on without graphs
    if graphs and not getattr(decode, "graphs", False):
        return None
    return (time.perf_counter() - started) / count
