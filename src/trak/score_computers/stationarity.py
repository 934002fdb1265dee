"""How strongly a finished training was regularized, read off its rows and loss weights.

What pulls at outputs says it where training came to rest (`trak.score_computers.pulls`).
Training that was stopped early looks like training with a larger ridge, which is told from
what is left of the loss weights (`trak.score_computers.decay`) where outputs did not begin
at zero.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from trak.score_computers.decay import Spectrum, between, decay_of
from trak.score_computers.duration import FREE, FREEST, lasted, with_growth
from trak.score_computers.flow import Stopped, stopped
from trak.score_computers.logistic import log_odds
from trak.score_computers.loss_power import (
    GROWTH,
    OTHER,
    Ending,
    path_of,
    power_of,
)
from trak.score_computers.pulls import Stationarity, stationarity_of
from trak.score_computers.residuals import ridge_left

LEAST, MOST = 0.3, 8.0
"""Ridges of a training, in units of the mean squared row norm times `q (1 - q)`."""
_HELD_BY_IT = (0.75, 0.9)
"""Share of the pulls' variance that stationarity explains: from the second on, outputs
began at zero and training came to rest, so that what is left of Q tells nothing else."""
_SURE, _MISTAKEN = 0.9, (0.1, 0.2)
"""How many examples are surely wrong, as a share of what is left of Q. Between the two,
short trainings turn from those of pretrained networks into those that have wrong labels to
learn, where depth counts."""
_UNDONE, _RESTING = (0.3, 0.45), (0.9, 1.0)
"""What is left of Q on average: from the first to the second, a training in which few
examples are surely wrong was short, unless stationarity explains nearly everything."""
_FLOWED, _GRIPPED = 0.6, (12.0, 18.0)
"""How much linearized models count that were trained by a flow that was stopped, where it
reproduces the loss weights: less the more labels are surely wrong, and the more of the
pulls stationarity explains; not at all where growth is held back 18 times as strongly as
`q (1 - q)`, where it was not the length of training that kept outputs small, nor after
batch normalization."""
_STILL = (0.7, 0.85)
"""Shares of the pulls' variance that stationarity explains: between them training turns
from one that was stopped into one that came to rest."""
NEARLY_ALL = (0.2, 0.4)
"""From the second of these shares of the rows' variance on outputs do little else but grow.
"""
_UNKNOWN = 0.4
_BOUNDED = 0.8  # of several labels, pixels or a hinge
_OF_WORDS = 0.03  # a text is many examples
_DEPTH = 2.5
"""Outputs of a network of `L` layers grow like the `L`-th power of its weights, so that
`Phi w = L f`. How many layers there are cannot be told from rows; 2.5 was best."""
HELD, _EXPLAINED = 8.0, 0.9
"""Where outputs of all examples grow along more than 4 % of the rows' variance, networks
give way to growth more easily than linear models do, down to a fifth of the stiffness; not
where growth is held back more than 8 times as strongly as the rest, nor where more than
90 % of what pulls at outputs is explained by a linear model."""
_MOST_WRONG = 0.5
_ALIKE = 0.6
_LEARNED = 0.75  # of the variance of outputs, by the leading directions
_RIGHT, _WRONG = 1e-30, 1e-9  # loss weights of 0 and 1 stand for finite outputs


@dataclass(frozen=True)
class Training:
    """A training of the linearized model.

    Attributes:
        ridge: of its objective, for all examples.
        kernel: of its features, `[n, n]`.
        answers: of a regression, `[n]`; None for the logistic loss.
        stiffness: of growth of all outputs, as `growth_stiffness` says; the kernel has it.
        power: exponent of Q that suits it (`trak.score_computers.loss_power`).
        path: share of what Q added up to along the way, on a logarithmic scale.
        stopped: when a flow from zero ends as it did, and how much is to be made of that;
            None if that is nothing, as of losses that are not logistic.
        time: how long it lasted (`trak.score_computers.duration`); None if nobody can tell.
    """

    ridge: float
    kernel: Tensor
    answers: Tensor | None
    stiffness: float = 1.0
    power: float = 1.0
    path: float = 0.0
    stopped: Stopped | None = None
    time: float | None = None

    def of(self, places: Tensor) -> "Training":
        """The same training of a part of the examples.

        Args:
            places: which, int64, `[c]`.

        Returns:
            A training with the same ridge.
        """
        answers = None if self.answers is None else self.answers[places]
        kernel = self.kernel[places][:, places]
        return replace(self, kernel=kernel, answers=answers)


class _Rest(NamedTuple):
    """What the training came to.

    Attributes:
        ending: how it ended; nobody has asked for the time yet.
        ridge: of the training, in mean squared row norms times `mean q (1 - q)`.
        stiffness: of growth.
        flowed: how much models count that were trained by a flow, if it is like this.
    """

    ending: Ending
    ridge: float
    stiffness: float
    flowed: float


class _Examples(NamedTuple):
    """Training examples of a logistic loss.

    Attributes:
        kernel: as for `training_of`.
        pull: as for `training_of`.
        loss: as for `training_of`.
        outputs: `[n]`.
        counts: how much they count, `[n]`.
        share: of the training set.
    """

    kernel: Tensor
    pull: Tensor
    loss: Tensor
    outputs: Tensor
    counts: Tensor
    share: float

    @property
    def steep(self) -> float:
        """The loss's mean curvature."""
        return float((self.loss * (1 - self.loss) * self.counts).mean())

    @property
    def growth(self) -> float:
        """Share of the rows' variance in which all outputs grow."""
        return growth_share(self.kernel, self.outputs)

    @property
    def mistaken(self) -> float:
        """How far surely wrong labels are what is left to learn, 0 to 1.

        They are not where growth is a large share, as with two classes.
        """
        sure = float((self.loss > _SURE).double().mean())
        many = between(sure / float(self.loss.mean()), *_MISTAKEN)
        return many and many * (1 - between(self.growth, *GROWTH))


def training_of(
    kernel: Tensor,
    pull: Tensor,
    loss: Tensor,
    *,
    counts: Tensor | None = None,
    share: float = 1.0,
    logistic: bool | None = None,
    words: bool = False,
    noisy: bool = False,
    outputs: Tensor | None = None,
    known: Stationarity | None = None,
    normalized: bool = False,
) -> Training:
    """The training whose result these examples are.

    Outputs are known where loss weights are probabilities of being wrong, `q = 1 / (1 +
    exp(f))`. (If nobody says whether they are: where most examples are wrong, or hardly
    differ, nothing but the leading directions can have been learned; if the outputs do not
    lie in these, Q is another kind of number, such as a mean over a text's words.) There
    the ridge is the median over eigenvectors 6 to 100, or what is left of Q along all of
    them says that it was larger (see `_ridge_of_it`). The direction in which all outputs
    grow may be held back more strongly than others, as by batch normalization or the
    length of training; the kernel is then smaller along it. Where it is a large part of
    the rows, as with two classes, it is larger (see `_stiffness`). When a flow from zero
    ends as a logistic training did is told beside that. The ridge of a squared loss is told
    from outputs and residuals (`trak.score_computers.residuals`), if they are known. For
    other losses it is a constant: 0.4, 0.8 where loss weights are different numbers from 0
    to 1 (as are their exponent and share of the way, `loss_power.OTHER`), or 0.03 for means
    over words. The answers are those that would have led to these weights.

    Args:
        kernel: `Phi Phi^T` of a sample, in units of the mean squared row norm, `[n, n]`,
            float64.
        pull: `Phi Phi^T Q`, with all training examples in the inner sum, `[n]`.
        loss: Q, not counting how much examples count, `[n]`.
        counts: how much they count, `[n]`; None if all count once.
        share: of the training set that the sample is.
        logistic: whether Q is that of a logistic loss; None if unknown.
        words: Q is a mean over the words of a text.
        noisy: `pull` comes from narrower rows than the kernel, so that least squares,
            weighted by the noise, take the place of the median.
        outputs: of the model, in units of Q, `[n]`, where the loss is a squared one.
        known: what pulls at outputs says, where more examples tell it than `pull` does.
        normalized: the model normalizes batches, which hides how long training was.

    Returns:
        The training.
    """
    told = _outputs(kernel, loss, logistic)
    counts = torch.ones_like(loss) if counts is None else counts
    if told is None:
        known_of_all = kernel, pull, loss, counts, share, outputs
        return _of_another_loss(*known_of_all, words=words, noisy=noisy)
    examples = _Examples(kernel, pull, loss, told, counts, share)
    rest = _at_rest(examples, noisy=noisy, known=known, normalized=normalized)
    time = None if normalized else lasted(kernel, loss, counts, share)
    return _of_logistic(examples, rest, time)


def growth_stiffness(
    kernel: Tensor,
    pull: Tensor,
    loss: Tensor,
    *,
    counts: Tensor | None = None,
    share: float = 1.0,
    logistic: bool | None = None,
    normalized: bool = False,
) -> float:
    """How strongly growth of all outputs is held back, compared with other directions.

    Args:
        kernel: as for `training_of`.
        pull: as for `training_of`.
        loss: as for `training_of`.
        counts: as for `training_of`.
        share: as for `training_of`.
        logistic: as for `training_of`.
        normalized: as for `training_of`.

    Returns:
        Below 1 where growth is easier than other changes, as in many classifiers of two
        classes; 1 for losses that are not logistic.
    """
    outputs = _outputs(kernel, loss, logistic)
    if outputs is None:
        return 1.0
    counts = torch.ones_like(loss) if counts is None else counts
    examples = _Examples(kernel, pull, loss, outputs, counts, share)
    return _at_rest(examples, noisy=False, normalized=normalized).stiffness


def _of_logistic(examples: _Examples, rest: _Rest, time: float | None) -> Training:
    kernel, flow = with_growth(examples.kernel, examples.outputs, rest.stiffness), None
    ending = rest.ending._replace(time=time)
    if rest.flowed:
        flow = stopped(kernel, examples.loss, examples.counts, examples.share)
        weight = rest.flowed * flow.weight
        flow = flow._replace(weight=weight) if weight else None
    return Training(
        rest.ridge * examples.steep,
        kernel,
        None,
        rest.stiffness,
        power_of(ending),
        path_of(ending),
        flow,
        time,
    )


def _of_another_loss(
    kernel: Tensor,
    pull: Tensor,
    loss: Tensor,
    counts: Tensor,
    share: float,
    outputs: Tensor | None,
    *,
    words: bool,
    noisy: bool,
) -> Training:
    bounded = bool(((loss >= 0) & (loss <= 1)).all() and loss.min() < loss.max())
    usual = _OF_WORDS if words else _BOUNDED if bounded else _UNKNOWN
    ridge = usual * float(counts.mean())
    if outputs is not None:
        ridge = ridge_left(kernel, pull, outputs, loss, counts, share, usual, noisy=noisy)
    power, path = OTHER if bounded and not words else (1.0, 0.0)
    return Training(ridge, kernel, pull / ridge + loss, power=power, path=path)


def margins(loss: Tensor) -> Tensor:
    """Outputs that probabilities of being wrong stand for, finite ones for all of them.

    Args:
        loss: Q, `[n]`, 0 to 1.

    Returns:
        `log((1 - q) / q)`, `[n]`.
    """
    return log_odds(loss, _RIGHT, 1 - _WRONG)


def growth_share(kernel: Tensor, outputs: Tensor) -> float:
    """How much of the rows' variance is growth of all outputs.

    Args:
        kernel: as for `training_of`.
        outputs: of the model, `[n]`.

    Returns:
        From 0 to 1; not a number where all outputs are 0.
    """
    return float(outputs @ kernel @ outputs / (outputs @ outputs)) / len(outputs)


def _at_rest(
    examples: _Examples,
    *,
    noisy: bool,
    known: Stationarity | None = None,
    normalized: bool = False,
) -> _Rest:
    kernel, outputs = examples.kernel, examples.outputs
    spectrum = None  # which takes as long as all else
    if known is None:
        spectrum, steep = Spectrum.of(kernel), examples.steep
        known = stationarity_of(spectrum, examples.pull, outputs, steep, noisy=noisy)
    growing, found, explained = known
    told = found / _DEPTH
    ridge = min(max(told, LEAST), MOST) if told > 0 else _UNKNOWN
    flowed = 0.0
    if not normalized:
        ridge = _ridge_of_it(examples, spectrum, ridge, explained)
        flowed = (1 - between(explained, *_STILL)) * (1 - between(growing, *_GRIPPED))
        flowed *= 1 - examples.mistaken
    share = examples.growth
    stiffness = _stiffness(growing, share, explained, ridge)
    ending = Ending(share, told, explained, None)
    return _Rest(ending, ridge, stiffness, _FLOWED * flowed)


def _ridge_of_it(
    examples: _Examples, spectrum: Spectrum | None, told: float, explained: float
) -> float:
    """The ridge of a training that may have been short.

    Outputs of pretrained networks did not begin at zero, so that stationarity cannot tell
    how short their fine-tuning was; the loss weights that it left can.

    Args:
        examples: of the training.
        spectrum: of their kernel, if it is known.
        told: what stationarity says, in units of `q (1 - q)`.
        explained: share of the pulls' variance that it explains.

    Returns:
        In units of `q (1 - q)`, with how much examples count.
    """
    kernel, loss, counts = examples.kernel, examples.loss, examples.counts
    mistaken = examples.mistaken
    undone = between(float(loss.mean()), *_UNDONE) * (1 - mistaken)
    undone *= 1 - between(explained, *_RESTING)
    weight = max(1 - between(explained, *_HELD_BY_IT), undone)
    if not weight:
        return told
    decay = decay_of(kernel, loss, counts, examples.share, spectrum)
    own = float((loss * (1 - loss)).mean())
    longer = decay.ridge * own / examples.steep / _DEPTH**mistaken
    return told * (max(told, min(longer, MOST)) / told) ** (weight * decay.clarity)


def _stiffness(growing: float, share: float, explained: float, ridge: float) -> float:
    """How strongly growth of all outputs is held back, compared with other directions.

    Features of networks whose outputs grow do grow, too, and what training leaves undone is
    done along the leading directions first. So growth is easier than other changes, which
    matters where much of what rows have in common is growth, as with two classes: there a
    ridge that does not know of it is far from what retrained networks want
    (docs/ridge.md). Where growth was found to be held back, as by batch normalization, it
    stays so; and so do linear models that were trained to the end.

    Args:
        growing: how strongly it is held back, in units of `q (1 - q)`.
        share: of the rows' variance, along the outputs.
        explained: share of the pulls' variance that stationarity explains.
        ridge: of the training, in units of `q (1 - q)`.

    Returns:
        Above 0; 1 if growth is like the rest.
    """
    held = max(1.0, growing / (_DEPTH * ridge)) ** _held_for_sure(growing, share, explained)
    freedom = max(FREEST, min(1.0, FREE / share) ** 2) if share > 0 else 1.0
    unlike = min(1.0, max(0.0, 1 - explained) / (1 - _EXPLAINED))
    return held * freedom ** (unlike / (1 + (held / HELD) ** 4))


def _held_for_sure(growing: float, share: float, explained: float) -> float:
    # not where outputs do little but grow, so that there is nothing to compare it with
    rest = between(explained, *_STILL)
    return max(rest, between(growing, *_GRIPPED), 1 - between(share, *NEARLY_ALL))


def _outputs(kernel: Tensor, loss: Tensor, logistic: bool | None) -> Tensor | None:
    # None where loss weights are no probabilities of a logistic model
    if not bool(((loss >= 0) & (loss <= 1)).all()) or not bool((loss * (1 - loss)).any()):
        return None
    outputs = margins(loss)
    if logistic is None:
        logistic = _as_if_learned(kernel, loss, outputs)
    return outputs if logistic else None


def _as_if_learned(kernel: Tensor, loss: Tensor, outputs: Tensor) -> bool:
    if float(loss.median()) <= _MOST_WRONG and float(outputs.std()) >= _ALIKE:
        return True
    vectors = torch.linalg.eigh(kernel).eigenvectors[:, -max(1, len(loss) // 12) :]
    apart = outputs - outputs.mean()
    along = (vectors.T @ apart).square().sum()
    return bool(along >= _LEARNED * apart.square().sum())
