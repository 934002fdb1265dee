"""How long a training lasted, told from the loss weights that it left.

The linearized model is trained by gradient flow from equal outputs,
`f = f0 + Phi Phi^T a` (`trak.score_computers.flow`), for several `f0`, until its loss
weights are most like the real ones. Unlike everything else that is told of a training
(`trak.score_computers.stationarity`), this asks for no guess at how it ended.
"""

import math

import torch
from torch import Tensor

from trak.score_computers.decay import between
from trak.score_computers.flow import GROWTH_OF_SAMPLES, STEPS_OF_SAMPLES, flow

_STARTS = (0.5, 0.65, 0.75, 0.85, 0.9, 0.95)
"""Loss weights that trainings may begin with: a half with two classes, more with many."""
_OVER = 0.1  # of the loss weights; so far beyond the model nothing is looked for
_SHORTEST = 2**-3.5
"""Added to all times, in units of what the mean squared row norm is in: optimizers that
adapt their steps learn more in few of them than a flow that lasts hardly at all."""
_LATE, _LATER = (-2.4, 5.6), (0.4, 1.0)
"""Powers of two, of times and of how much longer models are trained than that: features
are learned on the way, so that a training takes longer than one with those of its end."""
FREE, FREEST = 0.04, 0.2
"""Growth of all outputs is easier for networks than for linear models where it is more than
4 % of the rows' variance, down to a fifth of the stiffness."""
_FREER, _BY_THEN = 0.5, (0.0, 6.0)
"""Half of that, on a logarithmic scale, after trainings of 64, nothing of it after those
of 1."""


def lasted(kernel: Tensor, loss: Tensor, counts: Tensor, share: float) -> float | None:
    """How long a flow lasts whose loss weights are most like the real ones.

    Args:
        kernel: `Phi Phi^T` of a sample, in units of the mean squared row norm, `[s, s]`.
        loss: Q as probabilities of being wrong, not counting how much examples count,
            `[s]`.
        counts: how much they count, `[s]`.
        share: of the training set that the sample is.

    Returns:
        The time at which the correlation is largest, for all training examples, as if
        they counted once on average; None where it is nowhere above 0, as where loss
        weights are all equal, so that nothing can be told.
    """
    known, strong = kernel.float(), (counts / counts.mean()).float()[:, None]
    wanted = loss.float() - loss.float().mean()
    starts = torch.tensor(_STARTS, dtype=torch.float32, device=known.device)
    begun = torch.log((1 - starts) / starts).expand(len(loss), -1)
    best, found = 0.0, None
    followed = flow(
        lambda added: known @ (strong * added),
        torch.zeros_like(begun),
        GROWTH_OF_SAMPLES,
        STEPS_OF_SAMPLES,
        start=begun,
    )
    for time, _, current in followed:
        apart = current - current.mean(dim=0)
        alike = (wanted @ apart) / apart.norm(dim=0).clamp(min=1e-30)
        if float(alike.max()) > best:
            best, found = float(alike.max()), time
        if float(current.mean(dim=0).max()) < _OVER * float(loss.mean()):
            break
    return None if found is None else found * share


def as_networks(
    time: float, kernel: Tensor, outputs: Tensor, growth: float
) -> tuple[float, Tensor]:
    """What a linearized model has to be trained with, for how long, to be like a network.

    Args:
        time: that a training lasted, as `lasted` says.
        kernel: `Phi Phi^T`, `[s, s]`.
        outputs: of the model, `[s]`.
        growth: share of the rows' variance in which all outputs grow.

    Returns:
        A longer time, and a kernel in which growth is easier.
    """
    longer = math.log2(time + _SHORTEST)
    freedom = max(FREEST, min(1.0, FREE / growth)) if growth > 0 else 1.0
    stiffness = freedom ** (_FREER * between(longer, *_BY_THEN))
    kernel = with_growth(kernel, outputs, stiffness)
    first, last = _LATER
    longer += first + (last - first) * between(longer, *_LATE)
    return 2**longer, kernel


def with_growth(kernel: Tensor, outputs: Tensor, stiffness: float) -> Tensor:
    """A kernel in which growth of all outputs is easier or harder.

    Args:
        kernel: `Phi Phi^T`, `[s, s]`.
        outputs: of the model, `[s]`.
        stiffness: of growth, compared with that of the kernel, above 0.

    Returns:
        The kernel, divided by the stiffness along the outputs and as it was elsewhere.
    """
    if stiffness == 1:
        return kernel
    along = kernel @ outputs
    excess = (1 - 1 / stiffness) / float(outputs @ along)
    return kernel - excess * torch.outer(along, along)
