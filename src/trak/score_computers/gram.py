"""Products of the stored rows, streamed in blocks and accumulated in float64."""

from collections.abc import Iterator

import torch
from torch import Tensor

from trak.errors import NumericalError
from trak.shapes import ProjectedGradients, Square

BLOCK_ROWS = 4096


def blocks(rows: Tensor, block_rows: int = BLOCK_ROWS) -> Iterator[tuple[int, Tensor]]:
    """Cuts rows into blocks and brings them to float64.

    Args:
        rows: `[n, k]`, any floating dtype, possibly backed by a file.
        block_rows: rows in a block.

    Yields:
        First row and block, float64 and finite.

    Raises:
        NumericalError: names the first row that is not finite.
    """
    for start in range(0, rows.shape[0], block_rows):
        block = rows[start : start + block_rows].to(torch.float64)
        finite = torch.isfinite(block).all(dim=1)
        if not finite.all():
            row = start + int((~finite).nonzero()[0])
            raise NumericalError(
                f"Row {row} of the stored projected gradients is not finite, though it "
                "was when it was written: the file is damaged. Featurize again."
            )
        yield start, block


def primal_gram(rows: ProjectedGradients) -> Square:
    """`Phi^T Phi` (Park et al. 2023, Sec. 3.2, Step 3).

    Args:
        rows: Phi, `[n, k]`.

    Returns:
        `[k, k]`, float64. In float16 the sum would overflow.
    """
    k = rows.shape[1]
    gram = torch.zeros(k, k, dtype=torch.float64, device=rows.device)
    for _, block in blocks(rows):
        gram.addmm_(block.T, block)
    return gram


def dual_gram(rows: ProjectedGradients) -> Square:
    """`Phi Phi^T`.

    Args:
        rows: Phi, `[n, k]`.

    Returns:
        `[n, n]`, float64.
    """
    n = rows.shape[0]
    gram = torch.empty(n, n, dtype=torch.float64, device=rows.device)
    for start, block in blocks(rows):
        for other, second in blocks(rows[: start + BLOCK_ROWS]):
            tile = block @ second.T
            gram[start : start + len(block), other : other + len(second)] = tile
            gram[other : other + len(second), start : start + len(block)] = tile.T
    return gram
