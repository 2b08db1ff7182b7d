"""Item 3: attention alone at d20's shape, forward and backward, by each kernel that torch has."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu import models
from gpu.runner import Setting
from nanochat.attention import attention, window_mask
from nanochat.benchmark import spread, take_turns
from nanochat.errors import first_line

SAMPLE_SECONDS = 0.03  # a sample is as many calls as take this long
REPEATS = 7


@dataclass(frozen=True)
class Shape:
    B: int
    H: int
    T: int
    D: int
    window: int

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.D)

    def pairs(self, windowed: bool) -> int:
        """How many keys all queries of a head see together."""
        window = self.window if windowed else self.T
        return self.T * window - window * (window - 1) // 2


def measure(setting: Setting):
    config = models.dense_config(setting.tiny)
    shape = Shape(
        setting.rows, config.n_head, config.sequence_len, config.n_embd // config.n_head, config.window(0)
    )
    kernels = kernels_of(setting, shape)
    entries = {}
    runs = {}
    outputs = {}
    for name, kernel in kernels.items():
        try:
            runs[name], outputs[name] = passes(kernel, shape, setting)
        except Exception as error:  # a kernel that torch, or the card, does not have
            entries[name] = {"missing": f"{type(error).__name__}: {first_line(error)[:160]}"}
            yield entries
    seconds = take_turns(runs, 2 if setting.tiny else REPEATS, setting.device, SAMPLE_SECONDS)
    for name, measured in seconds.items():
        windowed = name.startswith("S")
        flops = 4 * shape.B * shape.H * shape.D * shape.pairs(windowed)
        reference = outputs.get("S: mask" if windowed else "L: cuDNN, causal")
        whole = [a + b for a, b in zip(measured["forward"], measured["backward"])]
        entries[name] = {
            "forward": spread(measured["forward"]),
            "backward": spread(measured["backward"]),
            "whole": spread(whole),
            "flops per second": 3.5 * flops / spread(whole)["median"],  # 2.5 times as many backward
            "difference": difference(outputs[name], reference),
        }
    yield entries


def difference(output, reference) -> float | None:
    if reference is None:
        return None
    return ((output - reference).norm() / reference.norm()).item()


def passes(kernel: Callable, shape: Shape, setting: Setting) -> tuple[dict, torch.Tensor]:
    """({"forward", "backward": function}, an output (B, H, T, D) in float32) of a kernel."""
    generator = torch.Generator(setting.device).manual_seed(0)
    size = (3, shape.B, shape.H, shape.T, shape.D)
    tensors = torch.randn(size, device=setting.device, dtype=setting.dtype, generator=generator).unbind()
    q, k, v = (tensor.requires_grad_() for tensor in tensors)
    y = kernel(q, k, v)
    grad = torch.randn(y.shape, device=setting.device, dtype=setting.dtype, generator=generator)

    def backward():
        torch.autograd.grad(y, (q, k, v), grad, retain_graph=True)

    backward()
    return {"forward": lambda: kernel(q, k, v), "backward": backward}, y.detach().float()


def kernels_of(setting: Setting, shape: Shape) -> dict[str, Callable]:
    """{name: (q, k, v) -> (B, H, T, D)}. S: a window of half the context, L: all of it."""
    mask = window_mask(shape.T, shape.window, setting.device)

    def library(backend, **options):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, scale=shape.scale, **options)

        return run

    def ours(mask):
        def run(q, k, v):
            y = attention(q, k, v, shape.scale, mask)  # (B, T, H·D)
            return y.unflatten(-1, (shape.H, shape.D)).transpose(1, 2)

        return run

    kernels = {"L: as in training": ours(None), "S: as in training": ours(mask)}
    if setting.device_type != "cuda":
        math_only = SDPBackend.MATH
        return kernels | {"S: mask": library(math_only, attn_mask=mask)}
    return kernels | {
        "L: cuDNN, causal": library(SDPBackend.CUDNN_ATTENTION, is_causal=True),
        "L: flash, causal": library(SDPBackend.FLASH_ATTENTION, is_causal=True),
        "S: mask": library(SDPBackend.CUDNN_ATTENTION, attn_mask=mask),
        "S: FlexAttention": flex(setting, shape),
        "S: varlen, window": varlen(shape),
    }


def flex(setting: Setting, shape: Shape) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def sees(batch, head, query, key):
        return (key <= query) & (query - key < shape.window)

    blocks = create_block_mask(sees, None, None, shape.T, shape.T, device=setting.device)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks, scale=shape.scale)


def varlen(shape: Shape) -> Callable:
    """Rows one after the other, (B·T, H, D), as torch's varlen attention wants them."""

    def run(q, k, v):
        from torch.nn.attention.varlen import varlen_attn  # torch 2.10 and later

        starts = torch.arange(0, (shape.B + 1) * shape.T, shape.T, device=q.device, dtype=torch.int32)
        packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        window = (shape.window - 1, 0)
        y = varlen_attn(*packed, starts, starts, shape.T, shape.T, scale=shape.scale, window_size=window)
        return y.unflatten(0, (shape.B, shape.T)).transpose(1, 2)

    return run
