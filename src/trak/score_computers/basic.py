"""Upstream's scoring, for parity: an absolute ridge, and a rescaled inverse."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trak.arguments import Ridge, as_ridge
from trak.encodings import RowSource, row_encoding
from trak.errors import InputError
from trak.score_computers.abstract import AbstractScoreComputer
from trak.score_computers.factor import factorize
from trak.score_computers.gram import primal_gram
from trak.score_computers.linear import Kept, LinearScoreComputer
from trak.score_computers.stream import decoded
from trak.utils import get_matrix_mult


def _absolute(lambda_reg: Ridge) -> float:
    found = as_ridge(lambda_reg) or 0.0
    if isinstance(found, str):
        raise InputError(
            f"Upstream's score computers add lambda_reg as it is; {found!r} is relative to "
            "the mean squared row norm. Give a number, or use RidgeScoreComputer."
        )
    return found


class BasicScoreComputer(LinearScoreComputer):
    """`Phi M / mean|M|` with `M = (Phi^T Phi + lambda I)^-1`, as `traker` 0.3.2 computes.

    The division makes the scale of scores arbitrary and another one for every
    checkpoint; use it to compare with published numbers. Arithmetic is float64 here, and
    a singular matrix is an error, not noise.

    Args:
        dtype: dtype of the stored rows.
        device: where to compute.
        CUDA_MAX_DIM_SIZE: accepted as upstream's name.
        logging_level: accepted as upstream's name.
        lambda_reg: the ridge, added to the diagonal as it is; 0 if None.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        CUDA_MAX_DIM_SIZE: int = 20_000,
        logging_level: int = logging.INFO,  # noqa: ARG002
        lambda_reg: Ridge = 0.0,
    ) -> None:
        super().__init__(dtype, device)
        self.CUDA_MAX_DIM_SIZE = CUDA_MAX_DIM_SIZE
        self.lambda_reg = _absolute(lambda_reg)

    def finalize(self, rows: RowSource) -> Kept:
        """Computes the rescaled inverse.

        Args:
            rows: Phi, `[n, k]`.

        Returns:
            The rescaled inverse `[k, k]` and its description.
        """
        return self._inverted(self._gram(rows), rows, self.lambda_reg)

    def at_ridges(
        self,
        kept: Kept,  # noqa: ARG002
        rows: RowSource,
        lambda_regs: Sequence[Ridge],
    ) -> list[Kept]:
        """Inverts with other ridges, in one pass over the rows for all of them.

        Args:
            kept: not used: the scale of the Gram matrix is lost in it.
            rows: Phi, `[n, k]`.
            lambda_regs: ridges; None stands for 0.

        Returns:
            One rescaled inverse and description a ridge.
        """
        gram = self._gram(rows)
        return [self._inverted(gram, rows, _absolute(reg)) for reg in lambda_regs]

    def weights(self, kept: Kept, rows: RowSource, targets: Tensor) -> Tensor | None:
        """Applies the inverse to the targets.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.
            targets: projected gradients of the targets, `[m, k]`.

        Returns:
            `[k, m]`, float64.
        """
        inverse = torch.as_tensor(kept[0], device="cpu").to(self.where(rows))
        return inverse @ targets.to(inverse).T

    def matches(self, info: dict[str, Any]) -> bool:
        """Whether what the store keeps was made with the present settings.

        Args:
            info: the description that `finalize` gave.

        Returns:
            False if the checkpoint must be finalized again.
        """
        request = self._request()
        return {name: info.get(name) for name in request} == request

    def features(self, kept: Kept, rows: RowSource) -> Tensor:
        """`Phi M / mean|M|`.

        Args:
            kept: what `finalize` made.
            rows: Phi, `[n, k]`.

        Returns:
            `[n, k]`, float64.
        """
        inverse = torch.as_tensor(kept[0], device="cpu").to(self.where(rows))
        return decoded(rows, torch.float64).to(inverse.device) @ inverse

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        """`Phi M / mean|M|` for a given Gram matrix.

        Args:
            grads: projected gradients Phi, `[n, k]`.
            xtx: what `get_xtx` returned.

        Returns:
            `[n, k]`, float64.
        """
        inverse = self._inverse(xtx.to(torch.float64), grads, self.lambda_reg)
        return grads.to(torch.float64) @ inverse

    def _gram(self, rows: RowSource) -> Tensor:
        return primal_gram(rows, self.where(rows))

    def _inverted(self, gram: Tensor, rows: RowSource, lambda_reg: float) -> Kept:
        inverse = self._inverse(gram, rows, lambda_reg)
        return inverse.cpu().numpy(), {**self._request(), "lambda_reg": lambda_reg}

    def _inverse(self, gram: Tensor, rows: RowSource, lambda_reg: float) -> Tensor:
        factor = factorize(
            gram,
            form="primal",
            ridge=lambda_reg,
            num_rows=rows.shape[0],
            row_eps=row_encoding(rows).eps,
        )
        inverse = torch.cholesky_inverse(factor.lower)
        return inverse / inverse.abs().mean()

    def _request(self) -> dict[str, Any]:
        return {"computer": type(self).__name__, "lambda_reg": self.lambda_reg}


class BasicSingleBlockScoreComputer(AbstractScoreComputer):
    """`Phi (Phi^T Phi)^-1` at once, without ridge or rescaling: upstream's bare version.

    Args:
        dtype: dtype of the stored rows.
        device: where to compute.
        logging_level: accepted so that `TRAKer` can make one.
        lambda_reg: must be 0 or None; this class has no ridge.

    Raises:
        InputError: if there is a ridge.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        logging_level: int = logging.INFO,  # noqa: ARG002
        lambda_reg: Ridge = 0.0,
    ) -> None:
        super().__init__(dtype, device)
        if as_ridge(lambda_reg):
            raise InputError(
                "BasicSingleBlockScoreComputer has no ridge; use BasicScoreComputer or "
                f"leave score_computer out for lambda_reg={lambda_reg}."
            )

    def get_xtx(self, grads: Tensor) -> Tensor:
        """The Gram matrix.

        Args:
            grads: projected gradients Phi, `[n, k]`.

        Returns:
            `Phi^T Phi`, `[k, k]`, float64.
        """
        phi = grads.to(torch.float64)
        return phi.T @ phi

    def get_x_xtx_inv(self, grads: Tensor, xtx: Tensor) -> Tensor:
        """The features.

        Args:
            grads: projected gradients Phi, `[n, k]`.
            xtx: what `get_xtx` returned.

        Returns:
            `Phi (Phi^T Phi)^-1`, `[n, k]`, float64.
        """
        eps = torch.finfo(grads.dtype).eps
        gram = xtx.to(torch.float64)
        factor = factorize(
            gram, form="primal", ridge=0.0, num_rows=grads.shape[0], row_eps=eps
        )
        return factor.solve(grads.to(torch.float64).T).T

    def get_scores(
        self, features: Tensor, target_grads: Tensor, accumulator: Tensor
    ) -> None:
        """Adds `features @ target_grads.T` to `accumulator`.

        Args:
            features: `[n, k]`.
            target_grads: projected gradients of the targets, `[m, k]`.
            accumulator: `[n, m]`.
        """
        product = get_matrix_mult(features, target_grads.to(features.dtype))
        accumulator += product.detach().to(accumulator.device)
