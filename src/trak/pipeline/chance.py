"""Models and tasks that answer differently every time, as with dropout that never stops."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import Batch, batch_size, select
from trak.gradient_computers import AbstractGradientComputer

logger = logging.getLogger(__name__)

_SAMPLES = 4
_SAME = 1e-2  # kernels of a GPU may round differently
_NOTHING = 1e-4  # beside the largest output


def warn_of_chance(computer: AbstractGradientComputer, batch: Batch) -> None:
    """Warns where outputs or Q of the same samples depend on the random state.

    Rows and scores are then random, too, and no two runs agree.

    Args:
        computer: computes model outputs and loss weights.
        batch: a normalized batch.
    """
    found = random_outputs(computer, batch)
    if found is not None:
        logger.warning(
            "The model is random: the first samples' outputs were %s once and %s the next "
            "time, in evaluation mode. So are rows and scores, then. Look for dropout or "
            "noise that does not depend on self.training (F.dropout(x, p) needs "
            "training=self.training), and for random numbers in the task.",
            *found,
        )
        return
    some = _first(batch)
    found = _differing(computer.model, lambda: computer.compute_loss_grad(some))
    if found is not None:
        logger.warning(
            "The task is random: the first samples' loss weights Q (get_out_to_loss_grad) "
            "were %s once and %s the next time, of the same outputs. So are scores, then. "
            "Take random numbers out of it, or draw them once, by a seed of the task.",
            *found,
        )


def random_outputs(
    computer: AbstractGradientComputer, batch: Batch
) -> tuple[list[float], list[float]] | None:
    """Computes outputs of the same samples twice, with another random state.

    Args:
        computer: computes model outputs.
        batch: a normalized batch.

    Returns:
        Both, if they differ; None if they do not, or cannot be told.
    """
    some = _first(batch)
    return _differing(
        computer.model, lambda: computer.compute_outputs(some, batch_size(some))
    )


def _first(batch: Batch) -> Batch:
    return select(batch, slice(0, min(_SAMPLES, batch_size(batch))))


def _differing(
    model: nn.Module, compute: Callable[[], Any]
) -> tuple[list[float], list[float]] | None:
    devices = {p.device for p in model.parameters() if p.device.type not in {"cpu", "meta"}}
    kind = next(iter(devices)).type if devices else "cuda"
    found: list[Tensor] = []
    with torch.random.fork_rng([d.index or 0 for d in devices], device_type=kind):
        for _ in range(2):
            made = compute()
            if not isinstance(made, Tensor) or made.is_complex():
                return None  # others say what is wrong with it
            found.append(made.detach().double())
            for device in ("cpu", *devices):  # to another random state
                torch.rand(1, device=device)
    one, other = found
    most = [float(each.abs().nan_to_num(posinf=0).max()) for each in found if each.numel()]
    least = _NOTHING * max(most, default=0)
    shaped = one.shape == other.shape
    if shaped and torch.allclose(one, other, rtol=_SAME, atol=least, equal_nan=True):
        return None
    return _rounded(one), _rounded(other)


def _rounded(outputs: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in outputs.flatten()[:_SAMPLES].tolist()]
