"""A finished model in another form: factors multiplied out, matrices cut down to factors by their singular values, layers in another order."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from nanochat.adapters.attach import plain
from nanochat.gpt import GPT, MATRICES, GPTConfig, Linear, LowRankLinear
from nanochat.rank import on_meta


def linear_layers(model: GPT) -> dict[str, Linear | LowRankLinear]:
    """{name: layer}: blocks.0.attn.q, …, blocks.0.mlp.up, …, and lm_head unless it is tied."""
    return {
        name: layer for name, layer in model.named_modules() if isinstance(layer, (Linear, LowRankLinear))
    }


def block_matrix(matrix: str, layer: int) -> str:
    """The name of q, k, v, o, up or down of a layer."""
    return f"blocks.{layer}.{'mlp' if matrix in ('up', 'down') else 'attn'}.{matrix}"


def rank_of(layer: Linear | LowRankLinear) -> int:
    """0 = full."""
    return layer.rank if isinstance(layer, LowRankLinear) else 0


def product(layer: Linear | LowRankLinear) -> torch.Tensor:
    """The matrix that it applies, (out, in) float64, so that reduced-precision float32 matmuls (TF32) play no part."""
    return deepcopy(layer).double().dense_weight()


def check_linear(model: GPT):
    """ValueError if a layer has a nonlinearity between its factors: no matrix does what it does."""
    for name, layer in linear_layers(model).items():
        if rank_of(layer) and layer.act != "none":
            raise ValueError(
                f"{name} has {layer.act} between its factors, so their product is not what it applies"
            )


@torch.no_grad()
def merge(model: GPT) -> GPT:
    """The same function with every product BA as one matrix, and an adapter inside it. ValueError: see `check_linear`."""
    model = plain(model)
    check_linear(model)
    return rebuild(
        model, {name: (product(layer),) for name, layer in linear_layers(model).items() if rank_of(layer)}
    )


@torch.no_grad()
def truncate(model: GPT, choose: dict[str, Callable]) -> tuple[GPT, dict[str, float]]:
    """The nearest model of lower rank, matrix by matrix (Eckart-Young), with balanced factors: W = U S Vᵀ, B = U √S, A = √S Vᵀ.

    choose: {name of a layer: function from its singular values, largest first, to a rank}. A layer stays as it is where the factors
    would have no fewer parameters than it has, or be all zeros, which could never learn.
    Returns (model, {name of a layer cut: share of its energy Σ S² that is kept}). ValueError: see `check_linear`.
    """
    check_linear(model)
    layers = linear_layers(model)
    factors = {}
    kept = {}
    for name, rank_from in choose.items():
        layer = layers[name]
        U, S, Vt = torch.linalg.svd(
            product(layer), full_matrices=False
        )  # (out, m), (m,), (m, in); m = min(in, out)
        r = rank_from(S)
        if S[0] > 0 and r * (layer.in_features + layer.out_features) < sum(
            p.numel() for p in layer.parameters()
        ):
            root = S[:r].sqrt()
            energy = S.square()
            factors[name] = (root[:, None] * Vt[:r], U[:, :r] * root)  # A: (r, in), B: (out, r)
            kept[name] = (energy[:r].sum() / energy.sum()).item()
    return rebuild(model, factors), kept


def rank_of_energy(energy: float, S: torch.Tensor) -> int:
    """The smallest rank whose singular values have at least this share of Σ S². energy: in (0, 1)."""
    sums = S.square().cumsum(0)
    return int((sums < energy * sums[-1]).sum()) + 1


def rebuild(model: GPT, weights: dict[str, tuple[torch.Tensor, ...]]) -> GPT:
    """The model with other weights in some of its linear layers, {name: (W,) or (A, B)}; all others are shared with it."""
    ranks = {name: rank_of(layer) for name, layer in linear_layers(model).items()}
    ranks |= {name: 0 if len(parts) == 1 else len(parts[0]) for name, parts in weights.items()}
    state = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in weights}
    for name, parts in weights.items():
        keys = ("weight",) if len(parts) == 1 else ("A", "B")
        state |= {
            f"{name}.{key}": part.to(model.wte.weight.dtype).contiguous() for key, part in zip(keys, parts)
        }
    new = on_meta(with_layer_ranks(model.config, ranks))
    new.load_state_dict(state, assign=True)
    return new


# ---- layers in another order, or more than once ---------------------------------------------------------------------


def with_layer_ranks(config: GPTConfig, ranks: dict[str, int]) -> GPTConfig:
    """The config of a model with these ranks, {name as in `linear_layers`: rank}, and nothing between the factors.

    attn_ranks and mlp_ranks where all matrices of the group have one rank in all layers, else matrix_ranks.
    """
    groups: dict[str, Any] = {"attn_ranks": (), "mlp_ranks": ()}
    single = {}
    for group, matrices in (("attn_ranks", MATRICES[:4]), ("mlp_ranks", MATRICES[4:])):
        own = {
            matrix: tuple(ranks[block_matrix(matrix, layer)] for layer in range(config.n_layer))
            for matrix in matrices
        }
        distinct = set().union(*own.values())
        if len(distinct) > 1:
            single |= own
        elif any(distinct):
            groups[group] = own[matrices[0]]
    return replace(
        config, **groups, matrix_ranks=single, lm_head_rank=ranks.get("lm_head", 0), factor_act="none"
    )
