"""Sums and solves in the precision that they are written in, whatever the caller set.

A training script often runs under `torch.autocast`, or lets float32 products be rounded
(`torch.set_float32_matmul_precision("medium")`). That is for its model: Gram matrices,
whitening and scores would lose digits that the ridge does not forgive.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")

_DEVICES = ("cpu", "cuda")
_KINDS = ("matmul", "conv", "rnn")
_EXACT = {"ieee", "none", "highest"}


def autocast_is_on() -> bool:
    """Whether the caller's code runs under `torch.autocast`.

    Returns:
        True on any device.
    """
    return any(torch.is_autocast_enabled(device) for device in _DEVICES)


@contextmanager
def without_autocast() -> Generator[None]:
    """Runs a block in its tensors' own dtypes.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def apart_from_autocast(function: Callable[[_T], None]) -> Callable[[_T], None]:
    """The same for a function that is called often, and seldom under autocast.

    Args:
        function: of one argument.

    Returns:
        The function, run without autocast.
    """

    def run(value: _T) -> None:
        if autocast_is_on():
            with without_autocast():
                function(value)
        else:
            function(value)

    return run


@contextmanager
def full_precision() -> Generator[None]:
    """The same, with float32 arithmetic in float32.

    Yields:
        Nothing.
    """
    with without_autocast(), exact_float32():
        yield


@contextmanager
def exact_float32() -> Generator[None]:
    """Products and convolutions of float32 numbers are not rounded to fewer bits.

    On CUDA devices torch rounds convolutions to TF32 unless it is told not to.

    Yields:
        Nothing.
    """
    rounding = [backend for backend in _backends() if backend.fp32_precision not in _EXACT]
    before = [backend.fp32_precision for backend in rounding]
    try:
        for backend in rounding:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(rounding, before, strict=True):
            backend.fp32_precision = value


def _backends() -> list[Any]:
    # one by one: the old switches fail where somebody used the new ones
    places = [torch.backends.mkldnn]
    if torch.cuda.is_available():
        places += [torch.backends.cuda, torch.backends.cudnn]
    found = [
        backend
        for place in places
        for backend in (getattr(place, kind, None) for kind in _KINDS)
        if hasattr(backend, "fp32_precision")
    ]
    return found or [_Products(), _Convolutions()]


class _Products:
    """Torch's older switch, before 2.9."""

    @property
    def fp32_precision(self) -> str:
        """What is in force."""
        return torch.get_float32_matmul_precision()

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        torch.set_float32_matmul_precision("highest" if value == "ieee" else value)


class _Convolutions:
    """The same for convolutions on CUDA devices."""

    @property
    def fp32_precision(self) -> str:
        """What is in force."""
        return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        torch.backends.cudnn.allow_tf32 = value == "tf32"
