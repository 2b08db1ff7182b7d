"""What a run trains: the model, its optimizers, and which tensors its checkpoints hold."""

from dataclasses import asdict

import torch

from nanochat import working_weights
from nanochat.exchange import Exchange
from nanochat.gpt import GPT
from nanochat.optim import ParameterShard, Rates, build_optimizers
from nanochat.processes import World
from nanochat.shards import make_buckets, shards_by_owner


class Trainable:
    """A GPT of which every parameter that requires a gradient is trained. A checkpoint holds the whole model.

    nanochat/subspace/trainable.py and nanochat/adapters/trainable.py train something else: they override the
    methods that differ.
    """

    has_dropout = False  # a forward pass draws random numbers
    may_have_working_weights = (
        True  # nothing but the forward pass reads the parameters: see working_weights.py
    )
    needs_whole_gradients = False  # `before_update` reads or changes them: each process gets all

    def __init__(self, model: GPT, rates: Rates):
        self.model = model
        self.rates = rates
        # from `make_optimizers` on:
        self.shards: list[ParameterShard] = []  # what this process updates
        self.exchange: Exchange
        self.optimizers: list[torch.optim.Optimizer] = []  # of the shards

    def make_optimizers(self, world: World, dtype: torch.dtype):
        """Divide the parameters, with their first values, among the processes; make this one's optimizers.

        dtype: of the products; see `working_weights` and `optim.Muon`.
        """
        buckets = make_buckets(self.model, world.size)
        self.shards = shards_by_owner(self.model, buckets)[world.rank]
        if self.may_have_working_weights and working_weights.serve(dtype, world.size):
            working_weights.make(self.model, self.shards)
        self.exchange = Exchange(self.model, buckets, self.shards, world, self.needs_whole_gradients)
        self.optimizers = self.build_optimizers(self.shards, dtype)

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
