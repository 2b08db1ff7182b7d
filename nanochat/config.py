"""The shape of a model: what a checkpoint stores of it, and what follows from that for each layer.

Shapes: V vocabulary, C width, K key/value heads, D head dim, M width inside the MLP.
"""

from dataclasses import dataclass, field

from nanochat.rank import resolve_rank

MATRICES = ("q", "k", "v", "o", "up", "down")  # of a block, by their names


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
    mlp_ratio: float = 4.0  # width inside the MLP, in widths of the model
    window_pattern: str = "SSSL"  # tiled over the layers: S = half the context, L = all; the last layer is L
    attn_ranks: tuple[float, ...] = ()  # one a layer, for q, k, v and o; () = full everywhere
    mlp_ranks: tuple[float, ...] = ()  # one a layer, for both MLP matrices
    # of q, k, v, o, up or down alone, where they differ from their group's
    matrix_ranks: dict[str, tuple[float, ...]] = field(default_factory=dict)
    lm_head_rank: float = 0
    tie_embeddings: bool = False  # the output head is the token embedding
    value_embeddings: bool = False  # a V × (K·D) table added to the values of every other layer
    factor_act: str = "none"  # "silu": y = B silu(A x) in the blocks (CoLA, arXiv 2502.10940)
    layer_map: tuple[int, ...] = ()  # layer at each position of the stack, e.g. (0, 0, 1, 1); () = each once
    layer_kinds: tuple[str, ...] = ()  # of copied layers, their `kind` where they come from; () = by pattern
    recompute: str = "none"  # what the backward pass computes again: see recompute.py
    rank_multiple: int = 1  # fractions become multiples of it; -1: of what suits a GPU

    @property
    def positions(self) -> tuple[int, ...]:
        """The layer at each position of the stack, from the embedding to the head."""
        return tuple(self.layer_map) or tuple(range(self.n_layer))

    @property
    def n_hidden(self) -> int:
        """Width inside the MLP."""
        return round(self.mlp_ratio * self.n_embd)

    def rank(self, matrix: str, layer: int) -> float:
        """The rank as it is given, perhaps a fraction. matrix: q, k, v, o, up or down."""
        group = self.mlp_ranks if matrix in ("up", "down") else self.attn_ranks
        ranks = self.matrix_ranks.get(matrix) or group
        return ranks[layer] if ranks else 0

    def matrix_shape(self, matrix: str) -> tuple[int, int]:
        """(in, out). matrix: q, k, v, o, up or down."""
        C = self.n_embd
        M = self.n_hidden
        kv_dim = self.n_kv_head * (C // self.n_head)
        shapes = {"q": (C, C), "k": (C, kv_dim), "v": (C, kv_dim), "o": (C, C), "up": (C, M), "down": (M, C)}
        return shapes[matrix]

    def whole_rank(self, matrix: str, layer: int) -> int:
        """The rank that a matrix has; 0 = full. ValueError where it does not fit."""
        return resolve_rank(self.rank(matrix, layer), *self.matrix_shape(matrix), self.rank_multiple)

    def kind(self, layer: int) -> str:
        """Its window, S or L, and then v if it has a value table: "S", "L", "Sv" or "Lv"."""
        if self.layer_kinds:
            return self.layer_kinds[layer]
        from_end = self.n_layer - 1 - layer
        window = self.window_pattern[layer % len(self.window_pattern)] if from_end else "L"
        return f"{window}v" if self.value_embeddings and from_end % 2 == 0 else window

    def window(self, layer: int) -> int:
        """How many positions back, itself included, a query of this layer sees."""
        return max(1, self.sequence_len // 2) if self.kind(layer).startswith("S") else self.sequence_len

    def has_value_embedding(self, layer: int) -> bool:
        return self.kind(layer).endswith("v")
