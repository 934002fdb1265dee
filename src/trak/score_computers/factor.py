"""The ridge system, factored once and solved for many targets.

With rows Phi `[n, k]` and ridge lambda, TRAK's scores before Q are
`Phi (Phi^T Phi + lambda I)^-1 Phi_targets^T` (Park et al. 2023, Sec. 3.2, Step 3, with
a ridge). The same numbers come from the smaller of two systems: `k x k` (primal) or,
by the push-through identity `Phi (Phi^T Phi + lambda I)^-1 = (Phi Phi^T + lambda I)^-1
Phi`, `n x n` (dual). All in float64.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trak.errors import InputError, NumericalError
from trak.shapes import Square, TargetColumns

logger = logging.getLogger(__name__)

Form = Literal["primal", "dual"]
_NEAR = 2.0  # times the rows' rounding: a ridge beside which scores may be noise
_AMPLE = 10.0


@dataclass(frozen=True, slots=True)
class RidgeFactor:
    """A Cholesky factor and what it is the factor of.

    Attributes:
        lower: lower triangular `L` with `L L^T = Gram + ridge I`; the Gram matrix can be
            had back from it, so that the ridge changes without a pass over the rows.
        form: whose Gram matrix it is: `Phi^T Phi` (primal) or `Phi Phi^T` (dual).
        ridge: what was added to the diagonal.
        mean_squared_norm: mean of the rows' squared norms, in which relative ridges
            are measured.
    """

    lower: Square
    form: Form
    ridge: float
    mean_squared_norm: float

    def gram(self) -> Square:
        """The Gram matrix, without the ridge.

        Returns:
            `L L^T - ridge I`.
        """
        gram = self.lower @ self.lower.T
        gram.diagonal().sub_(self.ridge)
        return gram

    def solve(self, right: TargetColumns) -> TargetColumns:
        """Solves `(Gram + ridge I) X = right`.

        Args:
            right: one column a target.

        Returns:
            X.
        """
        return torch.cholesky_solve(right, self.lower)


def smaller_form(num_rows: int, width: int) -> Form:
    """The form with the smaller system.

    Args:
        num_rows: `n`.
        width: `k`.

    Returns:
        `"dual"` if there are fewer rows than columns.
    """
    return "dual" if num_rows < width else "primal"


def factorize(
    gram: Square,
    *,
    form: Form,
    ridge: float,
    num_rows: int,
    row_eps: float = 0.0,
) -> RidgeFactor:
    """Factors `Gram + ridge I`, or says why that would not mean anything.

    Args:
        gram: a Gram matrix.
        form: whose.
        ridge: at least 0; what is added to the diagonal.
        num_rows: number of rows `n`.
        row_eps: relative precision of the stored rows. Eigenvalues below `(2 eps)^2` of
            the largest are rounding noise of the rows.

    Returns:
        The factor.

    Raises:
        InputError: if the ridge is negative or not finite.
        NumericalError: if the matrix is singular to working precision.
    """
    if not (ridge >= 0 and ridge < float("inf")):
        raise InputError(f"The ridge must be finite and at least 0, got {ridge}.")
    mean_squared_norm = float(gram.trace()) / num_rows
    if mean_squared_norm == 0:
        raise NumericalError(
            "Every projected gradient is zero, so there is nothing to attribute. Is the "
            "model output constant in the selected parameters (grad_wrt)?"
        )
    system = gram.clone()
    system.diagonal().add_(ridge)
    # rounding of the rows adds about (eps / 2)^2 trace / q to every eigenvalue
    rounding = row_eps**2 / len(gram) * float(gram.trace())
    noise = max(rounding, 1e-13 * float(gram.trace()))
    if ridge < max(noise, _NEAR * rounding):  # else the ridge itself is enough
        threshold = max((2 * row_eps) ** 2, 1e-13)
        eigenvalues = torch.linalg.eigvalsh(system)
        if eigenvalues[0] - ridge < rounding:
            _warn_of_rounding(ridge / mean_squared_norm, rounding / mean_squared_norm)
        if ridge < noise and eigenvalues[0] < threshold * eigenvalues[-1]:
            raise NumericalError(_singular(form, eigenvalues, ridge, num_rows))
    lower, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise NumericalError(
            f"The Gram matrix plus a ridge of {ridge:.3g} is not positive definite. The "
            f"mean squared row norm is {mean_squared_norm:.3g}; use a ridge of that "
            "size (lambda_reg='1x'), or leave lambda_reg out."
        )
    return RidgeFactor(lower, form, float(ridge), mean_squared_norm)


def _warn_of_rounding(ridge: float, rounding: float) -> None:
    logger.warning(
        "The ridge is %.2g mean squared row norms, and rounding of the stored rows is "
        "worth up to %.2g in directions that hardly any row has: scores may be mostly "
        "noise. Use a ridge of %.1gx or more, leave lambda_reg out, or store rows with "
        "row_dtype='float32' in a new save_dir.",
        ridge,
        rounding,
        _AMPLE * rounding,
    )


def _singular(form: Form, eigenvalues: Tensor, ridge: float, num_rows: int) -> str:
    what = "rows than columns" if form == "dual" else "columns than rows"
    size, low, high = len(eigenvalues), float(eigenvalues[0]), float(eigenvalues[-1])
    if form == "primal" and size > num_rows:
        what = f"columns than {num_rows} rows need"
        why = "proj_dim exceeds the number of training examples"
    else:
        why = (
            "examples are the same, or both proj_dim and the number of examples exceed the "
            "number of parameters, or a softmax model is not projected, whose last layer "
            "has a direction without gradient"
        )
    return (
        f"The Gram matrix ({size} x {size}, {form}: no more {what}) is singular to the "
        f"precision of the stored rows: eigenvalues from {low:.3g} to {high:.3g}. With "
        f"lambda_reg={ridge:.3g} its inverse, and every score, would be noise. This "
        f"happens where {why}. Leave lambda_reg out (a ridge is chosen then), set a "
        "positive one, or lower proj_dim."
    )
