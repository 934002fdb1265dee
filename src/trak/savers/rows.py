"""A group of arrays whose rows come and go together, under one journal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trak.encodings import EncodedRows, RowEncoding, encoding_of
from trak.errors import StoreCorruptedError
from trak.savers.arrays import REMEDY, RowFile
from trak.savers.journal import Journal


class RowGroup:
    """Rows of several arrays, all written or not at all.

    The order is: rows, wait for the disk, journal, wait for the disk. A row without a
    record does not exist.

    Args:
        journal: path of the journal.
        num_rows: number of rows there will be.
        arrays: name to (path, columns, dtype).
        encoding: how rows of `grads` become bytes; plainly, in their dtype, if None.
            One with scales keeps them in the array `scales`.
        remedy: what to do if a file is damaged, a sentence.

    Raises:
        StoreCorruptedError: if the journal is there and the file of an array is not.
    """

    def __init__(
        self,
        journal: Path,
        num_rows: int,
        arrays: Mapping[str, tuple[Path, int, Any]],
        encoding: RowEncoding | None = None,
        remedy: str = REMEDY,
    ) -> None:
        if journal.exists():  # which it does only after all of the arrays do
            _refuse_lost(journal, [path for path, _, _ in arrays.values()])
        journal.parent.mkdir(parents=True, exist_ok=True)
        self._files = {
            name: RowFile(path, (num_rows, columns), dtype, remedy)
            for name, (path, columns, dtype) in arrays.items()
        }
        self._encoding = encoding
        self._journal = Journal(journal, num_rows, remedy)

    @property
    def done(self) -> NDArray[np.bool_]:
        """True for every row that exists, `[rows]`."""
        return self._journal.done

    def refresh(self) -> NDArray[np.bool_]:
        """Reads what other processes have written since.

        Returns:
            True for every row that exists, `[rows]`.
        """
        self._journal.refresh()
        return self._journal.done

    def commit(self, rows: NDArray[np.int64], values: Mapping[str, NDArray[Any]]) -> None:
        """Writes rows of every array; they exist when this returns.

        Args:
            rows: row numbers, `[b]`.
            values: name to rows, `[b, columns]`, for every array; `grads` as floats,
                whatever their encoding, and without `scales`.
        """
        if self._encoding is not None and not self._encoding.plain:
            values = {**values, **_encoded(values["grads"], self._encoding)}
        for name, file in self._files.items():
            file.write(rows, values[name])
        self._journal.append(rows)

    def array(self, name: str) -> NDArray[Any]:
        """One array; what a caller changes stays in memory.

        Args:
            name: the array.

        Returns:
            `[rows, columns]`, backed by the file; rows that are not plain floats there
            are decoded into memory, float32.
        """
        if name == "grads" and self._encoding is not None and not self._encoding.plain:
            return self.encoded().tensor(torch.float32).numpy()
        return self._files[name].read()

    def encoded(self) -> EncodedRows:
        """The rows of `grads`, unread, for those who stream them.

        Returns:
            Where they are and what the bytes mean.
        """
        file = self._files["grads"]
        encoding = self._encoding or encoding_of(file.dtype)
        scales = self._files["scales"].read() if encoding.scaled else None
        return EncodedRows(file.path, file.offset, file.shape, encoding, scales)


def _encoded(rows: NDArray[Any], encoding: RowEncoding) -> dict[str, NDArray[Any]]:
    raw, scales = encoding.encode(torch.from_numpy(rows))
    if encoding.raw is torch.bfloat16:
        raw = raw.view(torch.int16)  # NumPy has no bfloat16: its bits
    values = {"grads": raw.numpy().view(encoding.file)}
    if scales is not None:
        values["scales"] = scales.numpy()
    return values


def _refuse_lost(journal: Path, paths: list[Path]) -> None:
    lost = [path for path in paths if not path.exists()]
    if lost:
        raise StoreCorruptedError(
            f"{lost[0]} is gone, but {journal} says which of its rows exist. Restore the "
            "file, or remove the journal and pass all of these examples again."
        )
