"""The strongest training examples of every target, without sorting whole columns."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from trak.arguments import as_integer

_BLOCK_ROWS = 65_536


class TopScores(NamedTuple):
    """The strongest training examples of every target, strongest first.

    Attributes:
        indices: rows of the training set, `[m, top]`.
        scores: their scores, `[m, top]`.
    """

    indices: Int64[np.ndarray, "m top"]
    scores: Float[np.ndarray, "m top"]


def how_many(k: Any, num_rows: int) -> int:
    """How many examples a list holds.

    Args:
        k: how many are asked for.
        num_rows: how many there are.

    Returns:
        The smaller of both.
    """
    return min(as_integer("k", k, least=1), num_rows)


def top_scores(
    scores: Float[np.ndarray, "n m"], k: int, *, helpful: bool = True
) -> TopScores:
    """Finds the `k` largest (or smallest) scores of every column.

    One pass over blocks of rows, keeping `k` candidates a target.

    Args:
        scores: `[n, m]`, possibly backed by a file.
        k: how many; all are given if there are fewer.
        helpful: largest scores first; if False, smallest first (the most harmful).

    Returns:
        Indices and scores, equal scores in the order of their rows.
    """
    k = how_many(k, len(scores))
    sign = -1.0 if helpful else 1.0
    best = np.empty((0, scores.shape[1]), dtype=scores.dtype)
    rows = np.empty((0, scores.shape[1]), dtype=np.int64)
    for start in range(0, scores.shape[0], _BLOCK_ROWS):
        block = np.asarray(scores[start : start + _BLOCK_ROWS])
        numbers = np.arange(start, start + len(block), dtype=np.int64)
        numbers = np.broadcast_to(numbers[:, None], block.shape)
        best = np.concatenate([best, block])
        rows = np.concatenate([rows, numbers])
        keep = _smallest(sign * best, k)
        best = np.take_along_axis(best, keep, axis=0)
        rows = np.take_along_axis(rows, keep, axis=0)
    return TopScores(np.ascontiguousarray(rows.T), np.ascontiguousarray(best.T))


def _smallest(values: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    # positions of the k smallest values of every column, in order, [k, m]
    if k >= len(values):
        return np.argsort(values, axis=0, kind="stable")
    # everything below the k-th value, then ties in the order of their rows
    limit = np.partition(values, k - 1, axis=0)[k - 1]
    columns: list[NDArray[np.int64]] = []
    for column, bound in zip(values.T, limit, strict=True):
        candidates = np.flatnonzero(column <= bound)
        order = np.argsort(column[candidates], kind="stable")[:k]
        columns.append(candidates[order])
    return np.stack(columns, axis=1)
