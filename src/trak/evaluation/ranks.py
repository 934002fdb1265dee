"""Ranks with ties, and correlations, of many weighted samples of the same columns."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trak.evaluation.arrays import Floats

Correlation = Literal["pearson", "spearman"]


def average_ranks(columns: Floats) -> Floats:
    """Ranks of each column's entries, from 1; equal entries share their mean rank.

    Args:
        columns: `[rows, m]`.

    Returns:
        `[rows, m]`.
    """
    order = np.argsort(columns, axis=0, kind="stable")
    ordered = np.take_along_axis(columns, order, axis=0)
    ranks = np.empty(columns.shape)
    each = np.arange(1.0, len(columns) + 1)[:, None]
    np.put_along_axis(ranks, order, np.broadcast_to(each, columns.shape), axis=0)
    once = np.ones((1, len(columns)))
    for tied in np.flatnonzero((ordered[1:] == ordered[:-1]).any(axis=0)):
        ranks[:, tied] = weighted_ranks(columns[:, tied], once)[0]
    return ranks


def weighted_ranks(column: Floats, weights: Floats) -> Floats:
    """Average ranks in samples that hold each entry a number of times.

    Copies of one entry are ties, so that the rank of an entry is the weight below it plus
    half of the weight equal to it, plus one half.

    Args:
        column: `[rows]`.
        weights: how often each sample holds each entry, `[draws, rows]`.

    Returns:
        `[draws, rows]`, in the order of the column.
    """
    order = np.argsort(column, kind="stable")
    ordered = column[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    group = np.empty(len(column), dtype=np.intp)
    group[order] = np.repeat(np.arange(len(first)), np.diff(np.r_[first, len(column)]))
    equal = np.add.reduceat(weights[:, order], first, axis=1)
    through = np.cumsum(equal, axis=1)
    return (through - 0.5 * equal + 0.5)[:, group]


def correlations(kind: Correlation, a: Floats, b: Floats) -> Floats:
    """Correlates columns.

    Args:
        kind: of values or of average ranks.
        a: `[rows, m]`.
        b: `[rows, m]`.

    Returns:
        `[m]`; 0 where a column is constant.
    """
    x, y = (_centred(kind, columns) for columns in (a, b))
    below = np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))
    return np.clip((x * y).sum(axis=0) / np.where(below > 0, below, 1.0), -1.0, 1.0)


def weighted_correlations(
    kind: Correlation, a: Floats, b: Floats, weights: Floats
) -> Floats:
    """Correlates columns in samples that hold each row a number of times.

    Args:
        kind: of values or of average ranks.
        a: `[rows, m]`.
        b: `[rows, m]`.
        weights: how often each sample holds each row, `[draws, rows]`; every row of it has
            the same sum.

    Returns:
        `[draws, m]`; 0 where a column is constant in a sample.
    """
    found = np.empty((len(weights), a.shape[1]))
    for target in range(a.shape[1]):
        x, y = (_deviations(kind, column[:, target], weights) for column in (a, b))
        found[:, target] = _ratio(x, y, weights)
    return found


def _centred(kind: Correlation, columns: Floats) -> Floats:
    if kind == "spearman":
        return average_ranks(columns) - (len(columns) + 1) / 2
    columns = _near_one(columns)
    return columns - columns.mean(axis=0)


def _near_one(columns: Floats) -> Floats:
    # by powers of two, which round nothing: squares must neither vanish nor overflow
    return np.ldexp(columns, -np.frexp(np.abs(columns).max(axis=0))[1])


def _deviations(kind: Correlation, column: Floats, weights: Floats) -> Floats:
    if kind == "spearman":
        # the mean of average ranks follows from their number alone
        return weighted_ranks(column, weights) - (weights[0].sum() + 1) / 2
    column = _near_one(column)
    means = weights @ column / weights.sum(axis=1)
    return column - means[:, None]


def _ratio(x: Floats, y: Floats, weights: Floats) -> NDArray[np.float64]:
    weighted = weights * x
    above = np.einsum("ds,ds->d", weighted, y)
    below_x = np.einsum("ds,ds->d", weighted, x)
    below_y = np.einsum("ds,ds,ds->d", weights, y, y)
    below = np.sqrt(below_x * below_y)
    return np.clip(above / np.where(below > 0, below, 1.0), -1.0, 1.0)
