"""Batches of examples that a user hands over as a whole: loaders, and lists of batches."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, SequentialSampler

from trak.batches import batch_size, normalize
from trak.errors import InputError, InputTypeError


def ordered(name: str, batches: Any) -> Any:
    """Accepts batches that can be iterated over several times, always in one order.

    Args:
        name: the argument, for messages.
        batches: what the user gave.

    Returns:
        The same.

    Raises:
        InputError: if the order may change, examples are left out, or there is one pass
            only.
        InputTypeError: if it is something else.
    """
    if isinstance(batches, DataLoader):
        inner = getattr(batches.batch_sampler, "sampler", None)
        ordered = all(isinstance(s, SequentialSampler) for s in (batches.sampler, inner))
        if not ordered or getattr(batches.batch_sampler, "drop_last", True):
            raise InputError(
                f"{name} must give every example in the same order each time, so that row "
                "i is example i: make its DataLoader with a batch size, shuffle=False and "
                "drop_last=False."
            )
        return batches
    if isinstance(batches, Iterator):
        raise InputError(
            f"{name} is iterated over several times, and {type(batches).__name__} only "
            "once. Give a DataLoader, or a list of batches."
        )
    if not isinstance(batches, Collection) or isinstance(batches, Mapping | str):
        raise InputTypeError(
            f"{name} must be a DataLoader or a list of batches, got "
            f"{type(batches).__name__}."
        )
    return batches


def size_of(batch: Any) -> int:
    """How many examples a batch has.

    Args:
        batch: as users give it.

    Returns:
        Their number.
    """
    return batch_size(normalize(batch))


def count_of(what: str, batches: Any) -> int:
    """How many examples there are.

    Args:
        what: they are, for messages.
        batches: as `ordered` gives them.

    Returns:
        Their number.

    Raises:
        InputError: if there is none.
    """
    if isinstance(batches, DataLoader):
        count = len(batches.dataset)  # pyright: ignore[reportArgumentType]
    else:
        count = sum(size_of(batch) for batch in batches)
    if not count:
        raise InputError(f"Nothing to attribute: there are no {what}.")
    return count


def spread(batches: Any, count: int, wanted: int) -> set[int]:
    """Batches, spread over all, that hold about so many examples.

    Args:
        batches: as `ordered` gives them.
        count: examples that there are.
        wanted: examples.

    Returns:
        Numbers of batches: all of them, if those spread evenly hold less than half of
        what is wanted, since sizes differ.
    """
    total = len(batches)
    number = max(1, round(total * min(1, wanted / count)))
    places = {j * total // number for j in range(number)}
    if isinstance(batches, DataLoader):  # its batches are of one size, but the last
        return places
    held = sum(size_of(batch) for j, batch in enumerate(batches) if j in places)
    return places if 2 * held >= min(wanted, count) else set(range(total))
