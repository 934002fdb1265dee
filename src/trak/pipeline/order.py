"""A guard against shuffled loaders where rows are counted by arrival.

`num_samples=` puts the first sample that arrives into row 0. If the loader shuffles, rows
are permuted and no later check can tell. A loader that is being iterated can be found,
though: it is alive, has given out exactly one batch when the first batch arrives, and
its sampler is a random one.
"""

import gc
from typing import Any

from torch.utils.data import (
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from trak.errors import InputError

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_ITERATOR = "DataLoaderIter"


def refuse_shuffled_loader() -> None:
    """Raises if a shuffling `DataLoader` has just given out its first batch.

    Raises:
        InputError: says what to do instead.
    """
    sampler = _shuffling()
    if sampler is not None:
        raise InputError(
            "num_samples= counts rows in the order in which samples arrive, but the "
            "DataLoader being iterated shuffles, so that row i would be another "
            "example than train_set[i]. Use shuffle=False, or pass the examples' own "
            f"numbers with inds=.{weighing(sampler)}"
        )


def weighing(sampler: Any) -> str:
    """What else is to be done without a sampler.

    Args:
        sampler: of a loader.

    Returns:
        A sentence for a message, if it draws some examples more often than others.
    """
    if not isinstance(sampler, WeightedRandomSampler):
        return ""
    return (
        " If training drew examples by this WeightedRandomSampler, let the task say how "
        "often, by class_weights or get_sample_weights (docs/custom-tasks.md)."
    )


def _shuffling() -> Any:
    # of its own, since the error's traceback would keep these objects alive;
    # type() and not isinstance(): some live objects lie about their class
    things = gc.get_objects()
    kinds = {kind for kind in set(map(type, things)) if kind.__name__.endswith(_ITERATOR)}
    if not kinds:
        return None
    iterators = [thing for thing in things if type(thing) in kinds]
    found = (_of_first_batch(iterator) for iterator in iterators)
    return next((sampler for sampler in found if sampler is not None), None)


def _of_first_batch(thing: Any) -> Any:
    if getattr(thing, "_num_yielded", 0) != 1:
        return None
    sampler = getattr(thing, "_index_sampler", None)
    inner = getattr(sampler, "sampler", sampler)
    return inner if isinstance(inner, _RANDOM) else None
