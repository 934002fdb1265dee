"""The ridge that nobody has to choose.

What the linear datamodeling score asks for is played through on a sample of the stored
rows: the linearized model is trained on random halves (`trak.score_computers.retraining`),
and the ridge is taken at which TRAK's scores predict best what these models answer. Two
things are added (docs/ridge.md has the measurements): the ridge of the training itself,
which the played one needs, is read off the rows and loss weights, and the result is
multiplied by what is known of the noise that the linearized model does not have.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.encodings import RowSource
from trak.score_computers.decay import Spectrum
from trak.score_computers.duration import as_networks
from trak.score_computers.pulls import Stationarity
from trak.score_computers.retraining import (
    SUBSETS,
    Halves,
    retrained,
    trained_by_flow,
)
from trak.score_computers.ridge_sample import (
    FEWEST,
    SAMPLE,
    Sample,
    Situation,
    is_curved,
    sample_of,
    sampled,
    stationarity_of_all,
)
from trak.score_computers.stationarity import (
    Training,
    growth_share,
    margins,
    training_of,
)
from trak.score_computers.unwhitened import Unwhitened

logger = logging.getLogger(__name__)

_MOST_GAMES = 8  # of halves of few examples
_HALVES = 8  # of each part of a sample, where two parts are compared
_RIDGES = np.logspace(-2, 3.5, 45)
_AS_GOOD = 0.01  # of the correlation
_MANY, _MORE, _LEAST = 0.22, 2.0, math.exp(-1)
BY_STRENGTH = 3.0
"""How much larger the ridge is where rows are white, `1 + 3 alpha`."""
BY_CURVATURE = 1.2
"""How much larger it is where rows are weighted by curvature."""
_NOISE, _BY_TRAINING, _BY_SKETCH, _AVERAGED = 0.75, 0.4, 0.8, 0.4
_SEEN_AVERAGED = 0.7
_MUCH, _FREE = 0.25, 0.3  # whitening, where growth is as free as this
_FARTHEST, _WORTH, _CHANCE = 2.0, 1.1, 0.25  # carried on to more examples
_LESS, _MUCH_MORE = 6.0, 3.0
"""How far below and above the ridge of models that are trained by flow alone another one
may be."""
USUAL = 2.0
"""The multiple for rows that nothing can be told from."""


class Choice(NamedTuple):
    """What rows say about scores.

    Attributes:
        multiple: the ridge, in units of the mean squared row norm, above 0.
        power: exponent of the loss weights Q, at most 1.
        path: share of what they added up to along the way of training, 0 to 1.
    """

    multiple: float
    power: float
    path: float = 0.0


def relative_ridge(rows: RowSource, situation: Situation) -> float:
    """The ridge in units of the mean squared row norm, in one pass over the rows.

    Args:
        rows: Phi, `[n, k]`; weighted rows if the situation says so.
        situation: what else counts.

    Returns:
        The multiple, above 0.
    """
    return choice(rows, situation).multiple


def ridge_of_examples(examples: Unwhitened | None, situation: Situation) -> float:
    """The ridge of a training set that consists of some examples.

    Args:
        examples: all that there are, whose rows are not whitened; None if none are known.
        situation: what else counts; weighted rows if it says so.

    Returns:
        The multiple, above 0, as `relative_ridge` gives it for their rows.
    """
    count = 0 if examples is None else len(examples.loss)
    curved = is_curved(situation)
    sample = (
        sample_of(examples, count, situation, curvature=curved)
        if examples is not None and count >= FEWEST
        else None
    )
    return _told([] if sample is None else [sample], count, situation).multiple


def choice(rows: RowSource, situation: Situation) -> Choice:
    """The ridge, and what is to be made of Q, in one pass over the rows.

    Where some examples are known in a wider projection, the ridge is the geometric mean of
    what the rows say and of what these do.

    Args:
        rows: Phi, `[n, k]`; weighted rows if the situation says so.
        situation: what else counts.

    Returns:
        The ridge, the exponent of Q, and the share of what Q added up to.
    """
    enough = situation.loss is not None and rows.shape[0] >= FEWEST
    samples = _samples(rows, situation) if enough else []
    known = stationarity_of_all(rows, situation) if samples else None
    return _told(samples, rows.shape[0], situation, known)


def _told(
    samples: Sequence[Sample],
    count: int,
    situation: Situation,
    known: Stationarity | None = None,
) -> Choice:
    factor = noise_factor(count, situation)
    factor *= 1 + BY_STRENGTH * situation.strength
    factor *= BY_CURVATURE if is_curved(situation) else 1
    if not samples:
        logger.info(
            "Automatic ridge: %.3g times the mean squared row norm, the usual one: nothing "
            "can be told from %d rows.",
            USUAL * factor,
            count,
        )
        return Choice(USUAL * factor, 1.0)
    wider = _by_wide(samples[0], situation)
    trainings = [_training(sample, situation, known=known) for sample in samples]
    _warn_of_much(situation.strength, trainings)
    pairs = zip(samples, trainings, strict=True)
    best = ridge_of_all if situation.strength else best_ridge
    logs = [math.log(bounded(best(*pair), *pair)) for pair in pairs]
    sizes = [len(s.loss) for s in samples]
    played = math.exp(np.average(logs, weights=sizes))
    power, path = (
        float(np.average(each, weights=sizes))
        for each in zip(*((t.power, t.path) for t in trainings), strict=True)
    )
    if situation.losses is None or not situation.losses.are_probable:
        power, path = 1.0, 0.0  # whatever the sample's are
    logger.info(
        "Automatic ridge: %.3g times the mean squared row norm for linearized models on "
        "halves, trained with a ridge of %s; times %.3g.",
        played,
        ", ".join(map(_described, trainings)),
        factor,
    )
    if wider is not None:
        return Choice(math.sqrt(played * factor * wider), power, path)
    return Choice(played * factor, power, path)


def _training(
    sample: Sample,
    situation: Situation,
    *,
    noisy: bool = False,
    known: Stationarity | None = None,
) -> Training:
    return training_of(
        sample.kernel,
        sample.pull,
        sample.loss,
        counts=sample.counts,
        share=sample.share,
        logistic=situation.logistic,
        words=situation.words,
        noisy=noisy,
        outputs=sample.outputs,
        known=known,
        normalized=situation.normalizes_batches,
    )


def _described(training: Training) -> str:
    ended = training.stopped
    if ended is None:
        return f"{training.ridge:.3g}"
    return f"{training.ridge:.3g} (others stopped early, which count {ended.weight:.2g})"


def _warn_of_much(strength: float, trainings: Sequence[Training]) -> None:
    if strength >= _MUCH and all(each.stiffness <= _FREE for each in trainings):
        logger.warning(
            "Rows are whitened by %g, which takes away what retrained models would share: "
            "all outputs grow together in this model, as in many classifiers of two "
            "classes. Use whitening=0.1 and another save_dir; trak.attribute chooses by "
            "itself (docs/whitening.md).",
            strength,
        )


def _by_wide(narrow: Sample, situation: Situation) -> float | None:
    # the noise of narrow rows is measured here: they score models that wide ones train
    if situation.wide is None or len(narrow.loss) < FEWEST:
        return None
    rows = torch.from_numpy(situation.wide.rows).to(narrow.kernel) * narrow.signs[:, None]
    kernel = rows @ rows.T
    sample = replace(narrow, kernel=kernel / kernel.diagonal().mean())
    training = _training(sample, situation, noisy=True)
    games = _games(sample, training)
    whole = best_ridge(sample, training, games)
    seen = best_ridge(narrow, training, games)
    noise = (seen / whole) ** (situation.checkpoints**-_SEEN_AVERAGED)
    whole = bounded(whole, sample, training)
    factor = noise_factor(len(narrow.loss), replace(situation, columns=None))
    factor *= BY_CURVATURE if is_curved(situation) else 1
    logger.info(
        "By wider rows of %d examples: %.3g for a training with a ridge of %.3g; times "
        "%.3g for the rows' width, times %.3g.",
        len(narrow.loss),
        whole,
        training.ridge,
        noise,
        factor,
    )
    return whole * noise * factor


def noise_factor(num_rows: int, situation: Situation) -> float:
    """How much larger the ridge should be than for linearized models.

    Features differ from training to training, and sketches from seed to seed. Averaging
    over checkpoints takes away both.

    Args:
        num_rows: `n`.
        situation: knows the checkpoints and columns.

    Returns:
        The factor.
    """
    factor = _NOISE + _BY_TRAINING / situation.checkpoints
    if situation.columns:
        narrow = 1 + num_rows / (3 * situation.columns)
        factor *= narrow ** (_BY_SKETCH * situation.checkpoints**-_AVERAGED)
    return factor


def ridge_of_all(sample: Sample, training: Training) -> float:
    """What `best_ridge` would be with all training examples instead of a part.

    Other ridges may be best with fewer examples. How they change is told from both halves
    of the part: where the ridge falls with their number by more than chance may explain, a
    power of 0.25, it falls on, to twice as many examples at most (docs/ridge.md). The
    part's examples are divided twice, with half as many halves each.

    Args:
        sample: of the training set.
        training: how the linearized models are trained.

    Returns:
        In the units of `best_ridge`.
    """
    games, size = _games(sample, training, twice=True), len(sample.loss)
    whole = best_ridge(sample, training, games)
    more = min(1 / sample.share, _FARTHEST)
    if more < _WORTH or size < 2 * FEWEST:
        return whole
    lots = torch.Generator().manual_seed(0)
    order = torch.randperm(size, generator=lots, device="cpu").to(sample.kernel.device)
    parts = [part.sort().values for part in order.split(math.ceil(size / 2))]
    pairs = [(sample.of(part), training.of(part)) for part in parts]
    found = [best_ridge(*pair, _games(*pair, brief=True)) for pair in pairs]
    slope = (math.log(whole) - float(np.log(found).mean())) / math.log(2)
    return whole * more ** min(0.0, slope + _CHANCE)


def bounded(found: float, sample: Sample, training: Training) -> float:
    """A ridge, held near that of models which are trained by flow alone.

    What tells a training's ridge (`trak.score_computers.stationarity`) was made with
    trainings of some kinds, and may be far off after others. How long a flow has to last
    until its loss weights are most like the real ones can be told of all
    (`trak.score_computers.duration`), but is no close estimate. So the former counts as
    long as it is not far from what the latter leads to.

    Args:
        found: the ridge, in the units of `best_ridge`.
        sample: of the training set.
        training: what was told of it.

    Returns:
        At least a sixth, at most three times that of the flow; the ridge as it is where
        nobody can tell how long the training lasted.
    """
    if training.time is None:
        return found
    outputs = margins(sample.loss)
    growth = growth_share(sample.kernel, outputs)
    time, kernel = as_networks(training.time, sample.kernel, outputs, growth)
    counts = sample.counts / sample.counts.mean()
    games = [
        trained_by_flow(kernel, time / sample.share, counts, seed, subsets)
        for seed, subsets in _divisions(len(sample.loss))
    ]
    flowed = best_ridge(sample, training, games)
    held = min(max(found, flowed / _LESS), flowed * _MUCH_MORE)
    if held != found:
        logger.info(
            "The ridge is %.3g times the mean squared row norm instead of %.3g, since "
            "models that are trained as long as loss weights say lead to %.3g.",
            held,
            found,
            flowed,
        )
    return held


def best_ridge(
    sample: Sample, training: Training, games: Sequence[Halves] | None = None
) -> float:
    """The ridge at which scores predict the outputs of linearized models best.

    Args:
        sample: of the training set.
        training: how the linearized models are trained.
        games: those that were, if these examples were played before.

    Returns:
        In units of the mean squared norm of the (weighted) rows: the geometric mean of
        the ridges that are as good as the best, within 0.01 of its correlation; less where
        these leave many directions to be told apart (see `_smaller`).
    """
    # a squared loss is equally curved everywhere, however rows are weighted
    even = training.answers is not None
    weights = sample.counts.sqrt() if even else sample.roots
    played = [
        _played(sample, weights, halves) for halves in games or _games(sample, training)
    ]
    values = np.mean([agreements for agreements, _ in played], axis=0)
    good = np.log(_RIDGES[values >= values.max() - _AS_GOOD])
    found = float(np.exp(good.mean()))
    if even or sample.curved:
        return found
    return found * _smaller(played[0][1], found * _share(sample))


def _games(
    sample: Sample, training: Training, *, twice: bool = False, brief: bool = False
) -> list[Halves]:
    divisions = _divisions(len(sample.loss), twice=twice)
    if brief:
        divisions = [(0, _HALVES)]
    ended = training.stopped
    if ended is not None:
        ended = ended._replace(time=ended.time / sample.share)
    return [
        retrained(
            training.kernel,
            training.ridge * sample.share,
            answers=training.answers,
            counts=sample.counts,
            seed=seed,
            subsets=subsets,
            stopped=ended,
        )
        for seed, subsets in divisions
    ]


def _divisions(size: int, *, twice: bool = False) -> list[tuple[int, int]]:
    # seeds and how many halves: several with few examples, where it matters which of them
    # are held out
    count = min(_MOST_GAMES, max(1, round(SAMPLE / size)))
    subsets = SUBSETS if size <= SAMPLE else SUBSETS // 2
    if twice and count == 1:
        count, subsets = 2, subsets // 2
    return [(seed, subsets) for seed in range(count)]


def _played(
    sample: Sample, weights: Tensor, halves: Halves
) -> tuple[NDArray[np.float64], Tensor]:
    # correlations at every ridge, and the spectrum of the rows trained with
    sums, spectrum = _sums(sample, weights, halves)
    values = halves.agreement(sums)
    return values.nan_to_num(-1.0).cpu().numpy(), spectrum


def _smaller(spectrum: Tensor, ridge: float) -> float:
    """How much smaller the ridge of a classifier is for networks than for linear models.

    Where classes are many and hard to tell apart, the ridge leaves many directions of the
    rows: `d = mean(s / (s + ridge))` over eigenvalues. Above 0.22 of the examples,
    `(0.22 / d)^2`, at least `1 / e`, fits what networks do (docs/ridge.md).

    Args:
        spectrum: eigenvalues of the rows' Gram matrix.
        ridge: in its units.

    Returns:
        A factor of at most 1.
    """
    effective = float((spectrum / (spectrum + ridge)).mean())
    return max(_LEAST, min(1.0, (_MANY / effective) ** _MORE)) if effective > 0 else 1.0


def _share(sample: Sample) -> float:
    size = len(sample.kernel)
    return sample.share * (size - size // 4) / size  # a quarter is held out


def _sums(sample: Sample, roots: Tensor, halves: Halves) -> tuple[Tensor, Tensor]:
    # of TRAK's scores over each half at every ridge, [r, subsets, h]; the Gram's spectrum
    train, held = halves.train, halves.held
    weights = roots[train][:, None]
    gram = weights * sample.kernel[train][:, train] * weights.T
    unit = gram.trace() / len(train)
    values, vectors = Spectrum.of(gram / unit)
    across = vectors.T @ (weights * sample.kernel[train][:, held])
    loss = (sample.loss * sample.counts)[train][:, None]
    after = halves.masks @ (vectors * (loss / weights))
    values = values.clamp(min=0)
    ridges = _share(sample) * torch.from_numpy(_RIDGES).to(values)[:, None, None]
    return after / (values + ridges) @ across, values


def _samples(rows: RowSource, situation: Situation) -> list[Sample]:
    # of whitened rows the unwhitened ones, of every process that fitted, if any kept some
    curved = is_curved(situation)
    found = [
        sample_of(examples, rows.shape[0], situation, curvature=curved)
        for examples in situation.unwhitened
        if len(examples.loss) >= FEWEST
    ]
    if not situation.strength or (not found and situation.plain is not None):
        found = [sampled(rows, situation)]
    return [sample for sample in found if sample is not None]
