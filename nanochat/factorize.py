"""Matrices of a finished model in another form: factors multiplied out, or made by singular values."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from nanochat.accounting import on_meta
from nanochat.config import MATRICES
from nanochat.gpt import GPT, GPTConfig, Linear, LowRankLinear


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
    """The matrix that a layer applies, (out, in), in float64: float32 might be reduced to TF32."""
    return deepcopy(layer).double().dense_weight()


def check_linear(model: GPT):
    """ValueError if a layer has a nonlinearity between its factors: then no matrix does the same."""
    for name, layer in linear_layers(model).items():
        if rank_of(layer) and layer.act != "none":
            raise ValueError(
                f"{name} has {layer.act} between its factors, so their product is not what it applies"
            )


@torch.no_grad()
def merge(model: GPT) -> GPT:
    """The same function with every product BA as one matrix. ValueError: see `check_linear`."""
    check_linear(model)
    layers = linear_layers(model).items()
    return with_weights(model, {name: (product(layer),) for name, layer in layers if rank_of(layer)})


@torch.no_grad()
def truncate(model: GPT, choose: dict[str, Callable]) -> tuple[GPT, dict[str, float]]:
    """(the nearest model of lower rank, {name of a truncated layer: share of its energy Σ S² that is kept}).

    Each W = U S Vᵀ becomes balanced factors B = U √S and A = √S Vᵀ of the r largest singular values
    (Eckart-Young). choose: {name of a layer: function from its singular values, largest first, to r}. A layer
    stays as it is where the factors would have no fewer parameters than it has, or be all zeros, which could
    never learn. ValueError: see `check_linear`.
    """
    check_linear(model)
    layers = linear_layers(model)
    factors = {}
    energy_kept = {}
    for name, rank_from in choose.items():
        layer = layers[name]
        # (out, m), (m,), (m, in) with m = min(in, out)
        U, S, Vt = torch.linalg.svd(product(layer), full_matrices=False)
        r = rank_from(S)
        fewer = r * (layer.in_features + layer.out_features) < sum(p.numel() for p in layer.parameters())
        if S[0] > 0 and fewer:
            root = S[:r].sqrt()
            energy = S.square()
            factors[name] = (root[:, None] * Vt[:r], U[:, :r] * root)  # A: (r, in), B: (out, r)
            energy_kept[name] = (energy[:r].sum() / energy.sum()).item()
    return with_weights(model, factors), energy_kept


def rank_of_energy(energy: float, S: torch.Tensor) -> int:
    """The smallest rank whose singular values have at least this share of Σ S². energy: in (0, 1)."""
    sums = S.square().cumsum(0)
    return int((sums < energy * sums[-1]).sum()) + 1


def with_weights(model: GPT, weights: dict[str, tuple[torch.Tensor, ...]]) -> GPT:
    """The model with other weights, {name of a layer: (W,) or (A, B)}; the rest it shares with the model."""
    ranks = {name: rank_of(layer) for name, layer in linear_layers(model).items()}
    ranks |= {name: 0 if len(parts) == 1 else len(parts[0]) for name, parts in weights.items()}
    state = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in weights}
    dtype = model.wte.weight.dtype
    for name, parts in weights.items():
        keys = ("weight",) if len(parts) == 1 else ("A", "B")
        for key, part in zip(keys, parts):
            state[f"{name}.{key}"] = part.to(dtype).contiguous()
    new = on_meta(with_layer_ranks(model.config, ranks))
    new.load_state_dict(state, assign=True)
    return new


def with_layer_ranks(config: GPTConfig, ranks: dict[str, int]) -> GPTConfig:
    """The config of a model with {name as in `linear_layers`: rank}, and nothing between the factors.

    The ranks are in attn_ranks and mlp_ranks where all matrices of the group have one rank in all layers,
    else in matrix_ranks.
    """
    groups: dict[str, Any] = {"attn_ranks": (), "mlp_ranks": ()}
    single = {}
    layers = range(config.n_layer)
    for group, matrices in (("attn_ranks", MATRICES[:4]), ("mlp_ranks", MATRICES[4:])):
        group_ranks = {}
        for matrix in matrices:
            group_ranks[matrix] = tuple(ranks[block_matrix(matrix, layer)] for layer in layers)
        distinct = {rank for layer_ranks in group_ranks.values() for rank in layer_ranks}
        if len(distinct) > 1:
            single |= group_ranks
        elif any(distinct):
            groups[group] = group_ranks[matrices[0]]
    return replace(
        config, **groups, matrix_ranks=single, lm_head_rank=ranks.get("lm_head", 0), factor_act="none"
    )
