"""Is the loss a squared one? Told from how loss weights answer to other outputs.

With the loss `h (f - y)^2 / 2` the loss weight is `Q = h (y - f)`: whatever is added to an
output, `h` times as much is taken from its Q. No other loss does that at all examples.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trak.batches import Batch, batch_size, select
from trak.gradient_computers import AbstractGradientComputer
from trak.gradient_computers.forwards import another_forward
from trak.modelout_functions.abstract import one_a_sample

logger = logging.getLogger(__name__)

_SAMPLES = 16
_STEPS = (0.25, -0.25)  # of the largest output
_SAME = 0.1  # relative; what bfloat16 rounds is less


def slope_of(computer: AbstractGradientComputer, batch: Batch) -> float | None:
    """The slope of Q in the output, if it is the same everywhere.

    The model's own outputs are raised and lowered, and the task makes the outputs of it,
    and Q.

    Args:
        computer: computes outputs and loss weights.
        batch: a normalized batch of training examples, of which the first 16 count.

    Returns:
        `-h` of a squared loss `h (f - y)^2 / 2`. None of another one, and where the task
        does not get its outputs by calling the model.
    """
    some = select(batch, slice(0, min(_SAMPLES, batch_size(batch))))
    try:
        before = _observed(computer, some, 0.0)
        if before is None:
            return None
        size = float(before[0].abs().max()) or 1.0
        after = [_observed(computer, some, step * size) for step in _STEPS]
    except Exception as error:  # by a task to which outputs mean more
        # as to a density, whose scale may not be negative
        logger.debug("Loss weights of other outputs cannot be told: %s", error)
        return None
    slopes = [_slopes(before, each) for each in after if each is not None]
    return _same(torch.cat(slopes)) if len(slopes) == len(after) else None


def _observed(
    computer: AbstractGradientComputer, batch: Batch, added: float
) -> tuple[Tensor, Tensor] | None:
    usual = computer.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        def raised(found: Tensor) -> Tensor:
            return found + added if found.is_floating_point() else found

        return pytree.tree_map_only(Tensor, raised, usual(*args, **kwargs))

    with another_forward(computer.model, forward):
        outputs = computer.compute_outputs(batch, batch_size(batch))
        if outputs is None or outputs.is_complex():
            return None
        found: Any = computer.compute_loss_grad(batch)
    loss = one_a_sample(found, batch_size(batch), "get_out_to_loss_grad")
    return outputs.detach().double().flatten(), loss.detach().double().flatten()


def _slopes(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Tensor:
    moved, answered = (b - a for a, b in zip(before, after, strict=True))
    return answered / moved


def _same(slopes: Tensor) -> float | None:
    middle = slopes.median()
    alike = (slopes - middle).abs() <= _SAME * middle.abs()
    return float(middle) if bool(alike.all() and middle != 0) else None
