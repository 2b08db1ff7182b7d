"""Decoding by a forward pass of its own, and its recordings, against `GPT.forward`."""

import null_gpu
import pytest
import torch
from test_engine import LOW, PROMPTS, greedy_texts, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from nanochat import engine
from nanochat.adapters.attach import AdapterConfig, attach
from nanochat.decode_graph import Decoder, can_pack
from nanochat.engine import GREEDY, generate, next_logits, prefill

MODELS = {
    "full rank": {},
    "low rank": LOW,
    "equal ranks in silu layers": dict(attn_ranks=(4, 8, 16), factor_act="silu"),
    "every rank another": {**LOW, "factor_act": "silu", "matrix_ranks": {"v": (3, 0, 8)}, "mlp_ratio": 1.5},
    "layers used twice, value embeddings": dict(layer_map=(0, 1, 1, 2, 0), value_embeddings=True),
    "grouped queries": dict(n_kv_head=2, value_embeddings=True),
    "grouped queries of low rank": {**LOW, "n_kv_head": 2},
    "one key head, windows, tied": dict(window_pattern="S", n_kv_head=1, tie_embeddings=True),
    "layer map of low rank, tied": dict(attn_ranks=(4, 8, 16), layer_map=(2, 1, 0), tie_embeddings=True),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    return tiny(**request.param)


class Recording:
    """Calls a decoder again. Like a graph it reads tensors in their places and writes its result into one."""

    def __init__(self, decoder, end):
        self.decoder = decoder
        self.end = end
        self.places = self.state()
        self.result = torch.full((len(decoder.tokens), 50), torch.nan, dtype=torch.float64)

    def state(self) -> list:
        cache = self.decoder.cache
        tensors = [*cache.keys, *cache.values, cache.last, cache.padding]
        return [None if tensor is None else tensor.data_ptr() for tensor in tensors]

    def replay(self):
        assert self.state() == self.places
        self.result.copy_(self.decoder.forward(self.end))


@pytest.fixture
def recorded_ends(monkeypatch):
    """Steps read the cache in parts of 4 slots and are recorded, as on a GPU. Returns what was recorded."""
    ends = []

    class GPUDecoder(Decoder):
        def __init__(self, *args):
            super().__init__(*args)
            self.graphs = True
            self.stride = 4

        def record(self, end):
            ends.append(end)
            recording = Recording(self, end)
            return recording, recording.result

    monkeypatch.setattr(engine, "Decoder", GPUDecoder)
    return ends


@pytest.mark.parametrize("stride", [1, 4, 5, 64])
@pytest.mark.parametrize("prompts", [PROMPTS[1:2], PROMPTS], ids=["one row", "padded rows"])
def test_logits_equal_those_of_the_model(model, prompts, stride):
    """Over all lengths of the cache, and again when it has been read again from other places."""
    _, expected_cache = prefill(model, prompts, 16, torch.float64)
    _, cache = prefill(model, prompts, 16, torch.float64)
    for tensor in cache.keys + cache.values:
        tensor[:, :, cache.length :] = 7  # no query sees it
    decode = Decoder(model, cache, torch.float64)
    decode.stride = stride
    for again in ([prompt[:3] for prompt in prompts], None):
        while cache.length < 16:
            tokens = torch.randint(0, 50, (len(prompts),))
            expected = next_logits(model, tokens[:, None], torch.float64, expected_cache)
            torch.testing.assert_close(decode(tokens), expected, atol=1e-12, rtol=0)
        if again:
            _, expected_cache = prefill(model, again, 16, torch.float64)
            prefill(model, again, 16, torch.float64, cache)


def test_recorded_text_is_that_of_each_prompt_computed_anew(model, recorded_ends):
    """Over parts and windows, and far past the context of 16, where rows are cropped and read again."""
    prompts = [PROMPTS[0], PROMPTS[1][:6], PROMPTS[2], list(range(40))]  # the last is cropped to 9
    expected = greedy_texts(model, prompts)
    steps = list(generate(model, prompts, 28, GREEDY, dtype=torch.float64))
    assert [list(row) for row in zip(*steps)] == expected
    assert set(recorded_ends) == {12, 16}


# ---- recordings


def test_a_part_is_recorded_at_its_second_step_once(recorded_ends):
    model = tiny()
    _, cache = prefill(model, [[1, 2, 3], [4, 5, 6]], 16, torch.float64)
    decode = engine.token_decoder(model, cache, torch.float64)
    counts = []
    while cache.length < 16:
        decode(torch.tensor([7, 8]))
        counts.append(len(recorded_ends))
    assert counts == [0, *[0, 1, 1, 1], *[1, 2, 2, 2], *[2, 3, 3, 3]] and recorded_ends == [8, 12, 16]
    for prompts, expected in (
        ([[6, 5, 4], [3, 2, 1]], [8, 12, 16, 4]),  # read again; a second step in the first part
        ([[6, 5, 4], [3]], [8, 12, 16, 4, 8]),  # a mask hides padding now: all anew
        ([[6, 5, 4], [3, 2]], [8, 12, 16, 4, 8, 4]),  # as before
    ):
        prefill(model, prompts, 16, torch.float64, cache)
        for _ in range(5):
            decode(torch.tensor([7, 8]))
        assert recorded_ends[: len(expected)] == expected, prompts


def test_where_nothing_can_be_recorded_text_is_generated_all_the_same(recorded_ends, monkeypatch, capsys):
    model = tiny()
    expected = list(generate(model, PROMPTS, 5, GREEDY, dtype=torch.float64))

    def fail(self, end):
        raise error

    monkeypatch.setattr(engine.Decoder, "record", fail)
    error = RuntimeError("capture failed\nand more")
    assert list(generate(model, PROMPTS, 5, GREEDY, dtype=torch.float64)) == expected
    assert capsys.readouterr().err == "generates without CUDA graphs: capture failed\n"
    error = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        list(generate(model, PROMPTS, 5, GREEDY, dtype=torch.float64))


class Operations(TorchDispatchMode):
    """Every operation with its arguments, a tensor by what a recording keeps of it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, tree_map(describe, (args, kwargs))))
        return func(*args, **(kwargs or {}))


def describe(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
    return value


@pytest.mark.parametrize("prompts", [PROMPTS[2:], PROMPTS[1:]], ids=["one row", "padded rows"])
def test_operations_are_the_same_at_all_lengths_in_a_part(model, prompts):
    """So a recording of one serves all. None of them hands a number to the host."""
    _, cache = prefill(model, prompts, 64, torch.float64)
    decode = Decoder(model, cache, torch.float64)
    calls = []
    for length in (12, 13, 15, 16):
        decode.position.fill_(length)
        with torch.inference_mode(), Operations() as operations:
            decode.forward(16 if length < 16 else 20)
        calls.append(operations.calls)
    assert len(calls[0]) > 50 and calls[0] == calls[1] == calls[2] != calls[3]
    to_host = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
    assert to_host.isdisjoint(func for func, _ in calls[0])


# ---- models that go through GPT.forward


def test_models_that_cannot_be_packed():
    model = tiny()
    assert can_pack(model, torch.float64) and not can_pack(model, torch.bfloat16)
    attach(model, "a", AdapterConfig(rank=2))
    model.requires_grad_(False)
    assert not can_pack(model, torch.float64)
    steps = list(generate(model, PROMPTS, 8, GREEDY, dtype=torch.float64))
    assert steps == list(generate(tiny(), PROMPTS, 8, GREEDY, dtype=torch.float64))
    trained = tiny().requires_grad_(True)
    assert not can_pack(trained, torch.float64)
    before = list(generate(trained, PROMPTS, 8, GREEDY, dtype=torch.float64))
    assert before == steps
    trained.lm_head.weight.data.neg_()
    assert before != list(generate(trained, PROMPTS, 8, GREEDY, dtype=torch.float64))


# ---- on a GPU without values

STUB = """
import nullgpu
import torch
from nanochat.engine import GREEDY, Decoder, generate, prefill
from nanochat.gpt import GPT, GPTConfig

shape = dict(sequence_len=1024, vocab_size=512, n_layer=2, n_head=2, n_kv_head=2, n_embd=256)
with torch.device("cuda"):
    dense = GPT(GPTConfig(**shape)).requires_grad_(False).to(torch.bfloat16)
    low = GPT(GPTConfig(**shape, attn_ranks=(64, 64), mlp_ranks=(64, 64)))
    low = low.requires_grad_(False).to(torch.bfloat16)
for model in (dense, low):
    with torch.inference_mode():
        _, cache = prefill(model, [[1, 2, 3]], 1024, torch.bfloat16)
        decode = Decoder(model, cache, torch.bfloat16, graphs=False)
        launches = []
        torch.cuda.set_sync_debug_mode("error")
        for length in (20, 21, 600, 1000):
            cache.length = length
            tokens = torch.zeros(1, dtype=torch.long, device="cuda")
            before = nullgpu.launches()
            decode(tokens)
            launches.append(nullgpu.launches() - before)
        torch.cuda.set_sync_debug_mode("default")
    print(*launches)
    counts = [nullgpu.launches()]
    for _ in generate(model, [[1, 2, 3]], 300, GREEDY, dtype=torch.bfloat16):
        counts.append(nullgpu.launches())
    print(*(after - before for before, after in zip(counts, counts[1:])))
"""


@null_gpu.marks[0]
@null_gpu.marks[1]
def test_launches_of_a_token(tmp_path):
    """No step waits for the GPU. A token is a graph, two writes before it, argmax and a copy to the host."""
    lines = null_gpu.run_source(STUB, tmp_path)
    dense, dense_text, low, low_text = (list(map(int, line.split())) for line in lines[-4:])
    # 17 a layer, and what is done once, with a second window 3 more
    assert dense[0] == dense[1] and max(dense) <= 2 * 17 + 32
    assert low[0] == low[1] and max(low) <= 2 * 21 + 32
    if dense_text[10] == dense[0] + 2:
        pytest.skip("this stub records no CUDA graphs")
    for text in (dense_text, low_text):
        assert set(text[4:250]) == set(text[260:]) == {5}
