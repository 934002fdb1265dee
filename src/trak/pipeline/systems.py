"""A checkpoint's rows with its ridge system, for methods that weigh rows one by one."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.encodings import RowSource
from trak.score_computers import RidgeScoreComputer
from trak.score_computers.linear import Kept
from trak.score_computers.losses import Losses
from trak.score_computers.stream import home


@dataclass(frozen=True)
class System:
    """A checkpoint's rows and ridge system.

    Attributes:
        model_id: the checkpoint.
        rows: Phi, `[n, k]`.
        loss: Q, `[n, 1]`.
        sizes: Q without signs, from which the rows' weights in the Gram matrix are told.
        scorer: solves; None if the method does not ask for it.
        kept: what the scorer made.
    """

    model_id: int
    rows: RowSource
    loss: NDArray[Any]
    sizes: Losses
    scorer: RidgeScoreComputer | None
    kept: Kept | None

    def solve(self, vectors: Tensor) -> Tensor:
        """`K^-1` times vectors.

        Args:
            vectors: `[b, k]`, float64.

        Returns:
            `[b, k]`.
        """
        assert self.scorer is not None  # noqa: S101 - methods that solve have both
        assert self.kept is not None  # noqa: S101
        return self.scorer.solved(self.kept, self.rows, vectors, self.sizes)

    def loss_weights(self, start: int, count: int) -> Tensor:
        """Q of a stretch of rows.

        Args:
            start: the first row.
            count: how many.

        Returns:
            `[count, 1]`, float64.
        """
        found = np.array(self.loss[start : start + count], dtype=np.float64)
        return torch.from_numpy(found).to(home(self.rows))

    def scale(self, rows: Tensor, start: int, kind: str) -> Tensor:
        """What a row's products are multiplied by.

        Args:
            rows: a stretch of Phi, `[b, k]`.
            start: its first row.
            kind: `"loss"`, or as for `norms`.

        Returns:
            `[b, 1]`; 0 for rows without a gradient, whose scores are 0. Where training on
            an example lowers its output (Q below 0, as of a regression's example whose
            output is too large) it is negative.
        """
        weights = self.loss_weights(start, len(rows)).to(rows.device)
        if kind == "loss":
            return weights
        solved = rows if kind == "norm" else self.solve(rows)
        signs = torch.where(weights < 0, -1.0, 1.0).to(rows)
        return signs / self.norms(rows, solved, kind)

    @staticmethod
    def norms(vectors: Tensor, solved: Tensor, kind: str) -> Tensor:
        """Lengths of vectors; infinite for zeros, so that a quotient by them is 0.

        Args:
            vectors: `[b, k]`.
            solved: `K^-1` times these.
            kind: `"norm"` (`|x|`), `"change"` (`|K^-1 x|`) or `"energy"`
                (`sqrt(x^T K^-1 x)`).

        Returns:
            `[b, 1]`.
        """
        if kind == "energy":
            found = (vectors * solved).sum(dim=1, keepdim=True).clamp(min=0).sqrt()
        else:
            found = (solved if kind == "change" else vectors).norm(dim=1, keepdim=True)
        return found.masked_fill(found == 0, torch.inf)
