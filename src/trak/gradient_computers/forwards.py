"""Puts another function in the place of a module's forward, for a while."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def another_forward(module: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Has a module call another function; a forward of its own comes back afterwards.

    Args:
        module: any.
        forward: what it calls within the block, without `self`.

    Yields:
        Nothing.
    """
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
