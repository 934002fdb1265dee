"""How well the ground truth itself is known: the LDS that nobody can expect to exceed."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import InputError
from trak.evaluation.arrays import Floats, as_outputs, check_enough, check_varied
from trak.evaluation.ranks import correlations
from trak.evaluation.rounding import mean_over_seeds

_SPLITS = 32  # of the seeds; more change the third digit
_LEAST_FOR_SPREAD = 6  # subsets: two halves of three


def noise_ceiling(outputs: Any) -> float:
    """The LDS to expect of a perfect predictor of each subset's expected output.

    Two trainings on one subset differ by their seeds, so a mean over `R` seeds is a noisy
    truth. How noisy follows from its reliability, the correlation `r` over subsets of the
    means of two disjoint sets of `h = R // 2` seeds: by Spearman 1910 and Brown 1910 the
    mean of all seeds has the reliability `q r / (1 + (q - 1) r)` with `q = R / h`, and its
    correlation with the expected output is the root of that (the attenuation formula,
    Spearman 1904). These hold for Pearson's correlation, so rank correlations `r_s` are
    brought to its scale and back by `r = 2 sin(pi r_s / 6)` (Pearson 1907; exact for normal
    variables).

    The root is concave, so that the root of a mean reliability is too large where targets
    differ, and the mean of roots of noisy ones too small where they do not. Each target's
    reliability is therefore shrunk towards the mean by the share of its variance that is
    not sampling noise, which the covariance over targets of estimates from two halves of
    the subsets tells (with fewer than six subsets: to the mean).

    A method may exceed it by chance, or where it knows the seeds.

    Args:
        outputs: of retrained models, `[subsets, seeds, m]`.

    Returns:
        The ceiling, of the mean over targets.

    Raises:
        InputError: if there are fewer than two seeds or three subsets, or the outputs of a
            target are constant.
    """
    truth = as_outputs("outputs", outputs, "subset")
    if truth.shape[1] < 2:
        raise InputError(
            "The noise of a ground truth shows in repeated trainings: outputs must be "
            f"[subsets, seeds, targets] with at least 2 seeds, got {truth.shape[1]}."
        )
    check_enough(len(truth), "subsets")
    check_varied("The outputs of the subsets", mean_over_seeds(truth))
    return ceiling_of(truth)


def ceiling_of(truth: Floats) -> float:
    """The ceiling of outputs that were checked.

    Args:
        truth: `[subsets, seeds, m]`, with at least two seeds.

    Returns:
        The ceiling.
    """
    seeds = truth.shape[1]
    half = seeds // 2
    r = _split_half(truth, half)
    r = np.clip(r.mean() + _true_share(truth, half, r) * (r - r.mean()), 0.0, 1.0)
    q = seeds / half
    root = np.sqrt(q * r / (1 + (q - 1) * r))
    return float(np.mean(6 / math.pi * np.arcsin(root / 2)))


def _split_half(truth: Floats, half: int) -> Floats:
    # the mean over splits is taken of ranks' correlations, then brought to Pearson's scale
    found = [
        correlations(
            "spearman", mean_over_seeds(truth[:, first]), mean_over_seeds(truth[:, second])
        )
        for first, second in _splits(truth.shape[1], half)
    ]
    return 2 * np.sin(math.pi / 6 * np.mean(found, axis=0))


def _splits(seeds: int, half: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    rng = np.random.default_rng(0)
    orders = [rng.permutation(seeds) for _ in range(8 * _SPLITS)]
    sides = [(np.sort(o[:half]), np.sort(o[half : 2 * half])) for o in orders]
    distinct = {tuple(sorted((tuple(a), tuple(b)))): (a, b) for a, b in sides}
    return list(distinct.values())[:_SPLITS]


def _true_share(truth: Floats, half: int, r: Floats) -> float:
    if len(truth) < _LEAST_FOR_SPREAD:
        return 0.0
    if len(r) == 1 or not r.var() > 0:
        return 1.0
    one, other = (_split_half(truth[start::2], half) for start in (0, 1))
    return float(np.clip(np.cov(one, other)[0, 1] / r.var(ddof=1), 0.0, 1.0))
