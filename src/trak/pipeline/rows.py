"""Which rows a batch fills, which of them are missing, and whether they are the same."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.arguments import as_number
from trak.batches import Batch, batch_size, select
from trak.digests import example_digests
from trak.encodings import encoding_of
from trak.errors import InputError, InputTypeError, NumericalError, StoreMismatchError
from trak.savers import Rows

RowNumbers = NDArray[np.int64]

_WIDER = 'Use use_half_precision=False or row_dtype="float32" with a new save_dir.'

_UNDERFLOW = 0.05  # of a row's norm lost to rounding; float16's normal range loses 0.0005
_RANGE = 0.99  # of the largest number, as bfloat16 has it


def row_numbers(
    inds: Any, num_samples: int | None, cursor: int, size: int, num_rows: int, what: str
) -> RowNumbers:
    """The rows a batch fills.

    Args:
        inds: the samples' row numbers, or None.
        num_samples: how many samples follow the cursor, or None.
        cursor: the next row, if `num_samples` is given.
        size: how many samples the batch holds.
        num_rows: how many rows there are.
        what: `train_set_size` or `num_targets`, for messages.

    Returns:
        Row numbers, `[b]`.

    Raises:
        InputError: if both or neither are given, they do not match the batch, repeat, or
            lie outside.
    """
    if (inds is None) == (num_samples is None):
        given = "neither" if inds is None else "both"
        raise InputError(
            "Give exactly one of num_samples, the batch's size, for the rows that follow "
            f"the last ones, and inds, the samples' own row numbers, got {given}."
        )
    if num_samples is not None:
        if as_number("num_samples", num_samples, zero=True) != size:
            raise InputError(
                f"num_samples={num_samples}, but the batch holds {size} samples. Pass "
                "the batch's own size (the last batch of a loader is often shorter)."
            )
        numbers = np.arange(cursor, cursor + size, dtype=np.int64)
    else:
        numbers = _as_integers(inds)
        if len(numbers) != size:
            raise InputError(
                f"inds must hold one number a sample, {size} for this batch, got "
                f"{len(numbers)}."
            )
        found, counts = np.unique(numbers, return_counts=True)
        if len(found) != size:
            raise InputError(
                f"inds must hold each number once, got {found[counts > 1][0]} more than "
                "once: a row belongs to one sample."
            )
    outside = numbers[(numbers < 0) | (numbers >= num_rows)]
    if len(outside):
        raise InputError(
            f"Row {outside[0]} is outside 0 to {num_rows - 1}: {what}={num_rows}, and "
            f"the batch fills rows {numbers.min()} to {numbers.max()}. Nothing of it was "
            f"stored. Was {what} meant to be larger, or the data passed twice?"
        )
    return numbers


def missing_rows(rows: Rows, numbers: RowNumbers) -> NDArray[np.int64]:
    """Positions in a batch whose rows do not exist yet.

    Args:
        rows: the store's rows.
        numbers: the batch's row numbers, `[b]`.

    Returns:
        Positions.
    """
    return np.flatnonzero(~rows.done[numbers])


def check_examples(
    numbers: RowNumbers,
    digests: NDArray[np.int64],
    others: Iterable[tuple[str, Rows]],
    what: str,
) -> None:
    """Refuses a batch whose samples are others than those seen for the same rows.

    Args:
        numbers: the batch's row numbers, `[b]`.
        digests: the samples' content hashes, `[b]`.
        others: descriptions and rows of everything stored for the same examples.
        what: `training example` or `target`, for messages.

    Raises:
        StoreMismatchError: names the first row that differs.
    """
    for description, rows in others:
        known = rows.done[numbers]
        seen = rows.array("examples")[numbers, 0]
        different = numbers[known & (seen != 0) & (digests != 0) & (seen != digests)]
        if len(different):
            raise StoreMismatchError(
                f"The {what} in row {different[0]} is not the one that {description} "
                f"holds there ({len(different)} of {len(numbers)} in this batch "
                "differ). Every pass must bring the same examples in the same order: is "
                "the loader shuffled, augmented at random, or of another data set? Use "
                "another save_dir or exp_name for other data, or check_examples=False if "
                "the difference is meant (other padding, say)."
            )
        if (known & (seen != 0)).all():
            return  # these are known to agree with all others


def to_store(rows: Tensor, dtype: torch.dtype, numbers: RowNumbers) -> NDArray[Any]:
    """Rounds rows to the store's dtype, or says which do not fit.

    Args:
        rows: finite, `[b, k]`.
        dtype: the store's.
        numbers: the rows' numbers, for messages.

    Returns:
        `[b, k]`, in the dtype; float32 for bfloat16, which NumPy lacks, and for int8.

    Raises:
        NumericalError: names the first row beyond the dtype's range or below it.
    """
    encoding = encoding_of(dtype)
    rounded = encoding.decode(
        *encoding.encode(rows), dtype if encoding.plain else torch.float32
    )
    fine = _are_fine(rows, rounded, dtype)
    problem = None if fine else _problem(rows, rounded, dtype, numbers)
    if problem is not None:
        raise NumericalError(f"{problem} Nothing of this batch was stored. {_WIDER}")
    return rounded.cpu().numpy()


def _are_fine(rows: Tensor, rounded: Tensor, dtype: torch.dtype) -> bool:
    # False where a closer look is needed
    if dtype.is_floating_point and rows.shape[1]:
        wide, own = torch.finfo(rows.dtype), torch.finfo(dtype)
        if own.tiny <= wide.tiny and own.max >= _RANGE * wide.max:
            # Rounds every entry of its range alike. Two passes in float32 take a tenth of
            # the time of `aminmax` along an axis.
            largest = torch.maximum(rounded.amax(dim=1), -rounded.amin(dim=1))
            least = wide.tiny / wide.eps
            return bool((torch.isfinite(largest) & (largest > least)).all())
    size = torch.linalg.vector_norm(rows, dim=1)
    lost = torch.linalg.vector_norm(rounded.to(rows.dtype) - rows, dim=1)
    return bool(((size > 0) & (lost <= _UNDERFLOW * size) & torch.isfinite(lost)).all())


def _problem(
    rows: Tensor, rounded: Tensor, dtype: torch.dtype, numbers: RowNumbers
) -> str | None:
    # in float64, since float32's squares overflow and underflow
    encoding = encoding_of(dtype)
    largest = rows.abs().amax(dim=1)
    finite = torch.isfinite(rounded).all(dim=1)
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        return (
            f"The projected gradient of sample {numbers[bad]} reaches "
            f"{float(largest[bad]):.3g}, beyond {dtype}."
        )
    size = torch.linalg.vector_norm(rows.double(), dim=1)
    lost = torch.linalg.vector_norm(rounded.double() - rows.double(), dim=1)
    small = lost > _UNDERFLOW * size
    if not small.any():
        return None
    bad = int(small.nonzero()[0])
    why = f"so small ({float(largest[bad]):.3g} at most)"
    if encoding.scaled:
        ratio = float(largest[bad] / size[bad]) * rows.shape[1] ** 0.5
        why = f"so uneven (its largest entry is {ratio:.3g} times its mean one)"
    return (
        f"The projected gradient of sample {numbers[bad]} is {why} that {dtype} loses it "
        "to rounding."
    )


def narrow(batch: Batch, positions: NDArray[np.int64]) -> Batch:
    """Leaves out the samples that need no work.

    Args:
        batch: a normalized batch.
        positions: those to keep.

    Returns:
        The batch itself if all are kept.
    """
    if len(positions) == batch_size(batch):
        return batch
    return select(batch, torch.from_numpy(positions))


def hash_examples(batch: Batch, *, enabled: bool) -> NDArray[np.int64]:
    """Content hashes of a batch's samples, or zeros.

    Args:
        batch: a normalized batch.
        enabled: whether examples are checked.

    Returns:
        `[b]`.
    """
    if enabled:
        return example_digests(batch)
    return np.zeros(batch_size(batch), dtype=np.int64)


def _as_integers(inds: Any) -> RowNumbers:
    if isinstance(inds, set | frozenset):
        raise InputTypeError(
            "inds is a set, which has no order: which number belongs to which sample is "
            "not known. Pass a list, array or tensor."
        )
    if isinstance(inds, Tensor):
        inds = inds.detach().cpu().numpy()
    elif isinstance(inds, Iterable) and not isinstance(inds, Mapping | np.ndarray):
        inds = [i.tolist() if isinstance(i, Tensor) else i for i in inds]
    try:
        numbers = np.asarray(inds).reshape(-1)
    except ValueError as error:
        raise InputTypeError(f"inds must be one list of integers ({error}).") from error
    if numbers.size == 0:
        return np.empty(0, dtype=np.int64)
    if numbers.dtype == np.bool_ or not np.issubdtype(numbers.dtype, np.integer):
        raise InputTypeError(
            f"inds must be integers (list, array or tensor), got dtype {numbers.dtype}."
        )
    return numbers.astype(np.int64)
