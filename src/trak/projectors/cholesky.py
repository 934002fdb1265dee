"""A Cholesky factor that grows by a few rows at a time.

Of `K = [[K_pp, K_pb], [K_bp, K_bb]]` with `K_pp = L L^T`, the factor's further rows are
`X = K_bp L^-T` and the factor of `K_bb - X X^T` (Golub and Van Loan 2013, Sec. 4.2.9).
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def forward(strips: Iterable[Tensor], right: Tensor) -> Tensor:
    """`L^-1 right` by forward substitution, with `L` in strips of rows.

    Args:
        strips: rows of `L` in order; the first `[r, r]`, the next `[r', r + r']`, and so
            on. A column of zeros is an example that adds nothing to those before it.
        right: `[n, b]`, float64.

    Returns:
        `[n, b]`; zero where `L`'s column is.
    """
    found = torch.zeros_like(right)
    start = 0
    for strip in strips:
        stop = strip.shape[1]
        here = right[start:stop] - strip[:, :start] @ found[:start]
        corner = strip[:, start:].clone()
        empty = corner.diagonal() == 0
        corner.diagonal().masked_fill_(empty, 1.0)
        solved = torch.linalg.solve_triangular(corner, here, upper=False)
        found[start:stop] = solved.masked_fill_(empty[:, None], 0.0)
        start = stop
    return found


def lower_factor(schur: Tensor, squares: Tensor, tolerance: float) -> Tensor:
    """The Cholesky factor of a matrix that may be singular.

    An example whose pivot is lost in rounding (a duplicate, say) gets a column of zeros: it
    lies in the span of those before it. What it has in common with later examples outside
    this span is lost with it, at most `sqrt(tolerance)` of the two lengths. (Raising the
    pivot instead keeps that for a few such examples, and lets rounding grow without bound
    where there are many.)

    Args:
        schur: `K_bb - X X^T`, `[b, b]`, float64.
        squares: the diagonal of `K_bb`, `[b]`.
        tolerance: smallest pivot, relative to these.

    Returns:
        Lower triangular, `[b, b]`; a row and column of zeros where the square is 0.
    """
    least = tolerance * squares
    lower, failed = torch.linalg.cholesky_ex(schur)
    if not int(failed) and bool((lower.diagonal().square() > least).all()):
        return lower
    lower = torch.zeros_like(schur)
    for j in range(len(schur)):
        column = schur[j:, j] - lower[j:, :j] @ lower[j, :j]
        if column[0] > least[j]:
            lower[j:, j] = column / column[0].sqrt()
    return lower
