"""The journal: the truth about which rows exist.

A line is eight hexadecimal digits (CRC-32 of the payload), a space, the payload in JSON,
and a line feed. The first payload describes the writer, every further one lists rows
that were safely on disk before the line was written. Lines are appended under a file
lock, so several processes may write rows of one checkpoint. A torn last line is what a
crash leaves; the next writer cuts it off. See FORMAT.md.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import StoreCorruptedError, StoreMismatchError
from trak.savers.arrays import REMEDY, runs
from trak.savers.filesystem import sync_directory

FORMAT = 1


class Journal:
    """Which of `num_rows` rows exist.

    Args:
        path: the file; created if absent.
        num_rows: number of rows there will be.
        remedy: what to do if the file is damaged, a sentence.

    Attributes:
        done: True for every row that exists, `[num_rows]`.

    Raises:
        StoreCorruptedError: if a line that is not the last is damaged.
        StoreMismatchError: if the journal is of another number of rows.
    """

    def __init__(self, path: Path, num_rows: int, remedy: str = REMEDY) -> None:
        self.path = path
        self.remedy = remedy
        self.num_rows = num_rows
        self.done = np.zeros(num_rows, dtype=np.bool_)
        self._offset = 0
        if path.exists():
            self.refresh()
        if not self._offset:
            with self._locked() as descriptor:
                if not self._offset:
                    self._append(descriptor, self._header())
            sync_directory(path.parent)

    def append(self, rows: NDArray[np.int64]) -> None:
        """Records rows that are on disk, and waits until the record is too.

        Args:
            rows: row numbers, `[b]`.
        """
        if len(rows) == 0:
            return
        ordered = np.unique(rows)
        stretches = [[int(ordered[a]), b - a] for a, b in runs(ordered)]
        with self._locked() as descriptor:
            self._append(descriptor, {"done": stretches})

    def refresh(self) -> None:
        """Reads what was appended since, by this or another process.

        Raises:
            StoreCorruptedError: if a line that is not the last is damaged, or the file
                is gone.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError as error:
            raise self._gone() from error
        lines = data.split(b"\n")
        for number, line in enumerate(lines[:-1]):
            payload = _parse(line)
            if payload is None:
                if number == len(lines) - 2 and not lines[-1]:
                    return  # the last line: torn by a crash
                raise StoreCorruptedError(
                    f"{self.path} is damaged at byte {self._offset}: the line's "
                    f"checksum or JSON is wrong. {self.remedy}"
                )
            self._apply(payload)
            self._offset += len(line) + 1

    @contextmanager
    def held(self) -> Generator[None]:
        """Keeps others from adding rows, and knows all that were added.

        Yields:
            Nothing.
        """
        with self._locked():
            yield

    def _apply(self, payload: dict[str, Any]) -> None:
        if self._offset == 0:
            expected = self._header()
            if payload != expected:
                raise StoreMismatchError(
                    f"{self.path} was written for {payload}; this run expects "
                    f"{expected}. Use another save_dir or experiment name."
                )
            return
        for start, count in payload["done"]:
            if start < 0 or count < 1 or start + count > self.num_rows:
                raise StoreCorruptedError(
                    f"{self.path} lists rows {start} to {start + count - 1} at byte "
                    f"{self._offset}; there are {self.num_rows}. {self.remedy}"
                )
            self.done[start : start + count] = True

    @contextmanager
    def _locked(self) -> Generator[int]:
        flags = os.O_RDWR | (0 if self._offset else os.O_CREAT)
        try:
            descriptor = os.open(self.path, flags, 0o666)
        except FileNotFoundError as error:
            raise self._gone() from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._refuse_replaced(descriptor)
            self.refresh()
            os.ftruncate(descriptor, self._offset)
            yield descriptor
        finally:
            os.close(descriptor)

    def _refuse_replaced(self, descriptor: int) -> None:
        # whoever takes a journal away holds its lock
        if not self.path.exists():
            raise self._gone()
        header = _line(self._header()) if self._offset else b""
        same = os.path.samestat(os.fstat(descriptor), self.path.stat())
        if not same or os.pread(descriptor, len(header), 0) != header:
            raise StoreMismatchError(
                f"{self.path} is no longer the journal of {self.num_rows} rows that it "
                "was: another process began this experiment anew, with another number of "
                "targets. Use another exp_name for one of them."
            )

    def _gone(self) -> StoreCorruptedError:
        return StoreCorruptedError(
            f"{self.path} is gone: its folder was moved or removed during the run. "
            "Make a new TRAKer."
        )

    def _header(self) -> dict[str, Any]:
        return {"format": FORMAT, "writer": 0, "rows": [0, self.num_rows]}

    def _append(self, descriptor: int, payload: dict[str, Any]) -> None:
        line = _line(payload)
        written = os.pwrite(descriptor, line, self._offset)
        if written != len(line):
            raise OSError(f"Only {written} of {len(line)} bytes fit into {self.path}.")
        os.fsync(descriptor)
        self._apply(payload)
        self._offset += len(line)


def _line(payload: dict[str, Any]) -> bytes:
    text = json.dumps(payload, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> dict[str, Any] | None:
    # None if the line is damaged
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None
