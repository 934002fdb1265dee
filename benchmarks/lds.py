"""The linear datamodeling score, its uncertainty, and what the truth's noise allows.

Park et al. 2023, Sec. 2: scores predict the output of a model that was trained on a subset
by the sum of the subset's scores; the LDS of a target is the Spearman correlation of
predictions and outputs over subsets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

LEVEL = 0.95


def group_scores(scores: NDArray[Any], masks: NDArray[Any]) -> NDArray[np.float64]:
    """What scores predict for each subset, up to a constant of the target.

    Args:
        scores: `[n, m]`.
        masks: which examples each subset holds, `[subsets, n]`.

    Returns:
        `[subsets, m]`.
    """
    return masks.astype(np.float64) @ np.asarray(scores, dtype=np.float64)


def spearman(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Spearman correlation of each column; ties share their mean rank.

    Args:
        a: `[subsets, m]`.
        b: `[subsets, m]`.

    Returns:
        `[m]`; 0 where a column is constant.
    """
    ranks = [rankdata(x, axis=0) for x in (a, b)]
    a, b = (r - r.mean(axis=0) for r in ranks)
    size = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return (a * b).sum(axis=0) / np.where(size > 0, size, 1.0)


def lds(predicted: NDArray[Any], outputs: NDArray[Any]) -> NDArray[np.float64]:
    """The linear datamodeling score of each target.

    Args:
        predicted: `group_scores`, `[subsets, m]`.
        outputs: of retrained models, `[subsets, seeds, m]`; their mean over seeds counts.

    Returns:
        `[m]`; the LDS is the mean.
    """
    return spearman(predicted, outputs.mean(axis=1))


def ceiling(outputs: NDArray[Any], draws: int = 20) -> float:
    """The LDS of someone who knows each subset's expected output.

    Two disjoint sets of `h` seeds correlate by `r`, the reliability of a mean of `h`. By
    Spearman and Brown the mean of all `s` seeds has reliability `q r / (1 + (q - 1) r)`
    with `q = s / h`, and its root is the correlation with what infinitely many seeds would
    say.

    Args:
        outputs: of retrained models, `[subsets, seeds, m]`.
        draws: random splits of the seeds to average over.

    Returns:
        The ceiling, the same for every method; NaN with one seed.
    """
    seeds = outputs.shape[1]
    half = seeds // 2
    if not half:
        return float("nan")
    rng = np.random.default_rng(0)
    found: list[float] = []
    for _ in range(draws):
        order = rng.permutation(seeds)
        first, second = order[:half], order[half : 2 * half]
        sides = (outputs[:, side].mean(axis=1) for side in (first, second))
        found.append(float(spearman(*sides).mean()))
    r, q = max(0.0, float(np.mean(found))), seeds / half
    return float(np.sqrt(q * r / (1 + (q - 1) * r)))


def over_targets(
    each: NDArray[Any], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """A bootstrap interval of a mean over targets.

    Args:
        each: a figure of each target, `[m]`: an LDS, or the difference of two.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The ends of the 95 % interval.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(each), size=(draws, len(each)))
    return _interval(each[drawn].mean(axis=1))


def over_subsets(
    predicted: list[NDArray[Any]],
    outputs: NDArray[Any],
    against: list[NDArray[Any]] | None = None,
    draws: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """A bootstrap interval over subsets of an LDS, or of the difference of two.

    Args:
        predicted: group scores `[subsets, m]`, one for each projection seed; the mean of
            their LDS counts.
        outputs: of retrained models, `[subsets, seeds, m]`.
        against: group scores whose LDS is subtracted, on the same drawn subsets.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The ends of the 95 % interval.
    """
    rng = np.random.default_rng(seed)
    truth = outputs.mean(axis=1)

    def mean(many: list[NDArray[Any]], drawn: NDArray[Any]) -> float:
        each = [spearman(one[drawn], truth[drawn]).mean() for one in many]
        return float(np.mean(each))

    found: list[float] = []
    for _ in range(draws):
        drawn = rng.integers(len(truth), size=len(truth))
        found.append(mean(predicted, drawn) - (mean(against, drawn) if against else 0.0))
    return _interval(np.array(found))


def _interval(values: NDArray[Any]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
