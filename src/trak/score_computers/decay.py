"""How far a training came, told from what its loss weights have left along eigenvectors.

If all examples began with loss weights of about `q0`, as they do where outputs begin near
zero or as noise that has nothing to do with the labels, then training a linearized model
with a ridge leaves `q = q0 (I + c K / lambda)^-1 1`, with `K = Phi Phi^T` and `c` the mean
of `q (1 - q)`: little along leading eigenvectors, all of it along the others. Unlike
stationarity (`trak.score_computers.stationarity`) this does not ask for outputs that began
at zero, so it also holds for short fine-tunings of pretrained networks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_RIDGES = torch.logspace(-2, 3, 101, dtype=torch.float64)
_BEGAN = (0.25, 0.45)
"""What loss weights would have begun as: 0.5 with two classes and near 1 with many. Less
than the first has come down along all directions, which linearized models do not do."""
_DECAYED = (0.05, 0.25)
"""Shares that the filter explains of what equal loss weights would leave unexplained: below
the first nothing has come down along leading directions that it could be told from."""
_LEADING, _SCATTERED = 100, 0.35
"""Both grow by 0.35 times what all examples have in common outside of the 100 leading
directions. Nobody knows the rate at which that comes down, the less so in narrow rows."""


class Decay(NamedTuple):
    """What loss weights tell of a training.

    Attributes:
        ridge: of the training, `lambda / c`.
        clarity: how much is to be made of it, from 0 to 1.
    """

    ridge: float
    clarity: float


class Spectrum(NamedTuple):
    """Eigenvalues and eigenvectors of a kernel, ascending.

    Attributes:
        values: `[s]`.
        vectors: as columns, `[s, s]`.
    """

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, kernel: Tensor) -> "Spectrum":
        """That of a symmetric matrix, in float32, in half of the time of float64.

        Args:
            kernel: `[s, s]`.

        Returns:
            All of it.
        """
        values, vectors = torch.linalg.eigh(kernel.float())
        return cls(values.to(kernel), vectors.to(kernel))


def decay_of(
    kernel: Tensor,
    loss: Tensor,
    counts: Tensor,
    share: float,
    spectrum: Spectrum | None = None,
) -> Decay:
    """The ridge whose filter fits best, by least squares.

    Args:
        kernel: `Phi Phi^T` of a sample, in units of the mean squared row norm, `[s, s]`,
            float64.
        loss: Q as probabilities of being wrong, not counting how much examples count,
            `[s]`.
        counts: how much they count, `[s]`.
        share: of the training set that the sample is.
        spectrum: of the kernel, if it is known.

    Returns:
        The ridge in units of the mean squared row norm times `mean q (1 - q)`, and how
        clearly it shows.
    """
    usual = counts.mean()  # the ridges that are tried must not depend on its size
    if not usual > 0:
        return Decay(float(_RIDGES[0]), 0.0)
    roots = (counts / usual).sqrt()
    if spectrum is None or not bool((roots == 1).all()):
        spectrum = Spectrum.of(kernel * torch.outer(roots, roots))
    values, vectors = spectrum
    began, left = vectors.T @ roots, vectors.T @ (roots * loss)
    ridges = _RIDGES.to(values)[:, None]
    filtered = began / (1 + values.clamp(min=0) / share / ridges)
    starts, unexplained = _fitted(filtered, left)
    best = int(unexplained.argmin())
    equal = float(_fitted(began[None], left)[1])
    explained = 1 - float(unexplained[best]) / equal if equal > 0 else 0.0
    scattered = float(began[:-_LEADING].square().sum() / began.square().sum())
    decayed = explained - _SCATTERED * scattered
    clarity = between(float(starts[best]), *_BEGAN) * between(decayed, *_DECAYED)
    return Decay(float(_RIDGES[best] * usual), clarity)


def between(value: float, low: float, high: float) -> float:
    """Where a value lies.

    Args:
        value: any number.
        low: where 0 ends.
        high: where 1 begins.

    Returns:
        From 0 to 1.
    """
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _fitted(pictures: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    # the best multiple of each picture, `[r, s]`, and what it leaves of `wanted`, `[r]`
    sizes = pictures.square().sum(dim=1)
    multiples = (pictures @ wanted) / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
    return multiples, (wanted - multiples[:, None] * pictures).square().sum(dim=1)
