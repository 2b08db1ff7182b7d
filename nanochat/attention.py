"""Causal attention within a window: which kernel serves which device stands here.

On a CPU: blocks of queries where a gradient is taken (cpu.py), else torch's scaled_dot_product_attention,
SDPA. On a GPU:

    kernel  what it is                            the whole context   a window
    cudnn   cuDNN, by SDPA                        causal              -
    flash   FlashAttention, by SDPA               causal              -
    varlen  FlashAttention, by torch's varlen     causal              skips what no query sees
    flex    FlexAttention, in compiled blocks     causal              skips what no query sees
    mask    SDPA, torch's choice without cuDNN    causal              computes all, and masks

Shapes: B batch, H heads, K key/value heads, G = H/K heads that share keys, T time, S keys, D head dim.
"""

import contextlib
import inspect
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat import cpu
from nanochat.errors import InputError

# ---- which kernel ------------------------------------------------------------------------------------------

KERNELS = ("mask", "flash", "cudnn", "flex", "varlen")  # of a GPU
WITHOUT_WINDOWS = ("flash", "cudnn")
LARGEST_HEAD_DIM = 256  # of all kernels but mask

# Of these a layer takes the first that its GPU has. On an H100 cuDNN's forward pass is 1.7 times as fast as
# FlashAttention 2 and as a kernel in Triton, as FlexAttention is one (arXiv 2407.08608, figure 5: head dim
# 128, 2048 tokens). By these figures a layer with a window of half the context takes longer than one without.
FULL = ("cudnn", "flash", "mask")
WINDOW = ("varlen", "flex", "mask")

# What `choose_kernels` chose for this process's GPU: (within a window, with a gradient, compiled) -> kernel
chosen: dict[tuple[bool, bool, bool], str] = {}
varlen_options: dict[str, bool] = {}


class GPU(NamedTuple):
    """What decides which kernels there are."""

    capability: tuple[int, int]  # (9, 0) for an H100
    cudnn: int  # its version: 91500 for 9.15
    varlen: frozenset[str]  # arguments of torch's varlen attention
    bfloat16: bool = True  # or float16: what is computed there
    amd: bool = False

    @property
    def kernels(self) -> set[str]:
        """The kernels that run there."""
        names = {"mask"}
        if self.bfloat16 and self.capability >= (8, 0):
            names |= {"flash", "flex"}
            if "window_size" in self.varlen and not self.amd:  # from torch 2.11 on
                names.add("varlen")
            trusted = self.capability[0] in (9, 10) and self.cudnn >= 91500  # by torch itself
            if trusted and not self.amd:
                names.add("cudnn")
        return names

    def kernel(self, requested: str, windowed: bool, with_grad: bool, compiled: bool) -> str:
        """The kernel of a layer. requested: one of KERNELS, for the layers that it can serve, or auto."""
        order: tuple[str, ...] = WINDOW if windowed else FULL
        if requested != "auto" and not (windowed and requested in WITHOUT_WINDOWS):
            order = (requested, *order)
        usable = self.kernels
        if not with_grad:  # of many lengths, for each of which cuDNN would make a plan
            usable = usable - {"cudnn"}
        if not compiled:
            usable = usable - {"flex"}
        return next(kernel for kernel in order if kernel in usable)


def this_gpu(device) -> GPU:
    varlen: frozenset[str] = frozenset()
    with contextlib.suppress(ImportError):  # before torch 2.10
        from torch.nn.attention.varlen import varlen_attn

        varlen = frozenset(inspect.signature(varlen_attn).parameters)
    cudnn = torch.backends.cudnn.version() or 0
    amd = torch.version.hip is not None
    return GPU(torch.cuda.get_device_capability(device), cudnn, varlen, amd=amd)


def choose_kernels(device, requested: str = "auto", dtype=torch.bfloat16):
    """Choose the kernels of this process. InputError where the machine has not the one asked for.

    requested: --attn-kernel. dtype: of the training, which a kernel that is asked for has to compute.
    """
    if device.type != "cuda":
        if requested != "auto":
            raise InputError(f"--attn-kernel {requested}: a kernel of GPUs; on a CPU use auto")
        return
    torch.backends.cuda.enable_cudnn_sdp(False)  # else SDPA takes it for generation, too
    gpu = this_gpu(device)
    here = sorted(gpu._replace(bfloat16=dtype.itemsize == 2).kernels)
    if requested not in ("auto", *here):
        name = torch.cuda.get_device_name(device)
        raise InputError(
            f"--attn-kernel {requested}: not on {name} with torch {torch.__version__} in "
            f"{str(dtype).removeprefix('torch.')}; use auto or one of {', '.join(here)}"
        )
    for windowed, with_grad, compiled in product((False, True), repeat=3):
        chosen[windowed, with_grad, compiled] = gpu.kernel(requested, windowed, with_grad, compiled)
    if "enable_gqa" in gpu.varlen:  # without it, torch 2.11 takes grouped heads as they are
        varlen_options["enable_gqa"] = True


# ---- attention ---------------------------------------------------------------------------------------------


def window_mask(T: int, window: int, device):
    """(T, T) bool, True where query i sees key j: i - window < j <= i."""
    return torch.ones(T, T, dtype=torch.bool, device=device).tril().triu(1 - window)


@lru_cache(maxsize=8)
def block_mask(T: int, window: int, device):
    """The same for FlexAttention: which blocks of scores it computes, and what it masks in them."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b, h, i, j):
        return (i >= j) & (i - j < window)

    with torch.inference_mode(False):  # what is kept here serves training
        return create_block_mask(sees, None, None, T, T, device=device)


def compiled_window(window, x, head_dim: int):
    """The window as compiled blocks take it, x: (B, T, C), their input.

    On a CPU a 0-d tensor: one compilation serves all windows. For FlexAttention its block mask, made once.
    """
    T = x.size(1)
    if not isinstance(window, int):
        return window
    if not x.is_cuda:
        return torch.tensor(window) if cpu.by_blocks(T, window) else window
    fits = x.element_size() == 2 and head_dim <= LARGEST_HEAD_DIM
    by_flex = fits and chosen.get((window < T, True, True)) == "flex"
    return block_mask(T, window, x.device) if by_flex else window


def attention(q, k, v, scale: float, window=None, kernel: str | None = None):
    """softmax(scale · q kᵀ) v over the keys that a query sees, (B, T, H·D).

    q: (B, H, T, D), k and v: (B, K, S, D). window: how many keys a query sees, up to its own; or a bool mask,
    (T, S) or (B, 1, T, S), True where a query sees a key; None: all keys up to its own or, where S > T, all.
    Compiled code gets it from `compiled_window`. kernel: instead of the one that was chosen.
    """
    B, H, T, D = q.shape
    head_dim = max(16, D + -D % 8)  # the kernels take 16, 24, 32, …; channels of zeros change nothing
    if q.is_cuda and head_dim != D:
        q, k, v = (F.pad(x, (0, head_dim - D)) for x in (q, k, v))
        return attention(q, k, v, scale, window, kernel).unflatten(2, (H, head_dim))[..., :D].flatten(2)
    mask = window if isinstance(window, torch.Tensor) and window.ndim else None
    causal = mask is None and k.size(2) == T
    window = T if window is None else window
    windowed = causal and isinstance(window, int) and window < T
    with_grad = torch.is_grad_enabled()
    grouped = k.size(1) < H
    if not isinstance(window, (int, torch.Tensor)):
        kernel = "flex"
    elif kernel is None and not q.is_cuda:
        kernel = "cpu" if with_grad and causal and cpu.by_blocks(T, window) else "mask"
    elif kernel is None:
        fits = causal and q.element_size() == 2 and D <= LARGEST_HEAD_DIM
        key = (windowed, with_grad, torch.compiler.is_compiling())
        kernel = chosen.get(key, "mask") if fits else "mask"

    if kernel == "cpu":
        return cpu.BlockAttention.apply(q, k, v, torch.as_tensor(window), scale)
    if kernel == "varlen":  # its rows are those of the batch, one after the other: (B·T, H, D)
        from torch.nn.attention.varlen import varlen_attn  # loads torch's compiler

        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        starts = torch.arange(0, B * T + 1, T, device=q.device, dtype=torch.int32)
        sides = (window - 1 if windowed else -1, 0)  # keys to the left and to the right of a query's own
        y = varlen_attn(q, k, v, starts, starts, T, T, scale=scale, window_size=sides, **varlen_options)
        return y.view(B, T, H * D)
    if kernel == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        blocks = block_mask(T, window, q.device) if isinstance(window, int) else window
        y = flex_attention(q, k, v, block_mask=blocks, scale=scale, enable_gqa=grouped)
        return y.transpose(1, 2).flatten(2)

    separate = grouped and kernel == "mask" and q.is_cuda  # there SDPA has no fast kernel for groups
    if separate and T == 1:  # heads that share keys become queries of one
        q = q.unflatten(1, (-1, H // k.size(1))).flatten(2, 3)  # (B, K, G, D)
    elif separate:
        k, v = (x.repeat_interleave(H // x.size(1), dim=1) for x in (k, v))
    if windowed:
        mask = q.new_ones(T, T, dtype=torch.bool).tril().triu(1 - window)  # as `window_mask`
    backend = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if kernel == "cudnn" else contextlib.nullcontext()
    with backend:
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped and not separate
        )
    return y.unflatten(2, (-1, T)).flatten(1, 2).transpose(1, 2).flatten(2)
