"""AdaLoRA (Zhang et al., arXiv 2303.10512): which triplets of which matrix are worth a budget that falls during training.

A training step, with `adapters = adapters_of(model, name)` and `allocator = Allocator(adapters, ...)`:

    model(x, y).backward()
    allocator.observe()                              # scores, from parameters and gradients before the update
    (0.1 * orthogonality(adapters)).backward()       # the objective is the loss plus this
    optimizer.step()
    allocator.allocate()                             # the triplets beyond the budget: λ = 0

The paper scores by the gradient of the whole objective. Here the loss's alone counts: in a small model that of the orthogonality is so
much larger that it would choose by the matrices' shapes (all triplets in attention, none in the MLP; dev/LOG.md).

The parameters are those of `adapter_layers.Triplets`. Resuming takes the adapter's tensors, the optimizer's state and `allocator.state_dict()`.
"""

import re

import torch

from nanochat.adapters.attach import AdapterConfig, adapters_of, attach, load_adapter_state
from nanochat.adapters.layers import Triplets
from nanochat.common import InputError


def budget(t: int, start: int, end: int, steps: int, warmup: int, final: int) -> int:
    """b(t) = b_T + (b₀ - b_T)(1 - (t - tᵢ) / (T - tᵢ - t_f))³ after t updates, rounded; b₀ up to t = tᵢ (warmup), b_T from T - t_f on."""
    left = 1 - (t - warmup) / (steps - warmup - final)
    return round(end + (start - end) * min(1.0, max(0.0, left)) ** 3)


def orthogonality(adapters: dict[str, Triplets]):
    """Sum over the matrices of ‖PᵀP - I‖²_F + ‖QQᵀ - I‖²_F; the authors add 0.1 to 0.5 times it to the loss."""
    total = 0.0
    for adapter in adapters.values():
        eye = torch.eye(len(adapter.lam), device=adapter.lam.device, dtype=adapter.lam.dtype)
        total = (
            total
            + (adapter.P.T @ adapter.P - eye).square().sum()
            + (adapter.Q @ adapter.Q.T - eye).square().sum()
        )
    return total


class Allocator:
    """Keeps the triplets with the highest scores within the budget: all of them up to `warmup` steps, then every `every` steps fewer, and
    from steps - final on a fixed choice. In between a pruned triplet trains from λ = 0 and may be chosen again; with every = 1 it
    hardly can, since at λ = 0 it has no sensitivity.

    The score of a triplet is s(λᵢ) + mean s(P·ᵢ) + mean s(Qᵢ·), where s is the mean sensitivity |w·∂L/∂w| times its mean deviation,
    both exponential means with `beta`. per_parameter: a triplet of an m × n matrix costs m + n instead of 1; the budget is then
    spent in the order of score per cost on whatever still fits.
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
                f"adalora: {warmup} steps of warmup and {final} at the final budget, allocating every {every}, do not fit into "
                f"{steps} steps; warmup + final must be below {steps}, and every at least 1"
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
        self.sensitivity, self.deviation = (
            {
                f"{name}.{key}": torch.zeros_like(p)
                for name, a in adapters.items()
                for key, p in a.named_parameters()
            }
            for _ in range(2)
        )

    def budget(self) -> int:
        """b(t) at the present step."""
        return budget(self.step, self.start, self.end, self.steps, self.warmup, self.final)

    @torch.no_grad()
    def observe(self):
        """Take in the gradients of one step. Call it before the optimizer's step."""
        self.step += 1
        if self.step > self.steps - self.final:  # nothing is chosen any more
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
        """Choose, if it is time to, and set λ of what is not live to 0. Call it after the optimizer's step."""
        t = self.step
        last = self.steps - self.final
        chooses = self.warmup < t <= last and ((t - self.warmup) % self.every == 0 or t == last)
        if chooses:
            for name, live in choose(self.scores(), self.costs, self.budget()).items():
                self.adapters[name].live.copy_(live)
        if chooses or t > last:
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
        self.step = state["step"]
        for own, given in (
            (self.sensitivity, state["sensitivity"]),
            (self.deviation, state["deviation"]),
            ({name: adapter.live for name, adapter in self.adapters.items()}, state["live"]),
        ):
            for key, tensor in own.items():
                tensor.copy_(given[key])


def choose(scores: dict[str, torch.Tensor], costs: dict[str, int], budget: int) -> dict[str, torch.Tensor]:
    """{matrix: (r,) bool}, the live triplets: in falling order of score per cost, each that still fits into the budget.

    Of equal scores the lower number in its matrix goes first, then the earlier matrix: so that scores that are all zero leave equal ranks.
    """
    order = sorted(
        (-score / costs[name], i, place, name)
        for place, (name, values) in enumerate(scores.items())
        for i, score in enumerate(values.tolist())
    )
    live = {name: torch.zeros(len(values), dtype=torch.bool) for name, values in scores.items()}
    for _, i, _, name in order:
        if costs[name] <= budget:
            live[name][i] = True
            budget -= costs[name]
    return live


@torch.no_grad()
def export_compact(model, name: str, new_name: str):
    """Attach the live triplets as a LoRA adapter, B = s·P∘λ and A = Q, its scale 1, and let it act. Matrices without a live one have none."""
    live = {target: adapter for target, adapter in adapters_of(model, name).items() if adapter.live.any()}
    if not live:
        raise InputError(f"adapter {name!r}: no triplet is live; there is nothing to export")
    ranks = {f"^{re.escape(target)}$": int(adapter.live.sum()) for target, adapter in live.items()}
    config = model.adapter_configs[name]
    attach(
        model,
        new_name,
        AdapterConfig(
            "lora",
            targets="|".join(ranks),
            ranks=ranks,
            alphas={key: float(r) for key, r in ranks.items()},
            dropout=config.dropout,
            seed=config.seed,
        ),
    )
    state = {}
    for target, a in live.items():
        state[f"{target}.A"] = a.Q[a.live]
        state[f"{target}.B"] = a.scale * (a.P * a.lam)[:, a.live]
    load_adapter_state(model, new_name, state)
