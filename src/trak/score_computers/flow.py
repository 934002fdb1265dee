"""A training of the linearized model, followed until it ends as the real one did.

Outputs `f = Phi w` that are trained by gradient flow from zero are `f = Phi Phi^T a`, with
`a_i` the integral of `q_i = 1 / (1 + exp(f_i))` over time: what all steps added up to
(as the steps of a real training are in Pruthi et al. 2020, Sec. 3).
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trak.score_computers.decay import between

_STEPS, STEPS_OF_SAMPLES = 1000, 3000  # of the time that Euler's rule is stable for
_APART = 1.08  # times between two looks at the loss weights
_FIRST, _GROWTH, GROWTH_OF_SAMPLES = 0.1, 1 / 12, 1 / 6  # of steps
_TURNS = 12  # of the power iteration that begins
_OVER = 0.25  # of the loss weights; so far beyond the model nothing is looked for
_LEAST = 1e-30
_DAMPED = 0.05  # Chebyshev polynomials, Hairer and Wanner 1996, Sec. IV.2
_UNLIKE = (0.35, 0.45)
"""Shares of the variance of loss weights that the flow does not reproduce: above the second
it says nothing about the training."""

Pull = Callable[[Tensor], Tensor]
"""`Phi Phi^T` times weights `[n]`, as outputs `[n]`."""


class Followed(NamedTuple):
    """Where the flow comes closest to the real model.

    Attributes:
        added: `a`, `[n]`, float32.
        distance: mean squared, between its loss weights and the real ones.
        time: that has passed there.
    """

    added: Tensor
    distance: float
    time: float


class Stopped(NamedTuple):
    """A flow that is stopped where it comes closest to the real model.

    Attributes:
        time: when, for all training examples.
        weight: how much is to be made of it, 0 to 1.
    """

    time: float
    weight: float


def stopped(kernel: Tensor, loss: Tensor, counts: Tensor, share: float) -> Stopped:
    """When a flow ends as the real training did.

    Args:
        kernel: `K = Phi Phi^T` of a sample, in units of the mean squared row norm,
            `[s, s]`, float64.
        loss: Q as probabilities of being wrong, not counting how much examples count,
            `[s]`.
        counts: how much they count, `[s]`.
        share: of the training set that the sample is.

    Returns:
        Its time, and how well it reproduces the loss weights.
    """
    found = _of_sample(kernel.float(), loss, counts.float())
    return Stopped(found.time * share, _likeness(found, loss))


def _of_sample(kernel: Tensor, loss: Tensor, strong: Tensor) -> Followed:
    def pull(added: Tensor) -> Tensor:
        return kernel @ (strong * added)

    return followed(pull, loss.float(), STEPS_OF_SAMPLES, GROWTH_OF_SAMPLES)


def _likeness(found: Followed, loss: Tensor) -> float:
    return 1 - between(found.distance / max(float(loss.var()), _LEAST), *_UNLIKE)


def followed(
    outputs: Pull, loss: Tensor, steps: int = _STEPS, growth: float = _GROWTH
) -> Followed:
    """Follows the flow of a logistic loss until its loss weights are the real ones.

    Args:
        outputs: the kernel; signed, and with how strongly examples pull.
        loss: Q of the real model as probabilities, `[n]`, float32.
        steps: how long at most, in steps of `1 / s`, or in shorter ones.
        growth: length of steps, as a share of the time that has passed.

    Returns:
        The flow's state that has the least mean squared distance.
    """
    found = Followed(torch.full_like(loss, 0.5), float("inf"), 0.0)
    for time, added, current in flow(outputs, loss, growth, steps):
        distance = float((current - loss).square().mean())
        if distance < found.distance:
            found = Followed(added, distance, time)
        if float(current.mean()) < _OVER * float(loss.mean()):
            break
    return found


def added_until(outputs: Pull, like: Tensor, time: float) -> Tensor:
    """Loss weights integrated over a flow that is stopped at some time.

    Args:
        outputs: the kernel, or several, a column each.
        like: a tensor of the size of `a`, whose entries do not matter.
        time: when, above 0.

    Returns:
        `a`, as large.
    """
    added = torch.zeros_like(like)
    for _, added, _ in flow(outputs, like, GROWTH_OF_SAMPLES, end=time):  # noqa: B007
        pass
    return added


def flow(
    outputs: Pull,
    like: Tensor,
    growth: float,
    steps: float = math.inf,
    end: float = math.inf,
    start: Tensor | None = None,
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Times, `a` and loss weights, each at least 8 % later than the one before.

    Steps are a share of the time that has passed, at least `0.1 / s`, with `s` the largest
    eigenvalue of the linearized flow, which falls as examples are learned. Those longer
    than `1 / s` have stages (see `_stepped`).

    Args:
        outputs: the kernel.
        like: a tensor of the size of `a`.
        growth: the share.
        steps: how long at most, in steps of `1 / s`, or in shorter ones.
        end: how long at most.
        start: outputs that the flow begins with; None for zeros.

    Yields:
        The last state is that of the end, if it is reached.
    """
    added, begun = torch.zeros_like(like), torch.zeros_like(like)
    begun = begun if start is None else begun + start
    current = torch.sigmoid(-begun)
    leading, steep = _steepest(outputs, current, torch.ones_like(like), _TURNS)
    time = until = 0.0
    while steps > 0 and time < end:
        stretch = min(max(_FIRST, growth * time * steep), max(steps, 1.0))
        step = min(stretch / steep, end - time)
        added, current = _stepped(outputs, begun, added, current, step, step * steep)
        steps -= max(1.0, stretch)
        time += step
        if until <= time < end:
            yield time, added, current
            until = time * _APART
            leading, steep = _steepest(outputs, current, leading, 1)
    if time >= end:
        yield time, added, current


def _stepped(
    outputs: Pull,
    begun: Tensor,
    added: Tensor,
    current: Tensor,
    step: float,
    stretch: float,
) -> tuple[Tensor, Tensor]:
    """One step of the flow, by a Runge-Kutta-Chebyshev rule of first order.

    With `s` stages it is stable for steps about `1.9 s^2` times as long as the smallest
    time scale, and Euler's rule, which it is with one stage, for steps twice as long (van
    der Houwen and Sommeijer 1980; Hairer and Wanner 1996, Sec. IV.2). Half of that is used.

    Args:
        outputs: the kernel.
        begun: outputs that the flow began with, `[n]`.
        added: `a`, `[n]`.
        current: loss weights there, `[n]`.
        step: how long.
        stretch: how long, in units of the smallest time scale.

    Returns:
        `a` and the loss weights afterwards.
    """
    stages = max(1, math.ceil(math.sqrt(stretch)))
    middle = 1 + _DAMPED / stages**2
    values, slopes = [1.0, middle], [0.0, 1.0]  # of Chebyshev polynomials
    for _ in range(stages - 1):
        slopes.append(2 * values[-1] + 2 * middle * slopes[-1] - slopes[-2])
        values.append(2 * middle * values[-1] - values[-2])
    scale = values[stages] / slopes[stages] * step
    before, added = added, added + scale / middle * current
    current = torch.sigmoid(-begun - outputs(added))
    for j in range(2, stages + 1):
        moved = middle * added + scale * current
        before, added = (
            added,
            (2 * values[j - 1] * moved - values[j - 2] * before) / values[j],
        )
        current = torch.sigmoid(-begun - outputs(added))
    return added, current


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
