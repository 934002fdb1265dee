"""The ridge that nobody has to choose.

In units of the mean squared row norm the ridge with the largest linear datamodeling score
was found to depend on four things (docs/ridge.md has the measurements): how much the
features are whitened, how many checkpoints are averaged over, how much narrower the
projection is than the number of examples, and how far training was from its end. The
first three are known beforehand. The last is read off the rows and loss weights: at a
stationary point of the regularized logistic loss with linearized outputs `f = Phi w`,
`lambda w = Phi^T q`, so that `lambda = (u^T Phi Phi^T q) / (u^T f)` along every
eigenvector `u` of `Phi Phi^T`, and `lambda` over the mean of `q (1 - q)` is a ridge of
the unweighted Gram matrix.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.encodings import RowSource
from trak.score_computers.curvature import FLOOR
from trak.score_computers.factor import Form
from trak.score_computers.stream import rows_per_block, stream

BASE = 1.8
BY_STRENGTH = 5.4
UNFINISHED = 2.0
# with rows weighted by the loss's curvature
CURVED_BASE, CURVED_BY_STRENGTH, CURVED_UNFINISHED = 1.4, 4.0, 4.0
_LEADING = 20
_SPARE = 12  # further vectors, by which the leading ones converge faster
_ROUNDS = 12
_WELL_FITTED = 0.1  # quantile of the loss weights
_CERTAIN = 1e-9  # a loss weight of 0 stands for a finite output


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the automatic ridge depends on, beside the rows.

    Attributes:
        checkpoints: over how many the scores will be averaged.
        strength: of whitening, 0 to 1.
        columns: projection dimension; None if the rows are not projected.
        loss: Q, `[n]` or `[n, 1]`; None if unknown.
        curvature: the rows are weighted by the loss's curvature.
    """

    checkpoints: int = 1
    strength: float = 0.0
    columns: int | None = None
    loss: Any = None
    curvature: bool = False


def relative_ridge(
    rows: RowSource, gram: Tensor, form: Form, situation: Situation
) -> float:
    """The ridge in units of the mean squared row norm.

    Args:
        rows: Phi, `[n, k]`.
        gram: `Phi^T Phi`, or `Phi Phi^T` in the dual form; float64.
        form: which of them.
        situation: what else counts.

    Returns:
        The multiple, above 0.
    """
    base, slope, more = BASE, BY_STRENGTH, UNFINISHED
    if situation.curvature:
        base, slope, more = CURVED_BASE, CURVED_BY_STRENGTH, CURVED_UNFINISHED
    known = (base + slope * situation.strength) * situation.checkpoints ** (-1 / 3)
    if situation.columns:
        narrow = 1 + rows.shape[0] / (3 * situation.columns)
        known *= narrow ** (1 / (2 * situation.checkpoints))
    left = unfinished(rows, gram, form, situation.loss, curvature=situation.curvature)
    return known * (1 + more * left)


def unfinished(
    rows: RowSource, gram: Tensor, form: Form, loss: Any, *, curvature: bool = False
) -> float:
    """How far training was from its end.

    Args:
        rows: Phi, `[n, k]`.
        gram: as for `relative_ridge`.
        form: which Gram matrix it is.
        loss: Q; a measure is known for tasks where it is a probability of being wrong,
            `q = 1 / (1 + exp(f))`.
        curvature: the rows are weighted by `sqrt(q (1 - q))`, and the Gram matrix with
            them.

    Returns:
        The ridge by which the leading eigenvectors would be stationary, in units of the
        mean squared row norm (median over 20), times the loss weight of the examples that
        are fitted best (10 % quantile). 0 where nothing is known.
    """
    if loss is None:
        return 0.0
    weights = torch.as_tensor(loss).to(gram.device, torch.float64).flatten()
    probable = (weights >= 0) & (weights <= 1)
    if not bool(probable.all()) or not bool((weights * (1 - weights)).any()):
        return 0.0
    best = float(np.quantile(weights.cpu().numpy(), _WELL_FITTED))
    outputs = torch.logit(weights, eps=_CERTAIN).neg()
    mean = 1.0 if curvature else float((weights * (1 - weights)).mean())
    values, vectors = leading(gram)
    both = torch.stack([weights, outputs], dim=1)
    if curvature:  # along u, sqrt(R) K sqrt(R) R^(-1/2) q = lambda sqrt(R) f
        root = (weights * (1 - weights)).clamp(min=FLOOR).sqrt()
        both = torch.stack([weights / root, outputs * root], dim=1)
    if form == "primal":  # u = Phi v, up to a factor that the quotient does not have
        both = _transposed(rows, both)
    residual, output = (vectors.T @ both).abs().T
    unit = float(gram.trace()) / rows.shape[0]
    # where an output is zero the quotient is infinite, or not a number: half are not
    stationary = float((values * residual / output / mean / unit).median())
    return best * stationary if math.isfinite(stationary) else 0.0


def leading(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The leading eigenvalues and eigenvectors, by subspace iteration.

    Args:
        gram: symmetric, positive semidefinite, `[q, q]`, float64.

    Returns:
        `[20]`, descending, and `[q, 20]`; fewer if the matrix is smaller.
    """
    size = len(gram)
    if size <= 4 * _LEADING:
        values, vectors = torch.linalg.eigh(gram)
    else:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(size, _LEADING + _SPARE, generator=generator)
        basis = torch.linalg.qr(start.to(gram)).Q
        for _ in range(_ROUNDS):
            basis = torch.linalg.qr(gram @ basis).Q
        values, small = torch.linalg.eigh(basis.T @ gram @ basis)
        vectors = basis @ small
    kept = min(_LEADING, size)
    return values[-kept:].flip(0).clamp(min=0), vectors[:, -kept:].flip(1)


def _transposed(rows: RowSource, columns: Tensor) -> Tensor:
    # Phi^T columns, in one pass
    total = torch.zeros(rows.shape[1], columns.shape[1]).to(columns)
    block_rows = rows_per_block(rows.shape[1], torch.float32)
    for _, start, block in stream([rows], torch.float32, columns.device, block_rows):
        part = columns[start : start + len(block)]
        total += (block.T @ part.to(block.dtype)).to(total.dtype)
    return total
