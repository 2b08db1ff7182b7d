"""Training an adapter: AdamW over its few parameters. Its checkpoints hold nothing else."""

import torch

from nanochat.adapters.adalora import Allocator, orthogonality
from nanochat.adapters.attach import adapter_state, adapters_of, describe, load_adapter_state
from nanochat.adapters.loading import ADAPTER
from nanochat.gpt import GPT
from nanochat.optim import ParameterShard, Rates, build_optimizers
from nanochat.trainable import Trainable


class AdapterTrainable(Trainable):
    """The adapter `ADAPTER` of a model; `AdaLoRATrainable` for one whose ranks change while it trains."""

    may_have_working_weights = False  # its checkpoints and AdaLoRA's choice take the parameters as they are

    def __init__(self, model: GPT, origin: dict, lr: float, weight_decay: float):
        """origin: see `adapters.loading.load_adapted`. weight_decay: of factors; vectors do not decay."""
        super().__init__(model, Rates())
        self.origin = origin
        self.settings = dict(lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
        self.has_dropout = model.adapter_configs[ADAPTER].dropout > 0
        self.adapters = adapters_of(model, ADAPTER)
        self.description = describe(model, ADAPTER)  # with a hash of the base, which never changes

    def build_optimizers(self, shards: list[ParameterShard], dtype: torch.dtype):
        return build_optimizers(self.model, self.rates, {".adapters.": self.settings}, shards)

    def state(self) -> dict:
        return {"adapter": adapter_state(self.model, ADAPTER)}

    def load(self, state: dict):
        load_adapter_state(self.model, ADAPTER, state["adapter"])

    def meta(self) -> dict:
        return super().meta() | {"adapter": {"description": self.description, "origin": self.origin}}


class AdaLoRATrainable(AdapterTrainable):
    """An adapter of AdaLoRA: the allocator lowers its budget, and the loss keeps its factors orthogonal."""

    needs_whole_gradients = True  # the allocator reads them

    def __init__(self, *args, allocator: Allocator, orthogonality_weight: float):
        """args: of AdapterTrainable. orthogonality_weight: the weight of `orthogonality` in the loss."""
        super().__init__(*args)
        self.allocator = allocator
        self.orthogonality_weight = orthogonality_weight

    def before_update(self):
        self.allocator.observe()
        penalty = self.orthogonality_weight * orthogonality(self.adapters)
        penalty.backward()  # added to the gradients of the loss

    def after_update(self):
        self.allocator.allocate()

    def metrics(self) -> dict:
        """{"adalora/ranks": {matrix: number of its live triplets}}"""
        return {"adalora/ranks": {name: int(a.live.sum()) for name, a in self.adapters.items()}}

    def state(self) -> dict:
        return super().state() | {"allocator": self.allocator.state_dict()}

    def load(self, state: dict):
        super().load(state)
        self.allocator.load_state_dict(state["allocator"])
