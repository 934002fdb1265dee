"""Loss weights Q of training examples that need not all count alike.

Where a training minimizes `sum_i w_i l_i`, with weights by class or a sampler that draws
some examples more often, its derivatives are `w_i q_i`, and what an example adds to the
curvature of the sum has the factor `w_i`, too (Park et al. 2023, Sec. 3.1, equation 8, with
an example counted `w_i` times). `q_i` alone says how wrong the model is about it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.score_computers.logistic import sizes

_ROUNDING = 1e-5  # of quotients of float32 numbers, and of models in lower precision


@dataclass(frozen=True)
class Losses:
    """What is known of training examples' losses.

    Attributes:
        own: derivative of each example's loss by its output, not counting how much it
            counts, `[n, 1]`, float64.
        counts: how much each counts, `[n, 1]`, float64; None if all count once.
    """

    own: Tensor
    counts: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """Q as scores are multiplied by it, `[n, 1]`, float64."""
        return self.own if self.counts is None else self.own * self.counts

    def sized(self, logistic: bool | None) -> "Losses":
        """The same without signs, where these only say which class is the right one.

        Args:
            logistic: whether the loss is logistic; None if unknown.

        Returns:
            As `trak.score_computers.logistic.sizes`.
        """
        return Losses(sizes(self.own, logistic), self.counts)

    @property
    def are_probable(self) -> bool:
        """Whether the examples' own Q lie between 0 and 1."""
        return bool(((self.own >= 0) & (self.own <= 1)).all())


def losses_of(total: Any, counts: Any = None) -> Losses:
    """Tells how wrong the model is about examples from how much they count.

    Args:
        total: Q, `[n]` or `[n, 1]`; `Losses` stay what they are.
        counts: how much each example counts, of the same shape; None if all count once.

    Returns:
        The losses.
    """
    if isinstance(total, Losses):
        return total
    every = _column(total)
    if counts is None:
        return Losses(every)
    weights = _column(counts)
    own = every / weights
    beyond = (own.abs() > 1) & (own.abs() <= 1 + _ROUNDING)
    return Losses(torch.where(beyond, own.sign(), own), weights)


def losses_beside(columns: Tensor) -> Losses:
    """As `losses_of`, from columns beside each other.

    Args:
        columns: Q, and how much the examples count if that differs, `[n, 1]` or `[n, 2]`.

    Returns:
        The losses.
    """
    return losses_of(*columns.T)


def _column(values: Any) -> Tensor:
    found = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    return found.detach().to("cpu", torch.float64).reshape(-1, 1)
