"""Which kernel computes attention, and that each computes the same: the window is that of `window_mask`."""

import sys
from importlib import import_module
from itertools import product

import null_gpu
import pytest
import torch
from conftest import ROOT
from torch.nn.attention.flex_attention import BlockMask

from nanochat import attention as attention_module
from nanochat.attention import (
    GPU,
    KERNELS,
    attention,
    block_mask,
    choose_kernels,
    compiled_window,
    window_mask,
)
from nanochat.errors import InputError
from nanochat.training_flags import MACHINE_GROUP

WINDOWS = frozenset(["query", "scale", "window_size"])
H100 = GPU((9, 0), 91900, WINDOWS)
H100_OLD_TORCH = GPU((9, 0), 91002, frozenset(["query", "scale"]))  # torch 2.9
A100 = GPU((8, 0), 91900, WINDOWS)
V100 = GPU((7, 0), 91900, WINDOWS)
MI300 = GPU((9, 4), 3004000, WINDOWS, amd=True)  # MIOpen's version in place of cuDNN's
EVERY_KERNEL = {"mask", "flash", "cudnn", "flex", "varlen"}


@pytest.fixture
def choices(monkeypatch):
    """What is chosen for this process, undone afterwards."""
    chosen = {}
    monkeypatch.setattr(attention_module, "chosen", chosen)
    monkeypatch.setattr(attention_module, "varlen_options", {})
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    return chosen


@pytest.fixture
def pretend_gpu():
    """A context in which tensors on the CPU take the path of a GPU."""
    folder = str(ROOT / "dev/bench")
    sys.path.insert(0, folder)
    yield import_module("pass_functions").PretendGPU
    sys.path.remove(folder)


# ---- which kernel


@pytest.mark.parametrize(
    "gpu, requested, full, window",
    [
        # with and without a gradient: compiled, uncompiled; without one blocks are never compiled
        (H100, "auto", ("cudnn", "cudnn", "flash"), ("varlen", "varlen", "varlen")),
        (A100, "auto", ("flash", "flash", "flash"), ("varlen", "varlen", "varlen")),
        (H100_OLD_TORCH, "auto", ("flash", "flash", "flash"), ("flex", "mask", "mask")),
        (V100, "auto", ("mask", "mask", "mask"), ("mask", "mask", "mask")),
        (MI300, "auto", ("flash", "flash", "flash"), ("flex", "mask", "mask")),
        (H100._replace(bfloat16=False), "auto", ("mask", "mask", "mask"), ("mask", "mask", "mask")),
        (H100, "flash", ("flash", "flash", "flash"), ("varlen", "varlen", "varlen")),
        (H100, "cudnn", ("cudnn", "cudnn", "flash"), ("varlen", "varlen", "varlen")),
        (H100, "flex", ("flex", "cudnn", "flash"), ("flex", "varlen", "varlen")),
        (H100, "varlen", ("varlen", "varlen", "varlen"), ("varlen", "varlen", "varlen")),
        (H100, "mask", ("mask", "mask", "mask"), ("mask", "mask", "mask")),
    ],
)
def test_the_kernel_of_each_kind_of_layer(gpu, requested, full, window):
    for windowed, expected in ((False, full), (True, window)):
        passes = [(True, True), (True, False), (False, False)]  # (with a gradient, compiled)
        assert tuple(gpu.kernel(requested, windowed, *each) for each in passes) == expected


def test_every_kernel_can_be_asked_for():
    (flag,) = [flag for flag in MACHINE_GROUP.flags if flag.option == "--attn-kernel"]
    assert flag.choices == ("auto", *KERNELS) and flag.free
    assert set(KERNELS) == H100.kernels == EVERY_KERNEL


def test_a_kernel_that_the_machine_has_not_is_an_error_in_a_line(choices, monkeypatch):
    with pytest.raises(InputError, match="--attn-kernel flash: a kernel of GPUs; on a CPU use auto"):
        choose_kernels(torch.device("cpu"), "flash")
    choose_kernels(torch.device("cpu"))
    assert choices == {}
    monkeypatch.setattr(attention_module, "this_gpu", lambda device: H100_OLD_TORCH)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    message = (
        r"--attn-kernel varlen: not on H100 with torch \S+ in bfloat16; use auto or one of flash, flex, mask$"
    )
    gpu = torch.device("cuda", 0)
    with pytest.raises(InputError, match=message):
        choose_kernels(gpu, "varlen")
    with pytest.raises(InputError, match="in float32; use auto or one of mask$"):
        choose_kernels(gpu, "flex", torch.float32)
    choose_kernels(gpu, "flex")
    assert choices[True, True, True] == "flex" and choices[True, False, False] == "mask"


def test_what_compiled_blocks_get(choices, pretend_gpu):
    x = torch.zeros(1, 2048, 4)
    assert compiled_window(1024, x, 128).ndim == 0 and compiled_window(2048, x, 128) == 2048
    assert compiled_window(None, x, 128) is None
    choices[True, True, True] = "flex"
    choices[False, True, True] = "cudnn"
    x16 = x.bfloat16()
    with pretend_gpu():
        assert isinstance(compiled_window(1024, x16, 128), BlockMask)
        assert compiled_window(2048, x16, 128) == compiled_window(2048, x, 128) == 2048
        for others, head_dim in ((x, 128), (x16, 512)):  # another kernel, which has to know the window
            assert compiled_window(1024, others, head_dim) == 1024


# ---- the same values


def inputs(T: int, kv_heads: int):
    """q, k, v as a block makes them: (B, T, H, D), transposed."""
    generator = torch.Generator().manual_seed(T)
    tensors = []
    for heads in (4, kv_heads, kv_heads):
        x = torch.randn(2, T, heads, 16, dtype=torch.float64, generator=generator)
        tensors.append(x.transpose(1, 2).requires_grad_())
    return tensors


def reference(q, k, v, scale, seen):
    """The whole matrix of weights. seen: (T, S) or (B, 1, T, S)."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    p = (scale * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2)


def seen_one_by_one(T: int, window: int):
    seen = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        seen[i, max(0, i - window + 1) : i + 1] = True
    return seen


def assert_same(y, expected, tensors):
    torch.testing.assert_close(y, expected)
    weight = torch.randn(y.shape, dtype=y.dtype)
    grads = [torch.autograd.grad((weight * value).sum(), tensors) for value in (y, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("T, window", [(192, 96), (192, 1), (130, 129), (65, 65)])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kernel", ["cpu", "mask", "mask on a GPU", "varlen"])
def test_a_kernel_computes_the_window(kernel, T, window, kv_heads, pretend_gpu, monkeypatch):
    q, k, v = inputs(T, kv_heads)
    expected = reference(q, k, v, 0.3, seen_one_by_one(T, window))
    if kernel == "mask on a GPU":
        with pretend_gpu():
            y = attention(q, k, v, 0.3, window, "mask")
    else:
        if kernel == "varlen":
            varlen = pytest.importorskip("torch.nn.attention.varlen")
            monkeypatch.setattr(varlen, "varlen_attn", varlen_by_definition)
        y = attention(q, k, v, 0.3, window, kernel)
    assert_same(y, expected, (q, k, v))


@pytest.mark.parametrize("D", [2, 8, 20, 100])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [4, None])
def test_on_a_gpu_every_head_dim_is_one_that_kernels_take(D, kv_heads, window, pretend_gpu, monkeypatch):
    generator = torch.Generator().manual_seed(D)
    tensors = []
    for heads in (4, kv_heads, kv_heads):
        x = torch.randn(2, heads, 24, D, dtype=torch.float64, generator=generator)
        tensors.append(x.requires_grad_())
    head_dims = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def note(q, *rest, **options):
        head_dims.append(q.size(-1))
        return sdpa(q, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", note)
    with pretend_gpu():
        y = attention(*tensors, 0.3, window)
    assert_same(y, reference(*tensors, 0.3, seen_one_by_one(24, window or 24)), tensors)
    assert head_dims == [{2: 16, 8: 16, 20: 24, 100: 104}[D]]


def varlen_by_definition(q, k, v, *lengths, scale, window_size):
    """FlashAttention's definition: query i of a row sees keys from i - left to i + right; -1 is no limit."""
    starts, key_starts, longest, longest_keys = lengths
    assert torch.equal(starts, key_starts) and starts.dtype == torch.int32 and longest == longest_keys
    left, right = window_size
    rows = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        assert end - start <= longest
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= -right) & ((distance <= left) | (left < 0))
        row = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        rows.append(reference(*row, scale, seen)[0].unflatten(-1, q.shape[1:]))
    return torch.cat(rows)


@pytest.mark.parametrize("T, window", [(192, 96), (130, 40), (300, 300)])
def test_the_block_mask_is_that_of_the_window(T, window):
    assert torch.equal(window_mask(T, window, "cpu"), seen_one_by_one(T, window))
    blocks = block_mask(T, window, torch.device("cpu"))
    i = torch.arange(T)
    seen = blocks.mask_mod(0, 0, i[:, None], i)
    assert torch.equal(seen, window_mask(T, window, "cpu"))
    computed = blocks.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert computed[:T, :T][seen].all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_computes_the_window():
    q, k, v = (x.detach() for x in inputs(192, 2))
    y = attention(q, k, v, 0.3, 96, "flex")
    torch.testing.assert_close(y, reference(q, k, v, 0.3, seen_one_by_one(192, 96)))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_on_a_gpu_queries_see_the_keys_of_a_cache(T, kv_heads, pretend_gpu, choices):
    """Whatever is chosen for training. Without a mask of its own a single query sees all keys."""
    choices.update(dict.fromkeys(product((False, True), repeat=3), "varlen"))
    q, k, v = (x.float() for x in inputs(8, kv_heads))
    q, k, v = (x.bfloat16() if T == 1 and kv_heads == 4 else x for x in (q, k, v))
    q = q[:, :, -T:]
    everything = torch.ones(T, 8, dtype=torch.bool)
    padded = torch.ones(2, 1, T, 8, dtype=torch.bool)
    padded[1, :, :, :3] = False
    for seen in (window_mask(8, 5, "cpu")[-T:], padded, everything):
        with pretend_gpu():
            y = attention(q, k, v, 0.3, None if seen is everything and T == 1 else seen)
        tolerance = 0.02 if q.dtype == torch.bfloat16 else 1e-5
        expected = reference(*(x.double() for x in (q, k, v)), 0.3, seen)
        torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


# ---- under the stub of CUDA

STUB_START = """
import torch
import nullgpu
from nanochat import attention, processes, recompute
from nanochat.compiler import compile_blocks
from nanochat.gpt import GPT, GPTConfig

device = processes.init_process("cuda").device

def build(T, layers, **changes):
    shape = dict(sequence_len=T, vocab_size=512, n_layer=layers, n_head=4, n_kv_head=2, n_embd=512)
    with torch.device(device):
        model = GPT(GPTConfig(**shape | changes))
        model.init_weights()
    recompute.apply(model)
    return model
"""

EAGER = """
def tensors(T, rows, kv_heads, dtype):
    for heads in (4, kv_heads, kv_heads):
        x = torch.zeros(rows, T, heads, 128, dtype=dtype, device=device, requires_grad=True)
        yield x.transpose(1, 2)

for kv_heads in (4, 2):
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = tensors(2048, 2, kv_heads, dtype)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        nullgpu.log(f"LOG.{dtype.itemsize}")
        attention.attention(q, k, v, 0.1, 1024).sum().backward()
        nullgpu.log(None)
        print("bytes", torch.cuda.max_memory_allocated() - before)
"""

COMPILED = """
from torch._dynamo.utils import counters

LOW = dict(attn_ranks=(128,) * 3, mlp_ranks=(128,) * 3)
for changes in ({}, LOW | dict(recompute="bottleneck"), dict(recompute="block", n_kv_head=4)):
    torch._dynamo.reset()
    counters.clear()
    model = build(192, 3, window_pattern="SSL", **changes)
    compile_blocks(model, backend="BACKEND")
    idx = torch.zeros(1, 192, dtype=torch.long, device=device)
    for _ in range(2):
        model(idx, idx, torch.bfloat16).backward()
    print("graphs", counters["stats"]["unique_graphs"], len(counters["graph_break"]))
"""

CORE = """
import numpy as np
from nanochat.core_eval import score_batch
from nanochat.engine import GREEDY, generate

model = build(256, 4)
nullgpu.log("LOG")
for length in (40, 61, 100):
    for other in (length, length - 7):  # without and with padding
        answers = [np.zeros(3, np.int32), np.zeros(2, np.int32)]
        rows = [(np.zeros(n, np.int32), answers) for n in (length, other)]
        score_batch(model, rows, torch.bfloat16)
list(generate(model, [[1] * 150, [2] * 9], 3, GREEDY, dtype=torch.bfloat16))
model.token_losses(*torch.zeros(2, 2, 256, dtype=torch.long, device=device), torch.bfloat16)
nullgpu.log(None)
"""


@pytest.mark.cuda_stub
class TestOnTheNullGPU:
    pytestmark = null_gpu.marks

    def test_a_window_never_takes_a_matrix_of_scores(self, tmp_path):
        """Neither with grouped heads nor in float32, where torch's grouped kernel would."""
        log = tmp_path / "log"
        lines = null_gpu.run_source(STUB_START + EAGER.replace("LOG", str(log)), tmp_path)
        needed = [int(line.split()[1]) for line in lines if line.startswith("bytes")]
        scores = 4 * 2 * 4 * 2048 * 2048  # in float32, of 2 rows and 4 heads
        assert len(needed) == 4 and max(needed) < scores
        kernels = log.with_suffix(".2").read_text("utf-8")
        assert "flash_fwd" in kernels and "flash_bwd" in kernels and "CUDNN" not in kernels

    def test_blocks_compile_whole_once_a_window(self, tmp_path):
        lines = null_gpu.run_source(STUB_START + COMPILED.replace("BACKEND", "aot_eager"), tmp_path)
        assert [line for line in lines if line.startswith("graphs")] == [
            "graphs 3 0"
        ] * 3  # S, L and the loss

    def test_many_lengths_make_no_plan_of_cudnn(self, tmp_path):
        log = tmp_path / "log"
        null_gpu.run_source(STUB_START + CORE.replace("LOG", str(log)), tmp_path)
        text = log.read_text("utf-8")
        assert "flash" in text and "CUDNN" not in text
