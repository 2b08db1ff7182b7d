"""LoRA and IA3, and what all adapters share: the base to the bit, merging, saving."""

import json
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from processes import Launched
from test_gpt import tiny, tokens

from nanochat.accounting import account, on_meta
from nanochat.adapters.attach import (
    AdapterConfig,
    adapter_state,
    adapters_of,
    attach,
    attach_saved,
    base_hash,
    base_state,
    describe,
    load_adapter_state,
    make_adapter,
    matrices,
    plain_model,
)
from nanochat.adapters.layers import IA3, AdaptedLinear, LoRA
from nanochat.errors import InputError
from nanochat.gpt import GPT, GPTConfig, Linear, LowRankLinear
from nanochat.layer_maps import stacked, with_layer_map
from nanochat.optim import Rates, build_optimizers
from nanochat.recompute import RecomputedBlock

BASES = {
    "full": {},
    "low rank": dict(attn_ranks=(6,) * 3, mlp_ranks=(8,) * 3),
    "mixed": dict(matrix_ranks={"k": (4, 0, 4), "down": (0, 5, 5)}, n_kv_head=2),
    "recomputed": dict(attn_ranks=(6,) * 3, mlp_ranks=(8,) * 3, recompute="bottleneck"),
    "tables": dict(value_embeddings=True, tie_embeddings=True),
}
KINDS = {
    "lora": AdapterConfig("lora", rank=4, alpha=6.0),
    "adalora": AdapterConfig("adalora", rank=3),
    "ia3": AdapterConfig("ia3"),
}


def awaken(model, name="a", seed=2):
    """Adapter parameters as training might leave them; AdaLoRA's P and Q stay near to orthonormal."""
    rng = torch.Generator().manual_seed(seed)
    for adapter in adapters_of(model, name).values():
        for key, p in adapter.named_parameters():
            p.data += (0.05 if key in "PQ" else 0.3) * torch.randn(p.shape, generator=rng, dtype=p.dtype)


def adapted(kind="lora", base="full", **changes):
    model = tiny(**{**BASES[base], **changes})
    attach(model, "a", KINDS[kind])
    awaken(model)
    return model


ADAMW = dict(lr=0.05, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


def train(model, steps=3):
    optimizer = build_optimizers(model, Rates(), extra={".adapters.": ADAMW})[0]
    for _ in range(steps):
        model(tokens(2, 16), tokens(2, 16) * 3 % 50).backward()
        optimizer.step()
        model.zero_grad()


# ---- against the base


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_the_logits_are_the_bases_to_the_bit(kind, base):
    model = tiny(**BASES[base])
    idx = tokens(2, 16)
    expected = model(idx)
    losses = model.token_losses(idx, idx)
    attach(model, "a", KINDS[kind])
    assert torch.equal(model(idx), expected) and torch.equal(model.token_losses(idx, idx), losses)
    awaken(model)
    assert (model(idx) - expected).abs().max() > 1e-3


def test_trained_parameters_are_the_adapters_alone_and_as_many_as_the_formula_says():
    shapes = {"q": 64, "k": 64, "v": 64, "o": 64, "up": 160, "down": 160}  # in + out at width 32
    expected = {
        "lora": 3 * 4 * sum(shapes.values()),
        "adalora": 3 * 5 * (sum(shapes.values()) + 6),
        "ia3": 3 * (32 + 32 + 128),
    }
    for kind, count in expected.items():
        model = adapted(kind)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
        model(tokens(2, 16), tokens(2, 16)).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("base", ["full", "low rank", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapted_model_equals_the_plain_model_of_the_changed_matrices_in_float64(kind, base):
    """Written out here: W0 + s·BA, W0 + s·P diag(λ) Q, diag(l) W0, and W0 diag(l) for `down`."""
    model = tiny(**BASES[base]).double()
    idx = tokens(2, 16)
    attach(model, "a", KINDS[kind])
    awaken(model)
    plain = tiny(n_kv_head=model.config.n_kv_head).double()
    layers = matrices(model)
    state = {name: t for name, t in base_state(model).items() if name.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        W = layer.base.dense_weight()
        a = layer.adapter
        if a is None:
            pass
        elif kind == "lora":
            W = W + 6 / 4 * a.B @ a.A
        elif kind == "adalora":
            W = W + 16 / 3 * a.P @ torch.diag(a.lam) @ a.Q
        else:
            W = W @ torch.diag(a.l) if name.endswith("down") else torch.diag(a.l) @ W
        state[f"{name}.weight"] = W.detach()
    plain.load_state_dict(state)
    # logits are float32
    torch.testing.assert_close(
        model(idx, compute_dtype=torch.float64), plain(idx, compute_dtype=torch.float64), atol=1e-6, rtol=0
    )
    loss = [m(idx, idx, torch.float64) for m in (model, plain)]
    torch.testing.assert_close(*loss, atol=1e-10, rtol=0)


@pytest.mark.parametrize("base", ["full", "recomputed", "mixed"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_is_a_plain_model_that_its_own_config_rebuilds(kind, base):
    model = adapted(kind, base)
    idx = tokens(2, 16)
    before = model(idx)
    plain = plain_model(model)
    torch.testing.assert_close(plain(idx), before, atol=1e-5, rtol=0)
    assert all(p.requires_grad for p in plain.parameters())
    again = GPT(plain.config)
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again(idx), plain(idx)) and torch.equal(model(idx), before)
    if kind == "ia3":  # a scale merges into one factor, so the ranks stay
        classes = [type(layer) for layer in matrices(tiny(**BASES[base])).values()]
        assert [type(layer) for layer in matrices(plain).values()] == classes
    assert plain_model(plain) is plain


def test_an_update_of_a_layer_with_silu_inside_runs_but_does_not_merge():
    model = adapted(factor_act="silu", base="low rank")
    with pytest.raises(InputError, match="silu between its factors is no matrix"):
        plain_model(model)
    scaled = adapted("ia3", factor_act="silu", base="low rank")
    idx = tokens(2, 16)
    torch.testing.assert_close(plain_model(scaled)(idx), scaled(idx), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_base_untouched(kind):
    model = tiny(**BASES["mixed"])
    idx = tokens(1, 16)
    before = base_hash(model)
    expected = model(idx)
    attach(model, "a", KINDS[kind])
    train(model)
    assert (model(idx) - expected).abs().max() > 1e-4
    assert base_hash(model) == before
    assert not any(p.grad is not None for p in base_state(model).values())


# ---- LoRA


def test_scale_and_dropout_are_those_of_the_formula():
    layer = Linear(24, 40)
    layer.init()
    x = torch.randn(5, 24)
    for config, s in (
        (AdapterConfig(rank=4, alpha=6.0), 1.5),
        (AdapterConfig(rank=4, alpha=6.0, rslora=True), 3.0),
    ):
        a = make_adapter(config, "blocks.0.mlp.up", layer, torch.Generator().manual_seed(0))
        assert a.B.abs().max() == 0 and a.A.abs().max() <= 24**-0.5 and a.A.abs().max() > 0.9 * 24**-0.5
        a.B.data.normal_()
        y = torch.randn(5, 40)
        torch.testing.assert_close(a.outer(y, a.inner(x)), y + s * (x @ a.A.T) @ a.B.T)
    a = LoRA(24, 40, 4, 1.0, dropout=0.5)
    a.init(torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    dropped = a.inner(x)
    torch.manual_seed(7)
    kept = (F.dropout(torch.ones_like(x), 0.5) > 0).float()
    torch.testing.assert_close(dropped, (x * kept / 0.5) @ a.A.T)
    with torch.no_grad():  # evaluation never drops
        torch.testing.assert_close(a.inner(x), x @ a.A.T)


def test_dropout_reaches_every_matrix_in_training_only():
    idx = tokens(2, 16)
    for matrix in ("q", "k", "v", "o", "up", "down"):
        model = tiny(**BASES["recomputed"])
        attach(model, "a", AdapterConfig(targets=rf"\.{matrix}$", rank=2, dropout=0.5))
        awaken(model)
        assert len({model(idx, idx).item() for _ in range(3)}) == 3, matrix
        assert torch.equal(model.token_losses(idx, idx), model.token_losses(idx, idx)), matrix


def test_recomputation_drops_the_same():
    found = []
    for base in ("low rank", "recomputed"):
        model = tiny(**BASES[base])
        attach(model, "a", AdapterConfig(rank=2, dropout=0.5))
        awaken(model)
        torch.manual_seed(5)
        found.append(gradients(model))
    assert all(torch.equal(a, b) for a, b in zip(*found))


def gradients(model):
    model(tokens(2, 16), tokens(2, 16)).backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def test_recomputing_changes_no_gradient():
    plain, again = (adapted(base=base) for base in ("low rank", "recomputed"))
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(again)))
    assert isinstance(again.blocks[0], RecomputedBlock)


def test_bfloat16_compute_keeps_float32_adapters():
    for kind in KINDS:
        model = adapted(kind)
        idx = tokens(2, 16)
        loss = model(idx, idx, torch.bfloat16)
        loss.backward()
        assert loss.item() == pytest.approx(model(idx, idx).item(), abs=0.1)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# ---- IA3


def test_scales_start_at_one():
    model = tiny()
    attach(model, "a", KINDS["ia3"])
    assert all(torch.equal(a.l, torch.ones_like(a.l)) for a in adapters_of(model, "a").values())
    assert {len(a.l) for a in adapters_of(model, "a").values()} == {32, 128}


def test_qk_norm_takes_the_length_of_a_heads_scales_and_leaves_their_direction():
    model = tiny().double()
    idx = tokens(2, 16)
    attach(model, "a", KINDS["ia3"])
    awaken(model)
    model(idx, tokens(2, 16) * 3 % 50, torch.float64).backward()
    for name, a in adapters_of(model, "a").items():
        along = (a.l.grad * a.l).view(-1, 8).sum(-1) if name.endswith("attn.k") else None  # by head
        if along is not None:
            assert along.abs().max() < 1e-5 * a.l.grad.abs().max() and a.l.grad.abs().max() > 1e-6


# ---- which matrices


def test_one_expression_chooses_and_patterns_give_ranks_and_alphas():
    model = tiny()
    attach(
        model,
        "a",
        AdapterConfig(
            targets=r"blocks\.[02]\.(attn\.[qv]|mlp)",
            rank=2,
            alpha=4,
            ranks={r"2\.mlp": 5, "mlp": 3},
            alphas={"attn": 8},
        ),
    )
    assert {name: (len(a.A), a.scale) for name, a in adapters_of(model, "a").items()} == {
        "blocks.0.attn.q": (2, 4),
        "blocks.0.attn.v": (2, 4),
        "blocks.0.mlp.up": (3, 4 / 3),
        "blocks.0.mlp.down": (3, 4 / 3),
        "blocks.2.attn.q": (2, 4),
        "blocks.2.attn.v": (2, 4),
        "blocks.2.mlp.up": (5, 4 / 5),
        "blocks.2.mlp.down": (5, 4 / 5),
    }


@pytest.mark.parametrize(
    "config,message",
    [
        (
            dict(targets=r"attn\.query"),
            r"no matrix has such a name; the nearest are blocks.0.attn.q, blocks.1.attn.q, blocks.2.attn.q",
        ),
        (dict(targets="blocks.7.mlp.up"), "the nearest are blocks.0.mlp.up"),
        (dict(ranks={"attn.x": 3}), "pattern 'attn.x': no matrix"),
        (dict(rank=33), "rank 33: blocks.0.attn.q is 32 x 32; give 1 to 32"),
        (dict(ranks={"down": 40}), "rank 40: blocks.0.mlp.down is 32 x 128; give 1 to 32"),
        (dict(rank=0), "rank 0: use a whole number >= 1"),
        (dict(targets="attn.(q"), "not a regular expression"),
        (dict(kind="dora"), "kind dora: use one of lora, adalora, ia3"),
        (dict(dropout=1.0), "dropout 1.0: use a number from 0"),
        (dict(alpha=0.0), "alpha 0.0: use a number above 0"),
        (dict(kind="adalora", initial=0.5), "initial ranks 0.5: below 1 the budget would rise"),
    ],
)
def test_what_cannot_be_is_one_clear_line_and_changes_nothing(config, message):
    model = tiny()
    with pytest.raises(InputError, match=message) as e:
        attach(model, "a", AdapterConfig(**config))
    assert "\n" not in str(e.value)
    assert all(isinstance(layer, (Linear, LowRankLinear)) for layer in matrices(model).values()) and all(
        p.requires_grad for p in model.parameters()
    )


def test_names_of_adapters():
    model = adapted()
    for name, message in (
        ("b", "the model has one already"),
        ("x.y", "choose a word without dots"),
        ("", "without dots"),
        ("keys", "without dots"),
    ):
        with pytest.raises(InputError, match=message):
            attach(model, name, AdapterConfig())
    with pytest.raises(InputError, match="adapter 'b': not attached; there are: a"):
        adapters_of(model, "b")


# ---- what is saved


@pytest.mark.parametrize("kind", KINDS)
def test_attached_again_from_its_state_it_is_the_same_to_the_bit_and_holds_nothing_of_the_base(kind):
    model = adapted(kind)
    idx = tokens(2, 16)
    description = describe(model, "a")
    state = adapter_state(model, "a")
    other = tiny()
    attach_saved(other, "mine", description, state)
    assert torch.equal(other(idx), model(idx))
    assert json.loads(json.dumps(description)) == description and description["base"] == base_hash(tiny())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for t in state.values() if t.is_floating_point()) == trained


def test_an_adapter_of_another_base_or_another_kind_is_refused():
    model = adapted()
    other = tiny()
    other.smear.data[3] += 1e-6
    with pytest.raises(
        InputError, match="made for another base .*; give the checkpoint that it was trained on"
    ):
        attach_saved(other, "a", describe(model, "a"), adapter_state(model, "a"))
    with pytest.raises(InputError, match="the tensors do not fit it"):
        load_adapter_state(model, "a", adapter_state(adapted("ia3"), "a"))


def train_all_kinds():
    model = GPT(GPTConfig(8, 20, 1, 1, 1, 8))
    model.init_weights()
    x = torch.zeros(1, 8, dtype=torch.long)
    shape = stacked(on_meta(model.config), layers=(0, 0))  # as a plan of a run does
    attach(shape, "a", AdapterConfig(rank=2))
    account(shape)
    with_layer_map(on_meta(model.config), (0, 0))
    for kind in KINDS:
        attach(model, "a", AdapterConfig(kind, rank=2, dropout=0.1))
        model(x, x).backward()
        build_optimizers(model, Rates(), extra={".adapters.": ADAMW})[0].step()
        model = plain_model(model)
    print("loaded:", "torch._dynamo" in sys.modules)


def test_eager_adapters_do_not_load_the_compiler(tmp_path):
    launched = Launched(1, tmp_path / "output", train_all_kinds)
    assert launched.codes() == [0] and launched.output.read_text() == "loaded: False\n"


# ---- an independent oracle (opt-in: only where peft is installed)


@pytest.mark.parametrize("case", ["lora", "rslora", "ia3 out", "ia3 in"])
def test_outputs_and_gradients_equal_pefts(case):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40, bias=False)).double()
    base = Linear(24, 40).double()
    base.weight.data.copy_(plain[0].weight)
    if "lora" in case:
        theirs = peft.get_peft_model(
            plain, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_rslora=case == "rslora")
        )
        ours = make_adapter(
            AdapterConfig(rank=4, alpha=6.0, rslora=case == "rslora"),
            "blocks.0.mlp.up",
            base,
            torch.Generator(),
        )
        pairs = [(ours.A, ".lora_A."), (ours.B, ".lora_B.")]
    else:
        theirs = peft.get_peft_model(
            plain, peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if case == "ia3 in" else [])
        )
        ours = IA3(24, 40, case.split()[1])
        pairs = [(ours.l, ".ia3_l.")]
    theirs = theirs.double()
    ours = ours.double()
    named = dict(theirs.named_parameters())
    for i, (p, part) in enumerate(pairs):
        matching = [q for name, q in named.items() if part in name]
        pairs[i] = (p, matching[0])
    assert sum(q.numel() for q in named.values() if q.requires_grad) == sum(p.numel() for p, _ in pairs)
    for p, q in pairs:
        q.data.normal_()
        p.data.copy_(q.data.view_as(p))
    layer = AdaptedLinear(base.requires_grad_(False), "a", ours)
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    grad = torch.randn(3, 7, 40, dtype=torch.float64)
    y = [f(x) for f in (layer, theirs)]
    torch.testing.assert_close(*y, atol=1e-6, rtol=1e-6)
    for output in y:
        output.backward(grad)
    for p, q in pairs:
        torch.testing.assert_close(p.grad, q.grad.view_as(p), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer.merged()(x), theirs.merge_and_unload()(x), atol=1e-6, rtol=1e-6)
