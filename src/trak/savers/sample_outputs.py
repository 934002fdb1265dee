"""Model outputs of some training examples, which the ridge of a squared loss asks for.

See FORMAT.md, "Outputs". Each is written before its example's row is recorded.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.savers.arrays import RowFile, read_array, refuse

_REMEDY = (
    "Restore it, or delete it: the automatic ridge of a squared loss is then a constant."
)


class SampleOutputs:
    """The file of a checkpoint.

    Args:
        folder: the checkpoint's.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "outputs.mmap"
        self._file: RowFile | None = None

    def write(
        self, sample: NDArray[np.int64], numbers: NDArray[np.int64], outputs: NDArray[Any]
    ) -> None:
        """Keeps outputs, and waits until they are on disk.

        Args:
            sample: row numbers of all examples that will have one, ascending, `[s]`.
            numbers: which of these come now, `[b]`.
            outputs: theirs, `[b]`.
        """
        if self._file is None:
            self._file = RowFile(self._path, (len(sample), 2), np.float64, _REMEDY)
        pairs = np.stack([numbers + 1, outputs], axis=1)  # zeros were never written
        self._file.write(np.searchsorted(sample, numbers), pairs)

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """What was kept so far.

        Returns:
            Examples' row numbers, ascending, `[c]`, and their outputs, `[c]`; None if there
            is no file.
        """
        if not self._path.exists():
            return None
        found = read_array(self._path, _REMEDY)
        if found.shape[1] != 2 or found.dtype != np.float64:
            what = f"an array of shape {found.shape} and {found.dtype}"
            refuse(self._path, what, _REMEDY)
        kept = found[found[:, 0] > 0]
        numbers = kept[:, 0].astype(np.int64) - 1
        if (np.diff(numbers) <= 0).any():
            what = "row numbers that do not ascend"
            refuse(self._path, what, _REMEDY)
        return numbers, np.array(kept[:, 1])
