"""Item 8: decoding at batch 1, 64 tokens after a prompt, so every step has another length."""

import time

import torch

from gpu import models
from gpu.runner import Setting
from nanochat.benchmark import spread, synchronize
from nanochat.engine import GREEDY, generate
from nanochat.gpt import GPT

TOKENS = 64
PROMPT = 512
REPEATS = 5


def measure(setting: Setting):
    """For each model: seconds a token of the first text, when every length is new, and of later ones."""
    names = (models.DENSE, models.QUARTER)
    forms = {}
    for name in names:
        config = models.variant(name, setting.tiny).config
        forms[name] = models.random_model(config, setting.device).to(setting.dtype).requires_grad_(False)
    prompt_tokens = 8 if setting.tiny else PROMPT
    seconds = {}
    for name, model in forms.items():
        seconds[name] = {"first text": [seconds_per_token(model, prompt_tokens, setting)], "later texts": []}
    for _ in range(2 if setting.tiny else REPEATS):
        for name, model in forms.items():
            seconds[name]["later texts"].append(seconds_per_token(model, prompt_tokens, setting))
        yield {
            name: {"first text": values["first text"][0], "later texts": spread(values["later texts"])}
            for name, values in seconds.items()
        }


def seconds_per_token(model: GPT, prompt_tokens: int, setting: Setting) -> float:
    """Over the tokens after the first, which the prompt's pass gives."""
    prompt = torch.randint(model.config.vocab_size, (prompt_tokens,)).tolist()
    tokens = generate(model, [prompt], TOKENS // 4 if setting.tiny else TOKENS, GREEDY, dtype=setting.dtype)
    next(tokens)
    synchronize(setting.device)
    started = time.perf_counter()
    count = sum(1 for _ in tokens)
    synchronize(setting.device)
    return (time.perf_counter() - started) / count
