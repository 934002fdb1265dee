"""Bootstrap intervals of a mean over targets of correlations over subsets.

The two ways in which a figure could have come out otherwise, other subsets and other
targets, are resampled each on its own and both together. Both together is the pigeonhole
bootstrap of Owen 2007 (Annals of Applied Statistics 1(2), Sec. 3), whose intervals are
somewhat too wide rather than too narrow.

Intervals are reflected, `2 value - quantiles` (the basic bootstrap, Davison and Hinkley
1997, Sec. 5.2). A rank correlation over few subsets is biased towards 0, and so is that of
a resample towards the sample's: percentiles would count this twice, and with many targets
miss the truth nearly always.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from trak.arguments import as_integer, as_number
from trak.errors import InputError
from trak.evaluation.arrays import Floats


class Interval(NamedTuple):
    """A confidence interval.

    Attributes:
        low: its lower end.
        high: its upper end.
    """

    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made.

    Attributes:
        level: nominal coverage of an interval, between 0 and 1.
        draws: resamples.
        seed: of the generator that draws them.
    """

    level: float = 0.95
    draws: int = 1000
    seed: int = 0

    @classmethod
    def of(cls, level: Any, draws: Any, seed: Any) -> "Bootstrap":
        """Checks what a user gave.

        Args:
            level: nominal coverage.
            draws: resamples.
            seed: of the generator.

        Returns:
            The settings.

        Raises:
            InputError: if one of them cannot be used.
        """
        checked = as_number("level", level, zero=False)
        if checked >= 1:
            raise InputError(f"level must be below 1, such as 0.95, got {level!r}.")
        draws = as_integer("draws", draws, least=2, most=_MOST_DRAWS)
        return cls(checked, draws, as_integer("seed", seed, least=0))

    def counts(self, size: int, stream: int) -> Floats:
        """Draws with replacement.

        Args:
            size: how many there are to draw from, and how many are drawn.
            stream: a number for what is drawn, so that two are independent.

        Returns:
            How often each draw holds each, `[draws, size]`.
        """
        rng = np.random.default_rng([self.seed, stream])
        drawn = rng.multinomial(size, np.full(size, 1 / size), size=self.draws)
        return drawn.astype(np.float64)

    def interval(
        self, value: float, drawn: Floats, limits: tuple[float, float] = (-1.0, 1.0)
    ) -> Interval:
        """The reflected interval.

        Args:
            value: what was found.
            drawn: what each resample gives, `[draws]`.
            limits: the smallest and largest value there can be.

        Returns:
            The interval, within the limits.
        """
        tail = (1 - self.level) / 2
        low, high = np.quantile(drawn, [tail, 1 - tail])
        ends = np.clip([2 * value - high, 2 * value - low], *limits)
        return Interval(float(ends[0]), float(ends[1]))


@dataclass(frozen=True, eq=False)
class Resampled:
    """A mean over targets with what its resamples say.

    Attributes:
        value: the mean.
        per_target: `[m]`.
        over_targets: interval over targets, for these subsets.
        over_subsets: interval over subsets, for these targets.
        jointly: interval over both.
        bias: mean over resampled subsets less the value; the intervals allow for it.
    """

    value: float
    per_target: Floats
    over_targets: Interval
    over_subsets: Interval
    jointly: Interval
    bias: float


_MOST_DRAWS = 1_000_000
SUBSETS, TARGETS, CONTROLS = range(3)
"""Streams of random numbers: one for each thing that is drawn."""


def resampled(
    per_target: Floats,
    drawn: Floats,
    how: Bootstrap,
    limits: tuple[float, float] = (-1.0, 1.0),
) -> Resampled:
    """Intervals of the mean over targets.

    Args:
        per_target: the figure of each target, `[m]`.
        drawn: the same on resampled subsets, `[draws, m]`.
        how: level and seed.
        limits: the smallest and largest value there can be.

    Returns:
        The mean and its intervals.
    """
    value = float(per_target.mean())
    targets = how.counts(len(per_target), TARGETS) / len(per_target)
    subsets = drawn.mean(axis=1)
    both = np.einsum("dm,dm->d", drawn, targets)
    return Resampled(
        value=value,
        per_target=per_target,
        over_targets=how.interval(value, targets @ per_target, limits),
        over_subsets=how.interval(value, subsets, limits),
        jointly=how.interval(value, both, limits),
        bias=float(subsets.mean()) - value,
    )
