"""The R of TRAK's Gram matrix: rows weighted by the curvature of the loss."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.encodings import RowSource

FLOOR = 1e-4
"""Examples that are fitted perfectly count a little, so that the system stays regular."""


def roots(loss: Any) -> Tensor | None:
    """Square roots of the rows' weights in the Gram matrix.

    With the logistic loss `log(1 + exp(-f))` the Newton step of TRAK's derivation (Park et
    al. 2023, Sec. 3.1, equation 8) has `(Phi^T R Phi)^-1`, `R = diag(q (1 - q))` with
    `q = 1 / (1 + exp(f))`, the loss weight; the paper then leaves `R` out. Losses of
    constant curvature, such as the squared one, have `R = I`.

    Args:
        loss: Q, `[n]` or `[n, 1]`.

    Returns:
        `sqrt(max(q (1 - q), 1e-4))`, `[n, 1]`, float64 (numbers that float32 holds); None
        if Q is no probability, so that nothing is to be weighted.
    """
    weights = torch.as_tensor(np.asarray(loss)).to(torch.float64).reshape(-1, 1)
    if not bool(((weights >= 0) & (weights <= 1)).all()):
        return None
    return (weights * (1 - weights)).clamp(min=FLOOR).sqrt().float().double()


def weighted(rows: RowSource, factors: Tensor | None) -> RowSource:
    """Rows multiplied by numbers, without reading those in a file.

    Args:
        rows: Phi, `[n, k]`.
        factors: `[n, 1]`; None for ones.

    Returns:
        `[n, k]`.
    """
    if factors is None:
        return rows
    if isinstance(rows, Tensor):
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return rows.to(dtype) * factors.to(rows.device, dtype)
    scales = factors.numpy() if rows.scales is None else rows.scales * factors.numpy()
    return replace(rows, scales=scales.astype(np.float32))
