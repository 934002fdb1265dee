"""Leave-one-out: do scores tell what happens without a single example?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import InputError
from trak.evaluation.arrays import (
    Floats,
    as_floats,
    as_outputs,
    check_enough,
    check_length,
    check_varied,
)
from trak.evaluation.indices import as_indices
from trak.evaluation.intervals import SUBSETS, Bootstrap, Interval, resampled
from trak.evaluation.ranks import Correlation, correlations, weighted_correlations
from trak.evaluation.rounding import mean_over_seeds


@dataclass(frozen=True, eq=False, kw_only=True)
class CorrelationOverTargets:
    """A correlation over examples, averaged over targets.

    Attributes:
        value: mean over targets.
        per_target: `[m]`.
        over_targets: interval over targets, for these examples.
        over_examples: interval over examples, for these targets.
        jointly: interval over both.
        bias: how far few examples pull the value towards 0, estimated; the intervals allow
            for it.
    """

    value: float
    per_target: Floats
    over_targets: Interval
    over_examples: Interval
    jointly: Interval
    bias: float


@dataclass(frozen=True, eq=False, kw_only=True)
class LeaveOneOut:
    """How scores agree with measured leave-one-out changes.

    Attributes:
        pearson: of values. Few examples with large changes decide it.
        spearman: of ranks. The many with changes near 0, mostly noise of the seeds, do.
        level: nominal coverage of the intervals.
    """

    pearson: CorrelationOverTargets
    spearman: CorrelationOverTargets
    level: float


def leave_one_out(
    scores: Any,
    outputs_without: Any,
    *,
    indices: Any = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> LeaveOneOut:
    """Correlates scores with what training without single examples changes.

    An example's effect on a target is the output with all examples less the output without
    this one (Koh and Liang 2017, Sec. 4.1, for the loss). The former is one number for each
    target and does not move a correlation, so it is not asked for.

    Args:
        scores: `[n, m]`.
        outputs_without: the targets' outputs after training without one example,
            `[removed, m]`, or `[removed, seeds, m]`, whose mean over seeds counts.
        indices: which example each row was trained without, `[removed]`; if None there must
            be a row for each example, in order.
        level: nominal coverage of the intervals.
        draws: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        Both correlations with their intervals.
    """
    how = Bootstrap.of(level, draws, seed)
    numbers = as_floats("scores", scores, axes=("training example", "target"))
    without = mean_over_seeds(
        as_outputs("outputs_without", outputs_without, "removed example")
    )
    check_length(
        numbers.shape[1], without.shape[1], "The columns of scores", "outputs_without"
    )
    check_enough(len(without), "removed examples")
    chosen = numbers[_rows(indices, len(without), len(numbers))]
    check_varied("Scores of the removed examples", chosen)
    check_varied("Outputs without the removed examples", without)
    both = {kind: _correlate(kind, chosen, -without, how) for kind in _KINDS}
    return LeaveOneOut(**both, level=how.level)


_KINDS: tuple[Correlation, ...] = ("pearson", "spearman")


def _correlate(
    kind: Correlation, scores: Floats, effects: Floats, how: Bootstrap
) -> CorrelationOverTargets:
    weights = how.counts(len(scores), SUBSETS)
    found = resampled(
        correlations(kind, scores, effects),
        weighted_correlations(kind, scores, effects, weights),
        how,
    )
    return CorrelationOverTargets(
        value=found.value,
        per_target=found.per_target,
        over_targets=found.over_targets,
        over_examples=found.over_subsets,
        jointly=found.jointly,
        bias=found.bias,
    )


def _rows(indices: Any, count: int, n: int) -> NDArray[np.int64]:
    if indices is None:
        check_length(count, n, "The rows of outputs_without", "scores")
        return np.arange(n)
    rows = as_indices("indices", indices, n, axis="removed example")
    check_length(len(rows), count, "The number of indices", "outputs_without")
    if len(np.unique(rows)) < len(rows):
        raise InputError(
            "indices names an example twice. Several trainings without one example belong "
            "into the axis of seeds of outputs_without."
        )
    return rows
