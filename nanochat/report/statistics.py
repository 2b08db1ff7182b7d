"""Statistics of adapters and random subspaces: d90, rank correlation, and where AdaLoRA puts its ranks."""

import math
import re
from statistics import fmean

import numpy as np

# ---- d90 ---------------------------------------------------------------------------------------------------


def loss_at_start(run) -> float | None:
    """Nats per token at the evaluation before the first step.

    Without such an evaluation: the loss of equal probabilities, which is near that of an untrained model.
    """
    first = run.history[0] if run.history else {}
    if first.get("step") == 0 and first.get("val/loss") is not None:
        return first["val/loss"]
    uniform = run.config.get("reference_losses", {}).get("uniform")
    vocabulary = run.config.get("derived", {}).get("model", {}).get("vocab_size")
    return uniform or (math.log(vocabulary) if vocabulary else None)


def d90(points: list[tuple[float, float]], start: float, full: float) -> float | None:
    """The smallest dimension whose loss closes 90 % of start - full (arXiv 1804.08838, for losses).

    points: (dimension, loss). The loss is interpolated, linearly in the logarithm of the dimension, between
    the last dimension that is not enough and the first that is. If the smallest dimension is enough, it is an
    upper bound. None: no dimension is enough.
    """
    target = start - 0.9 * (start - full)
    previous = None
    for dimension, loss in sorted(points):
        if loss <= target:
            if previous is None:
                return dimension
            previous_dimension, previous_loss = previous
            share = (previous_loss - target) / (previous_loss - loss)
            return math.exp((1 - share) * math.log(previous_dimension) + share * math.log(dimension))
        previous = dimension, loss
    return None


# ---- rank correlation --------------------------------------------------------------------------------------


def sample_ranks(values) -> np.ndarray:
    """1 for the smallest value; equal values share the mean of their places."""
    _, place, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(x, y) -> float:
    """Spearman's rho, the correlation of the sample ranks; NaN if all x or all y are equal."""
    x_ranks = sample_ranks(x)
    y_ranks = sample_ranks(y)
    x_centred = x_ranks - x_ranks.mean()
    y_centred = y_ranks - y_ranks.mean()
    norm = math.sqrt((x_centred @ x_centred) * (y_centred @ y_centred))
    return float(x_centred @ y_centred / norm) if norm else math.nan


def spearman_interval(
    x, y, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap over the pairs; None for fewer than four pairs, or if rho is NaN."""
    x = np.asarray(x, float)
    y = np.asarray(y, float)
    if len(x) < 4 or math.isnan(spearman(x, y)):
        return None
    samples = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    rhos = [spearman(x[sample], y[sample]) for sample in samples]
    rhos = [rho for rho in rhos if not math.isnan(rho)]  # a resample may be one pair over and over
    low, high = np.quantile(rhos, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


# ---- AdaLoRA's ranks ---------------------------------------------------------------------------------------


def rank_grid(runs) -> tuple[list[int], list[str], list[list[float]]]:
    """(layers, matrices, grid): grid[matrix][layer] is the mean final rank over the runs.

    NaN if a layer has no such matrix.
    """
    ranks = {}  # (matrix, layer) -> a rank for each run
    for run in runs:
        for name, rank in run.summary.get("adalora/ranks", {}).items():
            if match := re.fullmatch(r"\w+\.(\d+)\.(.+)", name):
                ranks.setdefault((match[2], int(match[1])), []).append(rank)
    layers = sorted({layer for _, layer in ranks})
    matrices = list(dict.fromkeys(matrix for matrix, _ in ranks))
    grid = []
    for matrix in matrices:
        grid.append([fmean(ranks.get((matrix, layer), [math.nan])) for layer in layers])
    return layers, matrices, grid


def rank_shares(layers: list[int], matrices: list[str], grid: list[list[float]]) -> tuple[float, float]:
    """(share of all ranks in the later half of the layers, share in the MLP).

    Of an odd number of layers the middle one counts half.
    """
    table = np.nan_to_num(np.asarray(grid, float))
    half = len(layers) / 2
    later = sum(table[:, i].sum() * min(1.0, max(0.0, i + 1 - half)) for i in range(len(layers)))
    mlp = sum(row.sum() for matrix, row in zip(matrices, table) if matrix.startswith("mlp"))
    return float(later / table.sum()), float(mlp / table.sum())
