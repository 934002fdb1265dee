"""Batches of examples that a user hands over as a whole: loaders, and lists of batches."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from trak.batches import batch_size, normalize
from trak.errors import InputError, InputTypeError
from trak.pipeline.order import weighing


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
        if isinstance(batches.dataset, IterableDataset):
            raise InputError(
                f"{name} needs a dataset with a length and a fixed order, and an "
                "IterableDataset promises neither. Give a DataLoader over a map-style "
                f"dataset, or a list of batches (list({name}), if it fits into memory)."
            )
        if not _in_order(batches):
            sampler = getattr(batches.batch_sampler, "sampler", None)
            raise InputError(
                f"{name} must give every example in the same order each time, so that row "
                "i is example i: make its DataLoader with a batch size, shuffle=False and "
                f"drop_last=False.{weighing(sampler)}"
            )
        return batches
    if isinstance(batches, Iterator):
        raise InputError(
            f"{name} is iterated over several times, and {type(batches).__name__} only "
            "once. Give a DataLoader, or a list of batches."
        )
    if not isinstance(batches, Collection) or isinstance(batches, Mapping | str):
        hint = f" Use DataLoader({name}, batch_size=100)."
        raise InputTypeError(
            f"{name} must be a DataLoader or a list of batches, got "
            f"{type(batches).__name__}.{hint if isinstance(batches, Dataset) else ''}"
        )
    parts = batches if isinstance(batches, tuple) else ()
    if any(isinstance(part, Tensor | np.ndarray) for part in (batches, *parts)):
        raise InputTypeError(
            f"{name} must list batches, and this {type(batches).__name__} is one batch: "
            f"put it into a list, {name}=[batch]."
        )
    return batches


def _in_order(loader: DataLoader[Any]) -> bool:
    # every example once, in the data set's order; samplers of other kinds are asked
    batches: Any = loader.batch_sampler
    if type(batches) is BatchSampler and type(batches.sampler) is SequentialSampler:
        return not batches.drop_last
    if batches is None or isinstance(getattr(batches, "sampler", None), RandomSampler):
        return False
    try:
        places = [int(place) for batch in batches for place in batch]
    except (TypeError, ValueError):  # keys that are no numbers
        return False
    return places == list(range(len(loader.dataset)))  # pyright: ignore[reportArgumentType]


def _length(batches: Any) -> int:
    try:
        return len(batches)
    except TypeError:  # a sampler of batches that does not know how many there are
        return sum(1 for _ in batches.batch_sampler)


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


def some_of(batches: Any, count: int, wanted: int) -> Iterator[Any]:
    """Some of the batches, by `spread`; stops after the last of them.

    Args:
        batches: as `ordered` gives them.
        count: examples that there are.
        wanted: examples.

    Yields:
        Batches, in their order.
    """
    places = spread(batches, count, wanted)
    for place, batch in enumerate(itertools.islice(batches, max(places) + 1)):
        if place in places:
            yield batch


def rest_of(batches: Any, count: int, wanted: int) -> Iterator[Any]:
    """Those that `some_of` leaves out; none are read if it leaves out none.

    Args:
        batches: as `ordered` gives them.
        count: examples that there are.
        wanted: examples.

    Yields:
        Batches, in their order.
    """
    places = spread(batches, count, wanted)
    if len(places) == _length(batches):
        return
    for place, batch in enumerate(batches):
        if place not in places:
            yield batch


def spread(batches: Any, count: int, wanted: int) -> set[int]:
    """Batches, spread over all, that hold about so many examples.

    Args:
        batches: as `ordered` gives them.
        count: examples that there are.
        wanted: examples.

    Returns:
        Numbers of batches, spread evenly; by the examples in them, if sizes differ so much
        that these hold less than half of what is wanted.
    """
    total = _length(batches)
    number = max(1, round(total * min(1, wanted / count)))
    places = {j * total // number for j in range(number)}
    if isinstance(batches, DataLoader):  # its batches are of one size, but the last
        return places
    ends = np.cumsum([size_of(batch) for batch in batches])
    sizes = np.diff(ends, prepend=0)
    if 2 * sizes[list(places)].sum() >= min(wanted, count):
        return places
    middles = (np.arange(number) + 0.5) * count / number
    return set(np.searchsorted(ends, middles, side="right").tolist())


def state_of(checkpoint: Any) -> Mapping[str, Any]:
    """The weights that a checkpoint stands for.

    Args:
        checkpoint: a state dict, a model, or a function that returns a state dict.

    Returns:
        The state dict.

    Raises:
        InputTypeError: if it is something else.
    """
    if isinstance(checkpoint, nn.Module):
        return checkpoint.state_dict()
    found = checkpoint() if callable(checkpoint) else checkpoint
    if not isinstance(found, Mapping):
        raise InputTypeError(
            "checkpoints must hold state dicts, models, or functions that return a state "
            f"dict; got {found!r:.80}. Load files first, without unpickling code: "
            "safetensors.torch.load_file(path), or torch.load(path, weights_only=True)."
        )
    return found
