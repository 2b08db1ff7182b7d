"""Training in a subspace: the few numbers that make the matrices, the embeddings and the head."""

from dataclasses import asdict

import torch

from nanochat.gpt import GPT
from nanochat.optim import SCALAR_EPS, ParameterShard, Rates, build_optimizers
from nanochat.subspace.config import SubspaceConfig
from nanochat.subspace.model import attach
from nanochat.trainable import Trainable


class SubspaceTrainable(Trainable):
    """A GPT with the matrices of a subspace. Its trained numbers are the subspace's, embeddings and head."""

    may_have_working_weights = False  # float32 formulas make the matrices

    def __init__(self, model: GPT, rates: Rates, config: SubspaceConfig, lr: float):
        """lr: of the subspace's numbers (--subspace-lr)."""
        super().__init__(model, rates)
        attach(model, config)
        self.config = config
        self.settings = adamw_settings(config, lr, rates.scalar_lr)

    def build_optimizers(self, shards: list[ParameterShard], dtype: torch.dtype):
        return build_optimizers(self.model, self.rates, self.settings, shards, dtype)

    def meta(self) -> dict:
        return super().meta() | {"subspace": asdict(self.config)}


def adamw_settings(config: SubspaceConfig, lr: float, scales_lr: float) -> dict[str, dict]:
    """{part of a name: AdamW's settings} of a subspace's trained numbers, for `optim.build_optimizers`.

    AdamW moves each of d numbers by about lr, so α by lr·√d. The rate is divided by √d (or √r): then a step
    changes the same share of the matrices at every d.
    """
    return {
        "subspace.scales": {"lr": scales_lr, "eps": SCALAR_EPS},
        "subspace.": {"lr": lr * max(1, config.dim, config.rank) ** -0.5},
    }
