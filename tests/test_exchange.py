"""The exchange in a step: means of gradients for their owners, bits of working weights, order of buckets."""

import pytest
import torch
import torch.distributed as dist
from processes import Launched

from nanochat import recompute, shards, working_weights
from nanochat.exchange import Exchange
from nanochat.fp8 import train_in_float8
from nanochat.gpt import GPT, GPTConfig
from nanochat.processes import World
from nanochat.shards import make_buckets, shard_parameters, shards_by_owner

SHAPE = dict(sequence_len=16, vocab_size=64, n_layer=3, n_head=2, n_kv_head=2, n_embd=32)
# a matrix that is used twice in a pass, a table that is also the head, a table for each second layer
USED_TWICE = dict(
    layer_map=(0, 1, 0, 2),
    tie_embeddings=True,
    value_embeddings=True,
    attn_ranks=(4, 8, 4),
    recompute="block",
)


def make_model(seed: int = 0, float8: bool = False, **changes) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SHAPE | changes))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays zero, so that every gradient says something
            parameter += 0.02 * torch.randn(parameter.shape)
    recompute.apply(model)
    if float8:
        train_in_float8(model)
    return model


def tokens(seed: int):
    return torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(seed)).split([16, 1], dim=1)[
        0
    ]


def make_exchange(model: GPT, world: World, **options) -> Exchange:
    buckets = make_buckets(model, world.size)
    own = shards_by_owner(model, buckets)[world.rank]
    if options.pop("bfloat16", False):
        working_weights.make(model, own)
    return Exchange(model, buckets, own, world, options.get("whole", False))


def backward(model, idx, dtype=torch.float32):
    model(idx, idx, dtype).backward()


# ---- buckets ----


@pytest.mark.parametrize("processes", [2, 8])
def test_buckets_of_whole_matrices_are_full_and_hardly_padded(monkeypatch, processes):
    monkeypatch.setattr(shards, "BUCKET_ENTRIES", 2**14)
    model = make_model(n_layer=16, vocab_size=4096)
    buckets = make_buckets(model, processes)
    for bucket in buckets:
        entries = sum(bucket.size(owner) for owner in range(processes))
        assert entries == sum(p.numel() for p in bucket.parameters)
    of_muon = [bucket for bucket in buckets if bucket.uses_muon]
    assert len(of_muon) > 2
    for bucket in of_muon[:-1]:  # the last one takes what is left
        entries = sum(p.numel() for p in bucket.parameters)
        assert entries >= 2**14 and bucket.length * processes <= entries * (1 + shards.LARGEST_PADDING)


def test_buckets_follow_the_backward_pass(monkeypatch):
    monkeypatch.setattr(shards, "BUCKET_ENTRIES", 1)
    model = make_model(value_embeddings=True)
    order = [shard.name for bucket in make_buckets(model, 1) for shard in bucket.shards[0]]
    finished = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: finished.append(name))
    backward(model, tokens(1))

    def layers(names):
        return [name.split(".")[1] for name in names if name.startswith("blocks.")]

    assert layers(order) == sorted(layers(order), reverse=True) == layers(finished)
    assert order[0] == finished[0] == "lm_head.weight" and order[-1] == finished[-1] == "wte.weight"


# ---- gradients ----


def exchanged_means(changes: dict, whole: bool = False, breaks_off: bool = False):
    """In each process: two micro-steps of rows of its own. Its masters get the mean over the processes."""
    dist.init_process_group("gloo")
    shards.BUCKET_ENTRIES = 2**11
    world = World(torch.device("cpu"), dist.get_rank(), dist.get_world_size())
    model = make_model(**changes)
    plain = make_model(**changes)
    for each in (model, plain):
        each.blocks[1].mlp.up.weight.requires_grad_(False)
    exchange = make_exchange(model, world, whole=whole)
    sent_in_pass = []
    model.wte.weight.register_post_accumulate_grad_hook(lambda _: sent_in_pass.append(exchange.sent))
    for step in range(2):  # the second finds nothing left of the first
        for micro_step in range(2):
            idx = tokens(10 * step + 2 * world.rank + micro_step)
            backward(plain, idx)
            if micro_step:
                exchange.start()
            backward(model, idx)
        exchange.finish()
        squares = 0.0
        for parameter in plain.parameters():
            if parameter.requires_grad:
                mean = parameter.grad.double() / world.size
                dist.all_reduce(mean)
                squares += mean.square().sum()
                parameter.grad = mean.float()
        by_name = dict(plain.named_parameters())
        for shard in exchange.own:
            expected = shard.entries(by_name[shard.name].grad)
            torch.testing.assert_close(shard.master.grad.view(-1), expected, msg=shard.name)
        torch.testing.assert_close(exchange.norm().double(), squares.sqrt(), rtol=1e-5, atol=0)
        exchange.clear()
        plain.zero_grad()
        assert not exchange.gradients() and not any(p.grad is not None for p in model.parameters())
    if not whole:  # a pass has sent most buckets before its last gradient is there; the first micro-step none
        assert sent_in_pass[0] == sent_in_pass[2] == 0
        assert 1 < len(exchange.buckets) - 2 <= sent_in_pass[1] == sent_in_pass[3]


@pytest.mark.parametrize(
    "processes,changes,whole", [(2, {}, False), (3, USED_TWICE, False), (2, USED_TWICE, True)]
)
def test_owners_get_the_mean_of_all_processes(tmp_path, processes, changes, whole):
    output = tmp_path / "output"
    assert Launched(processes, output, exchanged_means, changes, whole).codes() == [0] * processes, (
        output.read_text()
    )


def broken_off():
    """Process 1 breaks its step off before the last micro-step; then all go on with the next step."""
    dist.init_process_group("gloo")
    shards.BUCKET_ENTRIES = 2**11
    world = World(torch.device("cpu"), dist.get_rank(), dist.get_world_size())
    model = make_model()
    exchange = make_exchange(model, world)
    backward(model, tokens(0))
    if world.rank == 0:
        exchange.start()
        backward(model, tokens(1))
    exchange.finish()
    exchange.clear()
    exchange.start()
    backward(model, tokens(2))
    exchange.finish()
    alone = make_model()
    backward(alone, tokens(2))
    by_name = dict(alone.named_parameters())
    for shard in exchange.own:
        torch.testing.assert_close(shard.master.grad.view(-1), shard.entries(by_name[shard.name].grad))


def test_a_process_that_breaks_a_step_off_leaves_nobody_waiting(tmp_path):
    output = tmp_path / "output"
    assert Launched(2, output, broken_off).codes() == [0, 0], output.read_text()


# ---- working weights ----


needs_working_weights = pytest.mark.skipif(
    not working_weights.serve(torch.bfloat16, 2), reason="from torch 2.10 on"
)
IN_FLOAT8 = dict(n_embd=128, attn_ranks=(128, 128, 0), float8=True)


@needs_working_weights
@pytest.mark.parametrize("changes", [{}, USED_TWICE, dict(lm_head_rank=8, mlp_ranks=(8, 4, 8)), IN_FLOAT8])
def test_working_weights_give_the_losses_and_gradients_of_float32_weights(changes):
    plain = make_model(**changes)
    model = make_model(**changes)
    own = shard_parameters(model, 1)[0]
    working_weights.make(model, own)
    assert model.wte.weight.dtype == torch.bfloat16 and model.smear.dtype == torch.float32
    for micro_step in range(2):
        idx = tokens(micro_step)
        both = [each(idx, idx, torch.bfloat16) for each in (plain, model)]
        assert torch.equal(*both)
        for loss in both:
            loss.backward()
    for shard, (name, parameter) in zip(own, plain.named_parameters()):
        assert torch.equal(shard.parameter.grad, parameter.grad), name
        assert shard.name == name and torch.equal(shard.master, parameter)


def test_what_products_in_float32_or_one_process_need():
    assert not working_weights.serve(torch.float32, 8) and not working_weights.serve(torch.bfloat16, 1)
    assert working_weights.serve(torch.bfloat16, 2) == hasattr(torch.Tensor, "grad_dtype")
