"""Loading weights without half-loading them, and noticing when they change."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from trak.digests import state_digest
from trak.errors import InputError, InputTypeError, PhaseError


def validate_state(model: nn.Module, checkpoint: Any) -> str:
    """Checks that a state dict fits a model, before anything is touched.

    Args:
        model: the model.
        checkpoint: its state dict to be.

    Returns:
        The content hash of the weights.

    Raises:
        InputTypeError: if it is no state dict.
        InputError: lists missing, unexpected and wrongly shaped entries.
    """
    if not isinstance(checkpoint, Mapping):
        raise InputTypeError(
            "checkpoint must be a state dict (model.state_dict(), or one read from a "
            f"file), got {type(checkpoint).__name__}."
        )
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own if name not in checkpoint]
    problems += [f"not in the model: {name}" for name in checkpoint if name not in own]
    problems += [
        f"{name}: shape {tuple(value.shape)}, the model has {tuple(own[name].shape)}"
        for name, value in checkpoint.items()
        if isinstance(value, Tensor)
        and isinstance(own.get(name), Tensor)
        and value.shape != own[name].shape
    ]
    if problems:
        shown = "\n".join(f"  - {line}" for line in problems[:10])
        raise InputError(
            f"The checkpoint does not fit the model ({len(problems)} differences):\n"
            f"{shown}\nNothing was loaded."
        )
    return state_digest(checkpoint, like=own)


class WeightWatch:
    """Remembers the weights' version counters to notice in-place changes.

    Args:
        model: the model, just loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._versions = self._read()

    def check(self) -> None:
        """Refuses to go on with other weights than those that were loaded.

        Raises:
            PhaseError: if a parameter or buffer was changed in place.
        """
        if self._read() != self._versions:
            raise PhaseError(
                "The model's weights changed after they were loaded (a training step, "
                "or load_state_dict?), so their gradients do not belong to this "
                "checkpoint. Call load_checkpoint or start_scoring_checkpoint again."
            )

    def _read(self) -> list[tuple[int, int]]:
        tensors = (*self._model.parameters(), *self._model.buffers())
        return [(id(t), t._version) for t in tensors]  # noqa: SLF001


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Runs a block with the model in evaluation mode, and restores every module's mode.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
