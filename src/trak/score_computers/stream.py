"""One pass over stored rows, block by block, in the dtype of the products.

Blocks are sized by bytes, so that a pass needs the same memory for a thousand rows and
for a billion. On a CPU a decoded block is meant to stay in the last-level cache.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trak.encodings import EncodedRows, RowSource, row_encoding
from trak.errors import NumericalError
from trak.score_computers.reader import Stretch, read_ahead

BLOCK_BYTES = 16 << 20
_FEWEST, _MOST = 64, 8192  # float32 sums within a block stay short

Multiplier = Callable[[int, int], Tensor]


class RowBlock(NamedTuple):
    """Consecutive rows of one source.

    Attributes:
        source: which of the sources.
        start: the first row's number.
        rows: `[b, k]`, decoded; valid until the next block is asked for, and not to be
            changed.
    """

    source: int
    start: int
    rows: Tensor


def rows_per_block(width: int, dtype: torch.dtype, fewest: int = _FEWEST) -> int:
    """How many rows a block has.

    Args:
        width: bytes of a row are those of this many numbers ...
        dtype: ... of this dtype.
        fewest: at least so many, so that products stay efficient.

    Returns:
        A number that does not depend on how many rows there are.
    """
    return max(fewest, min(_MOST, BLOCK_BYTES // (width * dtype.itemsize)))


def stream(
    sources: Sequence[RowSource],
    dtype: torch.dtype,
    device: torch.device,
    block_rows: int,
    multiplier: Multiplier | None = None,
) -> Iterator[RowBlock]:
    """Passes over several sources side by side: the first rows of each, the next, ...

    Rows in files are read ahead by a thread while the caller computes.

    Args:
        sources: of one shape, all in files or all in memory.
        dtype: of the decoded blocks.
        device: of the decoded blocks.
        block_rows: rows in a block.
        multiplier: gives a factor for every row from `start` to `stop`, `[b, 1]`.

    Yields:
        Blocks, by start, then by source.
    """
    num_rows, width = sources[0].shape
    starts = range(0, num_rows, block_rows)
    places = [
        (i, start, min(start + block_rows, num_rows))
        for start in starts
        for i in range(len(sources))
    ]
    out = torch.empty(min(block_rows, num_rows), width, dtype=dtype, device=device)
    with closing(_raws(sources, places, device)) as raws:
        for (i, start, stop), raw in zip(places, raws, strict=True):
            factor = _scales(sources[i], start, stop)
            if multiplier is not None:
                more = multiplier(start, stop)
                factor = more if factor is None else factor.to(more) * more
            # to the device first: half the bytes travel, and it converts faster
            rows = out[: stop - start].copy_(raw.to(device))
            if factor is not None:
                rows.mul_(factor.to(rows))
            yield RowBlock(i, start, rows)


def decoded(rows: RowSource, dtype: torch.dtype, columns: slice = slice(None)) -> Tensor:
    """All rows in memory, or some of their columns.

    Args:
        rows: `[n, k]`.
        dtype: a floating dtype.
        columns: which.

    Returns:
        `[n, columns]`.
    """
    if isinstance(rows, Tensor):
        return rows[:, columns].to(dtype)
    return rows.tensor(dtype, columns)


def home(rows: RowSource) -> torch.device:
    """Where rows are computed with if nobody says otherwise.

    Args:
        rows: `[n, k]`.

    Returns:
        A tensor's device; the CPU for rows in a file.
    """
    return rows.device if isinstance(rows, Tensor) else torch.device("cpu")


def refuse_nonfinite(rows: RowSource, block_rows: int) -> None:
    """Passes over rows once more, after their products were found not to be finite.

    Args:
        rows: `[n, k]`.
        block_rows: rows in a block.

    Raises:
        NumericalError: names the first row that is not finite.
    """
    for _, start, block in stream([rows], torch.float64, home(rows), block_rows):
        finite = torch.isfinite(block).all(dim=1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            where = f" ({rows.path})" if isinstance(rows, EncodedRows) else ""
            raise NumericalError(
                f"Row {row} of the stored projected gradients{where} is not finite, "
                "though it was when it was written: the file is damaged. Featurize again."
            )


def products_dtype(rows: RowSource) -> torch.dtype:
    """The dtype in which products of rows are computed.

    Args:
        rows: `[n, k]`.

    Returns:
        float32 for rows with at most 11 significant bits, float64 for others.
    """
    return row_encoding(rows).products


def _raws(
    sources: Sequence[RowSource], places: list[tuple[int, int, int]], device: torch.device
) -> Generator[Tensor]:
    files = [rows for rows in sources if isinstance(rows, EncodedRows)]
    if files:
        yield from read_ahead([Stretch(files[i], a, b) for i, a, b in places], device)
    tensors = [rows for rows in sources if isinstance(rows, Tensor)]
    if tensors:
        yield from (tensors[i][a:b] for i, a, b in places)


def _scales(rows: RowSource, start: int, stop: int) -> Tensor | None:
    if isinstance(rows, Tensor) or rows.scales is None:
        return None
    return torch.from_numpy(np.array(rows.scales[start:stop]))
