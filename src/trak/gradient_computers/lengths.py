"""How long a sample's layer outputs are, to notice layers that see some samples only.

Experts that get some of the tokens, or models that drop padding, call layers with as many
rows as the data wants. Cut evenly among the samples, these rows would go to the wrong ones
without any error. So a few samples are run alone: where they disagree, or a batch is not as
long as its samples together, the layer is left to the exact computer.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from trak.batches import Batch, batch_size, leaves, select

Shapes = dict[str, list[tuple[int, int]]]

_PROBED = 8  # samples of the first shape, and of others where samples share an axis
_PROBED_LATER = 3


class Ledger:
    """The lengths of one forward pass.

    Args:
        num_samples: `b`.
        alone: what a sample alone gives, by place; None if unknown.

    Attributes:
        seen: place to the first two axes of every output.
    """

    def __init__(self, num_samples: int, alone: Shapes | None = None) -> None:
        self.seen: Shapes = defaultdict(list)
        self._num_samples = num_samples
        self._alone = alone
        self._calls: Counter[tuple[str, int]] = Counter()

    def fits(
        self, place: str, output: Tensor, axis: int = 0, *, shared: bool = False
    ) -> bool:
        """Whether an output is as long as the samples together.

        Args:
            place: a layer or a parameter.
            output: what was computed there.
            axis: of the samples.
            shared: whether it is for all samples, and as long as of one.

        Returns:
            False if rows cannot be told apart by sample.
        """
        first, second, *_ = (*output.shape, 0, 0)
        return self.note(place, (first, second), axis, shared=shared)

    def note(
        self, place: str, shape: tuple[int, int], axis: int = 0, *, shared: bool = False
    ) -> bool:
        """As `fits`, for the lengths of the first two axes.

        Args:
            place: a layer or a parameter.
            shape: the lengths.
            axis: of the samples.
            shared: whether the output is for all samples, and as long as of one.

        Returns:
            False if rows cannot be told apart by sample.
        """
        together = 1 if shared else self._num_samples
        call = self._calls[place, axis]
        self._calls[place, axis] += 1
        self.seen[place].append(shape)
        length = shape[axis]
        if self._alone is None:
            return length > 0 and length % together == 0
        own = self._alone.get(place, [])
        return call < len(own) and 0 < length == together * own[call][axis]


@dataclass
class Known:
    """What samples alone gave.

    Attributes:
        alone: shape of a sample to lengths by place.
        probed: shape to how many samples were tried.
    """

    alone: dict[tuple[object, ...], Shapes] = field(default_factory=dict)
    probed: Counter[tuple[object, ...]] = field(default_factory=Counter)


class Lengths:
    """What samples alone give, for every shape of them.

    Args:
        run: runs a batch of one sample and returns the lengths that were seen.
        known: of the same weights, which is added to.
    """

    def __init__(self, run: Callable[[Batch], Shapes], known: Known) -> None:
        self._run = run
        self._alone = known.alone
        self._probed = known.probed

    def alone(self, batch: Batch, places: Iterable[tuple[str, int]]) -> Shapes | None:
        """What a sample of this batch gives alone.

        Args:
            batch: a batch.
            places: where samples may share an axis with positions, and which axis.

        Returns:
            Place to lengths, without the places on which samples disagree; None for
            batches of one sample, which need no telling apart.
        """
        size = batch_size(batch)
        if size == 1:
            return None
        key = _shape_of(batch)
        most = _PROBED
        if self._alone and key not in self._alone:
            known = next(iter(self._alone.values()))
            shared = any(s[axis] != 1 for p, axis in places for s in known.get(p, []))
            if not shared:  # samples have an axis for themselves, whatever the shape
                return known
            most = _PROBED_LATER
        for _ in range(min(size, most - self._probed[key])):
            j = self._probed[key] % size
            self._compare(key, self._run(select(batch, slice(j, j + 1))))
            self._probed[key] += 1
        return self._alone[key]

    def known(self, batch: Batch) -> Shapes | None:
        """What is known already of samples of this shape.

        Args:
            batch: a batch.

        Returns:
            As `alone`; None if nothing is known.
        """
        return self._alone.get(_shape_of(batch))

    def _compare(self, key: tuple[object, ...], seen: Shapes) -> None:
        if key not in self._alone:
            self._alone[key] = {place: list(shapes) for place, shapes in seen.items()}
            return
        known = self._alone[key]
        self._alone[key] = {p: s for p, s in known.items() if seen.get(p) == s}


def _shape_of(batch: Batch) -> tuple[object, ...]:
    return tuple(tuple(part.shape[1:]) for part in leaves(batch))
