"""dev/candidates.py: every candidate's formula against an explicit computation of it, and a run of one of each kind."""

import importlib.util
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from processes import Launched

SCRIPT = ROOT / "dev/candidates.py"
spec = importlib.util.spec_from_file_location("candidates", SCRIPT)
candidates = importlib.util.module_from_spec(spec)
spec.loader.exec_module(candidates)


def drawn(cls, in_features=12, out_features=12, rank=4, seed=0):
    """A layer with no zeros in it, in float64."""
    torch.manual_seed(seed)
    layer = cls(in_features, out_features, rank).double()
    layer.init()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


def explicit(layer):
    """The matrix that the layer is, by its formula in numpy."""
    p = {name: value.detach().numpy() for name, value in layer.named_parameters()}
    BA = p["B"] @ p["A"]
    out = len(p["B"])
    if isinstance(layer, candidates.Diagonal):
        return BA + (0.1 * np.diag(p["D"]) if "D" in p else 0)
    if isinstance(layer, candidates.Repeat):
        K = -(-out // layer.rank)
        return BA + p["alpha"] / np.sqrt(K) * np.tile(p["A"], (K, 1))[:out]
    if isinstance(layer, candidates.Abba):
        return BA * (p["B2"] @ p["A2"])
    return candidates.SelfGuided.share * p["weight"] + (1 - candidates.SelfGuided.share) * BA


@pytest.mark.parametrize(
    "cls", [candidates.Diagonal, candidates.Repeat, candidates.Abba, candidates.SelfGuided]
)
@pytest.mark.parametrize("out_features", [12, 21])
def test_paths(cls, out_features, monkeypatch):
    monkeypatch.setattr(candidates.SelfGuided, "share", 0.3)
    layer = drawn(cls, out_features=out_features)
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = x.numpy() @ explicit(layer).T
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-12)
    together = torch.nn.functional.linear(
        x, torch.cat((torch.ones(3, 12).double(), layer.first_factor()))
    )  # as attention does for q, k and v
    np.testing.assert_allclose(layer.widen(together[:, 3:]).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("cls", [cls for name, cls in candidates.LAYERS.items() if name != "spectral"])
def test_size_of_outputs_at_first(cls):
    torch.manual_seed(1)
    layer = cls(96, 96, 24)
    layer.init()
    size = layer(torch.randn(512, 96)).std().item()
    expected = {candidates.Gaussian: 0.5, candidates.Cola: 0.5**0.5, candidates.Repeat: 1.25**0.5}.get(
        cls, 1.0
    )  # by their formulas
    assert abs(size - expected) < 0.12
    layer.init(zero=True)
    silent = layer(torch.randn(8, 96))
    assert silent.any() == (cls is candidates.Cola)


def test_spectral_keeps_the_largest_singular_values():
    torch.manual_seed(2)
    layer = candidates.Spectral(20, 30, 6)
    layer.init()
    torch.manual_seed(2)
    W = torch.empty(30, 20).uniform_(-1, 1) * (3 / 20) ** 0.5
    U, S, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    np.testing.assert_allclose((layer.B @ layer.A).detach().numpy(), U[:, :6] * S[:6] @ Vh[:6], atol=1e-5)
    np.testing.assert_allclose((layer.A @ layer.A.mT).detach().numpy(), np.diag(S[:6]), atol=1e-5)


def msign(M):
    U, _, Vh = np.linalg.svd(M, full_matrices=False)
    return U @ Vh


def moved(rule, lr, repeats=1):
    """(before, after, momenta) of a pair that the rule moves by the polar factor itself, which `orthogonalize` only comes near to."""
    layer = drawn(candidates.LowRankLinear, 12, 18, 5)
    before = [p.detach().clone().numpy() for p in (layer.A, layer.B)]
    torch.manual_seed(3)
    M_A = torch.randn(5, 12).double()
    M_B = torch.randn(18, 5).double()
    state = {layer.A: {}, layer.B: {}}
    with torch.no_grad():
        for _ in range(repeats):
            for p, value in zip((layer.A, layer.B), before):
                p.copy_(torch.from_numpy(value))
            rule(layer.A, layer.B, M_A, M_B, lr, state)
    return before, [p.detach().numpy() for p in (layer.A, layer.B)], (M_A.numpy(), M_B.numpy())


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(candidates, "orthogonalize", lambda X: torch.from_numpy(msign(X.numpy())))


def test_spectron(exact):
    before, after, momenta = moved(candidates.spectron, 0.1, repeats=60)  # the power iterations add up
    size = 0.1 / (sum(np.linalg.norm(p, 2) for p in before) + 1)
    for p, q, M in zip(before, after, momenta):
        np.testing.assert_allclose(p - q, size * msign(M), atol=1e-6)
    (A, B) = before
    (A_, B_) = after
    assert np.linalg.norm(B_ @ A_ - B @ A, 2) <= 0.1


def test_lora_muon(exact):
    (A, B), (A_, B_), (M_A, M_B) = moved(candidates.lora_muon, 0.1)

    def root(G):
        values, vectors = np.linalg.eigh(G + candidates.DAMPING * np.eye(5))
        return vectors @ np.diag(values**-0.5) @ vectors.T

    R_A = root(A @ A.T)
    R_B = root(B.T @ B)
    size = 0.05 * (18 / 12) ** 0.5
    np.testing.assert_allclose(A - A_, size * R_B @ msign(R_B @ M_A), atol=1e-10)
    np.testing.assert_allclose(B - B_, size * msign(M_B @ R_A) @ R_A, atol=1e-10)


def test_decay_of_the_product_follows_its_norm():
    layer = drawn(candidates.LowRankLinear, 12, 18, 5)
    before = [p.detach().clone() for p in (layer.A, layer.B)]
    (0.5 * (layer.B @ layer.A).square().sum()).backward()
    candidates.decay_product(layer.A, layer.B, 0.01)
    for p, old in zip((layer.A, layer.B), before):
        torch.testing.assert_close(p.detach(), old - 0.01 * p.grad)


def test_rebalancing_keeps_the_product():
    layer = drawn(candidates.LowRankLinear, 12, 18, 5)
    product = layer.dense_weight().detach().clone()
    candidates.rebalance(layer.A, layer.B)
    torch.testing.assert_close(layer.dense_weight().detach(), product)
    S = torch.linalg.svdvals(product)[:5].diag()
    torch.testing.assert_close((layer.A @ layer.A.mT).detach(), S)
    torch.testing.assert_close((layer.B.mT @ layer.B).detach(), S)


def test_the_dense_guide_is_gone_after_half_the_steps():
    assert [round(candidates.guide(p), 6) for p in (0, 0.25, 0.5, 1)] == [1, 0.5, 0, 0]


def test_silu_in_the_mlp_alone():
    square = drawn(candidates.SiluMLP)
    up = drawn(candidates.SiluMLP, out_features=21)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(square(x), x @ (square.B @ square.A).mT)
    h = x @ up.A.mT
    torch.testing.assert_close(up(x), h * torch.sigmoid(h) @ up.B.mT)


def run_as_script(words):
    sys.argv = [str(SCRIPT), *words]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("name", ["spectron=0.1", "rebalance=1"])
def test_a_run(name, base_dir, corpus_dir, tmp_path):
    """In a process of its own: it exchanges parts of the package."""
    ranks = ["--attn-rank", "8", "--mlp-rank", "8"]
    words = [name, *TINY, "--data", str(corpus_dir), *ranks, "--model-tag", name]
    launched = Launched(1, tmp_path / "output", run_as_script, words)
    assert launched.codes() == [0], launched.output.read_text()
    assert f'"{name.split("=")[0]}"' in (base_dir / "runs" / name / "config.json").read_text()


@pytest.mark.parametrize("words", [[], ["spectrum"], ["cola=3"], ["adamw=fast"]])
def test_bad_names_are_one_line(words, command):
    code, _, stderr = command("dev/candidates.py", *words)
    assert code == 2 and len(stderr.strip().splitlines()) == 1
