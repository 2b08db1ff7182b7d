"""What a run trains: the model, its optimizers, and which tensors its checkpoints hold."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict

import torch

from nanochat import working_weights
from nanochat.checkpoint_files import Piece, leaves, load_weights
from nanochat.exchange import Exchange
from nanochat.gpt import GPT
from nanochat.optim import ParameterShard, Rates, build_optimizers, named_parameters
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

    def pieces(self, world: World) -> list[Piece]:
        """What this process writes into a checkpoint. Those of all processes together are the whole state.

        Of a trained parameter and its optimizer's state, each process writes its own shards. Process 0 writes
        all else: frozen parameters, buffers, plain values.
        """
        trained = {p.data_ptr() for p in self.model.parameters() if p.requires_grad}
        paths = defaultdict(list)
        pieces = []
        for path, value in leaves(self.state()):
            if isinstance(value, torch.Tensor) and value.data_ptr() in trained and value.numel():
                paths[value.data_ptr()].append(path)
            elif world.rank == 0:
                pieces.append(Piece(path, value))
        shards = {shard.name: shard for shard in self.shards}
        for shard in shards.values():
            for path in paths[shard.parameter.data_ptr()]:
                pieces.append(Piece(path, shard.values, shard.start, shard.parameter.shape))
        for optimizer, name, p in named_parameters(self.optimizers):
            pieces += optimizer_pieces(shards[name], optimizer.state[p])
        return pieces

    def load(self, state: Mapping):
        """Take over what `state` returned, from a checkpoint."""
        load_weights(self.model, state["model"])

    def meta(self) -> dict:
        """The JSON entries from which `adapters.loading.load_model` builds the model again."""
        return {"model": asdict(self.model.config)}


def optimizer_pieces(shard: ParameterShard, state: dict) -> list[Piece]:
    """The pieces of an optimizer's state of a shard. The first shard has what is common to all."""
    pieces = []
    for path, value in leaves({"optimizer": {shard.name: dict(state)}}):
        is_common = not isinstance(value, torch.Tensor) or value.ndim == 0
        if not is_common and not shard.is_whole:
            pieces.append(Piece(path, value, shard.start, shard.parameter.shape))
        elif shard.start == 0:
            pieces.append(Piece(path, value))
    return pieces
