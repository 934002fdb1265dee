"""The default: TRAK with a ridge that is never left at zero by accident."""

import logging
from typing import Any

import torch
from torch import Tensor

from trak.arguments import as_ridge
from trak.score_computers.factor import RidgeFactor, factorize, smaller_form
from trak.score_computers.gram import dual_gram, primal_gram
from trak.score_computers.linear import (
    BlockScorer,
    Kept,
    LinearScoreComputer,
    row_scorer,
)

RELATIVE_RIDGE = 1.0


class RidgeScoreComputer(LinearScoreComputer):
    """`Phi (Phi^T Phi + lambda I)^-1 Phi_targets^T`, without further scaling.

    Solved in float64 by Cholesky, in the smaller of the primal and dual forms. Unlike
    `BasicScoreComputer` (upstream's), the inverse is not divided by its mean absolute
    entry, so that scores of several checkpoints are on one scale.

    Args:
        dtype: dtype of the stored rows.
        device: where to compute.
        logging_level: accepted as upstream's name.
        lambda_reg: the ridge, added to the diagonal as it is. None stands for the mean
            squared row norm of Phi (`trace(Phi^T Phi) / n`).
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        logging_level: int = logging.INFO,  # noqa: ARG002
        lambda_reg: float | None = None,
    ) -> None:
        super().__init__(dtype, device)
        self.lambda_reg = as_ridge(lambda_reg)

    def finalize(self, rows: Tensor) -> Kept:
        """Factors the Gram matrix plus ridge, in one pass over the rows.

        Args:
            rows: Phi, `[n, k]`.

        Returns:
            The Cholesky factor and its description.
        """
        form = smaller_form(*rows.shape)
        gram = primal_gram(rows) if form == "primal" else dual_gram(rows)
        ridge = self.lambda_reg
        if ridge is None:
            ridge = RELATIVE_RIDGE * float(gram.trace()) / rows.shape[0]
        factor = factorize(
            gram,
            form=form,
            ridge=ridge,
            num_rows=rows.shape[0],
            row_eps=torch.finfo(rows.dtype).eps,
        )
        info = {
            **self._request(),
            "form": factor.form,
            "ridge": factor.ridge,
            "mean_squared_norm": factor.mean_squared_norm,
        }
        return factor.lower.cpu().numpy(), info

    def scorer(self, kept: Kept, rows: Tensor, targets: Tensor) -> BlockScorer:
        """Solves for the targets.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.
            targets: projected gradients of the targets, `[m, k]`.

        Returns:
            A function of first and end row that gives scores `[rows, m]`, float64.
        """
        factor = self._factor(kept, rows.device)
        right = targets.to(torch.float64).T
        if factor.form == "primal":
            return row_scorer(rows, factor.solve(right))
        scores = factor.solve(row_scorer(rows, right)(0, rows.shape[0]))
        return lambda start, stop: scores[start:stop]

    def matches(self, info: dict[str, Any]) -> bool:
        """Whether what the store keeps was made with the present settings.

        Args:
            info: the description that `finalize` gave.

        Returns:
            False if the checkpoint must be finalized again.
        """
        request = self._request()
        return {name: info.get(name) for name in request} == request

    def features(self, kept: Kept, rows: Tensor) -> Tensor:
        """Upstream's features, `Phi (Phi^T Phi + ridge I)^-1`.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.

        Returns:
            `[n, k]`, float64.
        """
        factor = self._factor(kept, rows.device)
        phi = rows.to(torch.float64)
        return factor.solve(phi.T).T if factor.form == "primal" else factor.solve(phi)

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        """The features for a given Gram matrix.

        Args:
            grads: projected gradients Phi, `[n, k]`.
            xtx: what `get_xtx` returned.

        Returns:
            `Phi (Phi^T Phi + ridge I)^-1`, `[n, k]`, float64.
        """
        gram = xtx.to(torch.float64)
        ridge = self.lambda_reg
        if ridge is None:
            ridge = RELATIVE_RIDGE * float(gram.trace()) / grads.shape[0]
        eps = torch.finfo(grads.dtype).eps
        factor = factorize(
            gram, form="primal", ridge=ridge, num_rows=grads.shape[0], row_eps=eps
        )
        return factor.solve(grads.to(torch.float64).T).T

    def _request(self) -> dict[str, Any]:
        return {"computer": type(self).__name__, "lambda_reg": self.lambda_reg}

    def _factor(self, kept: Kept, device: torch.device) -> RidgeFactor:
        matrix, info = kept
        lower = torch.as_tensor(matrix).to(device)
        form, ridge = info["form"], info["ridge"]
        return RidgeFactor(lower, form, ridge, info["mean_squared_norm"])
