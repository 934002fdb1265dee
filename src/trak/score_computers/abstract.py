"""What every score computer offers, under upstream's names."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class AbstractScoreComputer(ABC):
    """From projected gradients to scores, in three steps.

    A subclass of one's own takes the arguments `dtype`, `device`, `logging_level` and
    `lambda_reg` and defines the three methods. Its features `[n, k]` are held in memory
    while scores are computed; `LinearScoreComputer` streams.

    Attributes:
        dtype: dtype of the stored rows.
        device: where to compute.
    """

    @abstractmethod
    def __init__(self, dtype: torch.dtype, device: str | torch.device) -> None:
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def get_xtx(self, grads: Tensor) -> Tensor:
        """The Gram matrix.

        Args:
            grads: projected gradients Phi, `[n, k]`.

        Returns:
            `Phi^T Phi`, `[k, k]`.
        """

    @abstractmethod
    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        """The features.

        Args:
            grads: projected gradients Phi, `[n, k]`.
            xtx: what `get_xtx` returned.

        Returns:
            `Phi (Phi^T Phi)^-1`, `[n, k]`.
        """

    @abstractmethod
    def get_scores(
        self, features: Tensor, target_grads: Tensor, accumulator: Tensor
    ) -> None:
        """Adds `features @ target_grads.T` to `accumulator`.

        Args:
            features: `[n, k]`.
            target_grads: projected gradients of the targets, `[m, k]`.
            accumulator: `[n, m]`.
        """
