"""AdaLoRA (Zhang et al., arXiv 2303.10512): a budget of triplets that falls during training; scores spend it.

A training step, with `adapters = adapters_of(model, name)` and `allocator = Allocator(adapters, ...)`:

    model(x, y).backward()
    allocator.observe()                         # scores, from parameters and gradients before the update
    (0.1 * orthogonality(adapters)).backward()  # the objective is the loss plus this penalty
    optimizer.step()
    allocator.allocate()                        # λ = 0 for the triplets beyond the budget

The paper computes scores from the gradient of the whole objective. Here only the gradient of the loss counts.
In a small model the gradient of the penalty is much larger, so the shapes of the matrices would decide: all
triplets in attention, none in the MLP (dev/LOG.md).

The parameters are those of `layers.Triplets`. To resume, load the adapter's tensors, the optimizer's state
and `allocator.state_dict()`.
"""

import torch

from nanochat.adapters.layers import Triplets
from nanochat.errors import InputError


def budget(step: int, start: int, end: int, steps: int, warmup: int, final: int) -> int:
    """The budget after `step` updates: `start` up to warmup, `end` from steps - final on, a cubic between.

    b(t) = b_T + (b₀ - b_T)(1 - (t - tᵢ) / (T - tᵢ - t_f))³, rounded.
    """
    remaining = 1 - (step - warmup) / (steps - warmup - final)
    return round(end + (start - end) * min(1.0, max(0.0, remaining)) ** 3)


def orthogonality(adapters: dict[str, Triplets]):
    """Sum over the matrices of ‖PᵀP - I‖²_F + ‖QQᵀ - I‖²_F; the authors add 0.1 to 0.5 of it to the loss."""
    total = 0.0
    for adapter in adapters.values():
        identity = torch.eye(len(adapter.lam), device=adapter.lam.device, dtype=adapter.lam.dtype)
        total = total + (adapter.P.T @ adapter.P - identity).square().sum()
        total = total + (adapter.Q @ adapter.Q.T - identity).square().sum()
    return total


class Allocator:
    """Keeps the triplets with the highest scores within the budget.

    Up to step `warmup` all are live; then fewer after each `every` steps; from steps - final on the choice is
    fixed. Between two choices a pruned triplet trains from λ = 0 and may be chosen again. With every = 1 this
    is unlikely, since at λ = 0 it has no sensitivity.

    The score of a triplet is s(λᵢ) + mean s(P·ᵢ) + mean s(Qᵢ·), where s is the mean sensitivity |w·∂L/∂w|
    times its mean deviation, both exponential means with `beta`. per_parameter: a triplet of an m × n matrix
    costs m + n instead of 1. The triplets are then chosen by score per cost, each that still fits the budget.
    """

    def __init__(
        self,
        adapters: dict[str, Triplets],
        steps: int,
        warmup: int,
        final: int,
        every: int = 10,
        beta: float = 0.85,
        per_parameter: bool = False,
    ):
        if warmup < 0 or final < 0 or every < 1 or warmup + final >= steps:
            raise InputError(
                f"adalora: {warmup} steps of warmup and {final} at the final budget, "
                f"allocating every {every}, do not fit into {steps} steps; "
                f"warmup + final must be below {steps}, and every at least 1"
            )
        self.adapters = adapters
        self.steps = steps
        self.warmup = warmup
        self.final = final
        self.every = every
        self.beta = beta
        self.costs = {name: a.P.size(0) + a.Q.size(1) if per_parameter else 1 for name, a in adapters.items()}
        self.start = sum(len(a.lam) * self.costs[name] for name, a in adapters.items())
        self.end = sum(a.end_rank * self.costs[name] for name, a in adapters.items())
        self.step = 0  # updates observed
        self.sensitivity = {}
        self.deviation = {}
        for name, adapter in adapters.items():
            for key, p in adapter.named_parameters():
                self.sensitivity[f"{name}.{key}"] = torch.zeros_like(p)
                self.deviation[f"{name}.{key}"] = torch.zeros_like(p)

    def budget(self) -> int:
        """The budget at the present step."""
        return budget(self.step, self.start, self.end, self.steps, self.warmup, self.final)

    @torch.no_grad()
    def observe(self):
        """Update the scores by the gradients of one step. Call it before the optimizer's step."""
        self.step += 1
        if self.step > self.steps - self.final:  # the choice is fixed
            return
        for name, adapter in self.adapters.items():
            for key, p in adapter.named_parameters():
                mean = self.sensitivity[f"{name}.{key}"]
                deviation = self.deviation[f"{name}.{key}"]
                now = (p * p.grad).abs()
                mean.mul_(self.beta).add_(now, alpha=1 - self.beta)
                deviation.mul_(self.beta).add_((now - mean).abs(), alpha=1 - self.beta)

    def scores(self) -> dict[str, torch.Tensor]:
        """{matrix: (r,)}, on the CPU."""

        def s(key):
            return (self.sensitivity[key] * self.deviation[key]).cpu()

        return {
            name: s(f"{name}.lam") + s(f"{name}.P").mean(0) + s(f"{name}.Q").mean(1) for name in self.adapters
        }

    @torch.no_grad()
    def allocate(self):
        """At the steps of a choice: choose the live triplets, and set the λ of the others to 0.

        Call it after each step of the optimizer. Between two choices the pruned triplets train.
        """
        last = self.steps - self.final
        since_warmup = self.step - self.warmup
        is_due = since_warmup % self.every == 0 or self.step == last
        chooses = self.warmup < self.step <= last and is_due
        if chooses:
            for name, live in choose(self.scores(), self.costs, self.budget()).items():
                self.adapters[name].live.copy_(live)
        if chooses or self.step > last:
            for adapter in self.adapters.values():
                adapter.lam.masked_fill_(~adapter.live, 0.0)

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "sensitivity": self.sensitivity,
            "deviation": self.deviation,
            "live": {name: adapter.live for name, adapter in self.adapters.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        current = self.state_dict()
        for part in ("sensitivity", "deviation", "live"):
            for key, tensor in current[part].items():
                tensor.copy_(state[part][key])
        self.step = state["step"]


def choose(scores: dict[str, torch.Tensor], costs: dict[str, int], budget: int) -> dict[str, torch.Tensor]:
    """{matrix: (r,) bool}, the live triplets: by falling score per cost, each that still fits the budget.

    Equal scores are ordered by the number in the matrix, then by the matrix: if all scores are zero, the
    matrices have equal ranks.
    """
    ranking = sorted(
        (-score / costs[name], i, place, name)
        for place, (name, values) in enumerate(scores.items())
        for i, score in enumerate(values.tolist())
    )
    live = {name: torch.zeros(len(values), dtype=torch.bool) for name, values in scores.items()}
    for _, i, _, name in ranking:
        if costs[name] <= budget:
            live[name][i] = True
            budget -= costs[name]
    return live
