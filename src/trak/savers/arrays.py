"""Row files: plain `.npy` arrays that are written by `pwrite` and read by a map."""

import errno
import io
import itertools
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from trak.errors import (
    UNREADABLE,
    StoreCorruptedError,
    StoreMismatchError,
    not_of_the_file,
)
from trak.savers.filesystem import link_new, sync_directory, temporary_path

_LARGEST = (1 << 63) - 1  # file, in bytes
REMEDY = "Remove its folder and featurize again."
"""What to do if a file is damaged that training examples' rows are in."""


class RowFile:
    """A two-dimensional array on disk, one row an example.

    The disk space is taken when the file is created, so that a full disk is a clean
    `OSError` then, and not a killed process later. An existing file is never truncated.

    Args:
        path: the file.
        shape: rows and columns.
        dtype: the rows' dtype.
        remedy: what to do if the file is damaged, a sentence.

    Attributes:
        offset: where the data begin, in bytes.

    Raises:
        StoreCorruptedError: if the file is there with another shape, dtype or length.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int], dtype: Any, remedy: str = REMEDY
    ) -> None:
        self.path = path
        self.shape = shape
        self.remedy = remedy
        self.dtype = np.dtype(dtype)
        if not path.exists():
            self._create()
        self.offset = self._check()

    def write(
        self, rows: NDArray[np.int64], values: NDArray[Any], *, sync: bool = True
    ) -> None:
        """Writes rows and waits until they are on disk.

        Args:
            rows: row numbers, `[b]`.
            values: `[b, columns]`.
            sync: False does not wait; call `sync` at the end.
        """
        values = np.ascontiguousarray(values, dtype=self.dtype)
        row_bytes = self.shape[1] * self.dtype.itemsize
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            self._refuse_replaced(descriptor)
            for first, last in runs(rows):
                data = memoryview(values[first:last].reshape(-1).view(np.uint8).data)
                offset = self.offset + int(rows[first]) * row_bytes
                while data:
                    with room_for(self.path, len(data)):
                        written = os.pwrite(descriptor, data, offset)
                    data, offset = data[written:], offset + written
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync(self, *, forget: bool = False) -> None:
        """Waits until everything written is on disk.

        Args:
            forget: let go of the pages in the system's cache.
        """
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            os.fsync(descriptor)
            if forget and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def read(self) -> NDArray[Any]:
        """Maps the array; what a caller changes stays in memory.

        Returns:
            `[rows, columns]`, backed by the file.
        """
        with self.path.open("rb") as file:
            self._refuse_replaced(file.fileno())
            return np.memmap(
                file, self.dtype, mode="c", offset=self.offset, shape=self.shape
            )

    def _refuse_replaced(self, descriptor: int) -> None:
        header = self._header()
        if os.pread(descriptor, len(header), 0) != header:
            raise StoreMismatchError(
                f"{self.path} is no longer the array of shape {self.shape} that it was: "
                "another process began this experiment anew, with another number of "
                "targets. Use another exp_name for one of them."
            )

    def _header(self) -> bytes:
        return npy_header(self.shape, self.dtype)

    def _create(self) -> None:
        temporary = temporary_path(self.path)
        try:
            header = self._header()
            size = len(header) + self.shape[0] * self.shape[1] * self.dtype.itemsize
            with temporary.open("wb") as file:
                file.write(header)
                file.flush()
                with room_for(self.path, size):
                    allocate(file.fileno(), size)
                os.fsync(file.fileno())
            link_new(temporary, self.path)
        finally:
            temporary.unlink()

    def _check(self) -> int:
        header = self._header()
        size = len(header) + self.shape[0] * self.shape[1] * self.dtype.itemsize
        with self.path.open("rb") as file:
            found = file.read(len(header))
        length = self.path.stat().st_size
        if found != header or length != size:
            raise StoreCorruptedError(
                f"{self.path} should be a .npy array of shape {self.shape} and dtype "
                f"{self.dtype} in {size} bytes; it has {length} bytes and begins with "
                f"{found[:80]!r}. {self.remedy}"
            )
        return len(header)


def read_array(path: Path, remedy: str) -> NDArray[Any]:
    """Reads a whole two-dimensional array.

    Args:
        path: the file.
        remedy: what to do if it is damaged, a sentence.

    Returns:
        The array; `refuse` raises where the file is none such, or not there.

    Raises:
        MemoryError: if there is none for what the file really holds.
    """
    try:
        with path.open("rb") as file:
            # what np.load says of a file that is no array is unsafe advice
            found: NDArray[Any] = npy.read_array(file, allow_pickle=False)
    except (*UNREADABLE, MemoryError) as error:
        if not_of_the_file(error, path):
            raise
        refuse(path, str(error), remedy, error)
    if found.ndim != 2:
        refuse(path, f"an array of shape {found.shape}", remedy)
    return found


def refuse(path: Path, found: str, remedy: str, cause: Exception | None = None) -> NoReturn:
    """Refuses a file that is not what it should be.

    Args:
        path: the file.
        found: what it is instead.
        remedy: what to do, a sentence.
        cause: of the error.

    Raises:
        StoreCorruptedError: always.
    """
    raise StoreCorruptedError(f"{path} is lost or damaged ({found}). {remedy}") from cause


@contextmanager
def new_array(path: Path, shape: tuple[int, int], dtype: Any) -> Generator[RowFile]:
    """Writes a whole array; a reader or a crash sees the old file or the new one.

    Args:
        path: the file, replaced at the end.
        shape: rows and columns.
        dtype: the dtype.

    Yields:
        The file to fill, under a temporary name.
    """
    temporary = temporary_path(path)
    temporary.unlink()
    try:
        yield RowFile(temporary, shape, dtype)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def npy_header(shape: tuple[int, int], dtype: np.dtype[Any]) -> bytes:
    """The bytes before the data of a C-ordered `.npy` file (format 1.0).

    Args:
        shape: rows and columns.
        dtype: the dtype.

    Returns:
        Magic string, version, header length and header.
    """
    buffer = io.BytesIO()
    description = {
        "descr": npy.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": shape,
    }
    npy.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def allocate(descriptor: int, size: int) -> None:
    """Extends a file with zeros, taking the disk space now where the system can.

    Args:
        descriptor: an open file.
        size: its length in bytes.

    Raises:
        OSError: if no file may be so large, or there is no room.
    """
    if size > _LARGEST:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


@contextmanager
def room_for(path: Path, size: int) -> Generator[None]:
    """Names the file and what was to be written where the disk is full.

    Args:
        path: the file.
        size: bytes.

    Yields:
        Nothing.

    Raises:
        OSError: says so.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise
        reason = f"{os.strerror(error.errno)} for {size} bytes of"
        raise OSError(error.errno, reason, str(path)) from error


def runs(rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cuts a list of row numbers into stretches of consecutive ones.

    Args:
        rows: row numbers, `[b]`.

    Returns:
        First and end position of every stretch.

    Example:
        >>> runs(np.array([4, 5, 6, 2, 9, 10]))
        [(0, 3), (3, 4), (4, 6)]
    """
    if len(rows) == 0:
        return []
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return list(itertools.pairwise(cuts))
