"""The linear datamodeling score (LDS): do scores predict what retraining does?

Park et al. 2023 (arXiv:2303.14186), Sec. 2.2: a model that was trained on a subset is
predicted to give a target the sum of the scores of the subset's examples; the LDS of a
target is the Spearman correlation of predictions and outputs over subsets.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from trak.evaluation.arrays import (
    Booleans,
    Floats,
    as_floats,
    as_masks,
    as_outputs,
    check_enough,
    check_length,
    check_varied,
)
from trak.evaluation.ceiling import ceiling_of
from trak.evaluation.intervals import SUBSETS, Bootstrap, Interval, Resampled, resampled
from trak.evaluation.ranks import correlations, weighted_correlations
from trak.evaluation.rounding import mean_over_seeds, without_rounding


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearDatamodelingScore:
    """An LDS with its uncertainty.

    Attributes:
        value: mean over targets.
        per_target: `[m]`.
        over_targets: interval over targets: other targets, these subsets.
        over_subsets: interval over subsets: these targets, other subsets.
        jointly: interval over both; the one to report.
        bias: how far few subsets pull the value towards 0, estimated; the intervals allow
            for it, so that they need not have the value in their middle.
        level: nominal coverage of the intervals.
        ceiling: LDS of a perfect predictor of the expected outputs (`noise_ceiling`); None
            if there is one seed.
    """

    value: float
    per_target: Floats
    over_targets: Interval
    over_subsets: Interval
    jointly: Interval
    bias: float
    level: float
    ceiling: float | None


@dataclass(frozen=True, eq=False, kw_only=True)
class LDSDifference:
    """How much better one method's LDS is than another's, on the same ground truth.

    Attributes:
        value: mean over targets, first less second.
        per_target: `[m]`.
        over_targets: interval over targets.
        over_subsets: interval over subsets.
        jointly: interval over both; the methods differ if it does not hold 0.
        bias: as for `LinearDatamodelingScore`.
        level: nominal coverage of the intervals.
    """

    value: float
    per_target: Floats
    over_targets: Interval
    over_subsets: Interval
    jointly: Interval
    bias: float
    level: float


def lds(
    scores: Any,
    masks: Any,
    outputs: Any,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> LinearDatamodelingScore:
    """The linear datamodeling score of an attribution method.

    Args:
        scores: `[n, m]`, positive where adding the training example raises the target's
            model output.
        masks: which training examples each subset holds, `[subsets, n]`, booleans or 0
            and 1.
        outputs: the targets' model outputs after training on each subset,
            `[subsets, m]`, or `[subsets, seeds, m]` with several trainings a subset, whose
            mean counts.
        level: nominal coverage of the intervals.
        draws: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        The score, its intervals and its ceiling.
    """
    how = Bootstrap.of(level, draws, seed)
    kept, truth, mean = _ground_truth(masks, outputs)
    predicted = _predictions("scores", scores, kept, truth)
    found = _compare([predicted], mean, how)
    ceiling = ceiling_of(truth) if truth.shape[1] > 1 else None
    return LinearDatamodelingScore(**vars(found), level=how.level, ceiling=ceiling)


def lds_difference(
    scores: Any,
    other_scores: Any,
    masks: Any,
    outputs: Any,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> LDSDifference:
    """The LDS of one method less that of another, with a paired bootstrap.

    Both are computed on the same resampled subsets and targets, so that what these have in
    common cancels: the interval is narrower than those of the two scores suggest.

    Args:
        scores: of one method, `[n, m]`.
        other_scores: of the other, `[n, m]`.
        masks: `[subsets, n]`, as for `lds`.
        outputs: `[subsets, m]` or `[subsets, seeds, m]`, as for `lds`.
        level: nominal coverage of the intervals.
        draws: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        The difference and its intervals.
    """
    how = Bootstrap.of(level, draws, seed)
    kept, truth, mean = _ground_truth(masks, outputs)
    both = [
        _predictions("scores", scores, kept, truth),
        _predictions("other_scores", other_scores, kept, truth),
    ]
    found = _compare(both, mean, how)
    return LDSDifference(**vars(found), level=how.level)


def group_scores(scores: Any, masks: Any) -> Floats:
    """What scores predict for each subset, up to a constant of the target.

    Args:
        scores: `[n, m]`.
        masks: `[subsets, n]`.

    Returns:
        The sum of the scores of each subset's examples, `[subsets, m]`.
    """
    numbers = as_floats("scores", scores, axes=("training example", "target"))
    kept = as_masks("masks", masks, axes=("subset", "training example"))
    check_length(len(numbers), kept.shape[1], "The rows of scores", "masks")
    return kept.astype(np.float64) @ numbers


def _ground_truth(masks: Any, outputs: Any) -> tuple[Booleans, Floats, Floats]:
    kept = as_masks("masks", masks, axes=("subset", "training example"))
    truth = as_outputs("outputs", outputs, "subset")
    check_length(len(truth), len(kept), "The subsets of outputs", "masks")
    check_enough(len(kept), "subsets")
    mean = mean_over_seeds(truth)
    check_varied("The outputs of the subsets", mean)
    return kept, truth, mean


def _predictions(name: str, scores: Any, kept: Booleans, truth: Floats) -> Floats:
    numbers = as_floats(name, scores, axes=("training example", "target"))
    check_length(len(numbers), kept.shape[1], f"The rows of {name}", "masks")
    check_length(numbers.shape[1], truth.shape[2], f"The columns of {name}", "outputs")
    weights = kept.astype(np.float64)
    predicted = without_rounding(weights @ numbers, weights @ np.abs(numbers))
    check_varied(f"Predictions from {name}", predicted)
    return predicted


def _compare(predicted: list[Floats], truth: Floats, how: Bootstrap) -> Resampled:
    weights = how.counts(len(truth), SUBSETS)
    each = [correlations("spearman", one, truth) for one in predicted]
    drawn = [weighted_correlations("spearman", one, truth, weights) for one in predicted]
    if len(predicted) == 1:
        return resampled(each[0], drawn[0], how)
    return resampled(each[0] - each[1], drawn[0] - drawn[1], how, (-2.0, 2.0))
