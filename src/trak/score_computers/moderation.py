"""Variances that are told from few checkpoints, moderated by those of like scores.

A variance with one or two degrees of freedom says little. Those of all scores together say
how large one should be: the example's usual spread, the target's, and how far the spread
grows with the score. Between this and what the score's own checkpoints say, the empirical
Bayes estimate of Smyth (2004, "Linear models and empirical Bayes methods for assessing
differential expression in microarray experiments", Sec. 3 and 6.2) weighs by how well the
one predicts the other. What it needs to know is learned from a few training examples in
the role of targets, so that the error of a score depends on no other target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PEERS = 32
"""Training examples that are scored as if they were targets."""
_ROUNDING = 1e-6  # of a score: a spread below it is none
_FEWEST = 200  # variances that something can be learned from
_MOST = 100.0  # degrees of freedom of what was learned
_EDGES = (-6.0, 6.0, 25)  # of log(|score| / usual spread)
_FEWEST_A_BIN = 50
_ROUNDS = 4


class ScoredRows(NamedTuple):
    """Some rows of the scores of all targets.

    Attributes:
        effects: of the rows' examples, `[b]`; NaN where nothing is known.
        scores: `[b, m]`, float64.
        squares: their variances, `[b, m]`.
    """

    effects: Tensor
    scores: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Moderation:
    """What is known of variances before a score's own is looked at.

    With `s2` the variance of a score and `d` its degrees of freedom, `(d0 s0^2 + d s2) /
    (d0 + d)`, with `log s0^2` the sum of the target's level, the example's effect and the
    trend in `log(|score| / usual spread)`.

    Attributes:
        degrees: `d0 + d`, of moderated variances.
        peers: row numbers of the training examples that are scored as targets, `[p]`.
        levels: mean logarithms of their variances, `[p]`.
        share: of an example's mean over the peers that counts as its effect.
        centres: of the trend's bins, ascending.
        bends: the trend there.
        own: `d`.
    """

    degrees: float
    peers: Tensor
    levels: Tensor
    share: float
    centres: Tensor
    bends: Tensor
    own: int

    def effects(self, numbers: Tensor, scores: Tensor, squares: Tensor) -> Tensor:
        """How much more than usual the scores of some examples vary.

        Args:
            numbers: their row numbers, `[b]`.
            scores: with the peers as targets, `[b, p]`, float64.
            squares: their variances, `[b, p]`.

        Returns:
            In logarithms, `[b]`; NaN for examples whose scores do not vary at all.
        """
        logs, alive = _logs(scores, squares, self.own)
        alive = alive & (numbers[:, None] != self.peers)
        found = self.share * _means(logs - self.levels, alive, dim=1)
        return torch.where(alive.any(dim=1), found, torch.nan)

    def target_levels(self, stretches: Sequence[ScoredRows]) -> Tensor:
        """The targets' levels.

        Args:
            stretches: some rows.

        Returns:
            `[m]`; NaN for targets whose scores do not vary in any of them.
        """
        levels: Tensor | None = None
        for _ in range(_ROUNDS):  # the trend depends on the level, and it on the trend
            total: Any = 0.0
            count: Any = 0.0
            for effects, scores, squares in stretches:
                logs, alive = _logs(scores, squares, self.own)
                alive = alive & ~effects[:, None].isnan()
                rest = logs - effects[:, None].nan_to_num()
                if levels is not None:
                    rest = rest - self._trend(scores, logs - rest + levels)
                total = total + (rest * alive).nan_to_num().sum(dim=0)
                count = count + alive.sum(dim=0)
            levels = total / count
        assert levels is not None  # noqa: S101 - there is at least one round
        return levels

    def moderated(self, levels: Tensor, stretch: ScoredRows) -> Tensor:
        """Moderates the variances of some rows.

        Args:
            levels: as `target_levels` gives them, `[m]`.
            stretch: the rows.

        Returns:
            `[b, m]`; variances that are rounding, or of rows or targets of which nothing
            is known, as they are.
        """
        effects, scores, squares = stretch
        alive = _varies(scores, squares)
        base = effects[:, None] + levels
        prior = self.degrees - self.own
        usual = (base + self._trend(scores, base) - _bias(prior)).exp()
        both = (prior * usual + self.own * squares) / self.degrees
        return torch.where(alive & ~base.isnan(), both, squares)

    def _trend(self, scores: Tensor, base: Tensor) -> Tensor:
        return _at(_sizes(scores, base), self.centres, self.bends)


def learned(
    numbers: Tensor,
    scores: Tensor,
    squares: Tensor,
    peers: Tensor,
    degrees: int,
) -> Moderation | None:
    """Learns how variances differ.

    Args:
        numbers: row numbers of some training examples, `[b]`.
        scores: of them, with the peers as targets, `[b, p]`, float64.
        squares: their variances, `[b, p]`.
        peers: row numbers of the peers, `[p]`.
        degrees: degrees of freedom of the variances, at least 1.

    Returns:
        What was learned; None if there is too little to learn from.
    """
    logs, alive = _logs(scores, squares, degrees)
    mine = alive & (numbers[:, None] != peers)
    if int(mine.sum()) < _FEWEST or int(mine.any(dim=0).sum()) < 2:
        return None
    chance = float(_trigamma(degrees))
    levels = _means(logs, mine, dim=0)
    apart = (logs - levels) * mine
    share_of_others, share = _shares(apart, mine, chance)
    # of each variance the effect is told by the other ones of its row
    others = mine.sum(dim=1, keepdim=True) - mine.long()
    base = (apart.sum(dim=1, keepdim=True) - apart) / others.clamp(min=1)
    base = share_of_others * base
    rest, sizes = apart - base, _sizes(scores, base + levels)
    centres, bends = _trend(sizes[mine], rest[mine])
    rest = (rest - _at(sizes, centres, bends))[mine]
    # less scatter than chance alone makes is chance that scores share
    prior = _degrees_of(abs(float(rest.var()) - chance))
    return Moderation(degrees + prior, peers, levels, share, centres, bends, degrees)


def _logs(scores: Tensor, squares: Tensor, degrees: int) -> tuple[Tensor, Tensor]:
    # unbiased for the logarithm of the true variance
    alive = _varies(scores, squares)
    return torch.where(alive, squares, 1.0).log() + _bias(degrees), alive


def _varies(scores: Tensor, squares: Tensor) -> Tensor:
    return squares > (_ROUNDING * scores).square()


def _bias(degrees: float) -> float:
    # how far a chi-square's logarithm lies below that of its expectation
    half = torch.tensor(degrees / 2, dtype=torch.float64, device="cpu")
    return float(half.log() - torch.digamma(half))


def _trigamma(degrees: float) -> Tensor:
    # the variance of a chi-square's logarithm
    return torch.polygamma(1, torch.tensor(degrees / 2, dtype=torch.float64, device="cpu"))


def _degrees_of(variance: float) -> float:
    low, high = 1e-2, _MOST
    if variance <= float(_trigamma(high)):
        return high
    for _ in range(60):  # bisection, by logarithms
        middle = (low * high) ** 0.5
        low, high = (low, middle) if float(_trigamma(middle)) < variance else (middle, high)
    return low


def _means(values: Tensor, chosen: Tensor, dim: int) -> Tensor:
    return (values * chosen).sum(dim) / chosen.sum(dim).clamp(min=1)


def _shares(apart: Tensor, chosen: Tensor, chance: float) -> tuple[float, float]:
    # of a mean over all other peers, and over all of them, that is the row's effect
    count = chosen.sum(dim=1)
    rows = count > 1
    apart, chosen, count = apart[rows], chosen[rows], count[rows]
    means = _means(apart, chosen, dim=1)
    inside = ((apart - means[:, None]) * chosen).square().sum() / (count - 1).sum()
    size = float(count.double().mean())
    common = max(0.0, chance - float(inside))  # to all of a row
    between = max(0.0, float(means.var() - inside / size) - common)
    noise = float(inside)
    every = between + common
    if not between > 0:
        return 0.0, 0.0
    return between / (every + noise / (size - 1)), between / (every + noise / size)


def _sizes(scores: Tensor, base: Tensor) -> Tensor:
    return scores.abs().clamp(min=torch.finfo(scores.dtype).tiny).log() - base / 2


def _trend(sizes: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    edges = torch.linspace(*_EDGES, dtype=sizes.dtype, device=sizes.device)
    bins = torch.bucketize(sizes, edges)
    counts = torch.bincount(bins, minlength=len(edges) + 1)
    full = counts >= _FEWEST_A_BIN
    if not bool(full.any()):
        return sizes.mean()[None], rest.mean()[None]
    sums = [
        torch.zeros_like(counts, dtype=sizes.dtype).index_add_(0, bins, each)
        for each in (sizes, rest)
    ]
    centres, bends = ((each / counts.clamp(min=1))[full] for each in sums)
    return centres, bends


def _at(points: Tensor, centres: Tensor, values: Tensor) -> Tensor:
    # linear between the centres, constant beyond
    if len(centres) == 1:
        return values.expand_as(points)
    slopes = values.diff() / centres.diff()
    bases = values[:-1] - slopes * centres[:-1]
    points = points.clamp(centres[0], centres[-1])
    part = torch.bucketize(points, centres[1:-1])
    return bases[part] + slopes[part] * points
