"""How much the loss weights Q of training examples should differ.

Scores are multiplied by `q`, what the model lacks at the end of its training. What an
example did on the way was more: an example that is learned now was wrong once, too. So Q
to a power below 1 predicts retrained models better where training ended before weights
and data had come to rest, as fine-tunings and trainings without weight decay do; where it
ran until they had, `q` itself is right (docs/choices.md has the measurements).
"""

from typing import Any, NamedTuple

from torch import Tensor

from trak.arguments import as_number
from trak.errors import InputError
from trak.score_computers.decay import between
from trak.score_computers.losses import Losses

_USUAL, _SHORT, _SHORTEST = 0.75, 0.5, 0.25
_UNLEARNED = (0.06, 0.18)
"""Mean loss weights: below the first training was long, from the second on it was short."""
GROWTH = (0.06, 0.13)
"""Shares of the rows' variance in which all outputs grow together. As with two classes:
what they have in common is learned for good, and the weights at the end say what is left.
"""
NEARLY_ALL = (0.2, 0.4)
"""From the second of these shares on, Q says what is left after short trainings, too."""
_LAZY = (1.0, 3.0)
"""Ridges of the training: from the second on it was so short that Q is still much like
what it began as, and growth like the rest."""
_HALF = 0.5  # of the way, where nothing else is known
_EXPLAINED_GROWTH = (0.85, 0.97)  # as `_EXPLAINED`, where growth is a large share
_AT_REST, _EXPLAINED = 0.2, (0.6, 0.8)
"""A ridge of the training, and the share of what pulls at outputs that it explains, from
which on a training has come to rest against its weight decay."""


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
        loss: mean Q of its examples.
        share: of the rows' variance, in which all outputs grow.
        ridge: of the training, in mean squared row norms times `mean q (1 - q)`.
        at_rest: the ridge that holds its outputs where they are, if it came to rest.
        explained: share of what pulls at outputs that this explains, 0 to 1.
        held: how surely growth is held back, 0 to 1.
        followed: how surely a flow followed it for so long that features grew, 0 to 1; 1
            where none was asked.
    """

    loss: float
    share: float
    ridge: float
    at_rest: float
    explained: float
    held: float
    followed: float = 1.0


def power_of(ending: Ending) -> float:
    """The exponent that suits a training.

    Args:
        ending: of it.

    Returns:
        0.75, and down to 0.5 the more examples were not learned, unless a ridge explains
        that; up to 1 where growth is a large share, unless it is held back while examples
        are left to learn; and instead of all this down to 0.25 the shorter training was,
        unless growth is nearly everything.
    """
    rest = between(ending.at_rest, 0, _AT_REST) * between(ending.explained, *_EXPLAINED)
    unlearned = between(ending.loss, *_UNLEARNED)
    power = _USUAL - (_USUAL - _SHORT) * unlearned * (1 - rest)
    short = between(ending.ridge, *_LAZY) * (1 - between(ending.share, *NEARLY_ALL))
    free = between(ending.share, *GROWTH) * (1 - short) * (1 - ending.held * unlearned)
    power += (1 - power) * free
    return power - (power - _SHORTEST) * short


def path_of(ending: Ending) -> float:
    """How much of Q is to be what it added up to along the way, not what it ended as.

    Args:
        ending: of the training.

    Returns:
        An exponent: a half, and up to 1 where growth is a large share, unless it is held
        back or a flow says that training was short; down to 0 where training came to rest
        against its weight decay, which forgets the way, and where it was so short that Q is
        still what it began as.
    """
    free = between(ending.share, *GROWTH) * (1 - ending.held)
    least, most = (
        low + (high - low) * free
        for low, high in zip(_EXPLAINED, _EXPLAINED_GROWTH, strict=True)
    )
    rest = between(ending.at_rest, 0, _AT_REST) * between(ending.explained, least, most)
    short = between(ending.ridge, *_LAZY)
    own = _HALF + (1 - _HALF) * free * ending.followed
    return own * (1 - rest) * (1 - short)


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
