"""What a checkpoint's earlier batches left: their gradients, and rows of the factor."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.errors import StoreCorruptedError
from trak.pipeline.sources import row_source
from trak.projectors.kept import Arrays, Part
from trak.savers import Rows
from trak.savers.arrays import runs
from trak.savers.gradient_files import GradientFiles
from trak.score_computers.stream import decoded

IN_MEMORY = 256 << 20
"""Bytes of gradients of one checkpoint that are not read anew for every batch."""
_STRIP = 1 << 22  # numbers of the factor that are read at once


@dataclass(slots=True)
class _File:
    rows: list[NDArray[np.int64]]
    parts: list[Part] | None


class Earlier:
    """Earlier batches of one checkpoint, in the order in which they were stored.

    Args:
        files: their gradients.
        rows: their rows, which say which files count.

    Attributes:
        order: row numbers in the order of arrival, which is that of the factor.
    """

    def __init__(self, files: GradientFiles, rows: Rows) -> None:
        self.files = files
        self.rows = rows
        self.order = np.empty(0, dtype=np.int64)
        self._files: list[_File] = []
        self._in_memory = 0

    def update(self) -> None:
        """Finds what was added since, by this process or another.

        Raises:
            StoreCorruptedError: if there are rows without gradients.
        """
        done = self.rows.refresh()
        while self.files.path(len(self._files)).exists():
            with self.files.read(len(self._files)) as arrays:
                found = [array.copy() for array in _rows_of(arrays)]
            numbers = np.concatenate(found)
            if not done[numbers].all():
                break  # a crash left it; it will be replaced
            self._add(_File(found, None))
        if len(self.order) != done.sum():
            raise StoreCorruptedError(
                f"{int(done.sum())} rows exist, but {self.files.folder} holds gradients of "
                f"{len(self.order)}: files are lost. Restore them, or delete the "
                "checkpoint's folder and featurize again."
            )

    def write(self, parts: list[Part]) -> None:
        """Writes a batch's gradients, before its rows.

        Args:
            parts: all samples of the batch.
        """
        arrays: dict[str, NDArray[Any]] = {}
        for number, part in enumerate(parts):
            arrays[f"{number}/rows"] = part.rows
            arrays |= {f"{number}/{key}": array for key, array in part.arrays.items()}
        self.files.write(len(self._files), arrays)

    def confirm(self, parts: list[Part]) -> None:
        """Remembers what was written, once its rows exist.

        Args:
            parts: what `write` was given.
        """
        self._add(_File([part.rows for part in parts], self._if_they_fit(parts)))

    def parts(self) -> Iterator[Part]:
        """All gradients, one file at a time.

        Yields:
            Samples in order; the arrays of a part are valid until the next one.
        """
        for number, file in enumerate(self._files):
            if file.parts is not None:
                yield from file.parts
                continue
            with self.files.read(number) as arrays:
                parts = [
                    Part(rows, _Under(arrays, f"{place}/"))
                    for place, rows in enumerate(file.rows)
                ]
                file.parts = self._if_they_fit(parts)
                yield from file.parts or parts

    def strips(self, device: torch.device) -> Iterator[Tensor]:
        """The factor, as `trak.projectors.cholesky.forward` takes it.

        Args:
            device: where to.

        Yields:
            Rows in the order of arrival, `[r, r']`, float64.
        """
        source, order = row_source(self.rows), self.order
        in_turn = bool((order == np.arange(len(order))).all())
        size = max(1, _STRIP // max(1, len(order)))
        for start in range(0, len(order), size):
            stop = min(start + size, len(order))
            own = order[start:stop]
            columns = slice(0, int(order[:stop].max()) + 1)
            strip = torch.cat([
                decoded(source[int(own[a]) : int(own[b - 1]) + 1], torch.float64, columns)
                for a, b in runs(own)
            ])
            if not in_turn:
                strip = strip[:, torch.from_numpy(order[:stop])]
            yield strip.to(device)

    def _add(self, file: _File) -> None:
        self._files.append(file)
        self.order = np.concatenate([self.order, *file.rows])

    def _if_they_fit(self, parts: list[Part]) -> list[Part] | None:
        # those that came first: files are read in order, again and again
        if self._in_memory >= IN_MEMORY:
            return None
        kept = [Part(part.rows, dict(part.arrays)) for part in parts]
        self._in_memory += sum(part.size() for part in kept)
        return kept


class _Under(Mapping[str, NDArray[Any]]):
    # the arrays whose names begin so, read when they are asked for

    def __init__(self, arrays: Arrays, prefix: str) -> None:
        self._arrays = arrays
        self._prefix = prefix
        self._names = [
            name.removeprefix(prefix)
            for name in arrays
            if name.startswith(prefix) and name != f"{prefix}rows"
        ]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[self._prefix + name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _rows_of(arrays: Arrays) -> Iterator[NDArray[np.int64]]:
    number = 0
    while f"{number}/rows" in arrays:
        yield arrays[f"{number}/rows"]
        number += 1
