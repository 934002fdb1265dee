"""Examples as they are without whitening: what a whitened run's ridge is told from.

Rows that are whitened say too little about how the model was trained (docs/ridge.md), so
`fit_whitening` keeps the inner products of some that are not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.errors import StoreCorruptedError

SAMPLE = 1000
"""Examples that are kept."""
_SAMPLE_BYTES = 1 << 29  # of their rows
_STRIP = 128
PREFIX = "unwhitened/"
"""Of the arrays' names in a file."""
_PARTS, _COUNTS = ("kernel", "pull", "loss"), "counts"


@dataclass(frozen=True)
class Unwhitened:
    """Some training examples.

    Attributes:
        kernel: inner products of their rows, `[s, s]`, float32.
        pull: their rows times the mean of `q phi` over all examples that were seen, `[s]`,
            float64.
        loss: their loss weights Q, `[s]`, float64.
        counts: how much they count in training, `[s]`, float64; None if all count once.
    """

    kernel: Tensor
    pull: Tensor
    loss: Tensor
    counts: Tensor | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The same as arrays, for a file.

        Returns:
            Name to array.
        """
        found = {part: getattr(self, part) for part in (*_PARTS, _COUNTS)}
        return {
            f"{PREFIX}{part}": tensor.cpu().numpy()
            for part, tensor in found.items()
            if tensor is not None
        }

    def alone(self, most: int) -> "Unwhitened":
        """Some of these, evenly spread, as if nothing else had been seen.

        Args:
            most: how many at most.

        Returns:
            The examples, in their order.
        """
        size = min(most, len(self.loss))
        taken = torch.arange(size, device="cpu") * len(self.loss) // max(1, size)
        loss, kernel = self.loss[taken], self.kernel[taken][:, taken]
        pull = kernel.double() @ loss / max(1, size)
        counts = None if self.counts is None else self.counts[taken]
        return Unwhitened(kernel, pull, loss, counts)

    @classmethod
    def of_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], path: Path
    ) -> "Unwhitened | None":
        """What `arrays` was made of.

        Args:
            arrays: name to array.
            path: where they are from, for messages.

        Returns:
            The examples; None if none were kept.

        Raises:
            StoreCorruptedError: if they do not fit together.
        """
        parts = (*_PARTS, _COUNTS)
        found = {p: arrays[PREFIX + p] for p in parts if PREFIX + p in arrays}
        if not found:
            return None
        shapes = {part: array.shape for part, array in found.items()}
        size = len(found.get("loss", ()))
        expected = {"kernel": (size, size), "pull": (size,), "loss": (size,)}
        if _COUNTS in found:
            expected[_COUNTS] = (size,)
        if shapes != expected:
            raise StoreCorruptedError(
                f"{path} is no whole file of whitening sums: its unwhitened examples are "
                f"of shapes {shapes}. Delete it and call fit_whitening again."
            )
        return cls(**{part: torch.from_numpy(array) for part, array in found.items()})


class Chosen:
    """Rows of some examples, chosen by lot from all that come along.

    Args:
        seed: of the lots.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._lots = torch.empty(0, device="cpu")
        self._loss = torch.empty(0, 0, dtype=torch.float64, device="cpu")
        self._found: Unwhitened | None = None
        self._kernel: Tensor | None = None
        self._concluded = False
        self._rows = torch.empty(0, 0, device="cpu")
        self._total = torch.empty(0, dtype=torch.float64, device="cpu")
        self._arrivals = torch.empty(0, dtype=torch.int64, device="cpu")
        self._seen = 0

    def add(self, rows: Tensor, loss: Tensor) -> None:
        """Lets a batch take part.

        Args:
            rows: `[b, k]`, not whitened.
            loss: Q, and how much the examples count if that differs, `[b, 1]` or `[b, 2]`.
        """
        if not self._seen:
            self._start(rows, loss.shape[1])
        self._found = self._kernel = None
        self._total += (rows.T @ loss[:, :1].to(rows)).flatten()
        every = torch.cat([
            self._lots,
            torch.rand(
                len(rows), generator=self._generator, dtype=torch.float64, device="cpu"
            ),
        ])
        kept = torch.zeros(len(every), dtype=torch.bool, device="cpu")
        kept[every.argsort()[: len(self._lots)]] = True
        places = (~kept[: len(self._lots)]).nonzero().flatten()
        winners = kept[len(self._lots) :].nonzero().flatten()
        self._lots[places] = every[len(self._lots) + winners]
        self._arrivals[places] = self._seen + winners
        self._seen += len(rows)
        self._loss[places] = loss.to("cpu", torch.float64)[winners]
        if len(winners) == len(rows) and _is_stretch(places):  # as long as there is room
            self._rows[int(places[0]) : int(places[-1]) + 1] = rows
        else:
            self._rows[places.to(rows.device)] = rows[winners.to(rows.device)]

    def add_to_sum(self, rows: Tensor, loss: Tensor) -> None:
        """Lets a batch take part in what pulls at the examples, but not be chosen.

        Args:
            rows: as for `add`, which was called before.
            loss: as for `add`.
        """
        self._found = None
        self._total += (rows.T @ loss[:, :1].to(rows)).flatten()
        self._seen += len(rows)

    def _start(self, rows: Tensor, columns: int) -> None:
        # empty places lose against any example, the first ones first
        most = max(1, min(SAMPLE, _SAMPLE_BYTES // (4 * rows.shape[1])))
        self._lots = torch.linspace(2, 1, most, dtype=torch.float64, device="cpu")
        self._loss = torch.zeros(most, columns, dtype=torch.float64, device="cpu")
        self._arrivals = torch.zeros(most, dtype=torch.int64, device="cpu")
        self._rows = rows.new_empty(most, rows.shape[1])
        self._total = rows.new_zeros(rows.shape[1], dtype=torch.float64)

    def found(self) -> Unwhitened | None:
        """What was chosen.

        Returns:
            The examples in the order in which they came, however they were cut into
            batches; None if there is none, or a row is not finite.
        """
        if self._found is None and not self._concluded:
            self._found = self._made()
        return self._found

    def conclude(self) -> None:
        """Lets go of the rows, which fill memory. Nothing can be added afterwards."""
        self.found()
        self._concluded = True
        self._rows = self._rows.new_empty(0, 0)

    def _made(self) -> Unwhitened | None:
        taken, rows = (self._lots < 1).nonzero().flatten(), self._rows
        if not len(taken):
            return None
        taken = taken[self._arrivals[taken].argsort()]
        if torch.equal(taken, torch.arange(len(taken), device="cpu")):
            rows = rows[: len(taken)]
        else:
            rows = rows[taken.to(rows.device)]
        if self._kernel is None:
            self._kernel = inner_products(rows).float().cpu()
        kernel = self._kernel
        pull = (rows @ (self._total / self._seen).to(rows)).cpu().double()
        if not bool(torch.isfinite(kernel).all() and torch.isfinite(pull).all()):
            return None
        loss, *counts = self._loss[taken].T.contiguous()
        return Unwhitened(kernel, pull, loss, counts[0] if counts else None)


def _is_stretch(places: Tensor) -> bool:
    return bool(len(places)) and int(places[-1]) - int(places[0]) + 1 == len(places)


def inner_products(rows: Tensor) -> Tensor:
    """Of all pairs, by strips of the lower triangle, which is half of the work.

    Args:
        rows: `[s, k]`.

    Returns:
        `[s, s]`, in the rows' dtype.
    """
    found = rows.new_zeros(len(rows), len(rows))
    for start in range(0, len(rows), _STRIP):
        stop = start + _STRIP
        found[start:stop, :stop] = rows[start:stop] @ rows[:stop].T
    return found.tril() + found.tril(-1).T
