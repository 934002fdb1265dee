"""Variances that are told from few checkpoints, moderated by those of like scores.

A variance with one or two degrees of freedom says little. Those of all scores together say
how large one should be: the example's usual spread, the target's, and how far the spread
grows with the score. Between this and what the score's own checkpoints say, the empirical
Bayes estimate of Smyth (2004, "Linear models and empirical Bayes methods for assessing
differential expression in microarray experiments", Sec. 3 and 6.2) weighs by how well the
one predicts the other. What it needs to know is learned from a few training examples in
the role of targets, so that the error of a score depends on no other target.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PEERS = 32
"""Training examples that are scored as if they were targets."""
_ROUNDING = 1e-6  # of a score: a spread below it is none
_FEWEST = 200  # variances that something can be learned from
_MOST = 100.0  # degrees of freedom of what was learned
_EDGES = (-6.0, 6.0, 25)  # of log(|score| / usual spread)
_FEWEST_A_BIN = 50
_ROUNDS = 3


class _Effects(NamedTuple):
    values: Tensor  # of rows, in logarithms, relative to the columns' levels, [b]
    without: Tensor  # the same without the variance at hand, [b, p]


@dataclass(frozen=True)
class Moderation:
    """What is known of variances before a score's own is looked at.

    With `s2` the variance of a score and `d` its degrees of freedom, `(d0 s0^2 + d s2) /
    (d0 + d)`, with `log s0^2` the sum of the target's level, the example's effect and the
    trend in `log(|score| / usual spread)`.

    Attributes:
        degrees: `d0 + d`, of moderated variances.
        peers: row numbers of the training examples that are scored as targets, `[p]`;
            theirs are the last columns of scores and variances.
        levels: mean logarithms of the columns' variances, `[m + p]`.
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

    def moderated(self, numbers: Tensor, scores: Tensor, squares: Tensor) -> Tensor:
        """Moderates the variances of some rows.

        Args:
            numbers: which they are, `[b]`.
            scores: `[b, m + p]`, float64.
            squares: their variances, `[b, m + p]`.

        Returns:
            `[b, m]`; variances that are rounding, or of rows without any, as they are.
        """
        count = len(self.peers)
        logs, alive = _logs(scores, squares, self.own)
        mine = alive[:, -count:] & (numbers[:, None] != self.peers)
        found = _effects(logs[:, -count:] - self.levels[-count:], mine)
        base = self.share * found.values[:, None] + self.levels[:-count]
        scores, squares = scores[:, :-count], squares[:, :-count]
        trend = _at(_sizes(scores, base), self.centres, self.bends)
        prior = self.degrees - self.own
        usual = (base + trend - _bias(prior)).exp()
        known = alive[:, :-count] & mine.any(dim=1, keepdim=True)
        both = (prior * usual + self.own * squares) / self.degrees
        return torch.where(known, both, squares)


def learned(
    numbers: Tensor, scores: Tensor, squares: Tensor, peers: Tensor, degrees: int
) -> Moderation | None:
    """Learns how variances differ.

    Args:
        numbers: row numbers of some training examples, `[b]`.
        scores: of them, the peers' in the last columns, `[b, m + p]`, float64.
        squares: their variances, `[b, m + p]`.
        peers: row numbers of the peers, `[p]`.
        degrees: degrees of freedom of the variances, at least 1.

    Returns:
        What was learned; None if there is too little to learn from.
    """
    count = len(peers)
    logs, alive = _logs(scores, squares, degrees)
    mine = alive[:, -count:] & (numbers[:, None] != peers)
    if int(mine.sum()) < _FEWEST or int(mine.any(dim=0).sum()) < 2:
        return None
    levels = _means(logs[:, -count:], mine, dim=0)
    apart = logs[:, -count:] - levels
    found = _effects(apart, mine)
    others_share, share = _shares(apart, mine)
    base = others_share * found.without
    rest, sizes = apart - base, _sizes(scores[:, -count:], base + levels)
    centres, bends = _trend(sizes[mine], rest[mine])
    rest = (rest - _at(sizes, centres, bends))[mine]
    prior = _degrees_of(float(rest.var()) - float(_trigamma(degrees)))
    # of the other columns only the level is their own
    base = share * found.values[:, None]
    known = alive[:, :-count] & mine.any(dim=1, keepdim=True)
    others, rest = scores[:, :-count], logs[:, :-count] - base
    own = _means(rest, known, dim=0)
    for _ in range(_ROUNDS):
        trend = _at(_sizes(others, base + own), centres, bends)
        own = _means(rest - trend, known, dim=0)
    return Moderation(
        degrees=degrees + prior,
        peers=peers,
        levels=torch.cat([own, levels]),
        share=share,
        centres=centres,
        bends=bends,
        own=degrees,
    )


def _logs(scores: Tensor, squares: Tensor, degrees: int) -> tuple[Tensor, Tensor]:
    # unbiased for the logarithm of the true variance
    alive = squares > (_ROUNDING * scores).square()
    return torch.where(alive, squares, 1.0).log() + _bias(degrees), alive


def _bias(degrees: float) -> float:
    # how far a chi-square's logarithm lies below that of its expectation
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    return float(half.log() - torch.digamma(half))


def _trigamma(degrees: float) -> Tensor:
    # the variance of a chi-square's logarithm
    return torch.polygamma(1, torch.tensor(degrees / 2, dtype=torch.float64))


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


def _effects(apart: Tensor, chosen: Tensor) -> _Effects:
    apart = apart * chosen
    total, count = apart.sum(dim=1, keepdim=True), chosen.sum(dim=1, keepdim=True)
    without = (total - apart) / (count - chosen.to(count)).clamp(min=1)
    return _Effects((total / count.clamp(min=1))[:, 0], without)


def _shares(apart: Tensor, chosen: Tensor) -> tuple[float, float]:
    # of a mean over all other peers, and over all of them, that is the row's effect
    count = chosen.sum(dim=1)
    rows = count > 1
    apart, chosen, count = apart[rows], chosen[rows], count[rows]
    means = _means(apart, chosen, dim=1)
    inside = ((apart - means[:, None]) * chosen).square().sum() / (count - 1).sum()
    size = float(count.double().mean())
    between = max(0.0, float(means.var() - inside / size))
    if not between > 0:
        return 0.0, 0.0
    noise = float(inside)
    return between / (between + noise / (size - 1)), between / (between + noise / size)


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
    right = torch.bucketize(points, centres).clamp(1, len(centres) - 1)
    left = right - 1
    way = (points - centres[left]) / (centres[right] - centres[left])
    return values[left] + way.clamp(0, 1) * (values[right] - values[left])
