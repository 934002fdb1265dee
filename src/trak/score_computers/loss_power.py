"""How much the loss weights Q of training examples should differ.

Scores are multiplied by `q`, what the model lacks at the end of its training. What an
example did on the way was more: an example that is learned now was wrong once, too. So Q
to a power below 1 predicts retrained models better where training ended before weights
and data had come to rest, as fine-tunings and trainings without weight decay do; where it
ran until they had, `q` itself is right (docs/choices.md has the measurements).
"""

import math
from typing import Any, NamedTuple

from torch import Tensor

from trak.arguments import as_number
from trak.errors import InputError
from trak.score_computers.decay import between
from trak.score_computers.losses import Losses

GROWTH = (0.06, 0.13)
"""Shares of the rows' variance in which all outputs grow together. As with two classes:
what they have in common is learned for good."""
_AT_REST, _EXPLAINED = 0.1, (0.8, 0.95)
"""A ridge of the training, and the share of what pulls at outputs that it explains, from
which on a training has come to rest against its weight decay."""
_BRIEF = (-4.0, -1.0)
"""Powers of two: times of trainings, in units of what the mean squared row norm is in,
below the first of which Q is still much like what it began as."""
_LONG = (1.0, 2.0)
"""Powers of two, too: from times above the second on features grew with outputs."""
_HALF, _RESTED = 0.5, 0.75
_NORMALIZED = (1.0, 0.5)
"""Exponent, and share of the way, where batch normalization lets nobody tell the time."""


class Path(NamedTuple):
    """What loss weights added up to along the way of training.

    Attributes:
        weights: as `trak.score_computers.path.added_up` gives them, `[n, 1]`, float64.
        share: exponent that they have.
    """

    weights: Tensor
    share: float


WAY = "way"
"""What a factor's description calls the weights of a `Path`, an array `[n, 1]`."""

Power = float | None
"""An exponent; None for the automatic one."""


def as_power(value: Any) -> Power:
    """Accepts an exponent of loss weights.

    Args:
        value: a number from 0 to 1, or `"auto"`.

    Returns:
        A Python float; None for the automatic one.

    Raises:
        InputError: if it is something else.
    """
    if isinstance(value, str) and value == "auto":
        return None
    found = 2.0 if isinstance(value, str) else as_number("loss_power", value, zero=True)
    if found > 1:
        raise InputError(
            "loss_power must be a number from 0 to 1, the exponent of loss weights Q (1 "
            f"for TRAK as it is), or 'auto', got {value!r}."
        )
    return found


OTHER = (0.5, 0.5)
"""Exponent, and share of the way, where loss weights are different numbers from 0 to 1 of a
loss that is no logistic one, such as of several labels or a hinge."""


class Ending(NamedTuple):
    """How a training ended.

    Attributes:
        share: of the rows' variance, in which all outputs grow.
        at_rest: the ridge that holds its outputs where they are, if it came to rest.
        explained: share of what pulls at outputs that this explains, 0 to 1.
        time: how long it lasted (`trak.score_computers.duration`); None if nobody can tell.
    """

    share: float
    at_rest: float
    explained: float
    time: float | None

    @property
    def rest(self) -> float:
        """How surely it came to rest, 0 to 1; not where growth is a large share."""
        held = between(self.at_rest, 0, _AT_REST) * between(self.explained, *_EXPLAINED)
        return held * (1 - between(self.share, *GROWTH))


def power_of(ending: Ending) -> float:
    """The exponent that suits a training.

    Args:
        ending: of it.

    Returns:
        A half, and up to 0.75 where training came to rest, so that Q says what is left;
        down to 0 the shorter it was, since Q says little then.
    """
    if ending.time is None:
        return _NORMALIZED[0]
    own = _HALF + (_RESTED - _HALF) * ending.rest
    return own * _beyond(ending.time, *_BRIEF)


def path_of(ending: Ending) -> float:
    """How much of Q is to be what it added up to along the way, not what it ended as.

    Args:
        ending: of the training.

    Returns:
        An exponent: a half, and up to 1 where growth is a large share and training was
        long; down to 0 where training came to rest against its weight decay, which forgets
        the way, and where it was so short that there was none.
    """
    if ending.time is None:
        return _NORMALIZED[1]
    grown = between(ending.share, *GROWTH) * _beyond(ending.time, *_LONG)
    own = _HALF + (1 - _HALF) * grown
    return own * (1 - ending.rest) * _beyond(ending.time, *_BRIEF)


def _beyond(time: float, low: float, high: float) -> float:
    return between(math.log2(time), low, high) if time > 0 else 0.0


def powered(
    losses: Losses, sizes: Losses, power: float, path: Path | None = None
) -> Tensor:
    """Loss weights as scores are multiplied by them.

    Args:
        losses: Q, with signs.
        sizes: the same as probabilities, without signs, where they are any.
        power: the exponent.
        path: what Q added up to along the way, if it is to have a share.

    Returns:
        `sign(q) |q|^power`, times how much examples count, with the mean size that Q has,
        `[n, 1]`, float64; Q itself where it is no probability. With a path `a` and its
        share `s`, `sign(q) |q|^(power (1 - s)) a^s`.
    """
    total = losses.total
    if (power == 1 and path is None) or not sizes.are_probable:
        return total
    share = 0.0 if path is None else path.share
    found = losses.own.sign() * sizes.own.pow(power * (1 - share))
    if path is not None:
        found = found * path.weights.pow(share)
    if losses.counts is not None:
        found = found * losses.counts
    size = found.abs().sum()
    return found * (total.abs().sum() / size) if size > 0 else found
