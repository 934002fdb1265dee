"""NumPy arrays from what users have: tensors of any kind, and nested lists of them."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.errors import InputError, InputTypeError

_OF_NUMPY = (torch.float16, torch.float32, torch.float64)
_NUMBERS = {int, float, bool}
_WORDS = {1: torch.uint8, 2: torch.int16}


def as_numpy(name: str, value: Any, *, bits: bool = False) -> NDArray[Any]:
    """Accepts an array, a tensor, or nested lists of numbers, arrays and tensors.

    Args:
        name: the argument, for messages.
        value: tensors may be on any device, sparse, part of a graph, conjugated, and of
            dtypes that NumPy lacks.
        bits: give such dtypes as integers of the same bits, not as numbers in float64.

    Returns:
        The array, of whatever dtype it is.

    Raises:
        InputError: if lists are ragged or endless, entries are masked, or values are no
            array for another reason.
    """
    try:
        plain = _without_tensors(name, value, bits=bits)
    except RecursionError as error:
        raise InputError(f"{name} is a list that nests without end.") from error
    try:
        return np.asarray(plain)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name} is no array: {error}. Give an array, a tensor, or lists that nest to "
            "one shape."
        ) from error


def _without_tensors(name: str, value: Any, *, bits: bool) -> Any:
    if isinstance(value, list | tuple):
        if set(map(type, value)) <= _NUMBERS:
            return value
        return [_without_tensors(name, part, bits=bits) for part in value]
    if isinstance(value, Tensor):
        return _of_tensor(name, value, bits=bits)
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise InputError(
            f"{name} has {np.ma.count_masked(value)} masked entries, which no figure here "
            "allows for. Leave their rows or columns out of every argument, or fill them."
        )
    return value


def _of_tensor(name: str, tensor: Tensor, *, bits: bool) -> NDArray[Any]:
    try:
        found = tensor.detach().cpu()
        found = found if found.layout is torch.strided else found.to_dense()
        found = found.resolve_conj().resolve_neg()
        if found.is_floating_point() and found.dtype not in _OF_NUMPY:
            word = _WORDS[found.itemsize]
            found = found.contiguous().view(word) if bits else found.double()
        return found.numpy()
    except (TypeError, RuntimeError) as error:
        raise InputTypeError(
            f"{name} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}, "
            f"whose numbers cannot be read: {error}. Give a plain tensor that has values."
        ) from error
