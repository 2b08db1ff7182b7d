"""What a run trains: the model, its optimizers, and which tensors its checkpoints hold."""

from dataclasses import asdict

import torch

from nanochat.exchange import Exchange
from nanochat.gpt import GPT
from nanochat.optim import ParameterShard, Rates, build_optimizers
from nanochat.processes import World
from nanochat.shards import make_buckets


class Trainable:
    """A GPT of which every parameter that requires a gradient is trained. A checkpoint holds the whole model.

    nanochat/subspace/trainable.py and nanochat/adapters/trainable.py train something else: they override the
    methods that differ.
    """

    has_dropout = False  # a forward pass draws random numbers
    needs_whole_gradients = False  # `before_update` reads or changes them: each process gets all

    def __init__(self, model: GPT, rates: Rates):
        self.model = model
        self.rates = rates
        self.exchange: Exchange  # between the processes, from `make_optimizers` on
        self.optimizers: list[torch.optim.Optimizer] = []  # of this process's shards

    def make_optimizers(self, world: World, dtype: torch.dtype):
        """Divide the parameters among the processes, and make the optimizers of this one's.

        dtype: see `optim.Muon`.
        """
        buckets = make_buckets(self.model, world.size)
        self.exchange = Exchange(self.model, buckets, world, self.needs_whole_gradients)
        self.optimizers = self.build_optimizers(self.shards, dtype)

    @property
    def shards(self) -> list[ParameterShard]:
        """What this process updates."""
        return self.exchange.own

    def build_optimizers(self, shards: list[ParameterShard], dtype: torch.dtype):
        return build_optimizers(self.model, self.rates, shards=shards, dtype=dtype)

    def before_update(self):
        """Called with the step's gradients: of the own shards' masters or, with `needs_whole_gradients`, of
        all parameters, the same in all processes, which it must change alike.
        """

    def after_update(self):
        """Called once every process has the new parameters of the step."""

    def metrics(self) -> dict:
        """More values for the record's entry of an evaluation."""
        return {}

    def state(self) -> dict:
        """Tensors, in nested dicts, that a checkpoint holds beside the state of the optimizers."""
        return {"model": self.model.state_dict()}

    def load(self, state: dict):
        """Take over what `state` returned, from a checkpoint."""
        self.model.load_state_dict(state["model"])

    def meta(self) -> dict:
        """The JSON entries from which `adapters.loading.load_model` builds the model again."""
        return {"model": asdict(self.model.config)}
