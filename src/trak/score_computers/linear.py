"""Score computers that factor once and stream the rows."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.score_computers.abstract import AbstractScoreComputer
from trak.score_computers.gram import blocks, primal_gram
from trak.utils import get_matrix_mult

BlockScorer = Callable[[int, int], Tensor]
Kept = tuple[NDArray[np.float64], dict[str, Any]]


class LinearScoreComputer(AbstractScoreComputer):
    """Scores that are a linear map of the targets' rows.

    `finalize` makes the square matrix that the store keeps; `scorer` turns it and the
    targets into a function that gives any stretch of score rows.
    """

    @abstractmethod
    def finalize(self, rows: Tensor) -> Kept:
        """Makes what the store keeps, in one pass over the rows.

        Args:
            rows: Phi, `[n, k]`.

        Returns:
            A square float64 matrix, and a JSON description of how it was made.
        """

    @abstractmethod
    def scorer(self, kept: Kept, rows: Tensor, targets: Tensor) -> BlockScorer:
        """Solves for the targets.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.
            targets: projected gradients of the targets, `[m, k]`.

        Returns:
            A function of first and end row that gives scores `[rows, m]`, float64.
        """

    @abstractmethod
    def matches(self, info: dict[str, Any]) -> bool:
        """Whether what the store keeps was made with the present settings.

        Args:
            info: the description that `finalize` gave.

        Returns:
            False if the checkpoint must be finalized again.
        """

    @abstractmethod
    def features(self, kept: Kept, rows: Tensor) -> Tensor:
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


def row_scorer(rows: Tensor, weights: Tensor) -> BlockScorer:
    """Scores as `rows @ weights`, computed where they are asked for.

    Args:
        rows: Phi, `[n, k]`.
        weights: `[k, m]`, float64.

    Returns:
        A function of first and end row.
    """

    def score(start: int, stop: int) -> Tensor:
        parts = [block @ weights for _, block in blocks(rows[start:stop])]
        return torch.cat(parts)

    return score
