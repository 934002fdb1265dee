"""Wider rows of some training examples, which the automatic ridge of narrow ones asks for.

See FORMAT.md, "Wide rows". Each is written before its example's row is recorded, so an
example whose row exists has its wide row, too.
"""

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from trak.errors import UNREADABLE, StoreCorruptedError, not_of_the_file
from trak.savers.arrays import RowFile


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
        numbers, rows = _load(self._numbers)[:, 0], _load(self._rows)
        if len(numbers) != len(rows):
            _refuse(self._rows, f"{len(rows)} rows for {len(numbers)} numbers")
        kept = rows.any(axis=1)
        return np.array(numbers[kept]), np.array(rows[kept])


def _load(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            # what np.load says of a file that is no array is unsafe advice
            found: NDArray[Any] = npy.read_array(file, allow_pickle=False)
    except (*UNREADABLE, MemoryError) as error:
        if not_of_the_file(error, path):
            raise
        _refuse(path, str(error), error)
    if found.ndim != 2:
        _refuse(path, f"an array of shape {found.shape}")
    return found


def _refuse(path: Path, found: str, cause: Exception | None = None) -> NoReturn:
    raise StoreCorruptedError(
        f"{path} is lost or damaged ({found}). Restore it, or delete wide.mmap and "
        "wide_numbers.mmap beside it: the automatic ridge is then told from the rows alone."
    ) from cause
