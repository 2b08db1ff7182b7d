"""One new token for each row, by a forward pass of its own: made to be replayed as a CUDA graph.

`GPT.forward` launches about a thousand small kernels for one token, and a GPU waits for most of them. Here
the weights are joined and cast once, and all that changes from token to token stands in tensors that keep
their place: the tokens, their position, the cache. So the kernels of one token are recorded once and then
started together for each token after it. A recording reads a fixed part of the cache, and a bias hides the
slots in it that a query must not see. A text that outgrows this part needs the next recording.

Shapes as in gpt.py; G = H/K heads that share keys, S slots of the cache, n slots that a step reads.
"""

import math
import sys

import torch
import torch.nn.functional as F

from nanochat.cpu import few_rows_by_mkl
from nanochat.errors import first_line
from nanochat.gpt import GPT, SCORE_SCALE, Block, Linear, LowRankLinear
from nanochat.ops import linear, logits

STRIDE = 256  # lengths of the cache that share a recording


# ---- weights -----------------------------------------------------------------------------------------------


class PackedLinear:
    """A layer's factors in the dtype of the products; a full-rank layer has one."""

    def __init__(self, layer, dtype):
        self.first = (layer.A if layer.rank else layer.weight).to(dtype)  # (r, in), or (out, in)
        self.second = layer.B.to(dtype) if layer.rank else None  # (out, r)
        self.act = F.silu if layer.rank and layer.act == "silu" else None

    def __call__(self, x):  # (B, in) -> (B, out)
        return self.finish(linear(x, self.first))

    def finish(self, h):
        """h: (B, r), the first factor's product -> (B, out)."""
        if self.second is None:
            return h
        return linear(self.act(h) if self.act else h, self.second)

    def add_to(self, residual, x):
        """residual: (B, out) += the output for x: (B, in), in the launch of the last product."""
        last = self.first
        if self.second is not None:
            x = linear(x, self.first)
            x = self.act(x) if self.act else x
            last = self.second
        return residual.addmm_(x, last.T)


class PackedProjections:
    """q, k and v: their first factors as one matrix, and second factors of one shape as one batch."""

    def __init__(self, layers, dtype):
        self.layers = [PackedLinear(layer, dtype) for layer in layers]
        self.ranks = [len(layer.first) for layer in self.layers]
        self.first = torch.cat([layer.first for layer in self.layers])  # (rq + rk + rv, C)
        seconds = [layer.second for layer in self.layers]
        self.batch = None
        if all(second is not None and second.shape == seconds[0].shape for second in seconds):
            self.batch = torch.stack(seconds).mT  # (3, r, out)

    def __call__(self, x):
        """(B, C) -> (B, H·D + 2·K·D)."""
        h = linear(x, self.first)
        if self.batch is not None:
            act = self.layers[0].act
            h = act(h) if act else h
            h = h.unflatten(1, (3, -1)).transpose(0, 1)  # (3, B, r)
            return torch.bmm(h, self.batch).transpose(0, 1).flatten(1)
        if all(layer.second is None for layer in self.layers):
            return h
        parts = zip(self.layers, h.split(self.ranks, dim=1))
        return torch.cat([layer.finish(part) for layer, part in parts], dim=1)


class PackedBlock:
    def __init__(self, block: Block, dtype):
        attn = block.attn
        self.window = block.window
        self.project = PackedProjections((attn.q, attn.k, attn.v), dtype)
        self.o = PackedLinear(attn.o, dtype)
        self.up = PackedLinear(block.mlp.up, dtype)
        self.down = PackedLinear(block.mlp.down, dtype)


def can_pack(model: GPT, dtype) -> bool:
    """Whether a `Decoder` can take the place of `GPT.forward`.

    Weights that are trained would change after they are packed. Adapters are modules around the matrices. On
    a CPU products in bfloat16 keep the rounding, so the tokens, that they have in `GPT.forward`.
    """
    if any(p.requires_grad for p in model.parameters()):
        return False
    if model.wte.weight.device.type == "cpu" and dtype.itemsize < 4:
        return False
    for block in model.blocks:
        attn = block.attn
        for layer in (attn.q, attn.k, attn.v, attn.o, block.mlp.up, block.mlp.down):
            if type(layer) not in (Linear, LowRankLinear):
                return False
    return True


# ---- the forward pass --------------------------------------------------------------------------------------


def norm(x):
    """`ops.norm` without a gradient, in one launch."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x, x.shape[-1:], eps=torch.finfo(wide).eps)


class Decoder:
    """`GPT.forward` and the last token's logits, for one new token in each row of a cache.

    cache: an `engine.KVCache` that holds a token of each row and keeps its tensors. The weights must not
    change afterwards. On a GPU a step starts one recording of its kernels, unless graphs is False.
    """

    def __init__(self, model: GPT, cache, dtype, graphs: bool = True):
        device = model.wte.weight.device
        self.model = model
        self.cache = cache
        self.dtype = dtype
        self.graphs = graphs and device.type == "cuda"
        # a CPU reads the slots that hold a token, and no others
        self.stride = 1 if device.type == "cpu" else STRIDE
        # end -> (graph, its logits); None after the first step, which loads the kernels
        self.recordings: dict[int, tuple | None] = {}
        self.padding = cache.padding  # as the recordings read it
        self.pool = None  # memory that the recordings share

        self.blocks = [PackedBlock(block, dtype) for block in model.blocks]
        self.resid_lambdas = model.resid_lambdas.to(dtype)
        self.x0_lambdas = model.x0_lambdas.to(dtype)[:, None, None]  # (P, 1, 1)
        self.smear = model.smear.to(dtype)
        rows, self.n_kv_head, slots, D = cache.keys[0].shape
        self.head_dim = D
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # the slot of the new tokens
        self.slots = torch.arange(slots, device=device)
        self.zero = torch.zeros((), dtype=dtype, device=device)
        self.hidden = torch.full((), -torch.inf, dtype=dtype, device=device)
        pair = torch.arange(0, D, 2, device=device, dtype=torch.float32)
        frequency = (4.0 * model.config.sequence_len) ** (-pair / D)  # as in `GPT.forward`
        angle = self.slots[:, None].float() * torch.cat((frequency, -frequency))  # (S, D)
        self.cos = angle.cos().to(dtype)
        self.sin = angle.sin().to(dtype)
        self.same = torch.eye(D, dtype=dtype, device=device)
        self.other = self.same.roll(D // 2, dims=0)  # exchanges the two channels of each pair

    def __call__(self, tokens):
        """tokens: (B,), those after the cache's last -> float32 logits (B, V) of the next ones.

        They enter the cache. On a GPU the next call writes over the logits.
        """
        self.tokens.copy_(tokens)
        self.position.fill_(self.cache.length)
        end = min((self.cache.length // self.stride + 1) * self.stride, len(self.slots))
        with few_rows_by_mkl(len(tokens)):
            result = self.replay(end) if self.graphs else self.forward(end)
        self.cache.length += 1
        return result

    def replay(self, end: int):
        """`forward`, from a recording that the second step up to an `end` makes."""
        if self.padding is not self.cache.padding:  # the rows were read again, with other padding
            self.padding = self.cache.padding
            self.recordings.clear()
        if end not in self.recordings:
            self.recordings[end] = None
            return self.forward(end)
        try:
            graph, result = self.recordings[end] or self.record(end)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            print(f"generates without CUDA graphs: {first_line(e)}", file=sys.stderr)
            self.graphs = False
            return self.forward(end)
        self.recordings[end] = (graph, result)
        graph.replay()
        return result

    def record(self, end: int):
        """(graph, the logits it writes). A recording runs nothing."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local")
        # the first context goes back to this stream where a recording cannot even begin
        with torch.cuda.stream(torch.cuda.current_stream()), recording:
            result = self.forward(end)
        return graph, result

    def forward(self, end: int):
        """The logits after `tokens`, as `__call__`. `position` is one of the `stride` slots before `end`."""
        model = self.model
        x = F.embedding(self.tokens, model.wte.weight).to(self.dtype)  # (B, C)
        last = self.cache.last[:, 0]
        smeared = torch.addcmul(x, self.smear, last)
        last.copy_(x)
        x0 = x = norm(smeared)
        shares = x0 * self.x0_lambdas  # (P, B, C)
        rotation = self.rotation()
        parts = {}  # window -> the slots that are read
        for window in {block.window for block in self.blocks}:
            parts[window] = self.visible_slots(window, end)
        for i, layer in enumerate(model.config.positions):
            block = self.blocks[layer]
            x = torch.addcmul(shares[i], x, self.resid_lambdas[i])
            heads = block.project(norm(x)).unflatten(1, (-1, self.head_dim))  # (B, H + 2·K, D)
            if str(layer) in model.value_embeds:
                values = F.embedding(self.tokens, model.value_embeds[str(layer)].weight)
                heads[:, -self.n_kv_head :] += values.unflatten(1, (-1, self.head_dim))
            x = block.o.add_to(x, self.attend(i, heads, rotation, *parts[block.window]))
            h = block.up(norm(x))
            x = block.down.add_to(x, F.relu(h).square())
        x = norm(x)
        output = model.wte if model.lm_head is None else model.lm_head
        low_rank = isinstance(output, LowRankLinear)
        x = linear(x, output.A) if low_rank else x  # (B, C) or (B, r)
        return logits(x, output.B if low_rank else output.weight)

    def rotation(self):
        """(D, D): multiplied from the right it rotates queries and keys by `position`, in one launch."""
        cos = self.cos.index_select(0, self.position)  # (1, D)
        sin = self.sin.index_select(0, self.position)
        return torch.addcmul(self.same * cos, self.other, sin)

    def visible_slots(self, window: int, end: int):
        """(start, bias) of the slots from start to end, which are read: (B·K, 1, n), -inf where not seen."""
        first = end - self.stride  # no position is before it
        start = max(0, first + 1 - window) // 8 * 8  # matrix units want multiples of 16 bytes
        slots = self.slots[start:end]
        visible = slots <= self.position
        if window < end:
            visible = visible & (slots > self.position - window)
        if self.cache.padding is not None:
            visible = visible & (slots >= self.cache.padding[:, None])  # (B, n)
        bias = torch.where(visible, self.zero, self.hidden).expand(len(self.tokens), -1)
        return start, bias.repeat_interleave(self.n_kv_head, dim=0)[:, None]

    def attend(self, place: int, heads, rotation, start: int, bias):
        """heads: (B, H + 2·K, D), q, k and v, which enter the cache -> (B, H·D).

        One query is a small product. Kernels of fused attention would give a head to one processor of a GPU.
        """
        keys = self.cache.keys[place]
        values = self.cache.values[place]
        B = len(heads)
        K = self.n_kv_head
        D = self.head_dim
        v = heads[:, -K:]
        qk = norm(torch.mm(heads[:, :-K].reshape(-1, D), rotation)).view(B, -1, D)
        keys.index_copy_(2, self.position, qk[:, -K:, None])
        values.index_copy_(2, self.position, v[:, :, None])
        q = qk[:, :-K].reshape(B * K, -1, D)  # (B·K, G, D)
        n = bias.size(-1)
        keys = keys.narrow(2, start, n).flatten(0, 1)  # (B·K, n, D)
        values = values.narrow(2, start, n).flatten(0, 1)
        p = torch.baddbmm(bias, q, keys.mT, alpha=SCORE_SCALE / math.sqrt(D)).softmax(-1)  # (B·K, G, n)
        return torch.bmm(p, values).view(B, -1)
