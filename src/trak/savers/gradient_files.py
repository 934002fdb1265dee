"""Files of unprojected gradients, one a batch, that the exact kernel is made from."""

import fcntl
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import UNREADABLE, StoreCorruptedError, not_of_the_file
from trak.savers.arrays import room_for
from trak.savers.filesystem import sync_directory, temporary_path

FORMAT = 1


class GradientFiles:
    """Numbered files of arrays, each written as a whole.

    A file belongs to the rows that it lists, and counts once all of these exist: it is
    written before they are. A crash in between leaves a file that the next one replaces.

    Args:
        folder: `{id}/kernel` of the store; made when the first file is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, number: int) -> Path:
        """Where a file lies.

        Args:
            number: counted from 0.

        Returns:
            Its path, whether or not it exists.
        """
        return self.folder / f"{number}.npz"

    def write(self, number: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes a file and waits until it is on disk.

        Args:
            number: the file's; one that is there is replaced.
            arrays: name to array.
        """
        path = self.path(number)
        temporary = temporary_path(path)
        size = sum(array.nbytes for array in arrays.values())
        try:
            with room_for(path, size), temporary.open("wb") as file:
                named: Any = {"format": np.array(FORMAT), **arrays}
                np.savez(file, **named)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(self.folder)

    @contextmanager
    def read(self, number: int) -> Generator[Mapping[str, NDArray[Any]]]:
        """Opens a file; arrays are read when they are asked for.

        Args:
            number: the file's.

        Yields:
            Name to array; what is lost or damaged raises `StoreCorruptedError`.

        Raises:
            StoreCorruptedError: if it is lost, damaged, or of a later format.
        """
        path = self.path(number)
        with ExitStack() as stack:
            with _damage_named(path):
                raw = stack.enter_context(path.open("rb"))
                file = stack.enter_context(np.load(raw, allow_pickle=False))
            found = _Arrays(path, file)
            if int(found["format"]) != FORMAT:
                raise StoreCorruptedError(
                    f"{path} is of format {int(found['format'])}; this version reads "
                    f"{FORMAT}. Use the version that wrote it."
                )
            yield found

    @contextmanager
    def locked(self) -> Generator[None]:
        """Keeps other processes from adding files or rows meanwhile.

        Yields:
            Nothing.
        """
        if not self.folder.exists():
            self.folder.mkdir(exist_ok=True)
            sync_directory(self.folder.parent)
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def room(self) -> int:
        """Free space on the disk.

        Returns:
            Bytes.
        """
        return shutil.disk_usage(self.folder.parent).free


class _Arrays(Mapping[str, NDArray[Any]]):
    # an open file

    def __init__(self, path: Path, file: Any) -> None:
        self._path = path
        self._file = file

    def __getitem__(self, name: str) -> NDArray[Any]:
        with _damage_named(self._path):
            return self._file[name]

    def __contains__(self, name: object) -> bool:
        return name in self._file.files

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.files)

    def __len__(self) -> int:
        return len(self._file.files)


@contextmanager
def _damage_named(path: Path) -> Generator[None]:
    try:
        yield
    except (*UNREADABLE, MemoryError) as error:
        if not_of_the_file(error, path):
            raise
        raise StoreCorruptedError(
            f"{path} is lost or damaged ({error}), and rows of the exact kernel are made "
            "from it. Restore it, or delete the checkpoint's folder and featurize again."
        ) from error
