"""How freely all outputs of a model grow together, which decides how much to whiten."""

import math

from trak.score_computers.duration import FREE
from trak.score_computers.ridge_sample import FEWEST, Sample, Situation, sample_of
from trak.score_computers.stationarity import (
    HELD,
    growth_share,
    growth_stiffness,
    margins,
)
from trak.score_computers.unwhitened import Unwhitened

_DOUBTS = 1.5  # standard errors


def may_grow_freely(examples: Unwhitened, count: int, logistic: bool | None) -> bool:
    """Whether `freedom` may be a small number that these examples alone cannot tell.

    Args:
        examples: some of the training set, as many as something can be told from, with
            what pulls at them from no others.
        count: `n`.
        logistic: whether Q is that of a logistic loss; None if unknown.

    Returns:
        False where growth is so small a part of the rows' variance that it cannot be below
        a half, and where it is held back beyond doubt.
    """
    return _growing(examples, count, logistic, math.sqrt(2) * FREE) is not None


def _growing(
    examples: Unwhitened, count: int, logistic: bool | None, least: float
) -> Sample | None:
    # where growth is more than so much of the rows' variance, and not held back
    sample = sample_of(examples, count, Situation(logistic=logistic), curvature=False)
    if sample is None or not sample.are_probable:
        return None
    share = growth_share(sample.kernel, margins(sample.loss))
    return sample if share > least and not _is_held(sample, count) else None


def _is_held(sample: Sample, count: int) -> bool:
    # growth is held back beyond doubt, as far as a part of the training set tells
    outputs = margins(sample.loss)
    pulls = count * sample.counts * sample.loss * (sample.kernel @ outputs)
    steep = (sample.counts * sample.loss * (1 - sample.loss)).mean()
    pulls = pulls / (outputs @ outputs) / steep  # growth is the mean of these
    missing = max(0.0, 1 - len(outputs) / count)
    doubt = float(pulls.std()) * math.sqrt(missing / len(outputs))
    return float(pulls.mean()) - _DOUBTS * doubt >= HELD


def freedom(
    examples: Unwhitened, count: int, logistic: bool | None, *, normalized: bool = False
) -> float:
    """How freely all outputs of the model grow together.

    Args:
        examples: some of the training set.
        count: `n`.
        logistic: whether Q is that of a logistic loss; None if unknown.
        normalized: the model normalizes batches.

    Returns:
        `trak.score_computers.stationarity.growth_stiffness`, at most 1; 1 where growth is a
        small part of the rows' variance or held back beyond doubt, and where nothing can
        be told.
    """
    enough = len(examples.loss) >= FEWEST
    sample = _growing(examples, count, logistic, FREE) if enough else None
    if sample is None:
        return 1.0
    found = growth_stiffness(
        sample.kernel,
        sample.pull,
        sample.loss,
        counts=sample.counts,
        share=sample.share,
        logistic=logistic,
        normalized=normalized,
    )
    return min(1.0, found)
