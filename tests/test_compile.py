"""Compilation by block: few graphs, none after the first step, the same numbers.

torch itself runs the graphs (aot_eager): what inductor makes of them needs a C++ compiler and a minute.
"""

from dataclasses import replace

import pytest
import torch

from nanochat import recompute
from nanochat.adapters.attach import AdapterConfig, adapters_of, attach
from nanochat.compiler import compile_blocks, knows_all_vector_instructions
from nanochat.engine import generate
from nanochat.gpt import GPT, GPTConfig
from nanochat.subspace.config import SubspaceConfig
from nanochat.subspace.model import attach as attach_subspace

pytestmark = pytest.mark.long
SHAPE = GPTConfig(sequence_len=16, vocab_size=50, n_layer=4, n_head=2, n_kv_head=2, n_embd=16)


def build(config) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    recompute.apply(model)
    for p in model.parameters():  # wake the zero-initialised outputs
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.fixture(autouse=True)
def counters():
    """What dynamo counts, from now on, with no graphs from before; its limit of 8 graphs for a function is
    lowered to 2, so that few layers exceed it.
    """
    from torch._dynamo.utils import counters  # slow to import

    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield counters
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "changes,graphs",
    [
        (dict(n_layer=2, value_embeddings=True), 2),  # without and with a table; the window is an argument
        (dict(n_layer=2, attn_ranks=(4,) * 2, mlp_ranks=(4,) * 2), 1),
        (
            dict(
                n_layer=2, window_pattern="L", attn_ranks=(4,) * 2, mlp_ranks=(4,) * 2, recompute="bottleneck"
            ),
            1,
        ),
        (dict(n_layer=3, window_pattern="L", attn_ranks=(1, 2, 3)), 3),  # more than the limit
    ],
)
def test_blocks_share_graphs_and_nothing_is_compiled_after_the_first_step(changes, graphs, counters):
    config = replace(SHAPE, **changes)
    eager = build(config)
    compiled = build(config)
    compile_blocks(compiled, backend="aot_eager")
    idx = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(2):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for model in (eager, compiled):
                loss = model(idx, idx)
                loss.backward()
                losses.append(loss.item())
                torch.optim.SGD(model.parameters(), 0.1).step()
                if step == 0:
                    model.zero_grad()
            compiled.token_losses(idx[:2], idx[:2])  # evaluation and sampling, in other shapes, in between
            list(generate(compiled, [[1, 2, 3]], 2))
    # and that of the loss
    assert counters["stats"]["unique_graphs"] == graphs + 1 and not counters["graph_break"]
    assert losses[::2] == pytest.approx(losses[1::2], abs=1e-4)
    for a, b in zip(eager.parameters(), compiled.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3)


def test_a_budget_keeps_less_and_changes_no_number():
    config = replace(SHAPE, n_layer=2, sequence_len=64, attn_ranks=(4,) * 2, mlp_ranks=(4,) * 2)
    idx = torch.randint(0, 50, (3, 64), generator=torch.Generator().manual_seed(1))
    kept = []
    gradients = []
    for budget in (1.0, 0.5):
        torch._dynamo.reset()
        model = build(config)
        compile_blocks(
            model, backend="aot_eager_decomp_partition", budget=budget
        )  # which keeps as inductor does
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(idx, idx)
        loss.backward()
        kept.append(sum(storages.values()))
        gradients.append([loss, *(p.grad for p in model.parameters())])
    assert kept[1] < 0.8 * kept[0]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapted_blocks_compile_whole(kind, counters):
    """The gradients are those without compilation.

    The first block, where nothing before it is trained, may have a graph of its own.
    """
    gradients = []
    idx = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(1))
    for compiled in (False, True):
        model = build(replace(SHAPE, n_layer=2, window_pattern="L"))
        attach(model, "a", AdapterConfig(kind, rank=2))
        for adapter in adapters_of(model, "a").values():
            for p in adapter.parameters():
                p.data += 0.1
        if compiled:
            compile_blocks(model, backend="aot_eager")
        model(idx, idx).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)
    assert counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]


def test_matrices_made_before_the_pass_are_inputs_of_the_graphs(counters):
    shape = replace(SHAPE, window_pattern="L")
    eager = build(shape)
    model = build(shape)
    for m in (eager, model):
        attach_subspace(m, SubspaceConfig("basis", 3))
    compile_blocks(model, backend="aot_eager")
    idx = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(0))
    for step in range(3):  # new matrices each time
        losses = [m(idx[:, :-1], idx[:, 1:]) for m in (eager, model)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, m.subspace.alpha)[0] for loss, m in zip(losses, (eager, model)))
        )
        for m in (eager, model):
            m.subspace.alpha.data[0, step] += 0.5
    assert counters["stats"]["unique_graphs"] == 2  # of the blocks and of the loss


@pytest.mark.parametrize(
    "name,version,known",
    [
        ("g++", "12", True),
        ("g++", "10.2.1", False),
        ("clang++", "14.0.6", True),
        ("clang++", "11.0", False),
        ("icpx", "2024", False),
        ("g++", "", False),
    ],
)
def test_only_a_new_compiler_is_trusted_with_all_vector_instructions(
    name, version, known, tmp_path, monkeypatch
):
    program = tmp_path / name
    program.write_text(f"#!/bin/sh\necho {version}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    assert knows_all_vector_instructions() == known
    monkeypatch.setenv("CXX", str(tmp_path / "none" / name))
    assert not knows_all_vector_instructions()
