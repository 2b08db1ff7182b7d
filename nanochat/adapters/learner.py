"""An adapter as what a run trains (`training.Learner`): AdamW over its few numbers, which are all that its checkpoints hold."""

from dataclasses import asdict

from nanochat.adapters.adalora import Allocator, orthogonality
from nanochat.adapters.attach import adapter_state, adapters_of, describe, load_adapter_state
from nanochat.adapters.loading import ADAPTER
from nanochat.gpt import GPT
from nanochat.optim import build_optimizers
from nanochat.training import Learner


class AdapterLearner(Learner):
    """The adapter `ADAPTER` of a model. With an `Allocator` AdaLoRA's: its budget falls, and its factors are held to be orthogonal."""

    starting = True

    def __init__(
        self,
        model: GPT,
        origin: dict,
        lr: float,
        weight_decay: float,
        allocator: Allocator | None = None,
        orthogonality_weight: float = 0.0,
    ):
        """origin: where the base is from, see `checkpoint_manager.adapted`. weight_decay: of the factors; vectors do not decay."""
        self.model = model
        self.origin = origin
        self.allocator = allocator
        self.orthogonality_weight = orthogonality_weight
        self.settings = dict(lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
        self.draws = model.adapter_configs[ADAPTER].dropout > 0
        self.adapters = adapters_of(model, ADAPTER)
        self.description = describe(model, ADAPTER)  # with the base's hash: once, it stays as it is

    def optimizers(self, pieces, dtype):
        return build_optimizers(self.model, extra={".adapters.": self.settings}, pieces=pieces)

    def before_update(self):
        if self.allocator:
            self.allocator.observe()
            (
                self.orthogonality_weight * orthogonality(self.adapters)
            ).backward()  # added to the gradients that are there

    def after_update(self):
        if self.allocator:
            self.allocator.allocate()

    def findings(self) -> dict:
        """{"adalora/ranks": {matrix: its live triplets}} of AdaLoRA."""
        return (
            {"adalora/ranks": {name: int(a.live.sum()) for name, a in self.adapters.items()}}
            if self.allocator
            else {}
        )

    def state(self) -> dict:
        return {"adapter": adapter_state(self.model, ADAPTER)} | (
            {"allocator": self.allocator.state_dict()} if self.allocator else {}
        )

    def load(self, state: dict):
        load_adapter_state(self.model, ADAPTER, state["adapter"])
        if self.allocator:
            self.allocator.load_state_dict(state["allocator"])

    def meta(self) -> dict:
        return {
            "model": asdict(self.model.config),
            "adapter": {"description": self.description, "origin": self.origin},
        }
