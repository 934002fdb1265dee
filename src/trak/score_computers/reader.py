"""Reads stretches of rows ahead of the arithmetic, in a thread of its own.

The thread only copies bytes: `preadv` releases the interpreter's lock, and rounding to
the dtype of the products stays with the thread that multiplies, whose workers would
otherwise fight over the cores.
"""

import os
import queue
import threading
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trak.encodings import EncodedRows
from trak.errors import StoreCorruptedError

_BUFFERS = 3  # one is read into, one waits, one is being multiplied


class Stretch(NamedTuple):
    """Consecutive rows to be read.

    Attributes:
        rows: where they are.
        start: the first.
        stop: one beyond the last.
    """

    rows: EncodedRows
    start: int
    stop: int


def read_ahead(stretches: Iterable[Stretch], device: Any = "cpu") -> Generator[Tensor]:
    """Yields the raw rows of stretches, while the next ones are being read.

    Memory is that of three stretches, whatever the file's length.

    Args:
        stretches: what to read, in order.
        device: buffers are pinned if this is a CUDA device.

    Yields:
        `[rows, k]` in the encoding's raw dtype, to be used before the next is asked for.
    """
    wanted = list(stretches)
    size = max((_num_bytes(s) for s in wanted), default=0)
    pin = torch.device(device).type == "cuda"
    thread = _Reader(wanted, [_buffer(size, pin) for _ in range(_BUFFERS)])
    thread.start()
    try:
        for stretch in wanted:
            buffer = thread.next()
            raw = buffer[: _num_bytes(stretch)].view(stretch.rows.encoding.raw)
            yield raw.view(stretch.stop - stretch.start, stretch.rows.shape[1])
            thread.free.put(buffer)
    finally:
        thread.stopped = True
        thread.free.put(None)
        thread.join()


class _Reader(threading.Thread):
    """Fills free buffers with stretches, in order."""

    def __init__(self, stretches: list[Stretch], buffers: list[Tensor]) -> None:
        super().__init__(name="trak-reader", daemon=True)
        self.stretches = stretches
        self.free: queue.Queue[Tensor | None] = queue.Queue()
        self.full: queue.Queue[Tensor | BaseException] = queue.Queue()
        self.stopped = False
        for buffer in buffers:
            self.free.put(buffer)

    def next(self) -> Tensor:
        """Waits for the next stretch; raises what the thread raised.

        Returns:
            The buffer it was read into.
        """
        item = self.full.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def run(self) -> None:
        try:
            with ExitStack() as stack:
                files: dict[str, int] = {}
                for stretch in self.stretches:
                    path = str(stretch.rows.path)
                    if path not in files:
                        files[path] = os.open(path, os.O_RDONLY)
                        stack.callback(os.close, files[path])
                    buffer = self.free.get()
                    if buffer is None or self.stopped:
                        return
                    _read(files[path], stretch, buffer.numpy())
                    self.full.put(buffer)
        except BaseException as error:  # raised where rows are asked for
            self.full.put(error)


def _read(descriptor: int, stretch: Stretch, buffer: Any) -> None:
    rows, row_bytes = stretch.rows, _num_bytes(stretch) // (stretch.stop - stretch.start)
    offset = rows.offset + stretch.start * row_bytes
    left = memoryview(buffer)[: _num_bytes(stretch)]
    while left:
        count = os.preadv(descriptor, [left], offset)
        if count == 0:
            raise StoreCorruptedError(
                f"{rows.path} ends at byte {offset}; its {rows.shape[0]} rows need "
                f"{rows.offset + rows.shape[0] * row_bytes} bytes. Restore it, or remove "
                "its folder and featurize again."
            )
        left, offset = left[count:], offset + count


def _num_bytes(stretch: Stretch) -> int:
    width = stretch.rows.shape[1] * stretch.rows.encoding.file.itemsize
    return (stretch.stop - stretch.start) * width


def _buffer(size: int, pin: bool) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=pin, device="cpu")
