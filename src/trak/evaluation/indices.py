"""Numbers of training examples, and the masks they make."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.arguments import as_integer, is_listed
from trak.errors import InputError, InputTypeError
from trak.evaluation.arrays import Booleans, as_floats
from trak.evaluation.conversion import as_numpy


def masks_from_indices(indices: Any, n: int) -> Booleans:
    """Turns lists of training examples into masks.

    Args:
        indices: for each subset, the examples it holds.
        n: number of training examples.

    Returns:
        `[subsets, n]`.

    Raises:
        InputError: if an index comes twice in a subset.
        InputTypeError: if there are no lists.
    """
    n = as_integer("n", n, least=1)
    if not is_listed(indices):
        raise InputTypeError(
            "indices must hold, for each subset, the numbers of its training examples, got "
            f"{type(indices).__name__}."
        )
    rows = [
        as_indices(f"indices of subset {j}", row, n, axis="example of the subset")
        for j, row in enumerate(indices)
    ]
    masks = np.zeros((len(rows), n), dtype=bool)
    for number, (mask, row) in enumerate(zip(masks, rows, strict=True)):
        mask[row] = True
        if mask.sum() != len(row):
            raise InputError(f"indices of subset {number} name an example twice.")
    return masks


def as_indices(name: str, value: Any, n: int, *, axis: str) -> NDArray[np.int64]:
    """Accepts numbers of training examples.

    Args:
        name: the argument, for messages.
        value: integers, of whatever dtype.
        n: number of training examples.
        axis: what the axis is.

    Returns:
        The numbers, in their order.

    Raises:
        InputTypeError: if they are truth values, which say something else.
        InputError: if one is no integer, or out of range.
    """
    found = as_numpy(name, value)
    if found.dtype.kind == "b":
        raise InputTypeError(
            f"{name} must be numbers of training examples, got truth values. A mask goes "
            "where masks are asked for, or is turned into numbers by numpy.flatnonzero."
        )
    numbers = as_floats(name, found, axes=(axis,))
    if (numbers != np.rint(numbers)).any() or numbers.min() < 0 or numbers.max() >= n:
        raise InputError(
            f"{name} must be integers from 0 to {n - 1}, rows of the scores, got from "
            f"{numbers.min():g} to {numbers.max():g}."
        )
    return numbers.astype(np.int64)
