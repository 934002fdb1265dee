"""Lists of the strongest examples that say which ranks these could have."""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.arguments import as_integer, as_number
from trak.errors import InputError

logger = logging.getLogger(__name__)

_NOISE = 2  # times the list's length
_STEPS = 20_001
_COMPARISONS = 1 << 20  # at once


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """The strongest training examples of every target, strongest first.

    Attributes:
        indices: rows of the training set, `[m, k]`.
        scores: their scores, `[m, k]`.
        errors: standard errors of the scores, `[m, k]`.
        rank_low: the best rank that each could have, from 1, `[m, k]`: one more than the
            number of examples whose score is clearly greater (clearly less, where the
            smallest scores were asked for).
        rank_high: the worst one, `[m, k]`: all but those whose score is clearly less
            (greater).
        level: "clearly" means beyond the interval of this level of the difference of two
            scores with independent errors.
        source: what the errors are from: `"checkpoints"` or `"sketch"`.
        limit: an entry that could have a rank beyond it is noise.
        projected: whether rows are random projections.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float32]
    errors: NDArray[np.float32]
    rank_low: NDArray[np.int64]
    rank_high: NDArray[np.int64]
    level: float
    source: str
    limit: int
    projected: bool = True

    def noise(self) -> NDArray[np.float64]:
        """How much of each list is noise.

        Returns:
            `[m]`: share of the entries whose rank could be beyond `limit`.
        """
        return (self.rank_high > self.limit).mean(axis=1)

    def describe(self, target: int) -> str:
        """One target's list in words.

        Args:
            target: its number.

        Returns:
            One line an example.

        Raises:
            InputError: if there is no such target.
        """
        if as_integer("target", target, least=0) >= len(self.indices):
            raise InputError(
                f"target must be from 0 to {len(self.indices) - 1}, got {target!r}."
            )
        rows = zip(
            self.indices[target],
            self.scores[target],
            self.errors[target],
            self.rank_low[target],
            self.rank_high[target],
            strict=True,
        )
        return "\n".join(
            f"{place:3}. example {index}: {score:.4g} +- {error:.2g}, "
            + (f"rank {low}" if low == high else f"rank could be {low} to {high}")
            for place, (index, score, error, low, high) in enumerate(rows, start=1)
        )

    def warn_of_noise(self) -> None:
        """Warns if most of the list is noise for most of the targets."""
        noisy = self.noise() > 0.5
        if noisy.mean() <= 0.5:
            return
        more = (
            "Average over more checkpoints of independent trainings"
            + (", or use a larger proj_dim." if self.projected else ".")
            if self.source == "checkpoints"
            else "Use a larger proj_dim, and several checkpoints, whose spread is not even "
            "counted here."
        )
        logger.warning(
            "The lists of the strongest examples are mostly noise for %d of %d targets: "
            "more than half of their entries could have ranks beyond %d. %s",
            int(noisy.sum()),
            len(noisy),
            self.limit,
            more,
        )


@dataclass(frozen=True, eq=False)
class Aims:
    """Scores that all others of their target are compared with.

    Attributes:
        values: the scores, `[m, k]`, float64.
        squares: their variances, `[m, k]`.
        reach: two scores differ clearly if by more than this times the standard error of
            their difference.
    """

    values: Tensor
    squares: Tensor
    reach: float

    def compared(self, scores: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """How many of some scores are clearly above and below each of these.

        Args:
            scores: `[b, m]`, float64.
            squares: their variances, `[b, m]`.

        Returns:
            `[m, k]` each.
        """
        # most are clearly below all of them
        unsure = self.reach**2 * (squares + self.squares.amax(dim=1))
        apart = (self.values.amin(dim=1) - scores).clamp(min=0)
        others = apart.square() <= unsure
        count, k = len(scores), self.values.shape[1]
        above = torch.zeros_like(self.values, dtype=torch.int64).flatten()
        below = (count - others.sum(dim=0)).repeat_interleave(k)
        targets = others.nonzero()[:, 1]
        found = (targets, scores[others], squares[others])
        size = max(1, _COMPARISONS // k)
        for target, score, square in zip(
            *(each.split(size) for each in found), strict=True
        ):
            apart = score[:, None] - self.values[target]
            unsure = self.reach**2 * (square[:, None] + self.squares[target])
            clear = apart.square() > unsure
            place = target[:, None] * k + torch.arange(k, device=target.device)
            above += torch.bincount(place[clear & (apart > 0)], minlength=len(above))
            below += torch.bincount(place[clear & (apart < 0)], minlength=len(below))
        return above.view_as(self.values), below.view_as(self.values)


def noise_limit(length: int, count: int) -> int:
    """The rank beyond which an entry of a list is noise.

    Args:
        length: of the list, `k`.
        count: examples that there are, `n`.

    Returns:
        Twice the length, or half-way from the list's end to the last example, if that is
        less.
    """
    return min(_NOISE * length, (length + count) // 2)


def critical(level: float, degrees: float) -> float:
    """How many standard errors an interval reaches to both sides.

    Args:
        level: share of intervals that hold what they are of, between 0 and 1.
        degrees: degrees of freedom of the standard error.

    Returns:
        The quantile of Student's t at `(1 + level) / 2`, to five digits.

    Raises:
        InputError: if the level is not between 0 and 1.
    """
    level = as_number("level", level, zero=False)
    if level >= 1:
        raise InputError(f"level must be between 0 and 1, got {level!r}.")
    # the density of t = sqrt(d) tan(a) is proportional to cos(a)^(d - 1)
    # (below two degrees steep at the end, where steps are short)
    farthest = min(math.pi / 2, 12 / math.sqrt(degrees))  # beyond there is nothing
    angles = farthest * (1 - np.linspace(1, 0, _STEPS) ** 4)
    density = np.cos(angles) ** (degrees - 1)
    steps = (density[1:] + density[:-1]) / 2 * np.diff(angles)
    masses = np.concatenate([[0.0], np.cumsum(steps)])
    angle = float(np.interp(level, masses / masses[-1], angles))
    return math.sqrt(degrees) * math.tan(angle)
