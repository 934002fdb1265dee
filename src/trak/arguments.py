"""Numbers as users write them: Python's, NumPy's, or an array or tensor of one number."""

import logging
import math
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor

from trak.errors import InputError, InputTypeError

MOST = 1 << 40
"""Of examples, targets and columns: numbers of bytes beyond it do not fit anywhere."""


def as_integer(
    name: str, value: Any, *, least: int | None = None, most: int | None = None
) -> int:
    """Accepts an integer of any library.

    Args:
        name: the argument, for the message.
        value: what the user gave.
        least: the smallest one that makes sense; any if None.
        most: the largest one; any if None.

    Returns:
        A Python integer.

    Raises:
        InputError: if it is no integer, too small or too large. A bool or `3.0` is none.
    """
    found = _plain(value)
    whole = isinstance(found, int) and not isinstance(found, bool)
    if not whole or (least is not None and found < least):
        limit = "" if least is None else f" of at least {least}"
        raise InputError(f"{name} must be an integer{limit}, got {value!r}.")
    if most is not None and found > most:
        raise InputError(
            f"{name} must be {most:,} at most, got about 2^{found.bit_length() - 1}."
        )
    return found


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer that no float holds
        return False


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
    if not real or not _is_finite(found) or found < 0 or (found == 0 and not zero):
        limit = "of at least 0" if zero else "above 0"
        raise InputError(f"{name} must be a finite number {limit}, got {value!r}.")
    return float(found)


def as_flag(name: str, value: Any, *, numbers: bool = False) -> bool:
    """Accepts a yes or no; any text would be a yes, `"no"` too.

    Args:
        name: the argument, for the message.
        value: what the user gave.
        numbers: whether 0 and 1 will do, as in arguments that upstream has.

    Returns:
        Whether.

    Raises:
        InputTypeError: if it is no truth value.
    """
    found = _plain(value)
    if not isinstance(found, bool) and not (
        numbers and isinstance(found, int) and found in {0, 1}
    ):
        raise InputTypeError(f"{name} must be True or False, got {value!r}.")
    return bool(found)


def as_level(value: Any) -> int:
    """Accepts a level of `logging`, by number or by name.

    Args:
        value: what the user gave.

    Returns:
        The number.

    Raises:
        InputError: if it is none.
    """
    found = _plain(value)
    if isinstance(found, str):
        with suppress(ValueError):
            found = logging.NullHandler(found.upper()).level
    if not isinstance(found, int) or isinstance(found, bool):
        raise InputError(
            "logging_level must be a level of Python's logging, such as logging.INFO, "
            f"30 or 'WARNING', got {value!r}."
        )
    return found


def meant(word: Any, known: Iterable[str]) -> str:
    """What a misspelt name may stand for, as a sentence for a message.

    Args:
        word: what the user gave.
        known: the names that there are.

    Returns:
        ` Did you mean ...?`, or nothing if no name is like it.
    """
    near = get_close_matches(word, sorted(known), n=2) if isinstance(word, str) else []
    return f" Did you mean {' or '.join(near)}?" if near else ""


Ridge = float | str | None
"""An absolute ridge; `"3x"`, in mean squared row norms; or None for the automatic one."""


def as_ridge(lambda_reg: Any) -> Ridge:
    """Accepts what may be added to the diagonal of a Gram matrix.

    Args:
        lambda_reg: a number; a multiple of the mean squared row norm, such as `"3x"`; or
            `"auto"` or None for the ridge that the score computer chooses.

    Returns:
        A Python float; the multiple as `"3x"`; or None.

    Raises:
        InputError: if it is something else.
    """
    if lambda_reg is None or (isinstance(lambda_reg, str) and lambda_reg == "auto"):
        return None
    if not isinstance(lambda_reg, str):
        return as_number("lambda_reg", lambda_reg, zero=True)
    try:
        multiple = float(lambda_reg[:-1]) if lambda_reg.endswith("x") else math.nan
    except ValueError:
        multiple = math.nan
    if not 0 <= multiple < math.inf:
        raise InputError(
            "lambda_reg must be a number (added as it is), a multiple of the mean squared "
            f"row norm such as '3x', or 'auto', got {lambda_reg!r}."
        )
    return f"{multiple!r}".removesuffix(".0") + "x"


def multiple_of(lambda_reg: Ridge) -> float | None:
    """The number of a relative ridge.

    Args:
        lambda_reg: as `as_ridge` gives it.

    Returns:
        The multiple of the mean squared row norm; None if the ridge is absolute or chosen.
    """
    return float(lambda_reg[:-1]) if isinstance(lambda_reg, str) else None


def is_listed(value: Any) -> TypeGuard[Iterable[Any]]:
    """Whether something lists others.

    Args:
        value: what the user gave.

    Returns:
        False for texts, and for arrays and tensors of a single number, which only look
        iterable.
    """
    listed = isinstance(value, Iterable) and not isinstance(value, str | bytes)
    return listed and getattr(value, "ndim", 1) != 0


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        with suppress(RuntimeError):  # of a tensor without memory
            return value.item()
    return value
