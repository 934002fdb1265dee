"""What training examples did along the way: their loss weights, added up.

Scores are multiplied by Q at the end of training, though an example moved the model all
the time. In the linearized model `f = Phi w` that is trained by gradient flow from zero,
`w = Phi^T a` with `a_i` the integral of `q_i = 1 / (1 + exp(f_i))` over time (as the steps
of a real training are added up in Pruthi et al. 2020, Sec. 3). The flow is followed until
its loss weights are closest to those of the real model. docs/choices.md has measurements.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.encodings import RowSource, row_encoding
from trak.score_computers.losses import Losses, losses_of
from trak.score_computers.ridge_sample import Situation
from trak.score_computers.stream import rows_per_block, stream

_STEPS = 1000
_APART = 1.08  # times between two looks at the loss weights
_FIRST, _GROWTH = 0.1, 1 / 12  # of steps
_TURNS = 20  # of the power iteration that begins
_OVER = 0.25  # of the loss weights; so far beyond the model nothing is looked for
_COLUMNS, _FEWEST, _NUMBERS = 2048, 64, 1 << 25
_MOST = 4096  # examples whose whole kernel is multiplied with
_LEAST = 1e-30

Pull = Callable[[Tensor], Tensor]
"""`Phi Phi^T` times weights `[n]`, as outputs `[n]`."""


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

    Steps are a twelfth of the time that has passed, from `0.1 / s` up to `1 / s`, with `s`
    the largest eigenvalue of the linearized flow, which falls as examples are learned.

    Args:
        pull: the kernel.
        losses: Q without signs, as probabilities; how much examples count is how strongly
            they pull.
        signs: of Q, `[n]`: where outputs are logits of one of two classes.
        device: of the kernel.

    Returns:
        `a`, `[n, 1]`, float64, with mean 1.
    """
    seen, signed = (each.to(device).float() for each in (losses.own.flatten(), signs))
    strong = signed
    if losses.counts is not None:
        strong = signed * losses.counts.flatten().to(signed)

    def outputs(weights: Tensor) -> Tensor:
        return signed * pull(strong * weights)

    weights, loss = torch.zeros_like(seen), torch.full_like(seen, 0.5)
    leading, steep = _steepest(outputs, loss, torch.ones_like(seen), _TURNS)
    found, least, time, until = loss, float("inf"), 0.0, 0.0
    for _ in range(_STEPS):
        step = max(_FIRST, min(1.0, _GROWTH * time * steep)) / steep
        time += step
        weights = weights + step * loss
        loss = torch.sigmoid(-outputs(weights))
        if time < until:
            continue
        until = time * _APART
        distance = float((loss - seen).square().mean())
        if distance < least:
            found, least = weights, distance
        if float(loss.mean()) < _OVER * float(seen.mean()):
            break
        leading, steep = _steepest(outputs, loss, leading, 2)
    total = found.cpu().double()
    return (total / total.mean())[:, None]


def _steepest(
    outputs: Pull, loss: Tensor, leading: Tensor, turns: int
) -> tuple[Tensor, float]:
    # power iteration on the linearized flow
    curvature, size = loss * (1 - loss), _LEAST
    for _ in range(turns):
        leading = outputs(curvature * leading)
        size = max(float(leading.norm()), _LEAST)
        leading = leading / size
    return leading, size
