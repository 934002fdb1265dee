"""How rows are written in a file: plain floats, bfloat16 bits, or int8 with scales.

An encoding says which bytes a row becomes, how precise they are, and in which dtype
products of such rows are worth computing. `EncodedRows` are rows of a file that nobody
has read yet: code that streams them asks for stretches, and never holds all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.errors import InputError

_INT8_STEPS = 127


@dataclass(frozen=True, slots=True)
class RowEncoding:
    """What becomes of a row when it is stored.

    Attributes:
        name: the precision's name in settings and metadata.
        raw: dtype in which torch sees the bytes of a row.
        file: dtype in which NumPy sees them.
        eps: relative precision of an entry; of the largest entry of a row if `scaled`.
        products: dtype for products of such rows. float32 holds products of two float16
            or bfloat16 numbers exactly, and their sums better than the rows are known.
        scaled: whether every row has a float32 scale beside it.
    """

    name: str
    raw: torch.dtype
    file: np.dtype[Any]
    eps: float
    products: torch.dtype
    scaled: bool = False

    @property
    def plain(self) -> bool:
        """Whether the file holds the numbers themselves, as NumPy knows them."""
        return self.file.kind == "f"

    @property
    def floating(self) -> torch.dtype:
        """The smallest floating dtype that holds every decoded row."""
        return torch.float32 if self.scaled else self.raw

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rounds rows.

        Args:
            rows: floats, `[b, k]`.

        Returns:
            The rows in the `raw` dtype `[b, k]`, and the scales `[b, 1]`, float32, if
            there are any. Numbers beyond the range become infinite.
        """
        if not self.scaled:
            return rows.to(self.raw), None
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        scales = (wide.abs().amax(dim=1, keepdim=True) / _INT8_STEPS).to(torch.float32)
        # a row of zeros, or one below float32's range, has a scale of 0
        steps = wide / torch.where(scales > 0, scales, 1.0).to(wide.dtype)
        steps = steps.round().nan_to_num(0.0).clamp(-_INT8_STEPS, _INT8_STEPS)
        return steps.to(torch.int8), scales

    def decode(
        self, raw: Tensor, scales: Tensor | None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """What `encode` left of rows.

        Args:
            raw: `[b, k]`.
            scales: `[b, 1]`, or None.
            dtype: a floating dtype; the smallest that loses nothing if None.

        Returns:
            `[b, k]`.
        """
        rows = raw.to(dtype or self.floating)
        if scales is None:
            return rows
        # raw may be a file's memory, whose pages are slow to change
        return rows * scales.to(rows) if rows is raw else rows.mul_(scales.to(rows))


def _encodings() -> dict[str, RowEncoding]:
    single, double = torch.float32, torch.float64
    eps: Callable[[torch.dtype], float] = lambda dtype: torch.finfo(dtype).eps  # noqa: E731
    listed = [
        RowEncoding("float64", double, np.dtype("<f8"), eps(double), double),
        RowEncoding("float32", single, np.dtype("<f4"), eps(single), double),
        RowEncoding("float16", torch.float16, np.dtype("<f2"), eps(torch.float16), single),
        RowEncoding(
            "bfloat16", torch.bfloat16, np.dtype("<u2"), eps(torch.bfloat16), single
        ),
        RowEncoding(
            "int8", torch.int8, np.dtype("|i1"), 1 / _INT8_STEPS, single, scaled=True
        ),
    ]
    return {encoding.name: encoding for encoding in listed}


ENCODINGS: Mapping[str, RowEncoding] = _encodings()
"""Every encoding of rows, by name."""


def encoding_of(dtype: Any) -> RowEncoding:
    """The encoding that a dtype stands for.

    Args:
        dtype: a torch dtype, a NumPy dtype or a name, such as `"int8"`.

    Returns:
        The encoding.

    Raises:
        InputError: lists the encodings there are.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in ENCODINGS:
        try:
            name = np.dtype(dtype).name
        except (TypeError, ValueError):
            name = str(dtype)
    if name not in ENCODINGS:
        raise InputError(
            f"Rows are stored in one of {', '.join(ENCODINGS)}; row_dtype={dtype!r} is "
            "none of them."
        )
    return ENCODINGS[name]


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Rows in a file, unread.

    Attributes:
        path: the file.
        offset: where its first row begins, in bytes; rows follow without gaps.
        shape: rows and columns.
        encoding: what the bytes are.
        scales: scale of every row, `[n, 1]`, if the encoding has scales.
    """

    path: Path
    offset: int
    shape: tuple[int, int]
    encoding: RowEncoding
    scales: NDArray[np.float32] | None = None

    def __getitem__(self, part: slice) -> "EncodedRows":
        start, stop, step = part.indices(self.shape[0])
        if step != 1:
            raise InputError(f"Rows of a file come in one stretch, not by {step}.")
        scales = None if self.scales is None else self.scales[start:stop]
        offset = self.offset + start * self.shape[1] * self.encoding.file.itemsize
        shape = (max(stop - start, 0), self.shape[1])
        return EncodedRows(self.path, offset, shape, self.encoding, scales)

    def tensor(
        self, dtype: torch.dtype | None = None, columns: slice = slice(None)
    ) -> Tensor:
        """Reads and decodes all rows. What a caller changes stays in memory.

        Args:
            dtype: a floating dtype; the smallest that loses nothing if None.
            columns: which columns.

        Returns:
            `[n, columns]`, backed by the file if nothing has to be decoded.
        """
        raw = np.memmap(
            self.path, self.encoding.file, "c", offset=self.offset, shape=self.shape
        )
        bits = raw.view(np.int16) if self.encoding.file.kind == "u" else raw
        scales = None if self.scales is None else torch.from_numpy(self.scales)
        rows = torch.from_numpy(bits).view(self.encoding.raw)[:, columns]
        return self.encoding.decode(rows, scales, dtype)


RowSource = Tensor | EncodedRows
"""Rows in memory, or in a file."""


def row_encoding(rows: RowSource) -> RowEncoding:
    """The encoding of rows, wherever they are.

    Args:
        rows: `[n, k]`.

    Returns:
        What their precision is.
    """
    return encoding_of(rows.dtype) if isinstance(rows, Tensor) else rows.encoding
