"""The R of TRAK's Gram matrix: rows weighted by the curvature of the loss."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.encodings import RowSource
from trak.score_computers.losses import losses_of

RULE = "q (1 - q / 2)"
"""What rows are weighted by, as the store notes it down."""
FLOOR = 1e-4
"""Examples that are fitted perfectly count a little, so that the system stays regular."""


def roots(loss: Any, *, curved: bool = True) -> Tensor | None:
    """Square roots of the rows' weights in the Gram matrix.

    The Newton step of TRAK's derivation (Park et al. 2023, Sec. 3.1, equation 8) has
    `(Phi^T R Phi)^-1`, where `R` holds the curvature of each example's loss; the paper then
    leaves `R` out. With a softmax, curvature along the logits is half the trace of
    `diag(p) - p p^T`, its Fisher information: `(1 - sum_c p_c^2) / 2`. That is `q (1 - q)`
    if all that the right class lacks, `q = 1 - p_y`, goes to one other class, and
    `q (1 - q / 2)` if it is spread over many. The latter is taken: the two differ for
    examples that the model gets wrong, and there it was better, with two classes too
    (docs/whitening.md). Losses of constant curvature, such as the squared one, have
    `R = I`. An example that counts `w` times has `w` times its curvature.

    Args:
        loss: Q, `[n]` or `[n, 1]`, or `Losses`.
        curved: take the loss's own curvature; if False, only how much examples count.

    Returns:
        `sqrt(max(q (1 - q / 2), 1e-4))`, times `sqrt(w)` where examples count differently,
        `[n, 1]`, float64 (numbers that float32 holds); None if nothing is to be weighted:
        Q is no probability, or not asked for, and all examples count once.
    """
    losses = losses_of(loss)
    found = losses.counts
    if curved and losses.are_probable:
        own = (losses.own * (1 - losses.own / 2)).clamp(min=FLOOR)
        found = own if found is None else own * found
    return None if found is None else found.sqrt().float().double()


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
