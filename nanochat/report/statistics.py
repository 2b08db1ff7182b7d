"""Runs that train a part of their numbers, adapters on a trained model and random subspaces: their names, and what is measured of them alone."""

import math
import re
from statistics import fmean

import numpy as np

# ---- names ----------------------------------------------------------------------------------------------------------


# ---- the dimension that is enough -----------------------------------------------------------------------------------


def loss_at_start(run) -> float | None:
    """Nats per token before the first step: as evaluated, or else that of equal probabilities, near which an untrained model lies."""
    first = run.history[0] if run.history else {}
    if first.get("step") == 0 and first.get("val/loss") is not None:
        return first["val/loss"]
    uniform = run.config.get("reference_losses", {}).get("uniform")
    vocabulary = run.config.get("derived", {}).get("model", {}).get("vocab_size")
    return uniform or (math.log(vocabulary) if vocabulary else None)


def d90(points: list[tuple[float, float]], start: float, full: float) -> float | None:
    """The smallest dimension whose loss closes 90 % of start - full (arXiv 1804.08838, for losses), from points (dimension, loss).

    Between the last dimension that does not and the first that does, linear in the logarithm of the dimension. None: not reached.
    """
    target = start - 0.9 * (start - full)
    before = None
    for dimension, loss in sorted(points):
        if loss <= target:
            if before is None:
                return dimension  # an upper bound: no smaller one was tried
            share = (before[1] - target) / (before[1] - loss)
            return math.exp((1 - share) * math.log(before[0]) + share * math.log(dimension))
        before = dimension, loss
    return None


# ---- does one order predict the other -------------------------------------------------------------------------------


def sample_ranks(values) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their places."""
    _, place, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(x, y) -> float:
    """Correlation of the ranks; NaN where either has one value only."""
    a, b = (r - r.mean() for r in (sample_ranks(x), sample_ranks(y)))
    size = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else math.nan


def spearman_interval(
    x, y, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap over the pairs; None for fewer than four, of which nothing can be said, and where there is no correlation."""
    x = np.asarray(x, float)
    y = np.asarray(y, float)
    if len(x) < 4 or math.isnan(spearman(x, y)):
        return None
    drawn = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    found = [
        rho for of in drawn if not math.isnan(rho := spearman(x[of], y[of]))
    ]  # a resample may be one pair over and over
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


# ---- where AdaLoRA's ranks went -------------------------------------------------------------------------------------


def rank_grid(runs) -> tuple[list[int], list[str], list[list[float]]]:
    """(layers, matrices, mean final rank over the runs by matrix and layer; NaN where a layer has no such matrix)."""
    found = {}
    for run in runs:
        for name, rank in run.summary.get("adalora/ranks", {}).items():
            if match := re.fullmatch(r"\w+\.(\d+)\.(.+)", name):
                found.setdefault((match[2], int(match[1])), []).append(rank)
    layers = sorted({layer for _, layer in found})
    matrices = list(dict.fromkeys(matrix for matrix, _ in found))
    return (
        layers,
        matrices,
        [[fmean(found.get((matrix, layer), [math.nan])) for layer in layers] for matrix in matrices],
    )


def rank_shares(layers: list[int], matrices: list[str], grid: list[list[float]]) -> tuple[float, float]:
    """(share of all ranks in the later half of the layers, share in the MLP). Of an odd number the middle layer counts half."""
    table = np.nan_to_num(np.asarray(grid, float))
    half = len(layers) / 2
    late = sum(table[:, i].sum() * min(1.0, max(0.0, i + 1 - half)) for i in range(len(layers)))
    return float(late / table.sum()), float(
        sum(row.sum() for matrix, row in zip(matrices, table) if matrix.startswith("mlp")) / table.sum()
    )
