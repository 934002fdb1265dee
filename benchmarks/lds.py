"""The linear datamodeling score of group scores, averaged over projection seeds.

Park et al. 2023, Sec. 2: scores predict the output of a model that was trained on a subset
by the sum of the subset's scores; the LDS of a target is the Spearman correlation of
predictions and outputs over subsets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.evaluation.ranks import correlations

LEVEL = 0.95


def lds(predicted: NDArray[Any], outputs: NDArray[Any]) -> NDArray[np.float64]:
    """The linear datamodeling score of each target.

    Args:
        predicted: `trak.evaluation.group_scores`, `[subsets, m]`.
        outputs: of retrained models, `[subsets, seeds, m]`; their mean over seeds counts.

    Returns:
        `[m]`; the LDS is the mean.
    """
    return correlations("spearman", predicted, outputs.mean(axis=1))


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
        each = [correlations("spearman", one[drawn], truth[drawn]).mean() for one in many]
        return float(np.mean(each))

    found: list[float] = []
    for _ in range(draws):
        drawn = rng.integers(len(truth), size=len(truth))
        found.append(mean(predicted, drawn) - (mean(against, drawn) if against else 0.0))
    return _interval(np.array(found))


def _interval(values: NDArray[Any]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
