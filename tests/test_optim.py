"""Optimizers against a singular value decomposition, a step by hand, and torch's own Muon."""

import pytest
import torch

from nanochat import optim
from nanochat.accounting import account
from nanochat.adapters.attach import AdapterConfig, attach
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import (
    Muon,
    Rates,
    build_optimizers,
    orthogonalize,
    shard_parameters,
    update_scale,
    uses_muon,
)

LRS = Rates(embedding_lr=0.1, unembedding_lr=0.01, matrix_lr=0.02, scalar_lr=0.01, weight_decay=0.1)


def small_model(**changes):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            **{**dict(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32), **changes}
        )
    )
    model.init_weights()
    return model


def with_singular_values(m, n, values):
    """(m, n) float64, random singular vectors."""
    U, _ = torch.linalg.qr(torch.randn(m, len(values), dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64))
    return U, V, U @ torch.diag(values) @ V.T


# the last two shapes take the way over the Gram matrix
@pytest.mark.parametrize("shape", [(32, 32), (16, 24), (8, 64), (64, 8)])
def test_orthogonalize_lifts_singular_values_to_one(shape):
    torch.manual_seed(0)
    values = torch.logspace(-1.5, 2, min(shape), dtype=torch.float64)  # the smallest is 0.0003 of the largest
    U, V, X = with_singular_values(*shape, values)
    result = orthogonalize(X.float()).double()
    singular = U.T @ result @ V
    assert (singular - torch.diag(singular.diagonal())).abs().max() < 1e-3, "the singular vectors stay"
    singular = singular.diagonal()
    above = values > 0.04 * values.max()
    assert (singular[above] - 1).abs().max() < 1e-3
    lifted = singular / (values / values.max())
    assert (singular[~above] <= 1.001).all() and (lifted[~above] < 85).all() and (lifted[~above] > 20).all()


def test_orthogonalize_of_a_batch_treats_each_matrix_alone():
    torch.manual_seed(0)
    X = torch.randn(3, 16, 48) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    for x, together in zip(X, orthogonalize(X)):
        torch.testing.assert_close(orthogonalize(x), together)
        U, _, Vh = torch.linalg.svd(x.double(), full_matrices=False)
        torch.testing.assert_close(together.double(), U @ Vh, atol=1e-4, rtol=0)


def test_the_steps_are_the_best_for_what_the_ones_before_leave():
    """Equioscillation: on the interval of each quintic, |1 - p| is as large at its lower end as inside."""
    low = 0.03
    high = 1.0
    for a, b, c in optim.POLAR_EXPRESS:
        x = torch.linspace(low, high, 20001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        assert error[0] < 0 and abs(error.min() - error[0]) < 1e-4 and abs(error.max() + error[0]) < 1e-4
        low = 1 + error.min().item()
        high = 1 + error.max().item()
    assert high - low < 1e-4


def test_orthogonalize_of_zero_is_zero():
    assert orthogonalize(torch.zeros(4, 6)).abs().max() == 0


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("shape", [(16, 24), (16, 64), (64, 16)])
def test_orthogonalize_of_any_size_is_of_size_one_or_zero(shape, rank):
    """Squares of 1e-20 are beyond float32: what is left of the Gram matrix must not count as a direction."""
    torch.manual_seed(0)
    X = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    for power in range(46):
        largest = torch.linalg.matrix_norm(orthogonalize(X * 10.0**-power), ord=2)
        assert largest == pytest.approx(1, abs=1e-3) if power < 13 else largest < 1.001, power


def test_a_matrix_whose_gradient_has_vanished_comes_to_rest():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(16, 48))
    muon = Muon([dict(params=[p])], lr=0.01)
    for step in range(900):
        p.grad = torch.randn(16, 48) if step < 10 else torch.zeros(16, 48)
        before = p.detach().clone()
        muon.step()
    assert p.isfinite().all() and torch.equal(p, before)


@pytest.mark.parametrize("shape,line_sum", [((12, 6), 1), ((6, 12), 0), ((1, 5), 0), ((5, 1), 1)])
def test_batched_muon_follows_the_formula_for_each_matrix(shape, line_sum):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    muon = Muon([dict(params=params, scale=2.0)], lr=0.1, momentum=0.9, weight_decay=0.5, beta2=0.8)
    expected = [p.detach().clone() for p in params]
    momentum = [torch.zeros(shape) for _ in params]
    square = [0.0] * 3
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + i))
            momentum[i] = 0.9 * momentum[i] + 0.1 * p.grad
            update = orthogonalize(0.9 * momentum[i] + 0.1 * p.grad)
            square[i] = 0.8 * square[i] + 0.2 * (update**2).sum(line_sum, keepdim=True) / shape[line_sum]
            even = update / square[i] ** 0.5
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * 2.0 * even * (update.norm() / even.norm())
        muon.step()
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.detach(), e, atol=1e-5, rtol=1e-5)


def test_muon_agrees_with_torchs_own_under_the_same_coefficients(monkeypatch):
    # many steps of these converge at any scale: torch's Muon divides by the Frobenius norm
    coefficients = (15 / 8, -10 / 8, 3 / 8)
    monkeypatch.setattr(optim, "POLAR_EXPRESS", (coefficients,) * 20)
    # torch's Muon has no such step
    monkeypatch.setattr(optim, "normalize_lines", lambda updates, square, beta2: (updates, square))
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(12, 24))
    theirs = torch.nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    muon = Muon([dict(params=[ours])], lr=0.1)
    reference = torch.optim.Muon(
        [theirs],
        lr=0.1,
        weight_decay=0.0,
        momentum=0.95,
        nesterov=True,
        ns_coefficients=coefficients,
        ns_steps=20,
    )
    for _ in range(3):
        ours.grad = torch.randn(12, 24)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    difference = (ours - theirs).norm() / (ours - start).norm()  # theirs computes in bfloat16
    assert difference < 0.03


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(attn_ranks=(4, 8), mlp_ranks=(4, 8), lm_head_rank=4),
        dict(tie_embeddings=True),
        dict(value_embeddings=True),
    ],
)
def test_every_parameter_is_in_exactly_one_group_and_accounted(changes):
    model = small_model(**changes)
    optimizers = build_optimizers(model, LRS)
    placed = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters())
    idx = torch.randint(0, 64, (2, 16))
    model(idx, idx).backward()
    for optimizer in optimizers:
        optimizer.step()
    held = sum(
        t.numel() * t.element_size()
        for o in optimizers
        for s in o.state.values()
        for t in s.values()
        if t.ndim
    )
    assert held == account(model)["mem/optimizer_bytes"]


def test_a_frozen_parameter_is_in_no_group_and_costs_nothing():
    model = small_model()
    model.wte.weight.requires_grad_(False)
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    before = model.wte.weight.clone()
    optimizers = build_optimizers(model, LRS)
    idx = torch.randint(0, 64, (2, 16))
    model(idx, idx).backward()
    for optimizer in optimizers:
        optimizer.step()
    placed = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    frozen = [model.wte.weight, model.blocks[0].mlp.up.weight]
    assert not placed & {id(p) for p in frozen} and all(p not in o.state for o in optimizers for p in frozen)
    assert torch.equal(before, model.wte.weight)


def test_a_muon_group_holds_one_shape_and_factors_keep_their_role():
    model = small_model(attn_ranks=(32, 32))  # A and B of a square full-width factorisation have one shape
    muon = build_optimizers(model, LRS)[1]
    for group in muon.param_groups:
        assert len({p.shape for p in group["params"]}) == 1
    scale = {id(p): g["scale"] for g in muon.param_groups for p in g["params"]}
    q = model.blocks[0].attn.q
    assert scale[id(q.A)] == update_scale("A", 32, 32) and scale[id(q.B)] == update_scale("B", 32, 32)


@pytest.mark.parametrize("processes", [2, 3, 7, 40])
def test_shards_cover_every_entry_once_and_share_the_work(processes):
    model = small_model(attn_ranks=(4, 8))
    shards = optim.shard_parameters(model, processes)
    for name, p in model.named_parameters():
        count = torch.zeros_like(p)
        for shard in sum(shards, []):
            if shard.name == name:
                shard.entries(count).add_(1)
        assert (count == 1).all(), name
    sizes = [0] * processes
    for rank, own in enumerate(shards):
        sizes[rank] = sum(shard.end - shard.start for shard in own)
    largest = max(p.numel() for name, p in model.named_parameters() if optim.uses_muon(name, p))
    assert max(sizes) <= sum(sizes) / processes + largest + 10


def test_the_shares_together_make_the_step_of_one_process():
    one = small_model(mlp_ranks=(4, 8))
    shared = small_model(mlp_ranks=(4, 8))
    idx = torch.randint(0, 64, (2, 16))
    whole = build_optimizers(one, LRS)
    shards = optim.shard_parameters(shared, 3)
    shares = [build_optimizers(shared, LRS, shards=own) for own in shards]
    for _ in range(3):
        for model, optimizers in ((one, whole), (shared, sum(shares, []))):
            model(idx, idx).backward()
            for shard in sum(shards, []):
                shard.take_gradient()
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()
    for (name, a), b in zip(one.named_parameters(), shared.parameters()):
        torch.testing.assert_close(a, b, msg=name)


def test_extra_groups_of_adamw_take_what_is_added_to_a_model_in_any_number_of_processes():
    """Adapters and the like: torch's own AdamW with their settings, decay on matrices only, never Muon."""

    def adapted():
        model = small_model()
        attach(model, "a", AdapterConfig("adalora", rank=2))
        return model

    settings = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.5)
    models = [adapted() for _ in range(2)]
    trained = []
    for model in models:
        trained.append({name: p for name, p in model.named_parameters() if p.requires_grad})
    assert trained[0] and all(
        ".adapters." in name and not uses_muon(name, p) for name, p in trained[0].items()
    )
    shares = shard_parameters(models[0], 3)
    ours = []
    for shards in shares:
        ours += build_optimizers(models[0], Rates(), {".adapters.": settings}, shards)
    theirs = torch.optim.AdamW(
        [
            {"params": [p for p in trained[1].values() if p.ndim == 2]},
            {"params": [p for p in trained[1].values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        **settings,
    )
    assert sum(p.numel() for o in ours for g in o.param_groups for p in g["params"]) == sum(
        p.numel() for p in trained[0].values()
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for a, b in zip(trained[0].values(), trained[1].values()):
            a.grad = b.grad = torch.randn(a.shape, generator=generator)
        for shard in sum(shares, []):
            shard.take_gradient()
        for optimizer in (*ours, theirs):
            optimizer.step()
    for name in trained[0]:
        torch.testing.assert_close(trained[0][name], trained[1][name], msg=name)
