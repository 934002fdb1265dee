"""Batches in the forms people have them: tuples, lists, dicts, `BatchEncoding`s.

A batch becomes either a tuple of tensors or a dict of tensors whose first axis is the
sample axis `b`; everything below sees only those two.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trak.errors import InputError, InputTypeError

Batch = tuple[Tensor, ...] | dict[str, Tensor]


def normalize(batch: Any, device: torch.device | None = None) -> Batch:
    """Brings a user's batch into one of the two forms and onto one device.

    Args:
        batch: a tensor, an iterable of tensors, or a mapping of names to tensors;
            NumPy arrays, and lists of numbers among its parts, are converted.
        device: where the tensors should be; unchanged if None.

    Returns:
        A tuple or a dict of tensors that agree on their first axis.

    Raises:
        InputTypeError: if the batch is no tensor, iterable or mapping, or a part of it is
            sparse, nested, quantized or without numbers.
    """
    normal: Batch
    if isinstance(batch, Mapping):
        normal = {str(k): _tensor(v, f"batch[{k!r}]", device) for k, v in batch.items()}
    elif isinstance(batch, Tensor | np.ndarray):
        normal = (_tensor(batch, "batch", device),)
    elif isinstance(batch, Iterable) and not isinstance(batch, str | bytes):
        parts = enumerate(batch)
        normal = tuple(_tensor(part, f"batch[{j}]", device) for j, part in parts)
    else:
        raise InputTypeError(
            f"A batch is a tuple, list or dict of tensors, got {type(batch).__name__}."
        )
    batch_size(normal)
    return normal


def leaves(batch: Batch) -> list[Tensor]:
    """The tensors of a batch, in order.

    Args:
        batch: a normalized batch.

    Returns:
        Its tensors.
    """
    return list(batch.values()) if isinstance(batch, dict) else list(batch)


def batch_size(batch: Batch) -> int:
    """The number of samples, on which all parts must agree.

    Args:
        batch: a normalized batch.

    Returns:
        The length of the first axis, `b`.

    Raises:
        InputError: if there is no tensor, a part has no sample axis, or parts differ.
    """
    parts = leaves(batch)
    if not parts:
        raise InputError("The batch holds no tensor.")
    shapes = [tuple(part.shape) for part in parts]
    if any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise InputError(
            "All parts of a batch must share their first (sample) axis; got shapes "
            f"{shapes}. Add the missing batch axis or drop the part."
        )
    return shapes[0][0]


def select(batch: Batch, index: Any) -> Batch:
    """Some samples of a batch.

    Args:
        batch: a normalized batch.
        index: a slice, or a tensor or list of positions.

    Returns:
        A batch of the same form.
    """
    if not isinstance(index, slice):
        index = torch.as_tensor(index, device="cpu")
    if isinstance(batch, dict):
        return {name: _rows(part, index) for name, part in batch.items()}
    return tuple(_rows(part, index) for part in batch)


def _rows(part: Tensor, index: slice | Tensor) -> Tensor:
    return part[index if isinstance(index, slice) else index.to(part.device)]


def _tensor(value: Any, where: str, device: torch.device | None) -> Tensor:
    if not isinstance(value, Tensor):
        _refuse_nested(value, where)
        try:
            value = torch.as_tensor(np.asarray(value), device="cpu")
        except (TypeError, ValueError) as error:
            raise InputTypeError(
                f"{where} is a {type(value).__name__} and not a tensor. Drop what the "
                "model does not take (texts, ids) before handing over the batch."
            ) from error
    way = _way_to_plain(value)
    if way is not None:
        raise InputTypeError(
            f"{where} must be a tensor of plain numbers, which samples can be taken out "
            f"of; it is {way[0]}. Pass {way[1]}; the model may turn it back."
        )
    if value.requires_grad:
        value = value.detach()
    if value.is_inference():
        value = value.clone()
    return value if device is None else value.to(device)


def _way_to_plain(value: Tensor) -> tuple[str, str] | None:
    # what it is instead, and what to pass
    if value.is_nested:
        return "a nested one", "part.to_padded_tensor(0.0)"
    if value.is_quantized:
        return "quantized", "part.dequantize()"
    if value.layout is not torch.strided:
        return f"of the layout {value.layout}", "part.to_dense()"
    if value.is_meta:
        return "on the meta device, without numbers", "one with numbers"
    return None


def _refuse_nested(value: Any, where: str) -> None:
    # [[a, b], y] is what a DataLoader makes of samples ((a, b), y); stacked as if a and b
    # were samples, it would pass for a batch of two
    if isinstance(value, Mapping) or _are_parts(value):
        raise InputTypeError(
            f"{where} is a {type(value).__name__} of tensors. Batches are not nested: put "
            "these tensors beside the other parts, as in (a, b, labels), or all into one "
            "dict. If each is one sample, stack them: torch.stack(samples)."
        )


def _are_parts(value: Any) -> bool:
    # batches of their own, by their shapes, and no samples
    if not isinstance(value, list | tuple) or not value:
        return False
    if not all(isinstance(part, Tensor | np.ndarray) and part.ndim for part in value):
        return False
    shapes = {tuple(part.shape) for part in value}
    return len(shapes) > 1 or next(iter(shapes))[0] == len(value)
