"""AdaLoRA: scores and steps against plain numpy, the budget, pruned triplets that come back, resuming."""

import copy

import numpy as np
import pytest
import torch
from test_gpt import tiny

from nanochat.adapters.adalora import Allocator, budget, choose, orthogonality
from nanochat.adapters.attach import (
    AdapterConfig,
    adapter_state,
    adapters_of,
    attach,
    base_hash,
    load_adapter_state,
)
from nanochat.adapters.layers import Triplets
from nanochat.errors import InputError
from nanochat.optim import Rates, build_optimizers, named_parameters


def adapted(rank=4, **changes):
    model = tiny()
    attach(model, "a", AdapterConfig("adalora", rank=rank, **changes))
    return model, adapters_of(model, "a")


def live(adapters) -> int:
    return sum(int(a.live.sum()) for a in adapters.values())


def test_budget_by_hand():
    """100 steps, 10 of warmup, 30 at the end; at step 40, half of the way, 1/8 of the difference is left."""
    b = [budget(t, 240, 160, 100, 10, 30) for t in (0, 10, 25, 40, 55, 70, 71, 100)]
    assert b == [240, 240, round(160 + 80 * 0.75**3), 170, 161, 160, 160, 160]
    assert all(budget(t, 240, 160, 100, 10, 30) >= budget(t + 1, 240, 160, 100, 10, 30) for t in range(100))


def test_orthogonality_is_the_formula_and_drives_the_factors_to_it():
    _, adapters = adapted(targets="blocks.0.attn.[qv]")
    expected = 0.0
    for a in adapters.values():
        for G in (
            a.P.detach().numpy().T @ a.P.detach().numpy(),
            a.Q.detach().numpy() @ a.Q.detach().numpy().T,
        ):
            expected += np.linalg.norm(G - np.eye(6)) ** 2
    assert orthogonality(adapters).item() == pytest.approx(expected, rel=1e-5)
    optimizer = torch.optim.Adam([p for a in adapters.values() for p in (a.P, a.Q)], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        orthogonality(adapters).backward()
        optimizer.step()
    assert orthogonality(adapters).item() < 0.01 * expected


# ---- three steps by hand


class ByHand:
    """One matrix with triplets, y = s·P diag(λ) Q x, and gradient descent in numpy, all written out."""

    def __init__(self, a: Triplets):
        self.w = {
            "P": a.P.detach().numpy().copy(),
            "lam": a.lam.detach().numpy().copy(),
            "Q": a.Q.detach().numpy().copy(),
        }
        self.mean = {key: np.zeros_like(w) for key, w in self.w.items()}
        self.deviation = {key: np.zeros_like(w) for key, w in self.w.items()}
        self.s = a.scale

    def step(self, x, target, gamma, lr, beta):
        """Gradient of ½‖y - target‖² / n + γR, the scores before the update, the update."""
        P, lam, Q = (self.w[key] for key in ("P", "lam", "Q"))
        n = len(x)
        error = (self.s * x @ Q.T * lam @ P.T - target) / n  # (n, out)
        G = error.T @ x  # (out, in), of the whole matrix
        identity = np.eye(len(lam))
        grads = {
            "P": self.s * G @ Q.T * lam + gamma * 4 * P @ (P.T @ P - identity),
            "lam": self.s * np.array([P[:, i] @ G @ Q[i] for i in range(len(lam))]),
            "Q": self.s * lam[:, None] * (P.T @ G) + gamma * 4 * (Q @ Q.T - identity) @ Q,
        }
        for key, w in self.w.items():
            now = abs(w * grads[key])
            self.mean[key] = beta * self.mean[key] + (1 - beta) * now
            self.deviation[key] = beta * self.deviation[key] + (1 - beta) * abs(now - self.mean[key])
            self.w[key] = w - lr * grads[key]
        s = {key: self.mean[key] * self.deviation[key] for key in self.w}
        return [
            s["lam"][i] + s["P"][:, i].sum() / P.shape[0] + s["Q"][i].sum() / Q.shape[1]
            for i in range(len(lam))
        ]


def test_the_first_three_steps_equal_a_computation_by_hand():
    rng = torch.Generator().manual_seed(3)
    adapters = {"x": Triplets(5, 7, 3, 2, 0.8).double(), "y": Triplets(6, 4, 3, 2, 1.3).double()}
    data = {}
    for name, a in adapters.items():
        a.init(rng)
        for p in (a.P, a.Q):
            p.data.mul_(20)
        data[name] = [
            torch.randn(9, n, generator=rng, dtype=torch.float64) for n in (a.Q.size(1), a.P.size(0))
        ]
    hand = {name: ByHand(a) for name, a in adapters.items()}
    allocator = Allocator(adapters, steps=4, warmup=0, final=1, every=1)
    optimizer = torch.optim.SGD([p for a in adapters.values() for p in a.parameters()], lr=0.1)
    for budget_now in (5, 4, 4):  # 4 + (6 - 4)(1 - t/3)³ = 4.59, 4.07, 4
        optimizer.zero_grad()
        loss = 0.05 * orthogonality(adapters)
        for name, a in adapters.items():
            x, target = data[name]
            error = a.outer(torch.zeros_like(target), a.inner(x)) - target
            loss = loss + 0.5 * error.square().sum() / len(x)
        loss.backward()
        allocator.observe()
        optimizer.step()
        allocator.allocate()

        expected = {}
        for name, h in hand.items():
            x, target = data[name]
            expected[name] = h.step(x.numpy(), target.numpy(), 0.05, 0.1, 0.85)
        for name, scores in allocator.scores().items():
            np.testing.assert_allclose(scores.numpy(), expected[name], rtol=1e-12)
        ranking = sorted(
            (-score, name, i) for name, scores in expected.items() for i, score in enumerate(scores)
        )
        kept = {(name, i) for _, name, i in ranking[:budget_now]}
        for name, h in hand.items():
            for i in range(3):
                if (name, i) not in kept:
                    h.w["lam"][i] = 0.0
            for key, p in adapters[name].named_parameters():
                np.testing.assert_allclose(p.detach().numpy(), h.w[key], rtol=1e-12, atol=1e-15)
                np.testing.assert_allclose(
                    allocator.sensitivity[f"{name}.{key}"], h.mean[key], rtol=1e-12, atol=1e-18
                )
                np.testing.assert_allclose(
                    allocator.deviation[f"{name}.{key}"], h.deviation[key], rtol=1e-12, atol=1e-18
                )
        assert {(name, i) for name, a in adapters.items() for i in range(3) if a.live[i]} == kept
    assert sum((h.w["lam"] != 0).sum() for h in hand.values()) == 4


# ---- the budget


@pytest.mark.parametrize("scores", ["zero", "equal", "random"])
def test_exactly_the_budget_is_live_after_every_allocation(scores, monkeypatch):
    _, adapters = adapted()
    allocator = Allocator(adapters, steps=40, warmup=5, final=10, every=3)
    rng = torch.Generator().manual_seed(0)
    value = {
        "zero": lambda n: torch.zeros(n),
        "equal": lambda n: torch.full((n,), 0.3),
        "random": lambda n: torch.rand(n, generator=rng),
    }[scores]
    monkeypatch.setattr(
        allocator, "scores", lambda: {name: value(len(a.lam)) for name, a in adapters.items()}
    )
    counts = []
    for a in adapters.values():
        for p in a.parameters():
            p.grad = torch.zeros_like(p)
    for t in range(1, 41):
        allocator.observe()
        for a in adapters.values():
            a.lam.data.fill_(1.0)  # as if an optimizer had moved all of them
        allocator.allocate()
        if t in (*range(8, 30, 3), 30) or t > 30:
            assert (
                live(adapters)
                == allocator.budget()
                == sum(int((a.lam != 0).sum()) for a in adapters.values())
            )
            counts.append(live(adapters))
    assert counts[0] < 18 * 6 and counts[-11:] == [18 * 4] * 11
    if scores != "random":  # ties leave equal ranks
        assert {int(a.live.sum()) for a in adapters.values()} == {4}


def test_a_budget_of_parameters_is_never_exceeded_and_no_triplet_more_would_fit():
    scores = {"wide": torch.tensor([9.0, 8.0, 7.0]), "small": torch.tensor([3.0, 2.0, 1.0])}
    costs = {"wide": 50, "small": 10}  # per cost: 0.18 0.16 0.14, 0.3 0.2 0.1
    for total, expected in (
        (75, [1, 2]),
        (80, [1, 3]),
        (49, [0, 3]),
        (100, [1, 3]),
        (120, [2, 2]),
        (9, [0, 0]),
        (180, [3, 3]),
    ):
        found = choose(scores, costs, total)
        assert [int(v.sum()) for v in found.values()] == expected, total
        assert all(v.tolist() == sorted(v.tolist(), reverse=True) for v in found.values())
    _, adapters = adapted()
    allocator = Allocator(adapters, steps=10, warmup=0, final=2, per_parameter=True)
    assert (allocator.start, allocator.end) == (3 * 6 * 576, 3 * 4 * 576)


def test_a_pruned_triplet_may_come_back_before_the_end_phase_and_not_in_it(monkeypatch):
    _, adapters = adapted()
    first = next(iter(adapters))
    allocator = Allocator(adapters, steps=30, warmup=0, final=10, every=5)
    favourite = [None]

    def scores():
        return {name: torch.full((6,), float((name == first) == favourite[0])) for name in adapters}

    monkeypatch.setattr(allocator, "scores", scores)
    history = []
    for t in range(1, 31):
        favourite[0] = 10 <= t < 15 or t > 20
        for a in adapters.values():
            for p in a.parameters():
                p.grad = torch.ones_like(p)
        allocator.observe()
        for a in adapters.values():
            a.lam.data += 0.1
        allocator.allocate()
        history.append((int(adapters[first].live.sum()), (adapters[first].lam != 0).sum().item()))
    at = dict(enumerate(history, 1))
    assert at[5] == (0, 0) and at[6] == (0, 6) and at[10] == (6, 6)  # out; training from zero; back
    assert at[20] == (0, 0) and all(at[t] == (0, 0) for t in range(20, 31))


def test_impossible_schedules_are_one_line():
    _, adapters = adapted()
    for settings in (
        dict(steps=10, warmup=5, final=5),
        dict(steps=10, warmup=-1, final=5),
        dict(steps=10, warmup=1, final=5, every=0),
    ):
        with pytest.raises(InputError, match="do not fit into 10 steps; warmup . final must be below 10"):
            Allocator(adapters, **settings)


# ---- training


class Training:
    def __init__(self, steps=16):
        self.model, self.adapters = adapted(rank=2)
        settings = dict(lr=0.02, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        self.optimizer = build_optimizers(self.model, Rates(), extra={".adapters.": settings})[0]
        self.allocator = Allocator(self.adapters, steps, warmup=2, final=4, every=2)

    def run(self, steps):
        for _ in range(steps):
            t = self.allocator.step
            idx = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(t))
            self.optimizer.zero_grad()
            self.model(idx, idx.roll(1, 1)).backward()
            self.allocator.observe()
            (0.1 * orthogonality(self.adapters)).backward()
            self.optimizer.step()
            self.allocator.allocate()

    def state(self):
        return copy.deepcopy(
            {
                "adapter": adapter_state(self.model, "a"),
                "optimizer": {
                    name: dict(self.optimizer.state[p]) for _, name, p in named_parameters([self.optimizer])
                },
                "allocator": self.allocator.state_dict(),
            }
        )

    def load(self, state):
        load_adapter_state(self.model, "a", state["adapter"])
        for group in self.optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                self.optimizer.state[p] = {
                    key: value.clone() for key, value in state["optimizer"][name].items()
                }
        self.allocator.load_state_dict(state["allocator"])


def assert_same_tensors(state, other):
    if isinstance(state, dict):
        assert state.keys() == other.keys()
        for key in state:
            assert_same_tensors(state[key], other[key])
    else:
        assert np.array_equal(np.asarray(state), np.asarray(other))


@pytest.mark.parametrize("at", [3, 7, 13])
def test_resumed_in_the_middle_of_the_schedule_it_ends_the_same_to_the_bit(at, tmp_path):
    whole = Training()
    before = Training()
    after = Training()
    whole.run(16)
    before.run(at)
    torch.save(before.state(), tmp_path / "state.pt")
    after.load(torch.load(tmp_path / "state.pt", weights_only=True))
    after.run(16 - at)
    assert_same_tensors(whole.state(), after.state())
    ranks = {int(adapter.live.sum()) for adapter in whole.adapters.values()}
    assert live(whole.adapters) == 18 * 2 and len(ranks) > 1
    assert base_hash(whole.model) == base_hash(tiny())
