"""Mislabelled examples: are they among the first that somebody inspects?"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from trak.errors import InputError
from trak.evaluation.arrays import Booleans, Floats, as_floats, as_masks, check_length
from trak.evaluation.intervals import Bootstrap, Interval
from trak.evaluation.ranks import average_ranks

_HALVINGS = 60  # of an interval of length 1: beyond float64's digits


@dataclass(frozen=True, eq=False, kw_only=True)
class Detection:
    """How well scores find the mislabelled examples.

    Attributes:
        auc: probability that a mislabelled example scores above another one, ties counted
            half: the area under the ROC curve.
        interval: of `auc`, over mislabelled and other examples.
        level: nominal coverage of the interval.
        inspected: fractions of the examples looked at, highest scores first, `[n + 1]`.
        found: fraction of the mislabelled ones among them, `[n + 1]`; in the mean over all
            orders of examples that tie.
    """

    auc: float
    interval: Interval
    level: float
    inspected: Floats
    found: Floats


def mislabelled(scores: Any, is_mislabelled: Any, *, level: float = 0.95) -> Detection:
    """Judges scores by the mislabelled examples that they find.

    The area is the Mann-Whitney statistic (Hanley and McNeil 1982), its interval that of
    Newcombe 2006 (Statistics in Medicine 25, 559-573, method 5), which is right near 1 too
    and where few examples are mislabelled.

    Args:
        scores: one a training example, larger where it is more suspect, `[n]`: the
            self-influence (an example's score for itself), or minus its mean score for
            targets that are known to be right.
        is_mislabelled: the truth, `[n]`, booleans or 0 and 1.
        level: nominal coverage of the interval.

    Returns:
        Area, interval and detection curve.

    Raises:
        InputError: if the arrays do not fit, or none or all are mislabelled.
    """
    how = Bootstrap.of(level, 2, 0)
    suspicion = as_floats("scores", scores, axes=("training example",))
    truth = as_masks("is_mislabelled", is_mislabelled, axes=("training example",))
    check_length(len(suspicion), len(truth), "The number of scores", "is_mislabelled")
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        raise InputError(
            "is_mislabelled must hold examples of both kinds, got "
            f"{positives} mislabelled of {len(truth)}."
        )
    ranks = average_ranks(suspicion[:, None])[:, 0]
    above = ranks[truth].sum() - positives * (positives + 1) / 2
    auc = float(above / (positives * negatives))
    inspected, found = _curve(suspicion, truth)
    return Detection(
        auc=auc,
        interval=_interval(auc, positives, negatives, how.level),
        level=how.level,
        inspected=inspected,
        found=found,
    )


def _curve(suspicion: Floats, truth: Booleans) -> tuple[Floats, Floats]:
    n = len(truth)
    order = np.argsort(-suspicion, kind="stable")
    ordered = suspicion[order]
    last = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    found = np.cumsum(truth[order])[last] / truth.sum()
    counts = np.arange(n + 1)
    # within a tie any order is as likely, so the mean rises evenly
    return counts / n, np.interp(counts, np.r_[0, last + 1], np.r_[0.0, found])


def _interval(auc: float, positives: int, negatives: int, level: float) -> Interval:
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (positives + negatives) / 2 - 1

    def outside(area: float) -> bool:
        spread = 1 + middle * ((1 - area) / (2 - area) + area / (1 + area))
        variance = area * (1 - area) * spread / (positives * negatives)
        return abs(area - auc) > z * math.sqrt(variance)

    def end(beyond: float) -> float:
        inside = auc
        for _ in range(_HALVINGS):
            between = (inside + beyond) / 2
            inside, beyond = (inside, between) if outside(between) else (between, beyond)
        return inside

    return Interval(end(0.0), end(1.0))
