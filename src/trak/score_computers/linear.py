"""Score computers that factor once and stream the rows."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.arguments import Ridge
from trak.encodings import RowSource
from trak.errors import InputError
from trak.score_computers.abstract import AbstractScoreComputer
from trak.score_computers.gram import primal_gram
from trak.score_computers.stream import (
    decoded,
    products_dtype,
    rows_per_block,
    stream,
)
from trak.utils import get_matrix_mult

_SAFE = (1e-24, 1e24)  # weights whose products with rows and Q float32 can hold
_PAIRS = 1 << 22  # numbers that single scores are summed from at once

BlockScorer = Callable[[int, int], Tensor]
Kept = tuple[NDArray[np.float64], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Weighted:
    """Scores of rows as their products with weights: a `BlockScorer`.

    Attributes:
        block: gives decoded rows from a first to an end row, as `blocks_of` does.
        weights: `[k, m]`, in the dtype of the products.
    """

    block: Callable[[int, int], Tensor]
    weights: Tensor

    def __call__(self, start: int, stop: int) -> Tensor:
        """All scores of some rows.

        Args:
            start: first row.
            stop: end row.

        Returns:
            `[rows, m]`, float64.
        """
        return (self.block(start, stop) @ self.weights).double()

    def pairs(self, start: int, stop: int, places: Tensor, targets: Tensor) -> Tensor:
        """Some of these scores, without computing the others.

        Args:
            start: first row.
            stop: end row.
            places: how far behind the first row the scores' rows are, `[p]`.
            targets: the scores' targets, `[p]`.

        Returns:
            `[p]`, float64.
        """
        rows, columns = self.block(start, stop).double(), self.weights.T
        size = max(1, _PAIRS // len(self.weights))
        parts = zip(places.split(size), targets.split(size), strict=True)
        return torch.cat([(rows[i] * columns[j].double()).sum(dim=1) for i, j in parts])


class LinearScoreComputer(AbstractScoreComputer):
    """Scores that are a linear map of the targets' rows.

    `finalize` makes the square matrix that the store keeps. `weights` turns it and the
    targets into a matrix by which blocks of rows are multiplied; where there is none,
    `scorer` gives any stretch of score rows.

    Rows are a tensor, or `EncodedRows` in a file; both have a `shape`, and
    `trak.score_computers.stream.stream` passes over either in blocks.
    """

    @abstractmethod
    def finalize(self, rows: RowSource) -> Kept:
        """Makes what the store keeps, in one pass over the rows.

        Args:
            rows: Phi, `[n, k]`.

        Returns:
            A square float64 matrix, and a description of how it was made: JSON values, and
            arrays `[n, 1]`.
        """

    def weights(
        self,
        kept: Kept,  # noqa: ARG002
        rows: RowSource,  # noqa: ARG002
        targets: Tensor,  # noqa: ARG002
    ) -> Tensor | None:
        """What to multiply rows by to get scores, so that several sets share a pass.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.
            targets: projected gradients of the targets, `[m, k]`.

        Returns:
            `[k, m]`, float64; None if scores must come from `scorer`.
        """
        return None

    def scorer(self, kept: Kept, rows: RowSource, targets: Tensor) -> BlockScorer:
        """Solves for the targets; asked for where there are no `weights`.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.
            targets: projected gradients of the targets, `[m, k]`.

        Returns:
            A function of first and end row that gives scores `[rows, m]`, float64.

        Raises:
            NotImplementedError: if a subclass defines neither.
        """
        weights = self.weights(kept, rows, targets)
        if weights is None:
            raise NotImplementedError(f"{type(self).__name__}: weights or scorer")
        return lambda start, stop: product(rows[start:stop], weights)

    def where(self, rows: RowSource) -> torch.device:
        """Where to compute.

        Args:
            rows: Phi, `[n, k]`.

        Returns:
            A tensor's own device; the computer's for rows in a file.
        """
        return rows.device if isinstance(rows, Tensor) else torch.device(self.device)

    def at_ridges(
        self,
        kept: Kept,  # noqa: ARG002
        rows: RowSource,  # noqa: ARG002
        lambda_regs: Sequence[Ridge],
    ) -> list[Kept]:
        """What `finalize` would make with other ridges, with at most one pass.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.
            lambda_regs: the ridges, as the constructor takes them; a matrix and a
                description are given for each.

        Raises:
            InputError: if this class cannot.
        """
        raise InputError(
            f"{type(self).__name__} has one ridge; {list(lambda_regs)} were asked for. "
            "Define at_ridges, or use RidgeScoreComputer."
        )

    @abstractmethod
    def matches(self, info: dict[str, Any]) -> bool:
        """Whether what the store keeps was made with the present settings.

        Args:
            info: the description that `finalize` gave.

        Returns:
            False if the checkpoint must be finalized again.
        """

    @abstractmethod
    def features(self, kept: Kept, rows: RowSource) -> Tensor:
        """Upstream's features, `Phi (Phi^T Phi + ridge I)^-1`.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.

        Returns:
            `[n, k]`, float64.
        """

    def get_xtx(self, grads: Tensor) -> Tensor:
        """The Gram matrix.

        Args:
            grads: projected gradients Phi, `[n, k]`.

        Returns:
            `Phi^T Phi`, `[k, k]`, float64.
        """
        return primal_gram(grads)

    def get_scores(
        self, features: Tensor, target_grads: Tensor, accumulator: Tensor
    ) -> None:
        """Adds `features @ target_grads.T` to `accumulator`.

        Args:
            features: `[n, k]`.
            target_grads: projected gradients of the targets, `[m, k]`.
            accumulator: `[n, m]`.
        """
        dtype = torch.promote_types(features.dtype, target_grads.dtype)
        product = get_matrix_mult(features.to(dtype), target_grads.to(dtype))
        accumulator += product.detach().to(accumulator.device)


def product(rows: RowSource, weights: Tensor) -> Tensor:
    """`rows @ weights`, with one pass over the rows.

    Args:
        rows: Phi, `[n, k]`.
        weights: `[k, m]`.

    Returns:
        `[n, m]`, in the dtype and on the device of `weights`.
    """
    block_rows = rows_per_block(rows.shape[1], weights.dtype)
    blocks = stream([rows], weights.dtype, weights.device, block_rows)
    return torch.cat([block @ weights for _, _, block in blocks])


def blocks_of(
    rows: RowSource, dtype: torch.dtype, device: torch.device
) -> Callable[[int, int], Tensor]:
    """Decodes stretches of rows, the last one once for all that ask for it.

    Args:
        rows: Phi, `[n, k]`.
        dtype: of the decoded rows.
        device: of the decoded rows.

    Returns:
        A function of first and end row.
    """

    @lru_cache(maxsize=1)
    def block(start: int, stop: int) -> Tensor:
        return decoded(rows[start:stop], dtype).to(device)

    return block


def safe_products(sources: Sequence[RowSource], weights: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which rows are multiplied by weights.

    Args:
        sources: rows, `[n, k]` each.
        weights: `[k, m]` each, float64.

    Returns:
        float32 where no rows are better than that, unless it could lose the weights.
    """
    if any(products_dtype(rows) is not torch.float32 for rows in sources):
        return torch.float64
    return torch.float32 if all(map(are_safe, weights)) else torch.float64


def are_safe(weights: Tensor) -> bool:
    """Whether float32 can hold products of rows with these.

    Args:
        weights: `[k, m]`.

    Returns:
        Whether no column's largest entry is near either end of its range.
    """
    low, high = _SAFE
    largest = weights.abs().amax(dim=0)
    return bool(((largest == 0) | ((largest > low) & (largest < high))).all())
