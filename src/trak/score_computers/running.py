"""The strongest training examples of every target, while scores stream by."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trak.errors import InputError

_PIECE = 256
_MANY = 0.1  # of all pieces: where so many hold news, whole columns are looked through


class TopScores(NamedTuple):
    """The strongest training examples of every target, strongest first.

    Attributes:
        indices: rows of the training set, `[m, top]`.
        scores: their scores, `[m, top]`.
    """

    indices: Int64[np.ndarray, "m top"]
    scores: Float[np.ndarray, "m top"]


class RunningTop:
    """Keeps the `k` largest scores of every target and forgets the others.

    Most stretches hold nothing new for most targets: after `r` rows in random order, a
    further row is among the `k` best with probability `k / r`. So a block costs the
    maximum of every piece of a column, and only pieces whose maximum beats the target's
    `k`-th score so far are looked at closer.

    Args:
        num_targets: number of columns, `m`.
        k: how many to keep.
        dtype: of the scores.
        device: of the scores.

    Raises:
        InputError: if `k` is not positive.
    """

    def __init__(
        self, num_targets: int, k: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}.")
        self.k = k
        self._scores = torch.empty(num_targets, 0, dtype=dtype, device=device)
        self._rows = torch.empty(num_targets, 0, dtype=torch.int64, device=device)

    def add(self, start: int, block: Tensor) -> None:
        """Looks at the scores of further rows.

        Args:
            start: number of the first row; larger than those of earlier blocks.
            block: scores without NaN, `[b, m]`.
        """
        full = self._scores.shape[1] == self.k
        whole = len(block) - len(block) % _PIECE if full else 0
        if whole:
            pieces = block[:whole].unflatten(0, (-1, _PIECE))
            news = pieces.amax(dim=1) > self._scores[:, -1]
            number, target = news.nonzero(as_tuple=True)
            if len(number) > _MANY * news.numel():
                self._add_columns(start, block[:whole])
            elif len(number):
                self._add_pieces(start, pieces, number, target)
        if whole < len(block):
            self._add_columns(start + whole, block[whole:])

    def result(self, *, negated: bool = False) -> TopScores:
        """What is left.

        Args:
            negated: whether the scores were given with their signs turned.

        Returns:
            Rows and scores, strongest first; equal scores in the order of their rows.
        """
        scores, rows = self._scores.cpu().numpy(), self._rows.cpu().numpy()
        return TopScores(rows, -scores if negated else scores)

    def _add_columns(self, start: int, block: Tensor) -> None:
        scores, rows = _largest(block.T.contiguous(), self.k)
        scores = torch.cat([self._scores, scores], dim=1)
        rows = torch.cat([self._rows, rows + start], dim=1)
        # earlier rows stand first, so that a stable sort leaves ties in their order
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.k]
        self._scores = scores.gather(1, order)
        self._rows = rows.gather(1, order)

    def _add_pieces(
        self, start: int, pieces: Tensor, number: Tensor, target: Tensor
    ) -> None:
        values = pieces[number, :, target]
        pair, place = (values > self._scores[target, -1:]).nonzero(as_tuple=True)
        # for each target: those kept so far, then the news, all by ascending row
        hit = target[pair].unique()
        targets = torch.cat([hit.repeat_interleave(self.k), target[pair]])
        scores = torch.cat([self._scores[hit].flatten(), values[pair, place]])
        rows = start + number[pair] * _PIECE + place
        rows = torch.cat([self._rows[hit].flatten(), rows])
        order = scores.argsort(descending=True, stable=True)
        order = order[targets[order].argsort(stable=True)]
        counts = torch.bincount(targets, minlength=len(self._scores))[hit]
        firsts = counts.cumsum(0) - counts
        chosen = order[firsts[:, None] + torch.arange(self.k, device=order.device)]
        self._scores[hit] = scores[chosen]
        self._rows[hit] = rows[chosen]


def top_of(blocks: Iterable[tuple[int, Tensor]], k: int, *, helpful: bool) -> TopScores:
    """The strongest training examples of every target, in memory that has no `n`.

    Args:
        blocks: first row and scores without NaN, `[b, m]`, of all rows in order.
        k: how many a target.
        helpful: the largest scores; if False, the smallest.

    Returns:
        Rows and scores, strongest first; equal scores in the order of their rows.
    """
    top: RunningTop | None = None
    for start, block in blocks:
        if top is None:
            top = RunningTop(block.shape[1], k, block.dtype, block.device)
        top.add(start, block if helpful else -block)
    assert top is not None  # noqa: S101 - there is at least one training example
    return top.result(negated=not helpful)


def _largest(columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    # the first k of every row of [m, b] by (larger value, smaller position), in the order
    # of their positions
    width = columns.shape[1]
    if k >= width:
        positions = torch.arange(width, device=columns.device)
        return columns, positions.expand_as(columns)
    values, positions = columns.topk(k + 1, dim=1)
    tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
    positions = positions[:, :k]
    if len(tied):  # topk takes any of the equal ones
        exact = columns[tied].argsort(dim=1, descending=True, stable=True)
        positions[tied] = exact[:, :k]
    positions = positions.sort(dim=1).values
    return columns.gather(1, positions), positions
