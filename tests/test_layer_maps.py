"""Layer maps: their texts, and models under them, tied and copied, against the model they come from."""

import itertools
import json
from dataclasses import asdict

import pytest
import torch

from nanochat.accounting import account
from nanochat.adapters import attach
from nanochat.adapters.attach import AdapterConfig
from nanochat.engine import GREEDY, generate, next_logits, prefill
from nanochat.errors import InputError
from nanochat.gpt import GPT, GPTConfig
from nanochat.layer_maps import (
    goliath,
    map_text,
    mobilellm,
    monotone_maps,
    parse_map,
    random_maps,
    solar,
    with_copied_layers,
    with_layer_map,
    without_layer_map,
)

MAP = (0, 2, 2, 1, 0)
LOW = dict(attn_ranks=(4, 8, 0), mlp_ranks=(0.25, 0.5, 0.75), matrix_ranks={"v": (0, 3, 5)}, lm_head_rank=8)
EVERY = [
    dict(window_pattern="L"),
    dict(value_embeddings=True, n_kv_head=2),
    {**LOW, "value_embeddings": True, "factor_act": "silu"},
    dict(tie_embeddings=True, **LOW | {"lm_head_rank": 0}),
]


def tiny(seed=0, **changes) -> GPT:
    """16 positions; windows of 8, 16 and 16 of them; every part of it matters to the output."""
    config = GPTConfig(
        **{
            **dict(
                sequence_len=16,
                vocab_size=50,
                n_layer=3,
                n_head=4,
                n_kv_head=4,
                n_embd=32,
                window_pattern="SL",
            ),
            **changes,
        }
    )
    torch.manual_seed(seed)
    model = GPT(config)
    model.init_weights()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def tokens(*shape):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))


def loaded(model: GPT) -> GPT:
    """As a checkpoint would give it back: from its config as JSON, and its weights by name."""
    other = GPT(GPTConfig(**json.loads(json.dumps(asdict(model.config)))))
    other.load_state_dict(model.state_dict())
    return other


# ---- texts


def test_the_named_maps_are_those_published():
    assert solar(32) == (*range(24), *range(8, 32)) and len(solar(32)) == 48
    # Goliath-120B, of Xwin and Euryale in turn
    published = [
        (0, 16),
        (8, 24),
        (17, 32),
        (25, 40),
        (33, 48),
        (41, 56),
        (49, 64),
        (57, 72),
        (65, 80),
    ]
    assert (
        goliath(80)
        == tuple(
            layer + 80 * (i % 2) for i, (start, end) in enumerate(published) for layer in range(start, end)
        )
        and len(goliath(80)) == 137
    )
    assert mobilellm(3) == (0, 0, 1, 1, 2, 2)
    assert solar(4) == (0, 1, 2, 1, 2, 3) and map_text(goliath(4), 4) == "A:0,A:1,B:1,B:2,A:2,A:3"
    for n in range(3, 100):
        for named in (solar, goliath, mobilellm):
            assert {layer % n for layer in named(n)} == set(range(n)), "no layer is left out"


def test_texts_of_maps():
    assert parse_map("0,1,1", 2) == parse_map("A:0,A:1,1", 2) == (0, 1, 1) and parse_map(
        "A:0,A:1,B:1,1", 2
    ) == (0, 1, 3, 1)
    assert parse_map("solar", 4) == solar(4) and parse_map("11", 12) == (11,)
    for one in (*random_maps(6, 5, 30, seed=0), goliath(12)):
        assert parse_map(map_text(one, 3 if max(one) < 6 else 12), 3 if max(one) < 6 else 12) == one
    for text, message in (
        ("0,2", "--maps 0,2: there is no layer 2, the layers are 0 to 1"),
        ("B:2", "--maps B:2: there is no layer 2"),
        ("0,,1", "--maps 0,,1: give the layer at each position"),
        ("", "give the"),
        ("C:0", "give the"),
        ("-1", "give the"),
        ("twice", "give the"),
    ):
        with pytest.raises(InputError, match=message):
            parse_map(text, 2, "--maps")


@pytest.mark.parametrize(
    "layers,positions,count", [(4, 8, 35), (4, 12, 165), (4, 4, 1), (1, 3, 1), (2, 5, 4)]
)
def test_monotone_maps_are_all_that_keep_the_order(layers, positions, count):
    maps = monotone_maps(layers, positions)
    everything = itertools.product(range(layers), repeat=positions) if layers**positions < 10**5 else maps
    assert len(maps) == count and sorted(maps) == sorted(
        m for m in everything if list(m) == sorted(m) and set(m) == set(range(layers))
    )


def test_random_maps_are_distinct_out_of_order_and_seeded():
    maps = random_maps(3, 4, 20, seed=1)
    assert len(set(maps)) == 20 and all(list(m) != sorted(m) for m in maps)
    assert maps == random_maps(3, 4, 20, seed=1) != random_maps(3, 4, 20, seed=2)
    # there are no more
    assert sorted(random_maps(2, 3, 99, seed=0)) == [
        (0, 1, 0),
        (1, 0, 0),
        (1, 0, 1),
        (1, 1, 0),
    ]


# ---- models


def test_the_model_under_a_map_executes_its_layers_in_that_order():
    model = tiny(mlp_ranks=(4, 8, 0))
    executed = []
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(
            lambda module, args, output, layer=layer: executed.append((layer, args[2].tolist()))
        )
    scalars = torch.stack((model.resid_lambdas, model.x0_lambdas), dim=1).tolist()
    under = with_layer_map(model, (2, 0, 0, 1))
    under.blocks = model.blocks  # with the hooks; its own hold the same weights
    under(tokens(2, 16))
    assert executed == [(layer, scalars[layer]) for layer in (2, 0, 0, 1)]
    assert (
        with_layer_map(model, (0, 1, 2)).blocks[0].mlp.up.A.data_ptr() == model.blocks[0].mlp.up.A.data_ptr()
    )


@pytest.mark.parametrize("changes", EVERY)
def test_the_identity_map_changes_no_bit_and_tied_layers_are_copied_ones(changes):
    model = tiny(**changes)
    idx = tokens(2, 16)
    for same in (with_layer_map(model, (0, 1, 2)), with_copied_layers(model, (0, 1, 2))):
        assert torch.equal(same(idx), model(idx)) and account(same) == account(model)
    assert asdict(same.config) == asdict(model.config)
    tied = with_layer_map(model, MAP)
    each = with_copied_layers(model, MAP)
    assert (
        torch.equal(tied(idx), each(idx))
        and torch.equal(loaded(each)(idx), each(idx))
        and not torch.equal(tied(idx), model(idx))
    )
    assert [each.config.window(layer) for layer in each.config.positions] == [
        tied.config.window(layer) for layer in tied.config.positions
    ]
    with torch.no_grad():
        next(each.blocks[0].parameters()).add_(1)  # the copies are its own
    assert torch.equal(with_layer_map(model, MAP)(idx), tied(idx))


def test_the_gradient_of_a_tied_layer_is_the_sum_of_the_copies():
    model = tiny(value_embeddings=True, **LOW).double()
    tied = with_layer_map(model, MAP)
    each = with_copied_layers(model, MAP)
    idx = tokens(2, 16)
    for one in (tied, each):
        one(idx, idx, torch.float64).backward()
    for module in ("blocks", "value_embeds"):
        for name, p in getattr(tied, module).named_parameters():
            layer, rest = name.split(".", 1)
            parts = [
                getattr(each, module).get_parameter(f"{i}.{rest}").grad
                for i, source in enumerate(MAP)
                if source == int(layer)
            ]
            assert torch.allclose(p.grad, sum(parts), atol=1e-12, rtol=1e-9), name
    # by position in both
    assert torch.allclose(tied.x0_lambdas.grad, each.x0_lambdas.grad, atol=1e-12, rtol=1e-9)
    assert tied.resid_lambdas.shape == each.resid_lambdas.shape == (5,)


@pytest.mark.parametrize("form", [with_layer_map, with_copied_layers])
def test_cached_decoding_of_repeated_layers_is_the_full_forward(form):
    """Token by token to the end of the context, past the short windows; then a text far beyond it."""
    model = form(tiny(value_embeddings=True, n_kv_head=2, **LOW).double(), MAP).requires_grad_(False)
    assert [model.config.window(layer) for layer in model.config.positions] == [8, 16, 16, 16, 8]
    text = tokens(16).tolist()
    logits, cache = prefill(model, [text[:3]], 16, torch.float64)
    for end in range(3, 16):
        assert torch.allclose(
            logits[0],
            model(torch.tensor([text[:end]]), compute_dtype=torch.float64)[0, -1],
            atol=1e-12,
            rtol=0,
        ), end
        logits = next_logits(model, torch.tensor([[text[end]]]), torch.float64, cache)
    row = list(text[:5])
    for (token,) in generate(model, [row], 11, GREEDY, dtype=torch.float64):
        assert token == model(torch.tensor([row]), compute_dtype=torch.float64)[0, -1].argmax().item()
        row.append(token)


def test_windows_and_value_tables_are_the_source_layers():
    model = tiny(value_embeddings=True, n_layer=4, window_pattern="SSSL")
    assert [model.config.kind(layer) for layer in range(4)] == ["S", "Sv", "S", "Lv"]
    tied = with_layer_map(model, (3, 1, 1, 0))
    each = with_copied_layers(model, (3, 1, 1, 0))
    assert [tied.config.window(layer) for layer in tied.config.positions] == [16, 8, 8, 8]
    assert each.config.layer_kinds == ("Lv", "Sv", "Sv", "S") and list(each.value_embeds) == ["0", "1", "2"]
    again = with_copied_layers(each, (3, 0, 1))
    assert again.config.layer_kinds == ("S", "Lv", "Sv") and torch.equal(
        again(tokens(1, 16)), with_layer_map(model, (0, 3, 1))(tokens(1, 16))
    )
    assert with_copied_layers(each, (1, 3, 0)).config.layer_kinds == (), "the pattern says the same"
    before = tied(tokens(1, 16))
    tied.value_embeds["1"].weight.data.add_(1.0)
    assert (tied(tokens(1, 16)) - before).abs().max() > 1e-3


def test_a_tied_model_copied_out_keeps_the_scalars_of_its_positions():
    model = tiny(layer_map=MAP, value_embeddings=True, **LOW)
    idx = tokens(2, 16)
    assert len(set(model.x0_lambdas.tolist())) == 5, "trained by position"
    each = without_layer_map(model)
    assert torch.equal(each(idx), model(idx)) and each.config.n_layer == 5 and not each.config.layer_map
    assert torch.equal(each.x0_lambdas, model.x0_lambdas)
    reordered = with_copied_layers(model, (1, 2, 0))
    assert torch.equal(reordered.x0_lambdas, model.x0_lambdas[[3, 1, 0]]), (
        "those of the layer where it first stood"
    )
    assert torch.equal(reordered(idx), with_layer_map(model, (1, 2, 0))(idx))
    with pytest.raises(
        InputError, match="layer map: layer 1 is at none of the model's positions, .* there are: 0, 2"
    ):
        with_layer_map(with_layer_map(model, (0, 2)), (1,))


def test_layers_of_two_models_of_one_shape():
    a = tiny(0, value_embeddings=True, **LOW)
    b = tiny(1, value_embeddings=True, **LOW)
    idx = tokens(2, 16)
    both = with_copied_layers(a, (0, 4, 2), b)
    by_hand = loaded(a)
    by_hand.blocks[1] = b.blocks[1]
    by_hand.resid_lambdas.data[1] = b.resid_lambdas[1]
    by_hand.x0_lambdas.data[1] = b.x0_lambdas[1]
    assert torch.equal(both(idx), by_hand(idx)) and torch.equal(
        with_copied_layers(a, goliath(3), a)(idx), with_layer_map(a, (0, 1, 1, 2))(idx)
    )
    end = with_copied_layers(a, (0, 5), b)
    assert torch.equal(end.value_embeds["1"].weight, b.value_embeds["2"].weight) and torch.equal(
        end.wte.weight, a.wte.weight
    )
    for other, message in (
        (None, "takes layers of a second model, and there is none"),
        (tiny(sequence_len=32), r"sequence_len \(32 there, 16 here\)"),
        (tiny(rank_multiple=16, **LOW), r"rank_multiple \(16 there, 1 here\)"),
        (
            tiny(value_embeddings=True),
            r"second model: of another shape than the first, .*attn_ranks \(\[\] there, \[4, 8, 0\] here\)",
        ),
    ):
        with pytest.raises(InputError, match=message):
            with_copied_layers(a, (0, 4), other)


def test_an_adapted_model_is_copied_with_its_adapters():
    model = tiny(**LOW)
    idx = tokens(2, 16)
    attach.attach(model, "wiki", AdapterConfig("lora", targets=r"attn\.q$|mlp\.down$", rank=2))
    for adapter in attach.adapters_of(model, "wiki").values():
        torch.nn.init.normal_(adapter.B)
    each = with_copied_layers(model, MAP)
    assert len(attach.adapters_of(each, "wiki")) == 2 * len(MAP) and not each.x0_lambdas.requires_grad
    assert torch.equal(each(idx), with_layer_map(model, MAP)(idx))
    assert (attach.plain_model(each)(idx) - each(idx)).abs().max() < 1e-5


def test_tied_layers_count_once_as_parameters_and_every_time_as_flops():
    model = tiny(value_embeddings=True, **LOW)
    once, tied, each = (
        account(m) for m in (model, with_layer_map(model, MAP), with_copied_layers(model, MAP))
    )
    assert tied["params/total"] == once["params/total"] + 2 * 2  # two more positions, two scalars each
    assert (
        each["params/total"]
        == sum(p.numel() for p in with_copied_layers(model, MAP).parameters())
        > tied["params/total"]
    )
    assert tied["flops/per_token"] == each["flops/per_token"] > 1.5 * once["flops/per_token"]
