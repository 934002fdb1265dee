"""Wider rows of some training examples, which the automatic ridge of narrow ones asks for.

See FORMAT.md, "Wide rows". Each is written before its example's row is recorded, so an
example whose row exists has its wide row, too.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.savers.arrays import RowFile, read_array, refuse

_REMEDY = (
    "Restore it, or delete wide.mmap and wide_numbers.mmap beside it: the automatic ridge "
    "is then told from the rows alone."
)


class WideRows:
    """The two files of a checkpoint.

    Args:
        folder: the checkpoint's.
    """

    def __init__(self, folder: Path) -> None:
        self._rows = folder / "wide.mmap"
        self._numbers = folder / "wide_numbers.mmap"
        self._file: RowFile | None = None

    def write(
        self, sample: NDArray[np.int64], numbers: NDArray[np.int64], rows: NDArray[Any]
    ) -> None:
        """Keeps rows, and waits until they are on disk.

        Args:
            sample: row numbers of all examples that will have one, ascending, `[s]`.
            numbers: which of these come now, `[b]`.
            rows: theirs, `[b, w]`.
        """
        if self._file is None:
            known = RowFile(self._numbers, (len(sample), 1), np.int64)
            if not np.array_equal(known.read()[:, 0], sample):
                known.write(np.arange(len(sample)), sample[:, None])
            self._file = RowFile(self._rows, (len(sample), rows.shape[1]), np.float32)
        self._file.write(np.searchsorted(sample, numbers), rows)

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """What was kept so far.

        Returns:
            Examples' row numbers, `[s]`, and their rows, `[s, w]`, without those that
            were never written or are 0; None if there are no files.
        """
        if not self._rows.exists():
            return None
        numbers = read_array(self._numbers, _REMEDY)[:, 0]
        rows = read_array(self._rows, _REMEDY)
        if len(numbers) != len(rows):
            found = f"{len(rows)} rows for {len(numbers)} numbers"
            refuse(self._rows, found, _REMEDY)
        kept = rows.any(axis=1)
        return np.array(numbers[kept]), np.array(rows[kept])
