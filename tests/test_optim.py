"""Optimizers against a singular value decomposition, a step by hand, and torch's own Muon."""
import pytest
import torch

from nanochat import optim
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Muon, build_optimizers, orthogonalize, update_scale
from nanochat.rank import account

LRS = dict(embedding_lr=0.1, unembedding_lr=0.01, matrix_lr=0.02, scalar_lr=0.01, weight_decay=0.1)


def small_model(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32), **changes}))
    model.init_weights()
    return model


@pytest.mark.parametrize("shape", [(32, 32), (8, 64), (64, 8), (3, 16, 48)])
def test_orthogonalize_is_near_the_polar_factor(shape):
    torch.manual_seed(0)
    X = torch.randn(*shape)
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    result = orthogonalize(X)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.85 and singular.max() < 1.15
    cosine = (result * (U @ Vh)).sum() / (result.norm() * (U @ Vh).norm())
    assert cosine > 0.995


def test_orthogonalize_of_zero_is_zero():
    assert orthogonalize(torch.zeros(4, 6)).abs().max() == 0


@pytest.mark.parametrize("shape,line_sum", [((12, 6), 1), ((6, 12), 0), ((1, 5), 0), ((5, 1), 1)])
def test_batched_muon_follows_the_formula_for_each_matrix(shape, line_sum):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    muon = Muon([dict(params=params, scale=2.0)], lr=0.1, momentum=0.9, weight_decay=0.5, beta2=0.8)
    expected, momentum, square = [p.detach().clone() for p in params], [torch.zeros(shape) for _ in params], [0.0] * 3
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(10 * step + i))
            momentum[i] = 0.9 * momentum[i] + 0.1 * p.grad
            update = orthogonalize(0.9 * momentum[i] + 0.1 * p.grad)
            square[i] = 0.8 * square[i] + 0.2 * (update ** 2).sum(line_sum, keepdim=True) / shape[line_sum]
            even = update / square[i] ** 0.5
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * 2.0 * even * (update.norm() / even.norm())
        muon.step()
    for p, e in zip(params, expected):
        torch.testing.assert_close(p.detach(), e, atol=1e-5, rtol=1e-5)


def test_muon_agrees_with_torchs_own_under_the_same_coefficients(monkeypatch):
    a, b, c = 3.4445, -4.7750, 2.0315
    monkeypatch.setattr(optim, "POLAR_EXPRESS", ((a, b, c),) * 5)
    monkeypatch.setattr(optim, "even_out", lambda update, square, beta2: update)  # theirs has no such step
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(24, 24))
    theirs = torch.nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    muon = Muon([dict(params=[ours])], lr=0.1)
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95, nesterov=True, ns_coefficients=(a, b, c), ns_steps=5)
    for step in range(3):
        ours.grad = torch.randn(24, 24)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    difference = (ours - theirs).norm() / (ours - start).norm()  # theirs computes in bfloat16
    assert difference < 0.03


@pytest.mark.parametrize("changes", [{}, dict(attn_ranks=(4, 8), mlp_ranks=(4, 8), lm_head_rank=4), dict(tie_embeddings=True), dict(value_embeddings=True)])
def test_every_parameter_is_in_exactly_one_group_and_accounted(changes):
    model = small_model(**changes)
    optimizers = build_optimizers(model, **LRS)
    placed = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters())
    idx = torch.randint(0, 64, (2, 16))
    model(idx, idx).backward()
    for optimizer in optimizers:
        optimizer.step()
    held = sum(t.numel() * t.element_size() for o in optimizers for s in o.state.values() for t in s.values() if t.ndim)
    assert held == account(model)["mem/optimizer_bytes"]


def test_a_frozen_parameter_is_in_no_group_and_costs_nothing():
    model = small_model()
    model.wte.weight.requires_grad_(False)
    model.blocks[0].mlp.up.weight.requires_grad_(False)
    before = model.wte.weight.clone()
    optimizers = build_optimizers(model, **LRS)
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
    muon = build_optimizers(model, **LRS)[1]
    for group in muon.param_groups:
        assert len({p.shape for p in group["params"]}) == 1
    scale = {id(p): g["scale"] for g in muon.param_groups for p in g["params"]}
    q = model.blocks[0].attn.q
    assert scale[id(q.A)] == update_scale("A", 32, 32) and scale[id(q.B)] == update_scale("B", 32, 32)
