"""What training examples did along the way: their loss weights, added up.

Scores are multiplied by Q at the end of training, though an example moved the model all
the time: by `a_i`, the integral of its loss weight over a training of the linearized model
(`trak.score_computers.flow`). docs/choices.md has measurements.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.encodings import RowSource, row_encoding
from trak.score_computers.flow import Pull, followed
from trak.score_computers.losses import Losses, losses_of
from trak.score_computers.ridge_sample import Situation
from trak.score_computers.stream import rows_per_block, stream

_COLUMNS, _FEWEST, _NUMBERS = 2048, 64, 1 << 25
_MOST = 4096  # examples whose whole kernel is multiplied with


def way_of(
    rows: RowSource,
    kernel: Tensor | None,
    roots: Tensor | None,
    situation: Situation,
    device: torch.device,
) -> NDArray[np.float64]:
    """What loss weights added up to in the training that ended as the model did.

    Args:
        rows: Phi, `[n, k]`, not weighted.
        kernel: their Gram matrix in the dual form, `[n, n]`; None in the primal one.
        roots: what the kernel's rows are weighted by, `[n, 1]`; None if by nothing.
        situation: knows the loss weights, which are probabilities.
        device: where to compute; the kernel is there.

    Returns:
        As `added_up`.
    """
    every = losses_of(situation.loss, situation.counts)
    signs = torch.where(every.own.flatten() < 0, -1.0, 1.0)
    losses = every.sized(situation.logistic)
    if kernel is not None and len(kernel) <= _MOST:
        pull = of_kernel(kernel, roots)
    else:
        pull = of_rows(rows, device)
    return added_up(pull, losses, signs, device).numpy()


def of_kernel(kernel: Tensor, roots: Tensor | None) -> Pull:
    """Outputs from the Gram matrix that was factored.

    Args:
        kernel: `Phi Phi^T` of weighted rows, `[n, n]`.
        roots: what they are weighted by, `[n, 1]`; None if they are not.

    Returns:
        A function of weights.
    """
    known = kernel.float()
    if roots is None:
        return known.__matmul__
    factors = roots.flatten().to(known)
    return lambda weights: (known @ (weights / factors)) / factors


def of_rows(rows: RowSource, device: torch.device) -> Pull:
    """Outputs from rows, of which no more is held than 2,048 columns.

    Wider ones are hashed (a count sketch, Weinberger et al. 2009, Sec. 2), fewer columns
    for more than 16,384 rows.

    Args:
        rows: Phi, `[n, k]`, not weighted.
        device: where to compute.

    Returns:
        A function of weights.
    """
    count, width = rows.shape
    columns = max(_FEWEST, min(_COLUMNS, _NUMBERS // count))
    lots = torch.Generator().manual_seed(0)
    places = torch.randint(columns, (width,), generator=lots, device="cpu")
    signs = torch.randint(2, (width,), generator=lots, device="cpu") * 2 - 1
    dtype = torch.float64 if row_encoding(rows).name == "float64" else torch.float32
    parts: list[Tensor] = []
    for _, _, block in stream([rows], dtype, device, rows_per_block(width, dtype)):
        if width <= columns:
            parts.append(block.float().clone())
            continue
        part = torch.zeros(len(block), columns, dtype=torch.float32, device=device)
        part.index_add_(1, places.to(device), (block * signs.to(block)).float())
        parts.append(part)
    known = torch.cat(parts)
    return lambda weights: known @ (known.T @ weights)


def added_up(pull: Pull, losses: Losses, signs: Tensor, device: torch.device) -> Tensor:
    """Loss weights of training examples, integrated over a training of the linear model.

    Args:
        pull: the kernel.
        losses: Q without signs, as probabilities; how much examples count is how strongly
            they pull.
        signs: of Q, `[n]`: where outputs are logits of one of two classes.
        device: of the kernel.

    Returns:
        `a`, `[n, 1]`, float64, with mean 1.
    """
    loss = losses.own.flatten().to(device).float()
    signed = strong = signs.to(device).float()
    if losses.counts is not None:
        strong = signed * losses.counts.flatten().to(signed)
    total = followed(lambda a: signed * pull(strong * a), loss).added.cpu().double()
    return (total / total.mean())[:, None]
