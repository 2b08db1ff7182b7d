"""What call 2 trains on: a folder that prepare.py makes, and the task that is trained.

text/            files of text, validation last by name
tokenizer.json   of TASK.vocab_size tokens
reference.json   the first losses on a CPU
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from train_step import RATES

from gpu.runner import Setting
from nanochat.dataloader import Rows, training_batches
from nanochat.dataset import open_corpus
from nanochat.gpt import GPT, GPTConfig
from nanochat.processes import World
from nanochat.signals import StopRequest
from nanochat.token_workers import build_caches
from nanochat.tokenizer import load_tokenizer, tokenizer_path
from nanochat.trainable import Trainable
from scripts import base_train


@dataclass(frozen=True)
class Task:
    """The shape of the full-rank model, and its batches in tokens."""

    depth: int = 6
    width: int = 256
    head_dim: int = 64
    T: int = 512
    vocab_size: int = 4096
    rows: int = 128  # of a pass
    batch: int = 65536  # tokens of a step
    short_batch: int = 8192  # of the runs that are killed, and of the first losses
    short_steps: int = 200
    first_losses: int = 40
    tokens_per_parameter: float = 20
    eval_tokens: int = 2**19

    @property
    def short_rows(self) -> int:
        return self.short_batch // self.T


TINY = Task(2, 64, 32, 64, 300, 4, 512, 256, 120, 6, 0.05, 1024)


def task_of(tiny: bool) -> Task:
    return TINY if tiny else Task()


def working_folder(setting: Setting) -> Path:
    """Where the runs and the token caches of this call are: beside the text, in a folder of their own."""
    return setting.data / "base"


def open_working_folder(setting: Setting):
    """Let this process, and those that it starts, work there."""
    base = working_folder(setting)
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    if not tokenizer_path().is_file():
        tokenizer_path().parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(setting.data / "tokenizer.json", tokenizer_path())


def training_rows(setting: Setting, task: Task) -> Rows:
    corpus = open_corpus(str(setting.data / "text"))
    tokenizer = load_tokenizer()
    build_caches(corpus.train, tokenizer)
    return Rows(corpus.train, tokenizer, task.T)


def first_losses(rows: Rows, task: Task, device, dtype) -> dict:
    """{"losses": of the first steps, "weights": a sum that tells whether two began alike}.

    The model is drawn on the CPU, so it is the same wherever it is trained.
    """
    heads = task.width // task.head_dim
    torch.manual_seed(0)
    model = GPT(GPTConfig(task.T, rows.vocab_size, task.depth, heads, heads, task.width))
    model.init_weights()
    weights = sum(p.detach().double().abs().sum().item() for p in model.parameters())
    model = model.to(device)
    world = World(device)
    trainable = Trainable(model, RATES)
    trainable.make_optimizers(world, dtype)
    batches = training_batches(rows, 0, task.short_rows, world)
    losses = []
    for step in range(task.first_losses):
        loss, _ = base_train.forward_backward(trainable, batches, 1, dtype, StopRequest())
        base_train.gradient_norm(trainable, 0.0)
        base_train.update(trainable, step, 1.0)
        model.zero_grad()
        losses.append(loss)
    return {"losses": losses, "weights": weights}
