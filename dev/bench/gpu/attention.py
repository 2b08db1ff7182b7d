"""Item 3: attention alone at d20's shape, forward and backward, by each kernel of nanochat/attention.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from gpu import models
from gpu.runner import Setting
from nanochat.attention import KERNELS, WITHOUT_WINDOWS, attention, chosen
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

    def pairs(self, windowed: bool) -> int:
        """How many keys all queries of a head see together."""
        window = self.window if windowed else self.T
        return self.T * window - window * (window - 1) // 2


def measure(setting: Setting):
    config = models.dense_config(setting.tiny)
    D = config.n_embd // config.n_head
    shape = Shape(setting.rows, config.n_head, config.sequence_len, D, config.window(0))
    entries = {}
    runs = {}
    outputs = {}
    for name, kernel in kernels_of(setting, shape).items():
        try:
            runs[name], outputs[name] = passes(kernel, shape, setting)
        except Exception as error:  # a kernel that torch, or the card, does not have
            entries[name] = {"missing": f"{type(error).__name__}: {first_line(error)[:160]}"}
            yield entries
    seconds = take_turns(runs, 2 if setting.tiny else REPEATS, setting.device, SAMPLE_SECONDS)
    for name, measured in seconds.items():
        windowed = name.startswith("S")
        flops = 4 * shape.B * shape.H * shape.D * shape.pairs(windowed)
        whole = [a + b for a, b in zip(measured["forward"], measured["backward"])]
        entries[name] = {
            "forward": spread(measured["forward"]),
            "backward": spread(measured["backward"]),
            "whole": spread(whole),
            "flops per second": 3.5 * flops / spread(whole)["median"],  # 2.5 times as many backward
            "difference": difference(outputs[name], outputs.get(f"{name[0]}: mask")),
            "as in training": name[3:] == chosen_kernel(windowed),
        }
    yield entries


def chosen_kernel(windowed: bool) -> str | None:
    """What `choose_kernels` chose for compiled training."""
    return chosen.get((windowed, True, True))


def difference(output, reference) -> float | None:
    if reference is None:
        return None
    return ((output - reference).norm() / reference.norm()).item()


def passes(kernel: Callable, shape: Shape, setting: Setting) -> tuple[dict, torch.Tensor]:
    """({"forward", "backward": function}, an output (B, T, H·D) in float32) of a kernel."""
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
    """{name: (q, k, v) -> (B, T, H·D)}. S: a window of half the context, L: all of it."""
    scale = 1 / math.sqrt(shape.D)
    if setting.device_type != "cuda":
        by_blocks = {f"{layer}: cpu": partial(attention, scale=scale) for layer in "SL"}
        by_blocks["S: cpu"] = partial(attention, scale=scale, window=shape.window)
        return by_blocks
    kernels = {}
    for layer, window in (("S", shape.window), ("L", shape.T)):
        for kernel in KERNELS:
            if layer == "S" and kernel in WITHOUT_WINDOWS:
                continue
            run = partial(attention, scale=scale, window=window, kernel=kernel)
            if kernel == "flex":  # uncompiled it would hold all scores
                run = torch.compile(run, dynamic=False, fullgraph=True)
            kernels[f"{layer}: {kernel}"] = run
    return kernels
