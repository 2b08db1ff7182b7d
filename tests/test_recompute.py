"""Recomputation: the same losses and gradients to the bit, and fewer activations kept."""

from dataclasses import replace

import pytest
import torch
from test_gpt import live_bytes, tiny, tokens

from nanochat import recompute
from nanochat.adapters.attach import AdapterConfig, adapters_of, attach
from nanochat.compiler import compile_blocks
from nanochat.engine import GREEDY, generate
from nanochat.gpt import Block
from nanochat.recompute import RecomputedBlock
from nanochat.subspace.config import SubspaceConfig
from nanochat.subspace.model import attach as attach_subspace

LOW = dict(attn_ranks=(8,) * 3, mlp_ranks=(8,) * 3)
SHAPES = {
    "full": {},
    "low": LOW,
    "mixed": dict(matrix_ranks={"v": (4,) * 3, "down": (4, 0, 4), "up": (0, 4, 4)}),
    "attention only": dict(attn_ranks=(8,) * 3),
    "silu": LOW | dict(factor_act="silu"),
    "value embeddings": LOW | dict(value_embeddings=True, n_kv_head=2),
    "tied map": LOW | dict(layer_map=(0, 0, 1, 2, 2)),
}


def saved_bytes(function) -> int:
    """Bytes that live on once the function has returned."""
    return live_bytes(function)[1]


def result(model, idx):
    """[loss, every gradient]."""
    loss = model(idx, idx)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("mode", ["bottleneck", "block"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_bit_of_loss_or_gradient_changes(shape, mode):
    changes = SHAPES[shape]
    idx = tokens(2, 16)
    plain = result(tiny(**changes), idx)
    again = result(tiny(**changes, recompute=mode), idx)
    assert len(plain) == len(again) and all(map(torch.equal, plain, again))


def test_which_blocks_recompute_and_what_they_keep():
    kinds = {}
    for name, changes in (("full", {}), ("last", dict(matrix_ranks={"down": (0, 0, 4)}))):
        for mode in recompute.MODES:
            model = tiny(**changes, recompute=mode)
            kinds[name, mode] = [isinstance(block, RecomputedBlock) for block in model.blocks]
    no = [False] * 3
    yes = [True] * 3
    assert [kinds["full", mode] for mode in recompute.MODES] == [no, no, yes]
    assert [kinds["last", mode] for mode in recompute.MODES] == [no, [False, False, True], yes]
    model = tiny(**LOW, recompute="bottleneck")
    assert all(block.attn.q.keep_product and block.mlp.down.keep_product for block in model.blocks)
    model.config = replace(model.config, recompute="block")
    recompute.apply(model)
    assert not any(block.attn.q.keep_product or block.mlp.down.keep_product for block in model.blocks)
    recompute.remove(model)
    assert all(type(block) is Block for block in model.blocks)


@pytest.mark.parametrize(
    "shape,mode,numbers",
    [
        ("low", "bottleneck", 32 + 6 * 8),  # the block's input, and six products r wide
        ("low", "block", 32),
        ("full", "block", 32),
        ("attention only", "bottleneck", 32 + 4 * 8),
        ("value embeddings", "block", 32 + 16),  # the values that are added at layer 0
    ],
)
def test_a_block_keeps_what_it_says(shape, mode, numbers):
    """Numbers a token that one more layer of the same kind keeps."""
    idx = tokens(4, 64)
    kept = []
    for layers in ((0, 1, 2), (0, 1, 2, 0, 0)):
        model = tiny(**SHAPES[shape] | dict(layer_map=layers, sequence_len=64), recompute=mode)
        model(idx, idx).backward()  # what is kept from pass to pass is there
        kept.append(saved_bytes(lambda: model(idx, idx)))
    assert (kept[1] - kept[0]) / (2 * idx.numel() * 4) == pytest.approx(numbers, abs=0.5)


@pytest.mark.parametrize("mode", ["bottleneck", "block"])
def test_evaluation_and_generation_do_not_change(mode):
    plain = tiny(**LOW)
    again = tiny(**LOW, recompute=mode)
    idx = tokens(2, 16)
    assert torch.equal(plain.token_losses(idx, idx), again.token_losses(idx, idx))
    texts = [list(generate(model, [[1, 2, 3], [4]], 6, GREEDY)) for model in (plain, again)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("mode", ["bottleneck", "block"])
@pytest.mark.parametrize("kind", ["lora", "ia3", "adalora"])
def test_adapted_models_recompute(kind, mode):
    results = []
    for choice in ("none", mode):
        model = tiny(**LOW, recompute=choice)
        idx = tokens(2, 16)
        attach(model, "a", AdapterConfig(kind, rank=2))
        for adapter in adapters_of(model, "a").values():
            for p in adapter.parameters():
                p.data += 0.1
        results.append(result(model, idx))
    assert isinstance(model.blocks[0], RecomputedBlock) and all(map(torch.equal, *results))


def test_with_dropout_nothing_is_recomputed_since_other_numbers_would_be_dropped():
    model = tiny(**LOW, recompute="bottleneck")
    attach(model, "a", AdapterConfig("lora", rank=2, dropout=0.1))
    assert all(type(block) is Block for block in model.blocks)


@pytest.mark.parametrize("kind", ["basis", "fastfood"])
def test_blocks_of_a_subspace_recompute(kind):
    results = []
    for mode in ("none", "block"):
        model = tiny(recompute=mode)
        attach_subspace(model, SubspaceConfig(kind, 3))
        results.append(result(model, tokens(2, 16)))
    assert isinstance(model.blocks[0], RecomputedBlock) and all(map(torch.equal, *results))


@pytest.mark.long
@pytest.mark.parametrize("shape, mode", [("full", "block"), ("mixed", "bottleneck"), ("silu", "bottleneck")])
def test_compiled_blocks_recompute(shape, mode):
    torch._dynamo.reset()
    idx = tokens(2, 16)
    results = []
    for compiled in (False, True):
        model = tiny(**SHAPES[shape], window_pattern="L", recompute=mode)
        if compiled:
            compile_blocks(model, backend="aot_eager")
        results.append(result(model, idx))
    torch._dynamo.reset()
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-3)
