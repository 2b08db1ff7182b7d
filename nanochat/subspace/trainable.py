"""A model whose matrices are made of a few trained numbers, as what a run trains."""

from dataclasses import asdict

import torch

from nanochat.gpt import GPT
from nanochat.optim import ParameterShard, Rates, build_optimizers
from nanochat.subspace.model import SubspaceConfig, adamw_settings, attach
from nanochat.trainable import Trainable


class SubspaceTrainable(Trainable):
    """The numbers that the matrices are made of, the embeddings and the head."""

    def __init__(self, model: GPT, rates: Rates, config: SubspaceConfig, lr: float):
        """lr: of the numbers that the matrices are made of (--subspace-lr)."""
        super().__init__(model, rates)
        attach(model, config)
        self.config = config
        self.settings = adamw_settings(config, lr, rates.scalar_lr)

    def build_optimizers(self, shards: list[ParameterShard], dtype: torch.dtype):
        return build_optimizers(self.model, self.rates, self.settings, shards, dtype)

    def meta(self) -> dict:
        return super().meta() | {"subspace": asdict(self.config)}
