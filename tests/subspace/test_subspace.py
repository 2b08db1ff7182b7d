"""Random subspaces: operators against explicit matrices, what a checkpoint holds, and training in them."""

import re
from dataclasses import replace

import pytest
import scipy.fft
import scipy.linalg
import torch
from conftest import Killed, losses

from nanochat import metrics
from nanochat.accounting import account
from nanochat.checkpoint_manager import load_checkpoint
from nanochat.core_eval import head_input
from nanochat.errors import InputError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Rates, build_optimizers
from nanochat.subspace import costs, noise, operators
from nanochat.subspace.config import PROJECTED, SubspaceConfig, matrices
from nanochat.subspace.model import attach, restore
from nanochat.subspace.trainable import adamw_settings
from scripts import base_eval, base_train, materialize

SHAPE = GPTConfig(
    sequence_len=16,
    vocab_size=50,
    n_layer=2,
    n_head=2,
    n_kv_head=1,
    n_embd=16,
    window_pattern="SL",
    value_embeddings=True,
)
ALL = [
    SubspaceConfig("none"),
    SubspaceConfig("basis", 3),
    SubspaceConfig("basis", 2, "layer"),
    SubspaceConfig("basis", 1, "matrix", freeze_embeddings=True),
    SubspaceConfig("fastfood", 20),
    SubspaceConfig("fastfood", 4, "layer", scales=True),
    SubspaceConfig("fft-fastfood", 9, "matrix"),
    SubspaceConfig("fft-fastfood", 30, scales=True, freeze_embeddings=True),
    SubspaceConfig("lora-random", rank=2),
]


def words(config) -> str:
    return "-".join(map(str, vars(config).values())).replace(noise.VERSION, "")


def dense(config=SHAPE) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    return model


def inside(config, shape=SHAPE) -> GPT:
    model = dense(shape)
    attach(model, config)
    return model


def batch(T=16):
    return torch.randint(50, (3, T), generator=torch.Generator().manual_seed(1))


def wake(model):
    """Random values for all that is trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def weights(model, dtype=torch.float32):
    return [W.detach() for W in model.subspace.make_matrices(dtype)]


# ---- operators ---------------------------------------------------------------------------------------------


def signs(matrix, seed, d):
    """W_k, (d, out, in), all at once."""
    drawn = noise.signs(
        noise.sub_streams(matrix.stream(seed, noise.BASIS), 0, d, "cpu"), 0, matrix.size, "cpu", torch.float64
    )
    return drawn.view(d, matrix.rows, matrix.columns)


def test_a_basis_is_the_sum_of_its_matrices_and_its_gradient_autograds_whatever_the_pieces(monkeypatch):
    matrix = matrices(SHAPE)[4]  # up, 64 x 16
    d = 7
    alpha = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(
        matrix.rows, matrix.columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    def made():
        W = operators.Combination.apply(
            alpha, matrix.stream(5, noise.BASIS), matrix.rows, matrix.columns, 0.25, torch.float64
        )
        return W, torch.autograd.grad(W, alpha, grad)[0]

    explicit = 0.25 * torch.einsum("k,koi->oi", alpha, signs(matrix, 5, d))
    W, inner = made()
    torch.testing.assert_close(W, explicit, rtol=0, atol=1e-12)
    torch.testing.assert_close(inner, torch.autograd.grad(explicit, alpha, grad)[0], rtol=0, atol=1e-11)
    for at_once in (1, 5, 100):  # 32, 160, 3200 entries
        monkeypatch.setitem(noise.WORDS, "cpu", at_once)
        other, inner_too = made()
        assert torch.equal(other, W)
        torch.testing.assert_close(inner_too, inner)
    assert torch.autograd.gradcheck(
        lambda a: operators.Combination.apply(a, matrix.stream(5, 1), 3, 5, 0.5, torch.float64), alpha
    )


def explicit_fastfood(module):
    """S·H·G·Π·H·B with S, one number, inside of G; Π H is H with its rows in another order."""
    H = torch.tensor(scipy.linalg.hadamard(len(module.order)), dtype=torch.float64)
    return (H[: module.n] * module.G) @ (H[module.order, : len(module.B)] * module.B)


def explicit_fft_fastfood(module):
    """Π·F·B."""
    F = torch.tensor(
        scipy.fft.dct(torch.eye(len(module.order), dtype=torch.float64).numpy(), axis=0, norm="ortho")
    )
    return F[module.order, : len(module.B)] * module.B


@pytest.mark.parametrize(
    "make, explicit",
    [(operators.Fastfood, explicit_fastfood), (operators.FFTFastfood, explicit_fft_fastfood)],
)
def test_projections_are_the_product_of_their_explicit_factors(make, explicit):
    for n, d in ((1024, 50), (1000, 300), (37, 20), (8, 3), (1, 1)):
        module = make(d, n, 3, 0, "cpu").double()
        P = explicit(module)
        alpha = torch.nn.functional.normalize(
            torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(n)), dim=0
        )
        y = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n + 1))
        torch.testing.assert_close(module(alpha), P @ alpha, rtol=0, atol=1e-12)
        alpha.requires_grad_()
        adjoint = torch.autograd.grad(module(alpha), alpha, y)[0]
        torch.testing.assert_close(adjoint, P.T @ y, rtol=1e-12, atol=1e-11)
        assert torch.dot(module(alpha), y).item() == pytest.approx(
            torch.dot(alpha, adjoint).item(), abs=1e-10
        )
    assert torch.autograd.gradcheck(module, alpha)


def test_fastfoods_matrix_is_as_good_as_gaussian():
    module = operators.Fastfood(64, 3000, 0, 0, "cpu")
    basis = torch.eye(64)
    P = torch.stack([module(alpha) for alpha in basis], dim=1).double()  # (3000, 64) of 4096 x 4096
    assert P.var().item() == pytest.approx(1, rel=0.03) and (
        P**4
    ).mean().item() / P.var().item() ** 2 == pytest.approx(3, rel=0.05)
    gram = P.T @ P / 3000
    # directions near orthogonal
    assert gram.diagonal().std() < 0.06 and gram.fill_diagonal_(0).abs().max() < 5 * 3000**-0.5
    module = operators.FFTFastfood(64, 3000, 0, 0, "cpu")
    F = torch.stack([module(alpha) for alpha in basis], dim=1)
    torch.testing.assert_close(F.T @ F, 3000 * basis, rtol=1e-4, atol=0.05)


# ---- matrices in a model -----------------------------------------------------------------------------------


def test_every_matrix_and_every_k_has_numbers_of_its_own_and_the_size_of_a_dense_initialisation():
    drawn = {matrix.name: signs(matrix, 0, 3).flatten(1) for matrix in matrices(SHAPE)}
    rows = torch.cat([W[:, :128] for W in drawn.values()])  # the smallest has 8 x 16
    assert (
        len(rows.unique(dim=0)) == 3 * 12 and ((rows @ rows.T).fill_diagonal_(0).abs() < 6 * 128**0.5).all()
    )
    shape = replace(SHAPE, n_embd=64, n_head=2)
    for config in (
        SubspaceConfig("basis", 5),
        SubspaceConfig("basis", 4, "matrix"),
        SubspaceConfig("lora-random", rank=1),
    ):
        for matrix, W in zip(matrices(shape), weights(inside(config, shape))):
            assert W.shape == (
                matrix.rows,
                matrix.columns,
            ) and W.var().item() * matrix.columns == pytest.approx(1, abs=0.1)
    for kind in PROJECTED:  # a change of length 1 is as large
        model = inside(SubspaceConfig(kind, 100), shape)
        before = weights(model)
        model.subspace.alpha.data += 0.1
        for matrix, a, b in zip(model.subspace.targets, weights(model), before):
            assert (a - b).var().item() * matrix.columns == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("config", ALL, ids=words)
def test_the_model_uses_its_matrices_and_the_gradient_reaches_all_that_is_trained(config):
    model = inside(config)
    own = [p for name, p in model.named_parameters() if name.startswith("subspace.")]
    # at 0 the base exactly
    assert model.subspace.config.kind == "basis" or all(
        map(torch.equal, weights(model), model.subspace.initial_matrices())
    )
    wake(model)
    idx = batch()
    plain = dense()  # an ordinary GPT given the matrices and everything else
    matrices = dict(zip((m.name + ".weight" for m in model.subspace.targets), weights(model)))
    rest = {
        name: t
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if not name.startswith(("subspace.", "blocks."))
    }
    plain.load_state_dict(matrices | rest)
    loss = model(idx[:, :-1], idx[:, 1:])
    expected = plain(idx[:, :-1], idx[:, 1:])
    assert torch.equal(loss, expected)
    loss.backward()
    assert len(own) or config.kind == "none"
    for name, p in model.named_parameters():
        silent = config.kind == "none" and name.startswith("value_embeds")  # outputs of attention stay zero
        assert p.grad is not None and p.grad.isfinite().all() and (p.grad.abs().max() > 0) != silent, name
    assert sum(p.numel() for p in own) == costs.count_trained(config, SHAPE)
    accounting = costs.account(config, SHAPE, account(SHAPE))
    assert (
        accounting["params/trained"] == sum(p.numel() for p in model.parameters())
        and accounting["params/stored_bits"] == 32 * accounting["params/trained"] + 64
    )
    held = model.subspace.buffers() if config.kind != "none" else ()  # there W₀ is what is used
    assert costs.state_bytes(config, SHAPE) == sum(b.numel() * b.element_size() for b in held)


def test_the_gradient_of_the_loss_is_that_through_explicit_matrices_and_finite_differences():
    model = inside(SubspaceConfig("basis", 4, seed=3)).double()
    wake(model)
    idx = batch()
    alpha = model.subspace.alpha
    d = 4
    (grad,) = torch.autograd.grad(model(idx[:, :-1], idx[:, 1:], torch.float64), alpha)
    explicit = alpha.detach().clone().requires_grad_()
    for matrix in model.subspace.targets:
        model.get_submodule(matrix.name).weight = (
            torch.einsum("k,koi->oi", explicit[0], signs(matrix, 3, d)) * matrix.columns**-0.5
        )
    loss = GPT.forward(model, idx[:, :-1], compute_dtype=torch.float64, head=head_input)[0]
    mine = model(idx[:, :-1], compute_dtype=torch.float64, head=head_input)[0]
    torch.testing.assert_close(loss, mine, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss.square().sum() * 0.5 + loss.sin().sum(), explicit)[0],
        torch.autograd.grad(mine.square().sum() * 0.5 + mine.sin().sum(), alpha)[0],
        rtol=1e-9,
        atol=1e-11,
    )
    step = torch.zeros_like(alpha)
    step[0, 2] = 1e-5
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            alpha.add_(sign * step)
            ends.append(model(idx[:, :-1], idx[:, 1:], torch.float64).item())
            alpha.sub_(sign * step)
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(grad[0, 2].item(), rel=1e-5)


@pytest.mark.parametrize("config", ALL, ids=words)
def test_a_state_holds_what_is_trained_and_restores_the_model_to_the_bit(config, monkeypatch):
    model = inside(replace(config, seed=2**40 + 1))
    wake(model)
    state = model.state_dict()
    assert state.keys() == {name for name, _ in model.named_parameters()}
    embeddings = {"wte.weight", "lm_head.weight", "value_embeds.1.weight"}
    assert config.freeze_embeddings != (embeddings <= state.keys())
    assert all(
        t.numel() <= max(20, config.dim * 12, config.rank * 64)
        for name, t in state.items()
        if name not in embeddings
    )
    monkeypatch.setitem(noise.WORDS, "cpu", 60)  # another machine's pieces
    torch.manual_seed(99)
    again = GPT(SHAPE)
    restore(again, vars(model.subspace.config), state)
    with torch.no_grad():
        assert torch.equal(again(batch()), model(batch()))
        assert torch.equal(
            again(batch(), compute_dtype=torch.bfloat16), model(batch(), compute_dtype=torch.bfloat16)
        )
    with pytest.raises(InputError, match="generator 'old': it drew the frozen weights"):
        restore(GPT(SHAPE), vars(model.subspace.config) | {"generator": "old"}, state)


def test_without_a_gradient_matrices_are_made_once_until_a_number_changes(monkeypatch):
    model = inside(SubspaceConfig("basis", 2))
    make = model.subspace.make_matrices
    calls = []
    monkeypatch.setattr(model.subspace, "make_matrices", lambda dtype: calls.append(dtype) or make(dtype))
    wake(model)
    with torch.inference_mode():
        a = model(batch())
        assert torch.equal(model(batch()), a) and len(calls) == 1
    model.subspace.alpha.data.view(-1)[0] += (
        0.1  # as an optimizer's slice does, unseen by autograd's version count
    )
    with torch.no_grad():
        assert not torch.equal(model(batch()), a) and len(calls) == 2
    model(batch()).sum().backward()
    assert len(calls) == 3


def test_every_parameter_is_in_one_group_and_numbers_of_the_subspace_have_their_rate():
    rates = Rates(embedding_lr=1.0, unembedding_lr=2.0, matrix_lr=3.0, scalar_lr=4.0, weight_decay=0.0)
    for config in ALL:
        extra = adamw_settings(config, 5.0, 6.0)
        groups = [g for o in build_optimizers(inside(config), rates, extra) for g in o.param_groups]
        model_names = sorted(name for name, _ in inside(config).named_parameters())
        assert sorted(name for g in groups for name in g["names"]) == model_names
        for name, lr in ((name, g["lr"]) for g in groups for name in g["names"]):
            of_subspace = name.startswith(("subspace.alpha", "subspace.A", "subspace.B"))
            if of_subspace:
                assert lr == pytest.approx(5.0 / max(1, config.dim, config.rank) ** 0.5)
            if name == "subspace.scales":
                assert lr == 6.0
            assert of_subspace == (name.startswith("subspace.") and name != "subspace.scales")


# ---- what cannot be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        (SubspaceConfig("bases", 3), "--subspace bases: use one of none, basis"),
        (SubspaceConfig("basis", 0), "--subspace-dim 0: basis needs"),
        (SubspaceConfig("basis", 3, "model"), "--subspace-scope model: use one of global, layer, matrix"),
        (
            SubspaceConfig("lora-random", scope="layer", rank=2),
            "--subspace-scope layer: in lora-random no matrices share numbers",
        ),
        (SubspaceConfig("none", 3), "--subspace-dim 3: none has no dimension"),
        (
            SubspaceConfig("fastfood", 129, "matrix"),
            "--subspace-dim 129: of scope matrix fastfood has 128 dimensions; use 1 to 128",
        ),
        (SubspaceConfig("lora-random", rank=9), "--subspace-rank 9: lora-random needs a rank from 1 to 8"),
        (SubspaceConfig("lora-random"), "--subspace-rank 0: lora-random needs a rank"),
        (SubspaceConfig("basis", 3, rank=2), "--subspace-rank 2: for lora-random only"),
        (SubspaceConfig("basis", 3, scales=True), "--subspace-scales: for fastfood and fft-fastfood only"),
        (
            SubspaceConfig("none", freeze_embeddings=True),
            "--freeze-embeddings: with --subspace none nothing would be trained",
        ),
    ],
)
def test_subspaces_that_cannot_be_are_refused_with_the_flag(config, message):
    with pytest.raises(InputError, match=message):
        attach(dense(), config)


def test_memory_is_counted_before_it_is_taken(monkeypatch):
    config = SubspaceConfig("fastfood", 10)
    huge = replace(SHAPE, n_embd=2**15, n_head=2, n_layer=40)
    with pytest.raises(InputError, match=r"--subspace fastfood: needs [\d,.]+ GiB .*are free"):
        costs.check_memory(config, huge, 4, "cpu")
    monkeypatch.setattr(costs, "available_bytes", lambda device_type: 2**50)
    costs.check_memory(config, huge, 4, "cpu")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--subspace-dim", 5), "--subspace-dim: means something with --subspace only"),
        (("--freeze-embeddings",), "--freeze-embeddings: means something with --subspace only"),
        (("--subspace", "basis"), "--subspace-dim 0: basis needs"),
        (("--subspace", "basis", "--subspace-dim", 0), "--subspace-dim: '0' is not a whole number >= 1"),
        (
            ("--subspace", "basis", "--subspace-dim", 5, "--attn-rank", 4),
            "--subspace basis: the matrices that it makes have full rank",
        ),
        (
            ("--subspace", "fastfood", "--subspace-dim", 5, "--model-dim", 2**17, "--depth", 48, "--dry-run"),
            "--subspace fastfood: needs .* GiB",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(train, flags, message):
    with pytest.raises(InputError, match=message):
        train(*flags)
    assert not (metrics.runs_dir() / "tiny").exists()


# ---- training ----------------------------------------------------------------------------------------------


def test_a_run_in_a_subspace_learns_resumes_to_the_bit_and_is_restored(train, kill_after, capsys):
    flags = (
        "--subspace",
        "fastfood",
        "--subspace-dim",
        200,
        "--subspace-scope",
        "layer",
        "--subspace-scales",
        "--num-iterations",
        12,
    )
    whole = train(*flags, tag="whole")
    kill_after(7)
    with pytest.raises(Killed):
        train(*flags, "--save-every", 4, tag="cut")
    kill_after(None)
    cut = train(*flags, "--save-every", 4, "--resume", "auto", tag="cut")
    assert losses(cut) == losses(whole)[-len(losses(cut)) :] and losses(whole)[-1] < losses(whole)[0] - 0.5
    (a, meta), (b, _) = (load_checkpoint(metrics.runs_dir() / tag, 12) for tag in ("whole", "cut"))
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert {name: t.numel() for name, t in a["model"].items()} == {
        "wte.weight": 300 * 32,
        "lm_head.weight": 300 * 32,
        "subspace.alpha": 400,
        "subspace.scales": 12,
    }
    assert meta["subspace"]["generator"] == noise.VERSION and a["model"]["subspace.alpha"].abs().min() > 0
    assert (
        whole.summary["params/trained"] == 2 * 300 * 32 + 412
        and whole.summary["params/stored_bits"] == 32 * whole.summary["params/trained"] + 64
    )
    base_eval.main(
        ["--model-tag", "whole", "--device-batch-size", "4", "--eval", "bpb", "--eval-tokens", "1024"]
    )
    assert re.search(rf"val   .* loss {whole.summary['val/loss']:.4f}", capsys.readouterr().out)

    with pytest.raises(InputError, match="another config: .*seed"):
        train(*flags, "--seed", 1, "--resume", "auto", tag="cut")
    with pytest.raises(InputError, match="--init-from whole:12: trained with --subspace"):
        base_train.main(["--init-from", "whole"])
    with pytest.raises(InputError, match="--model-tag whole: trained with --subspace"):
        materialize.main(["--model-tag", "whole", "--out-tag", "flat", "--energy", "0.9"])


@pytest.mark.parametrize(
    "flags",
    [
        ("none",),
        ("basis", "--subspace-dim", 5),
        ("fft-fastfood", "--subspace-dim", 50, "--freeze-embeddings"),
        ("lora-random", "--subspace-rank", 2, "--tie-embeddings", "--layer-map", "mobilellm"),
    ],
)
def test_every_method_trains(train, flags):
    run = train("--subspace", *flags, "--num-iterations", 20)
    assert losses(run)[-1] < losses(run)[0] - 0.1 and run.summary["status"] == "finished"
