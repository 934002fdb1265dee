"""What pulls at outputs says about a training that came to rest.

At a stationary point of a regularized loss with linearized outputs `f = b + Phi w`,
`lambda w = Phi^T q`, with `q` the loss's slopes. So along every eigenvector `u` of
`Phi Phi^T` `lambda u^T (f - b) = u^T Phi Phi^T q`.
"""

from typing import NamedTuple

from torch import Tensor

from trak.score_computers.decay import Spectrum

_FIRST, _LAST = 5, 100  # leading directions have few examples each on their side
_PRESENT = 1e-6  # smaller eigenvalues are rounding


class Stationarity(NamedTuple):
    """What pulls at outputs says about a training that came to rest.

    Attributes:
        growing: how strongly growth of all outputs is held back.
        ridge: that holds the other outputs, in the same units: `q (1 - q)` mean squared row
            norms.
        explained: share of the pulls' variance that this ridge explains.
    """

    growing: float
    ridge: float
    explained: float


def stationarity_of(
    spectrum: Spectrum,
    pull: Tensor,
    outputs: Tensor,
    steep: float,
    *,
    noisy: bool = False,
    growing: float | None = None,
) -> Stationarity:
    """What pulls at outputs says: `lambda u^T f = u^T Phi Phi^T q` along eigenvectors.

    Args:
        spectrum: of the examples' kernel, which is as for `training_of`.
        pull: as for `training_of`.
        outputs: of the model, `[n]`.
        steep: the loss's mean curvature, `q (1 - q)`, above 0.
        noisy: as for `training_of`.
        growing: what all examples say of growth; None to ask these.

    Returns:
        The ridge is the median over eigenvectors 6 to 100.
    """
    found, explained = _ridge_of(spectrum, pull, outputs, noisy=noisy)
    if growing is None:
        growing = float(outputs @ pull / (outputs @ outputs)) / steep
    return Stationarity(growing, found / steep, explained)


def _ridge_of(
    spectrum: Spectrum, pull: Tensor, outputs: Tensor, *, noisy: bool
) -> tuple[float, float]:
    # and the share of the pulls' variance that it explains
    apart = outputs - outputs.mean()
    slope = apart @ pull / (apart @ apart)
    offset = outputs.mean() - pull.mean() / slope
    values, vectors = spectrum
    present = int((values > _PRESENT * values[-1]).sum())
    last = max(1, min(_LAST, len(values) // 3, present))
    chosen = slice(min(_FIRST, last - 1), last)
    directions = vectors.flip(1)[:, chosen].T
    pulls, wanted = directions @ pull, directions @ (outputs - offset)
    lengths = pulls.norm() * wanted.norm()
    explained = float((pulls @ wanted / lengths) ** 2) if lengths > 0 else 1.0
    if not noisy:
        return float((pulls / wanted).nanmedian()), explained
    weights = wanted / values.flip(0)[chosen]  # a sketch's noise grows like the values
    return float((weights @ pulls) / (weights @ wanted)), explained
