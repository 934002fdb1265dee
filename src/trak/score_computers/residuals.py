"""How strongly a regression was regularized, told from outputs and residuals.

With the squared loss and linearized outputs `f = b + Phi w` a ridge `lambda` leaves of the
answers `y = f + q` the residuals `q = lambda (K + lambda I)^-1 (y - b)`, `K = Phi Phi^T`
(ridge regression; Hastie, Tibshirani and Friedman 2009, Sec. 3.4.1): little along leading
eigenvectors, all of it along the others. A training that was stopped early leaves about as
much as one with a larger ridge (Ali, Kolter and Tibshirani 2019, Sec. 3). Where training
came to rest against its weight decay, networks, whose features were learned, behave as with
a smaller one, which what pulls at outputs tells (`trak.score_computers.pulls`).
"""

import math

import torch
from torch import Tensor

from trak.score_computers.decay import Spectrum, between
from trak.score_computers.pulls import Stationarity, stationarity_of

LEAST, MOST = 0.04, 8.0
"""Ridges of a training, in units of the mean squared row norm."""
_RIDGES = torch.logspace(-3, 3, 121, dtype=torch.float64)
_ABOUT_RIGHT, _WRONG = math.log(1.8), math.log(3)
"""How far, on a logarithmic scale, the usual ridge may be from what residuals tell: it is
kept up to the first, and from the second on it does not count."""
_STILL, _SMALLEST = (0.5, 0.7), 0.25
"""Between these shares of the pulls' variance that stationarity explains, ridges move to
halfway towards a smaller one that it tells, on a logarithmic scale, down to a quarter."""


def ridge_left(
    kernel: Tensor,
    pull: Tensor,
    outputs: Tensor,
    loss: Tensor,
    counts: Tensor,
    share: float,
    usual: float,
    *,
    noisy: bool = False,
) -> float:
    """The ridge whose filter fits the residuals best, by least squares, and a usual one.

    It is smaller where stationarity explains what pulls at outputs and tells of a smaller
    one.

    Args:
        kernel: `Phi Phi^T` of a sample, in units of the mean squared row norm, `[s, s]`,
            float64.
        pull: `Phi Phi^T Q` in these units, with all training examples in the inner sum and
            how much they count, `[s]`.
        outputs: of the model, in units of Q, `[s]`.
        loss: Q, not counting how much examples count, `[s]`.
        counts: how much they count, `[s]`.
        share: of the training set that the sample is.
        usual: the ridge of trainings that nothing is known of, where examples count once,
            in units of the mean squared row norm.
        noisy: `pull` comes from narrower rows than the kernel.

    Returns:
        In these units times the mean count: the usual one where it is about right, or there
        is nothing to tell from; else one from 0.04 to 8. Down to a quarter of either where
        training came to rest.
    """
    mean = float(counts.mean())
    if not mean > 0 or not bool(torch.isfinite(outputs).all()):
        return usual * mean
    roots = (counts / mean).sqrt()
    spectrum = Spectrum.of(kernel * torch.outer(roots, roots))
    values, vectors = spectrum
    answers, left = (
        vectors.T @ (roots * (part - _mean(part, counts)))
        for part in (outputs + loss, loss)
    )
    if not bool(left.any() and answers.any()):
        return usual * mean
    ridges = _RIDGES.to(values)[:, None]
    filtered = ridges / (values.clamp(min=0) / share + ridges) * answers
    best = ridges[int((filtered - left).square().sum(dim=1).argmin()), 0]
    apart = math.log(float(best.clamp(LEAST, MOST)) / usual)
    weight = between(abs(apart), _ABOUT_RIGHT, _WRONG)
    ridge = usual * mean * math.exp(weight * apart)
    pulled, grown = roots * pull, roots * (outputs - _mean(outputs, counts))
    return ridge * _at_rest(ridge, stationarity_of(spectrum, pulled, grown, 1, noisy=noisy))


def _at_rest(ridge: float, told: Stationarity) -> float:
    # how much smaller the ridge of a training is that came to rest
    if not told.ridge > 0:  # it did not, or there is nothing to tell from
        return 1.0
    smaller = max(_SMALLEST, min(1.0, math.sqrt(told.ridge / ridge)))
    return smaller ** between(told.explained, *_STILL)


def _mean(part: Tensor, counts: Tensor) -> Tensor:
    return (part * counts).sum() / counts.sum()
