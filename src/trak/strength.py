"""How much to whiten, from what the rows have in common and how well checkpoints agree.

Where growth of all outputs is a large part of the rows and nothing holds it back, as in
many classifiers of two classes, a little is best. Elsewhere the LDS of scores and the
agreement of scores from different checkpoints rise and fall together as the strength
changes, at the ridge that belongs to each (docs/whitening.md). Neither needs retraining.
"""

import logging
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trak.agreement import Fitting, Trial, fit, load
from trak.batches import Batch, batch_size, normalize
from trak.gradient_computers.surroundings import normalizes_batches
from trak.modes import evaluation_mode
from trak.pipeline import Pipeline
from trak.savers.filesystem import read_object
from trak.score_computers.freedom import freedom, may_grow_freely
from trak.score_computers.losses import losses_beside
from trak.whitening.whitening import STRENGTH

logger = logging.getLogger(__name__)

STRENGTHS = (0.25, 0.5, 0.75)
WORTH = 0.005
"""A step up must raise the agreement by so much, since whitening can also do harm."""
SAMPLE = 600
_DIGITS = 3
_MOST_WRONG, _ALIKE = 0.5, 0.1
_FEWEST = 40  # examples that agreement can be told from


def choose_strength(
    pipeline: Pipeline,
    states: Sequence[Any],
    batches: Iterable[Any],
    fitting: Fitting,
    count: int,
    *,
    others: Iterable[Any] = (),
    curvature: bool = True,
) -> float:
    """The smallest strength beyond which checkpoints hardly agree better.

    Up to 600 examples are taken, a quarter of them as targets. Two checkpoints score them
    at several strengths; the agreement is the Spearman correlation of the scores' sums over
    random halves of the rest, averaged over targets.

    These are fitted before that, and their sums stay in the pipeline's whitener, unless
    whitening is of no use, or there is one whose loss is not logistic. Where growth of all
    outputs turns out to be freer than other changes, down to a fifth of their stiffness,
    the strength is as much smaller than 0.4.

    Args:
        pipeline: of a run that whitens; its model ends up with another state's weights.
        states: as `state_of` takes them.
        batches: of training examples, spread over the training set.
        fitting: number of a checkpoint to batches that its whitening is fitted to.
        count: training examples that there are, `n`.
        others: batches of those that the first checkpoint's whitening is not fitted to,
            which are looked at where growth may be free.
        curvature: weigh rows by the curvature of the loss.

    Returns:
        One of `STRENGTHS`. For a single checkpoint, which has none to agree with,
        `trak.whitening.whitening.STRENGTH`. Less than any of these where growth is free.
        0 where loss weights are no probabilities, as of the squared loss, and where a
        classifier gets most examples about equally wrong, so that training has hardly
        begun: both were best without.
    """
    device = next(pipeline.model.parameters()).device
    sample = [normalize(batch, device) for batch in batches]
    enough = sum(batch_size(batch) for batch in sample) >= _FEWEST
    load(pipeline, states[0])
    weights = _finite_weights(pipeline, sample)
    logistic = pipeline.losses.tell(sample, weights)
    losses = losses_beside(torch.cat(weights)).sized(logistic)
    useful = _is_useful(losses.own, logistic)
    strength = STRENGTH if useful else 0.0
    if useful and enough and logistic is not False:
        fit(pipeline, fitting(0), 0, conclude=False)
        _look_on(pipeline, others, count, logistic)
        strength = round(STRENGTH * _freedom(pipeline, count, logistic), _DIGITS)
    if len(states) < 2 or not enough or strength < STRENGTHS[0]:
        logger.info("whitening='auto' stands for %g.", strength)
        return strength
    return _by_agreement(
        Trial(pipeline, sample, states, fitting, curvature=curvature, logistic=logistic)
    )


def _freedom(pipeline: Pipeline, count: int, logistic: bool | None) -> float:
    examples = pipeline.whitener.seen(0)
    if examples is None:
        return 1.0
    normalized = normalizes_batches(pipeline.model)
    return freedom(examples, count, logistic, normalized=normalized)


def _finite_weights(pipeline: Pipeline, sample: list[Batch]) -> list[Tensor]:
    found: list[Tensor] = []
    for place, batch in enumerate(sample):
        which = f"of batch {place} (of {len(sample)} batches spread over train)"
        numbers = [f"{j} {which}" for j in range(batch_size(batch))]
        found.append(pipeline.maker.finite_weights(batch, numbers))
    return found


def _by_agreement(trial: Trial) -> float:
    agreements = trial.agreements(STRENGTHS)
    gains = [after - before - WORTH for before, after in pairwise(agreements)]
    chosen = [*(gain >= 0 for gain in gains), False].index(False)
    logger.info(
        "whitening='auto' stands for %g: scores of two checkpoints agree by %s.",
        STRENGTHS[chosen],
        ", ".join(f"{a:.3f} ({s:g})" for s, a in zip(STRENGTHS, agreements, strict=True)),
    )
    return STRENGTHS[chosen]


def _look_on(
    pipeline: Pipeline, others: Iterable[Any], count: int, logistic: bool | None
) -> None:
    # what pulls at examples is mostly chance in a small part of the training set
    whitener, examples = pipeline.whitener, pipeline.whitener.seen(0)
    if (
        examples is not None
        and len(examples.loss) >= _FEWEST
        and may_grow_freely(examples, count, logistic)
    ):
        device = next(pipeline.model.parameters()).device
        with evaluation_mode(pipeline.model):
            for batch in others:
                whitener.look_on(normalize(batch, device), 0)
    whitener.conclude(0)


def fit_first(pipeline: Pipeline, state: Any, batches: Iterable[Any]) -> None:
    """Fits the whitening of the first checkpoint, whose sums stay in the whitener.

    Args:
        pipeline: of a run that whitens.
        state: the checkpoint, as `state_of` takes it.
        batches: of training examples.
    """
    load(pipeline, state)
    fit(pipeline, batches, 0)


def _is_useful(loss: Tensor, logistic: bool | None) -> bool:
    probable = bool(((loss >= 0) & (loss <= 1)).all())
    loss = loss.double()
    wrong = bool(loss.median() > _MOST_WRONG)
    alike = len(loss) > 1 and bool(loss.std() < _ALIKE * loss.mean())
    return probable and not (logistic and wrong and alike)


def known_strength(folder: Path) -> float | None:
    """The strength that a store was begun with.

    Args:
        folder: the store's.

    Returns:
        0 for none; None if there is no store yet.
    """
    known = begun_with(folder)
    if known is None:
        return None
    found = known.get("whitening")
    return float(found["strength"]) if found else 0.0


def begun_with(folder: Path) -> dict[str, Any] | None:
    """The settings that a store was begun with.

    Args:
        folder: the store's.

    Returns:
        Its metadata; None if there is no store yet.
    """
    path = folder / "metadata.json"
    return read_object(path) if path.exists() else None
