"""The model: a GPT whose linear layers are full rank or low rank, each layer with its own ranks.

Rotary positions, QK norm, relu² MLP, RMSNorm without parameters, grouped-query and sliding-window attention, logit
softcap, a learned residual scale and a learned shortcut from the embeddings at every layer, and a learned share of the
previous token's embedding (the "smear" of modded-nanogpt's records). No biases.
Shapes: B batch, T time, V vocabulary, C width (n_embd), H heads, K key/value heads, D head dim,
N hidden width of the MLP, r rank.
Master weights are float32; the matmuls run in the dtype of the activations (`GPT.forward`'s compute_dtype).
"""

import contextlib
import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.attention import attention, mask_for
from nanochat.functional import (
    SOFTCAP,
    HeadCrossEntropy,
    SquaredReLUMLP,
    linear,
    loss_of_logits,
    norm,
    rotary_norm,
    rows_at_once,
    squashed,
)
from nanochat.whole_ranks import resolve_rank

MATRICES = ("q", "k", "v", "o", "up", "down")  # of a block, by their names
SCORE_SCALE = (
    1.6  # attention scores are SCORE_SCALE · q·k / √D: normalised q and k need sharper than the usual 1
)


@dataclass
class GPTConfig:
    """Shape of a model. A rank is 0 (full), an integer >= 1, or a fraction in (0, 1) of min(in, out).

    Checkpoints store it. Earlier ones lack a new field: its default has to be what all models were before.
    """

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    mlp_ratio: float = 4.0  # width of the MLP's hidden layer, in widths of the model
    window_pattern: str = (
        "SSSL"  # tiled over the layers: S = half the context, L = all of it; the last layer is L
    )
    attn_ranks: tuple[
        float, ...
    ] = ()  # one rank a layer, for q, k, v and the attention output; () = full everywhere
    mlp_ranks: tuple[float, ...] = ()  # one rank a layer, for both MLP matrices
    matrix_ranks: dict[str, tuple[float, ...]] = field(
        default_factory=dict
    )  # of q, k, v, o, up or down alone, where not their group's
    lm_head_rank: float = 0
    tie_embeddings: bool = False  # the output head is the token embedding
    value_embeddings: bool = False  # a V × (K·D) table added to the values of every other layer
    factor_act: str = (
        "none"  # "silu": y = B silu(A x) in the factored matrices of the blocks (CoLA, arXiv 2502.10940)
    )
    layer_map: tuple[
        int, ...
    ] = ()  # the layer that each position of the stack executes, e.g. (0, 0, 1, 1): weights tied; () = each layer once
    layer_kinds: tuple[
        str, ...
    ] = ()  # of copied layers, what each was where it was copied from (see `kind`); () = as the patterns above have it
    recompute: str = "none"  # "bottleneck": of a factored layer the backward pass keeps what is r wide, and computes the rest again
    rank_multiple: int = 1  # fractions become multiples of it; -1: of what suits a GPU

    @property
    def positions(self) -> tuple[int, ...]:
        """The layer at each position of the stack, from the embedding to the head."""
        return tuple(self.layer_map) or tuple(range(self.n_layer))

    @property
    def n_hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return round(self.mlp_ratio * self.n_embd)

    def rank(self, matrix: str, layer: int) -> float:
        """As it is given. matrix: q, k, v, o, up or down."""
        ranks = self.matrix_ranks.get(matrix) or (
            self.mlp_ranks if matrix in ("up", "down") else self.attn_ranks
        )
        return ranks[layer] if ranks else 0

    def matrix_shape(self, matrix: str) -> tuple[int, int]:
        """(in, out). matrix: q, k, v, o, up or down."""
        C = self.n_embd
        N = self.n_hidden
        kv_dim = self.n_kv_head * (C // self.n_head)
        shapes = {"q": (C, C), "k": (C, kv_dim), "v": (C, kv_dim), "o": (C, C), "up": (C, N), "down": (N, C)}
        return shapes[matrix]

    def whole_rank(self, matrix: str, layer: int) -> int:
        """The rank that a matrix has; 0 = full. ValueError where it does not fit."""
        return resolve_rank(self.rank(matrix, layer), *self.matrix_shape(matrix), self.rank_multiple)

    def kind(self, layer: int) -> str:
        """S or L, its window, and then v if it has a value table: "S", "L", "Sv" or "Lv"."""
        if self.layer_kinds:
            return self.layer_kinds[layer]
        from_end = self.n_layer - 1 - layer
        window = self.window_pattern[layer % len(self.window_pattern)] if from_end else "L"
        return window + "v" * (self.value_embeddings and from_end % 2 == 0)

    def window(self, layer: int) -> int:
        """How many positions back, itself included, a query of this layer sees."""
        return max(1, self.sequence_len // 2) if self.kind(layer).startswith("S") else self.sequence_len

    def has_value_embedding(self, layer: int) -> bool:
        return self.kind(layer).endswith("v")


# ---- linear layers --------------------------------------------------------------------------------------------------


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Nothing on the meta device: there the draw of no numbers would load torch's compiler."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Module):
    """y = W x with W: (out, in), cast to the dtype of x. One factor is all there is: `narrow` is W, `widen` does nothing."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x):  # (..., in) -> (..., out)
        return self.widen(self.narrow(x))

    def first_factor(self):
        return self.weight

    def narrow(self, x):  # (..., in) -> (..., out)
        return linear(x, self.weight)

    def widen(
        self, h
    ):  # (..., out) -> (..., out), a copy where h is a part of a larger tensor, which it would keep alive
        return h.contiguous()

    def dense_weight(self):  # (out, in)
        return self.weight

    @torch.no_grad()
    def init(self, zero: bool = False):
        """Entries uniform with variance 1/in: unit-variance inputs give unit-variance outputs."""
        bound = 0.0 if zero else math.sqrt(3 / self.in_features)
        self.weight.uniform_(-bound, bound)


class LowRankLinear(nn.Module):
    """y = B(A x) with A: (r, in), B: (out, r); the matrix BA is never formed. act = "silu": y = B silu(A x), which is no matrix."""

    def __init__(self, in_features: int, out_features: int, rank: int, act: str = "none"):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.act = act
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))

    def forward(self, x):  # (..., in) -> (..., r) -> (..., out)
        return self.widen(self.narrow(x))

    def first_factor(self):
        return self.A

    def narrow(self, x):  # (..., in) -> (..., r)
        return linear(x, self.A)

    def widen(self, h):  # (..., r) -> (..., out)
        return linear(self.activated(h), self.B)

    def activated(self, h):  # (..., r) -> (..., r)
        return F.silu(h) if self.act == "silu" else h

    def dense_weight(self):  # (out, in)
        if self.act != "none":
            raise ValueError(f"a layer with {self.act} between its factors is not a matrix")
        return self.B @ self.A

    @torch.no_grad()
    def init(self, zero: bool = False):
        """Orthonormal rows in A and columns in B, scaled so that BA's entries have variance 1/in, as in `Linear`.

        ||BA||_F² = s²·r must equal ||W||_F² = out, hence s = (out/r)^½, all of it in B. zero: B = 0, so that a residual
        branch starts silent while A already passes a gradient to B. Orthogonal factors: Spectron (arXiv 2602.12429).
        """
        nn.init.orthogonal_(self.A)
        if zero:
            self.B.zero_()
        else:
            nn.init.orthogonal_(self.B, gain=math.sqrt(self.out_features / self.rank))


def make_linear(
    in_features: int, out_features: int, rank: float, act: str = "none", multiple: int = 1
) -> Linear | LowRankLinear:
    """The layer for a configured rank (see `resolve_rank`)."""
    r = resolve_rank(rank, in_features, out_features, multiple)
    return LowRankLinear(in_features, out_features, r, act) if r else Linear(in_features, out_features)


# ---- blocks ---------------------------------------------------------------------------------------------------------

# Attention and MLP are each three steps: `narrow` (norm and the first factors), `between` (the second factors, what follows, and
# the last matrix's first factor), and the last widening. Between the steps flows what is r wide; with recompute = "bottleneck"
# only that and the residual stream are kept for the backward pass (as CoLA-M does, arXiv 2502.10940).


def kept_or_not(function, recompute: bool, *inputs):
    """function(*inputs). recompute: the backward pass, if there is one, keeps the inputs only and calls it again, up to what it needs last."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.n_kv_head = config.n_kv_head
        self.head_dim = C // config.n_head
        kv_dim = self.n_kv_head * self.head_dim
        ranks = {name: config.whole_rank(name, layer) for name in "qkvo"}
        self.q = make_linear(C, C, ranks["q"], config.factor_act)
        self.k = make_linear(C, kv_dim, ranks["k"], config.factor_act)
        self.v = make_linear(C, kv_dim, ranks["v"], config.factor_act)
        self.o = make_linear(C, C, ranks["o"], config.factor_act)
        self.recompute = config.recompute == "bottleneck" and any(ranks.values())

    def forward(self, x, value_embedding, cos, sin, mask, extend=None):
        """(B, T, C) -> (B, T, C). extend: in generation, the function that takes the keys and values of x, each (B, K, T, D), and
        returns them with those before, as far as they are seen (`engine.KVCache.extend`).
        """
        h = kept_or_not(self.narrow, self.recompute, x)
        return self.o.widen(
            kept_or_not(self.between, self.recompute, h, value_embedding, cos, sin, mask, extend)
        )

    def narrow(self, x):  # (B, T, C) -> (B, T, 3r), or all of q, k, v at full rank
        layers = (self.q, self.k, self.v)
        x = norm(x)
        if x.size(1) == 1:  # one new token: putting the weights together would take longer than the products
            return torch.cat([linear(x, layer.first_factor()) for layer in layers], dim=-1)
        first = torch.cat([layer.first_factor() for layer in layers])  # one matmul for the three
        return linear(x, first)

    def project(self, h):
        """h: (B, T, 3r) -> q: (B, H, T, D), k and v: (B, K, T, D)."""
        layers = (self.q, self.k, self.v)
        D = self.head_dim
        parts = h.split([layer.first_factor().size(0) for layer in layers], dim=-1)
        return [
            layer.widen(part).unflatten(-1, (-1, D)).transpose(1, 2) for layer, part in zip(layers, parts)
        ]

    def between(self, h, value_embedding, cos, sin, mask, extend=None):  # (B, T, 3r) -> (B, T, r)
        q, k, v = self.project(h)
        if value_embedding is not None:
            v = v + value_embedding.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if q.size(2) == 1:  # one new token: fewer calls
            q, k = rotary_norm(torch.cat((q, k), dim=1), cos, sin).split((self.n_head, self.n_kv_head), dim=1)
        else:
            q = rotary_norm(q, cos, sin)  # QK norm keeps the scores bounded
            k = rotary_norm(k, cos, sin)
        if extend is not None:
            k, v = extend(k, v)
        return self.o.narrow(attention(q, k, v, SCORE_SCALE / math.sqrt(self.head_dim), mask))


def squared_relu_mlp(x, up, down, recompute: bool):
    """relu(x upᵀ)² downᵀ. x: (..., in), up: (N, in), down: (out, N). recompute: see `kept_or_not`."""
    if torch.is_grad_enabled() and not (
        recompute and torch.compiler.is_compiling()
    ):  # the compiler would keep what is made twice
        return SquaredReLUMLP.apply(x, up.to(x.dtype), down.to(x.dtype), not recompute)
    return kept_or_not(plain_squared_relu_mlp, recompute, x, up, down)


def plain_squared_relu_mlp(x, up, down):
    return linear(F.relu(linear(x, up)).square(), down)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd
        N = config.n_hidden
        up = config.whole_rank("up", layer)
        down = config.whole_rank("down", layer)
        self.up = make_linear(C, N, up, config.factor_act)
        self.down = make_linear(N, C, down, config.factor_act)
        self.recompute = config.recompute == "bottleneck" and (up > 0 or down > 0)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        h = kept_or_not(self.narrow, self.recompute and type(self.up) is not Linear, x)
        return self.down.widen(self.between(h))

    def narrow(self, x):  # (B, T, C) -> (B, T, r), or C at full rank
        return norm(x) if type(self.up) is Linear else self.up.narrow(norm(x))

    def between(self, h):  # (B, T, r) -> (B, T, N) -> (B, T, r)
        if type(self.up) is Linear:
            return squared_relu_mlp(h, self.up.weight, self.down.first_factor(), self.recompute)
        if type(self.up) is LowRankLinear:
            return squared_relu_mlp(self.up.activated(h), self.up.B, self.down.first_factor(), self.recompute)
        return kept_or_not(self.apart, self.recompute, h)

    def apart(self, h):
        """`between` for a layer of another kind, relu² a step by itself."""
        return self.down.narrow(F.relu(self.up.widen(h)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config, layer)

    def forward(self, x, x0, scales, value_embedding, cos, sin, mask, extend=None):
        """x: (B, T, C), the residual stream; x0: the same where it began; scales: (2,), the share of each; extend: see `Attention`."""
        x = scales[0] * x + scales[1] * x0
        x = x + self.attn(x, value_embedding, cos, sin, mask, extend)
        return x + self.mlp(x)


# ---- the model ------------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """Build under torch.device('meta') to count, or on a device and call `init_weights` to train."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config  # see nanochat/compiler.py
        self.compiled = False
        self.of_logits = loss_of_logits
        C = config.n_embd
        V = config.vocab_size
        L = config.n_layer
        self.wte = Embedding(V, C)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(L))
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = make_linear(C, V, config.lm_head_rank, multiple=config.rank_multiple)
        P = len(config.positions)
        self.resid_lambdas = nn.Parameter(
            torch.empty(P)
        )  # scale of the residual stream entering each position of the stack
        self.x0_lambdas = nn.Parameter(torch.empty(P))  # share of the embedding added there
        self.smear = nn.Parameter(torch.empty(C))  # share of the previous token's embedding, by channel
        kv_dim = config.n_kv_head * (C // config.n_head)
        self.value_embeds = nn.ModuleDict(
            {str(layer): Embedding(V, kv_dim) for layer in range(L) if config.has_value_embedding(layer)}
        )

    @torch.no_grad()
    def init_weights(self):
        """Draw from the global generator, embeddings first so that they agree between ranks under one seed."""
        nn.init.normal_(
            self.wte.weight
        )  # normalised right after the lookup, so only the direction matters there
        if self.config.tie_embeddings:
            self.wte.weight.mul_(0.02)  # as a head it has to start with small logits
        for table in self.value_embeds.values():
            table.weight.zero_()  # rare tokens, seldom updated, would keep adding noise
        for block in self.blocks:
            for linear in (block.attn.q, block.attn.k, block.attn.v, block.mlp.up):
                linear.init()
            for linear in (block.attn.o, block.mlp.down):
                linear.init(zero=True)  # every block starts as the identity
        if self.lm_head is not None:
            self.lm_head.init(zero=True)  # every token equally likely
        self.init_scalars()

    @torch.no_grad()
    def init_scalars(self):
        self.resid_lambdas.fill_(1.0)
        self.x0_lambdas.fill_(0.1)
        self.smear.zero_()

    def rotary(self, T: int, device, dtype, start: int = 0):
        """cos, sin: (T, D/2), of the positions from `start` on. The slowest pair of channels turns once in 2π · 4 contexts
        (base 8192 at 2048 tokens).
        """
        D = self.config.n_embd // self.config.n_head
        inverse_frequency = (4.0 * self.config.sequence_len) ** (
            -torch.arange(0, D, 2, device=device, dtype=torch.float32) / D
        )
        angle = (
            torch.arange(start, start + T, device=device, dtype=torch.float32)[:, None] * inverse_frequency
        )
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def hidden(self, idx, compute_dtype=torch.float32, cache=None):
        """idx: (B, T) int -> (B, T, C), normalised, ready for the head. cache: an `engine.KVCache` of the positions before, extended by idx."""
        T = idx.size(1)
        cos, sin = self.rotary(T, idx.device, compute_dtype, 0 if cache is None else cache.length)
        x = self.wte(idx).to(compute_dtype)
        before = F.pad(x, (0, 0, 1, 0))[:, :-1] if cache is None else cache.before(x)
        x = x + self.smear.to(compute_dtype) * before  # pairs of tokens, before any attention
        x0 = norm(x)
        x = x0.view_as(x0)  # not the same object, for which the first block would be compiled apart
        scales = torch.stack((self.resid_lambdas, self.x0_lambdas), dim=1).to(compute_dtype)  # (positions, 2)
        windows = {self.config.window(i) for i in range(self.config.n_layer)}
        if cache is None:
            masks = {window: mask_for(T, window, idx.device) for window in windows}
        else:
            masks = {window: cache.mask(window, T) for window in windows}
        for i, layer in enumerate(self.config.positions):
            table = self.value_embeds[str(layer)] if str(layer) in self.value_embeds else None
            x = self.blocks[layer](
                x,
                x0,
                scales[i],
                None if table is None else table(idx).to(compute_dtype),
                cos,
                sin,
                masks[self.config.window(layer)],
                None if cache is None else partial(cache.extend, i),
            )
        if cache is not None:
            cache.length += T
        return norm(x)

    def head(self, idx, compute_dtype, cache=None):
        """(x, weight) with logits before the softcap = x weightᵀ; x: (B·T, C) or, with a low-rank head, (B·T, r)."""
        x = self.hidden(idx, compute_dtype, cache).flatten(0, 1)
        if self.lm_head is None:
            return x, self.wte.weight.to(x.dtype)
        if isinstance(self.lm_head, LowRankLinear):
            return linear(x, self.lm_head.A), self.lm_head.B.to(x.dtype)
        return x, self.lm_head.weight.to(x.dtype)

    def forward(self, idx, targets=None, compute_dtype=torch.float32):
        """idx: (B, T). Returns float32 logits (B, T, V) or, with targets (B, T), the mean cross-entropy in nats."""
        x, weight = self.head(idx, compute_dtype)
        if targets is None:
            return (SOFTCAP * squashed(x, weight)).view(*idx.shape, -1)
        return HeadCrossEntropy.apply(x, weight, targets.flatten(), self.of_logits)

    def eager(self):
        """A context for batches and lengths other than those compiled for training. Without compiled blocks nothing is loaded for it."""
        return torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()

    @torch.no_grad()
    def token_losses(self, idx, targets, compute_dtype=torch.float32):
        """Cross-entropy in nats of each target, (B, T) float32, no gradient."""
        with self.eager():
            x, weight = self.head(idx, compute_dtype)
        chunks = zip(
            x.split(rows_at_once(x, weight.size(0))), targets.flatten().split(rows_at_once(x, weight.size(0)))
        )
        losses = [
            F.cross_entropy(SOFTCAP * squashed(part, weight), target, reduction="none")
            for part, target in chunks
        ]
        return torch.cat(losses).view(targets.shape)
