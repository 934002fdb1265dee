"""Models that answer differently every time, as with dropout that is never turned off."""

import logging

import torch

from trak.batches import Batch, batch_size, select
from trak.gradient_computers import AbstractGradientComputer

logger = logging.getLogger(__name__)

_SAMPLES = 4
_SAME = 1e-2  # kernels of a GPU may round differently
_NOTHING = 1e-4  # beside the largest output


def warn_of_chance(computer: AbstractGradientComputer, batch: Batch) -> None:
    """Warns where outputs of the same samples depend on the random state.

    Rows and scores are then random, too, and no two runs agree.

    Args:
        computer: computes model outputs.
        batch: a normalized batch.
    """
    some = select(batch, slice(0, min(_SAMPLES, batch_size(batch))))
    model = computer.model
    devices = {p.device for p in model.parameters() if p.device.type not in {"cpu", "meta"}}
    kind = next(iter(devices)).type if devices else "cuda"
    found = []
    with torch.random.fork_rng([d.index or 0 for d in devices], device_type=kind):
        for _ in range(2):
            outputs = computer.compute_outputs(some, batch_size(some))
            if outputs is None:
                return
            found.append(outputs.detach().double())
            for device in ("cpu", *devices):  # to another random state
                torch.rand(1, device=device)
    least = _NOTHING * max(float(each.abs().nan_to_num(posinf=0).max()) for each in found)
    if not torch.allclose(*found, rtol=_SAME, atol=least, equal_nan=True):
        logger.warning(
            "The model is random: the first samples' outputs were %s once and %s the next "
            "time, in evaluation mode. So are rows and scores, then. Look for dropout or "
            "noise that does not depend on self.training (F.dropout(x, p) needs "
            "training=self.training), and for random numbers in the task.",
            _rounded(found[0]),
            _rounded(found[1]),
        )


def _rounded(outputs: torch.Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in outputs.flatten()[:_SAMPLES].tolist()]
