"""Numbers as users write them: Python's, NumPy's, or an array or tensor of one number."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from trak.errors import InputError


def as_integer(name: str, value: Any, *, least: int | None = None) -> int:
    """Accepts an integer of any library.

    Args:
        name: the argument, for the message.
        value: what the user gave.
        least: the smallest one that makes sense; any if None.

    Returns:
        A Python integer.

    Raises:
        InputError: if it is no integer, or too small. A bool or `3.0` is none.
    """
    found = _plain(value)
    whole = isinstance(found, int) and not isinstance(found, bool)
    if not whole or (least is not None and found < least):
        limit = "" if least is None else f" of at least {least}"
        raise InputError(f"{name} must be an integer{limit}, got {value!r}.")
    return found


def as_number(name: str, value: Any, *, zero: bool) -> float:
    """Accepts a finite number of any library that is not negative.

    Args:
        name: the argument, for the message.
        value: what the user gave.
        zero: whether it may be 0.

    Returns:
        A Python float.

    Raises:
        InputError: if it is no number, not finite, negative, or 0 where that means
            nothing.
    """
    found = _plain(value)
    real = isinstance(found, int | float) and not isinstance(found, bool)
    if not real or not math.isfinite(found) or found < 0 or (found == 0 and not zero):
        limit = "of at least 0" if zero else "above 0"
        raise InputError(f"{name} must be a finite number {limit}, got {value!r}.")
    return float(found)


def as_ridge(lambda_reg: Any) -> float | None:
    """Accepts what may be added to the diagonal of a Gram matrix.

    Args:
        lambda_reg: a number, or None for the ridge that the score computer chooses.

    Returns:
        A Python float, or None.
    """
    return None if lambda_reg is None else as_number("lambda_reg", lambda_reg, zero=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        return value.item()
    return value
