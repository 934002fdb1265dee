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
from trak.savers.arrays import runs
from trak.savers.filesystem import sync_directory

FORMAT = 1


class Journal:
    """Which of `num_rows` rows exist.

    Args:
        path: the file; created if absent.
        num_rows: number of rows there will be.

    Attributes:
        done: True for every row that exists, `[num_rows]`.

    Raises:
        StoreCorruptedError: if a line that is not the last is damaged.
        StoreMismatchError: if the journal is of another number of rows.
    """

    def __init__(self, path: Path, num_rows: int) -> None:
        self.path = path
        self.num_rows = num_rows
        self.done = np.zeros(num_rows, dtype=np.bool_)
        self._offset = 0
        if path.exists():
            self.refresh()
        if not self._offset:
            with self._locked() as descriptor:
                if not self._offset:
                    header = {"format": FORMAT, "writer": 0, "rows": [0, num_rows]}
                    self._append(descriptor, header)
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
            raise StoreCorruptedError(
                f"{self.path} is gone: its folder was moved or removed during the run. "
                "Make a new TRAKer."
            ) from error
        lines = data.split(b"\n")
        for number, line in enumerate(lines[:-1]):
            payload = _parse(line)
            if payload is None:
                if number == len(lines) - 2 and not lines[-1]:
                    return  # the last line: torn by a crash
                raise StoreCorruptedError(
                    f"{self.path} is damaged at byte {self._offset}: the line's "
                    "checksum or JSON is wrong. Remove its folder and featurize again."
                )
            self._apply(payload)
            self._offset += len(line) + 1

    def _apply(self, payload: dict[str, Any]) -> None:
        if self._offset == 0:
            expected = {"format": FORMAT, "writer": 0, "rows": [0, self.num_rows]}
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
                    f"{self._offset}; there are {self.num_rows}. Remove its folder and "
                    "featurize again."
                )
            self.done[start : start + count] = True

    @contextmanager
    def _locked(self) -> Generator[int]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self.refresh()
            os.ftruncate(descriptor, self._offset)
            yield descriptor
        finally:
            os.close(descriptor)

    def _append(self, descriptor: int, payload: dict[str, Any]) -> None:
        text = json.dumps(payload, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        written = os.pwrite(descriptor, line, self._offset)
        if written != len(line):
            raise OSError(f"Only {written} of {len(line)} bytes fit into {self.path}.")
        os.fsync(descriptor)
        self._apply(payload)
        self._offset += len(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    # None if the line is damaged
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None
