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
    if _is_any_shuffling():
        raise InputError(
            "num_samples= counts rows in the order in which samples arrive, but the "
            "DataLoader being iterated shuffles, so that row i would be another "
            "example than train_set[i]. Use shuffle=False, or pass the examples' own "
            "numbers with inds=."
        )


def _is_any_shuffling() -> bool:
    # of its own, since the error's traceback would keep these objects alive;
    # type() and not isinstance(): some live objects lie about their class
    things = gc.get_objects()
    kinds = {kind for kind in set(map(type, things)) if kind.__name__.endswith(_ITERATOR)}
    if not kinds:
        return False
    iterators = [thing for thing in things if type(thing) in kinds]
    return any(_is_first_batch_of_shuffled(iterator) for iterator in iterators)


def _is_first_batch_of_shuffled(thing: Any) -> bool:
    if getattr(thing, "_num_yielded", 0) != 1:
        return False
    sampler = getattr(thing, "_index_sampler", None)
    inner = getattr(sampler, "sampler", sampler)
    return isinstance(inner, _RANDOM)
