"""The model: a GPT whose linear layers are full rank or low rank, each layer with its own ranks.

Rotary positions, QK norm, relu² MLP, RMSNorm without parameters, grouped-query and sliding-window attention,
logit softcap, a learned residual scale and a learned shortcut from the embeddings at every layer, and a
learned share of the previous token's embedding (the "smear" of modded-nanogpt's records). No biases.
Master weights are float32; products run in the dtype of the activations (compute_dtype of `GPT.forward`).

What low rank saves, for the matrix `up` of an MLP of width C = 768 and M = 4·C = 3072, at rank r = C/4 = 192:

    full      y = W x      W: (M, C)                C·M      = 2,359,296 parameters
    low rank  y = B(A x)   A: (r, C), B: (M, r)     r·(C+M)  =   737,280 parameters, 31%

A parameter of a matrix costs 2 FLOPs a token in the forward pass and 4 in the backward pass. So training
costs 6 · 737,280 = 4.4 MFLOP a token instead of 14.2: the same 31%. Low rank is cheaper below the break-even
rank C·M / (C+M) = 614; for a square matrix that is C/2 = 384. Between the factors flow r numbers a token.

Shapes: B batch, T time, V vocabulary, C width, H heads, K key/value heads, D head dim, M width inside the
MLP, r rank, P positions of the stack of layers.
"""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat import ops
from nanochat.attention import attention
from nanochat.config import GPTConfig
from nanochat.ops import linear, norm, project, relu2_mlp
from nanochat.rank import resolve_rank

SCORE_SCALE = 1.6  # scores are SCORE_SCALE · q·k / √D: normalised q and k need sharper ones than the usual 1


# ---- linear layers -----------------------------------------------------------------------------------------


class Linear(nn.Module):
    """y = W x with W: (out, in), cast to the dtype of x."""

    rank = 0  # full
    keep_product = recomputed = False  # see LowRankLinear
    product = staticmethod(linear)  # in training, fp8.py may put another in its place

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x, h=None):
        """(..., in) -> (..., out). h: W x, where it has been computed with other products."""
        if h is not None:
            return h.contiguous()  # a copy of its part, to free the rest
        return self.product(x, self.weight)

    def dense_weight(self):  # (out, in)
        return self.weight

    @torch.no_grad()
    def init(self, zero: bool = False):
        """Entries uniform with variance 1/in: unit-variance inputs give unit-variance outputs."""
        bound = 0.0 if zero else math.sqrt(3 / self.in_features)
        self.weight.uniform_(-bound, bound)


class LowRankLinear(nn.Module):
    """y = B(A x) with A: (r, in), B: (out, r); the product BA is never formed.

    act = "silu": y = B silu(A x), which is no matrix.
    """

    recomputed = False  # whether the backward pass computes its block again: set by recompute.py
    keep_product = False  # whether that block keeps A x
    product = staticmethod(linear)  # see Linear

    def __init__(self, in_features: int, out_features: int, rank: int, act: str = "none"):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.act = act
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))

    def forward(self, x, h=None):
        """(..., in) -> (..., r) -> (..., out). h: A x, where it has been computed with other products."""
        h = self.product(x, self.A, self.keep_product) if h is None else h
        return self.product(F.silu(h) if self.act == "silu" else h, self.B)

    def dense_weight(self):  # (out, in)
        if self.act != "none":
            raise ValueError(f"a layer with {self.act} between its factors is not a matrix")
        return self.B @ self.A

    @torch.no_grad()
    def init(self, zero: bool = False):
        """Orthonormal rows in A and columns in B, scaled for entries of BA of variance 1/in, as in Linear.

        ||BA||_F² = s²·r must equal ||W||_F² = out: s = (out/r)^½, all in B (Spectron, arXiv 2602.12429).
        zero: B = 0, so that a residual branch starts silent while A already passes a gradient to B.
        """
        nn.init.orthogonal_(self.A)
        if zero:
            self.B.zero_()
        else:
            nn.init.orthogonal_(self.B, gain=math.sqrt(self.out_features / self.rank))


def make_linear(in_features: int, out_features: int, rank: float, act: str = "none", multiple: int = 1):
    """The layer, Linear or LowRankLinear, for a configured rank (see `resolve_rank`)."""
    r = resolve_rank(rank, in_features, out_features, multiple)
    return LowRankLinear(in_features, out_features, r, act) if r else Linear(in_features, out_features)


def block_linear(config: GPTConfig, matrix: str, layer: int):
    """The layer for q, k, v, o, up or down."""
    return make_linear(*config.matrix_shape(matrix), config.whole_rank(matrix, layer), config.factor_act)


# ---- blocks ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.q = block_linear(config, "q", layer)
        self.k = block_linear(config, "k", layer)
        self.v = block_linear(config, "v", layer)
        self.o = block_linear(config, "o", layer)

    def forward(self, x, value_embedding, rotation, window, extend=None):
        """(B, T, C) -> (B, T, C). window: as `attention` takes it.

        extend: in generation, `engine.KVCache.extend` for this position. It takes the keys and values of x,
        both (B, K, T, D), and returns them with those of earlier tokens.
        """
        D = self.head_dim
        q, k, v = project(norm(x), self.q, self.k, self.v)  # (B, T, H·D), (B, T, K·D), (B, T, K·D)
        v = v if value_embedding is None else v + value_embedding
        # rotated by position; QK norm keeps the scores bounded
        q = norm(q.unflatten(-1, (-1, D)), *rotation).transpose(1, 2)  # (B, H, T, D)
        k = norm(k.unflatten(-1, (-1, D)), *rotation).transpose(1, 2)  # (B, K, T, D)
        v = v.unflatten(-1, (-1, D)).transpose(1, 2)  # (B, K, T, D)
        if extend is not None:
            k, v = extend(k, v)
        return self.o(attention(q, k, v, SCORE_SCALE / math.sqrt(D), window))


class MLP(nn.Module):
    fused = False  # by the kernels of fused_mlp.py: set by mlp_kernel.py

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.up = block_linear(config, "up", layer)
        self.down = block_linear(config, "down", layer)

    def forward(self, x):  # (B, T, C) -> (B, T, M) -> (B, T, C)
        return relu2_mlp(norm(x), self.up, self.down, self.fused)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.window = config.window(layer)
        self.attn = Attention(config, layer)
        self.mlp = MLP(config, layer)

    def forward(self, x, x0, scales, value_embedding, rotation, window, extend=None):
        """x: (B, T, C), the residual stream; x0: the same where it began; scales: (2,), the share of each."""
        x = scales[0] * x + scales[1] * x0
        x = x + self.attn(x, value_embedding, rotation, window, extend)
        return x + self.mlp(x)


# ---- the model ---------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """Build it on a device and call `init_weights` to train, or by `rank.on_meta` to count."""

    loss = staticmethod(ops.CrossEntropy.apply)  # the loss of the head's input, its weight and the targets

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        C = config.n_embd
        V = config.vocab_size
        P = len(config.positions)
        kv_dim = config.n_kv_head * (C // config.n_head)
        self.wte = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = make_linear(C, V, config.lm_head_rank, multiple=config.rank_multiple)
        self.resid_lambdas = nn.Parameter(torch.empty(P))  # scale of the residual stream entering a position
        self.x0_lambdas = nn.Parameter(torch.empty(P))  # share of the embedding added there
        self.smear = nn.Parameter(torch.empty(C))  # share of the previous token's embedding, by channel
        tables = [layer for layer in range(config.n_layer) if config.has_value_embedding(layer)]
        self.value_embeds = nn.ModuleDict({str(layer): nn.Embedding(V, kv_dim) for layer in tables})

    @torch.no_grad()
    def init_weights(self):
        """Draw from the global generator; embeddings first: they agree between ranks under one seed."""
        nn.init.normal_(self.wte.weight)  # normalised after the lookup: only the direction matters
        if self.config.tie_embeddings:
            self.wte.weight.mul_(0.02)  # as a head it has to start with small logits
        for table in self.value_embeds.values():
            table.weight.zero_()  # rare tokens, seldom updated, would keep adding noise
        for block in self.blocks:
            for layer in (block.attn.q, block.attn.k, block.attn.v, block.mlp.up):
                layer.init()
            for layer in (block.attn.o, block.mlp.down):
                layer.init(zero=True)  # every block starts as the identity
        if self.lm_head is not None:
            self.lm_head.init(zero=True)  # every token equally likely
        self.init_scalars()

    @torch.no_grad()
    def init_scalars(self):
        self.resid_lambdas.fill_(1.0)
        self.x0_lambdas.fill_(0.1)
        self.smear.zero_()

    def forward(self, idx, targets=None, compute_dtype=torch.float32, cache=None, head=None):
        """idx: (B, T) tokens -> float32 logits (B, T, V) or, with targets (B, T), the mean loss in nats.

        cache: an `engine.KVCache` of the positions before, extended by idx. head: what to return instead, a
        function of the head's input (B, T, C), its weight (V, C) and the targets, such as `ops.token_losses`.
        """
        T = idx.size(1)
        D = self.config.n_embd // self.config.n_head
        start = 0 if cache is None else cache.length
        position = torch.arange(start, start + T, device=idx.device)  # (T,)
        # rotary embeddings (arXiv 2104.09864); the slowest pair of channels turns once in 2π · 4 contexts
        pair = torch.arange(0, D, 2, device=idx.device, dtype=torch.float32)
        frequency = (4.0 * self.config.sequence_len) ** (-pair / D)  # (D/2,)
        # (T, 1, D), the same for all heads; see `ops.RMSNorm`
        angle = position[:, None, None].float() * torch.cat((frequency, -frequency))
        rotation = angle.cos().to(compute_dtype), angle.sin().to(compute_dtype)
        windows = {block.window: block.window for block in self.blocks}
        if cache is not None:  # which of the keys that it holds a query sees
            windows = {window: cache.mask(window, T) for window in windows}

        x = self.wte(idx).to(compute_dtype)  # (B, T, C)
        previous = F.pad(x, (0, 0, 1, 0))[:, :-1] if cache is None else cache.previous(x)
        x = x + self.smear.to(compute_dtype) * previous  # pairs of tokens, before any attention
        x = x0 = norm(x)
        scales = torch.stack((self.resid_lambdas, self.x0_lambdas), dim=1).to(compute_dtype)  # (P, 2)
        for i, layer in enumerate(self.config.layer_map or range(self.config.n_layer)):
            block = self.blocks[layer]
            values = None
            if str(layer) in self.value_embeds:
                values = self.value_embeds[str(layer)](idx).to(compute_dtype)  # (B, T, K·D)
            extend = None if cache is None else partial(cache.extend, i)
            x = block(x, x0, scales[i], values, rotation, windows[block.window], extend)
        if cache is not None:
            cache.length += T

        x = norm(x)  # (B, T, C)
        output = self.wte if self.lm_head is None else self.lm_head
        low_rank = isinstance(output, LowRankLinear)
        x = linear(x, output.A) if low_rank else x  # (B, T, C) or (B, T, r)
        weight = output.B if low_rank else output.weight  # (V, C) or (V, r)
        head = head or (ops.logits if targets is None else self.loss)
        return head(x, weight.to(x.dtype), targets)

    def token_losses(self, idx, targets, compute_dtype=torch.float32):
        """Cross-entropy in nats of each target, (B, T) float32, no gradient."""
        with torch.no_grad():
            return self(idx, targets, compute_dtype, head=ops.token_losses)
