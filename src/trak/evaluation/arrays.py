"""Plain arrays as users have them, checked before anything is computed."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import InputError, InputTypeError
from trak.evaluation.conversion import as_numpy

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]

_LEAST = 3  # subsets: two are ordered alike or not, which says nothing


def as_floats(name: str, value: Any, *, axes: tuple[str, ...]) -> Floats:
    """Accepts an array of finite numbers.

    Args:
        name: the argument, for messages.
        value: an array, a tensor on any device, or nested lists.
        axes: what each axis is, one word each.

    Returns:
        The numbers in float64, a copy only where one is needed.

    Raises:
        InputTypeError: if it holds no real numbers.
        InputError: if the number of axes differs, an axis is empty, a number is not
            finite (names the first such place), or sums of them would not be.
    """
    found = as_numpy(name, value)
    if found.dtype.kind not in "biuf":
        raise InputTypeError(
            f"{name} must hold real numbers, got dtype {found.dtype}. Convert it first."
        )
    _check_axes(name, found, axes)
    with np.errstate(over="ignore"):  # of a longdouble, which is then not finite
        numbers = found.astype(np.float64, copy=False)
    largest = max(abs(float(numbers.min())), abs(float(numbers.max())))
    if not math.isfinite(largest):
        bad = np.argwhere(~np.isfinite(numbers))
        where = ", ".join(f"{axis} {i}" for axis, i in zip(axes, bad[0], strict=True))
        raise InputError(
            f"{name} must be finite, got {numbers[tuple(bad[0])]} at {where} ({len(bad)} "
            "such entries). Find out where it comes from; leave the row or column out only "
            "if you know why."
        )
    if largest > np.finfo(np.float64).max / (4 * numbers.size):
        raise InputError(
            f"{name} reaches {largest:.3g}, and sums of such numbers exceed float64, which "
            "ends at 1.8e308. Divide all of it by a constant: no rank depends on the unit."
        )
    return numbers


def as_masks(name: str, value: Any, *, axes: tuple[str, ...]) -> Booleans:
    """Accepts an array of truth values.

    Args:
        name: the argument, for messages.
        value: booleans, or numbers that are all 0 or 1.
        axes: what each axis is, one word each.

    Returns:
        Booleans of the same shape.

    Raises:
        InputError: if the number of axes differs, an axis is empty, or an entry is
            neither 0 nor 1.
    """
    found = as_numpy(name, value)
    _check_axes(name, found, axes)
    if found.dtype == object and set(map(type, found.flat)) <= {bool, np.bool_}:
        found = found.astype(np.bool_)  # as tables give them
    kind = found.dtype.kind
    if kind not in "biuf" or (kind != "b" and not np.isin(found, (0, 1)).all()):
        raise InputError(
            f"{name} must hold booleans, or 0 and 1: got other values of dtype "
            f"{found.dtype}. Lists of indices become masks with masks_from_indices."
        )
    return found.astype(np.bool_, copy=False)


def as_outputs(name: str, value: Any, first: str) -> Floats:
    """Accepts outputs of retrained models, with or without an axis of seeds.

    Args:
        name: the argument, for messages.
        value: `[first, m]` or `[first, seeds, m]`.
        first: what the first axis is.

    Returns:
        `[first, seeds, m]`, float64.

    Raises:
        InputError: if there are fewer or more axes.
    """
    found = as_numpy(name, value)
    if found.ndim not in {2, 3}:
        raise InputError(
            f"{name} must have the axes [{first}, target], or [{first}, seed, target], got "
            f"shape {found.shape}."
        )
    if found.ndim == 2:
        return as_floats(name, found, axes=(first, "target"))[:, None]
    return as_floats(name, found, axes=(first, "seed", "target"))


def check_length(found: int, expected: int, what: str, source: str) -> None:
    """Refuses arrays that do not belong together.

    Args:
        found: a length.
        expected: the one it must equal.
        what: whose length was found.
        source: whose length was expected.

    Raises:
        InputError: if they differ.
    """
    if found != expected:
        raise InputError(
            f"{what} must be {expected}, as in {source}, got {found}. Both must describe "
            "the same examples in the same order; a transposed array looks like this too."
        )


def check_enough(count: int, what: str) -> None:
    """Refuses a correlation over too few.

    Args:
        count: how many there are.
        what: of what, in the plural.

    Raises:
        InputError: if there are fewer than three.
    """
    if count < _LEAST:
        raise InputError(
            f"A rank correlation needs at least {_LEAST} {what}, got {count}; a useful one "
            "needs 50 or more."
        )


def check_varied(name: str, columns: Floats) -> None:
    """Refuses columns whose correlation with anything is undefined.

    Args:
        name: what the columns are, for the message.
        columns: `[subsets, m]`.

    Raises:
        InputError: lists the first constant columns.
    """
    constant = np.flatnonzero((columns == columns[0]).all(axis=0))
    if len(constant):
        shown = ", ".join(map(str, constant[:10].tolist()))
        raise InputError(
            f"{name} must differ: they are constant for {len(constant)} of "
            f"{columns.shape[1]} targets (the first: {shown}), whose correlation is "
            "undefined. Leave these targets out of every argument, and report how many."
        )


def as_single(name: str, values: Floats) -> NDArray[np.float32]:
    """Rounds to float32.

    Args:
        name: the argument, for the message.
        values: finite.

    Returns:
        The same, finite.

    Raises:
        InputError: if one is too large for float32.
    """
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    if not np.isfinite(found).all():
        place = tuple(int(i[0]) for i in np.nonzero(~np.isfinite(found)))
        raise InputError(
            f"{name} are kept in float32, which ends at 3.4e38; got {values[place]:g} at "
            f"{place}. Scale the outputs."
        )
    return found


def _check_axes(name: str, found: NDArray[Any], axes: tuple[str, ...]) -> None:
    if found.ndim != len(axes) or 0 in found.shape:
        raise InputError(
            f"{name} must have the axes [{', '.join(axes)}], none of them empty, got shape "
            f"{found.shape}."
        )
