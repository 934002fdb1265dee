"""Gram matrices of the stored rows, in one pass over them.

A matrix of sums over examples is accumulated in float64. Rows of at most 11 significant
bits (float16, bfloat16, int8) are multiplied in float32, which holds the products of two
float16 or bfloat16 numbers exactly, and summed in float32 over 32,768 rows at most. Where
bfloat16 products are asked for, sums over 1,024 columns are rounded to bfloat16.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from trak.encodings import EncodedRows, RowSource
from trak.score_computers.stream import (
    BLOCK_BYTES,
    decoded,
    home,
    products_dtype,
    refuse_nonfinite,
    rows_per_block,
    stream,
)
from trak.shapes import Square

_STRIP = 256
_PART_ROWS = 32_768  # are summed in the dtype of the products, parts in float64
_DUAL_COLUMNS = 16_384
_SHORT_COLUMNS = 1024
_Lower = Callable[[RowSource, torch.dtype, torch.device], Tensor]
_TINY = 1e-24  # mean squares below it may have lost products to float32's lower end


def primal_gram(
    rows: RowSource,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Square:
    """`Phi^T Phi` (Park et al. 2023, Sec. 3.2, Step 3).

    Args:
        rows: Phi, `[n, k]`.
        device: where to compute; where the rows are if None.
        dtype: of products; as the rows' encoding has it if None.

    Returns:
        `[k, k]`, float64. In float16 the sum would overflow.
    """
    return _symmetric(_lower_primal, rows, device or home(rows), dtype)


def dual_gram(
    rows: RowSource,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Square:
    """`Phi Phi^T`.

    Args:
        rows: Phi, `[n, k]`.
        device: where to compute; where the rows are if None.
        dtype: of products; as the rows' encoding has it if None.

    Returns:
        `[n, n]`, float64.
    """
    return _symmetric(_lower_dual, rows, device or home(rows), dtype)


def _symmetric(
    lower: _Lower, rows: RowSource, device: torch.device, dtype: torch.dtype | None
) -> Square:
    num_rows, width = rows.shape
    dtype = dtype or products_dtype(rows)
    gram = lower(rows, dtype, device)
    mean_square = float(gram.trace()) / max(1, num_rows * width)
    if dtype is not torch.float64 and not _TINY < mean_square < math.inf:
        gram = lower(rows, torch.float64, device)
    if not torch.isfinite(gram.diagonal()).all():  # any NaN or inf is squared into it
        refuse_nonfinite(rows, rows_per_block(width, torch.float64))
    upper = gram.tril(-1).T
    return gram.tril_().add_(upper)


def _lower_primal(rows: RowSource, dtype: torch.dtype, device: torch.device) -> Tensor:
    # the lower triangle, by strips: fewer multiplications than the whole square needs
    width = rows.shape[1]
    # the sum of k x k blocks must not cost more than their making
    block_rows = rows_per_block(width, dtype, fewest=1024)
    strip = max(_STRIP, width // 8)
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    part = torch.zeros(width, width, dtype=dtype, device=device)
    summed = 0
    for _, _, block in stream([rows], dtype, device, block_rows):
        for start in range(0, width, strip):
            stop = min(start + strip, width)
            out = part[start:stop, :stop]
            # with beta=0 the product replaces what the part held
            out.addmm_(block[:, start:stop].T, block[:, :stop], beta=1 if summed else 0)
        summed += len(block)
        if summed >= _PART_ROWS:
            gram += part
            summed = 0
    return gram.add_(part) if summed else gram


def _lower_dual(rows: RowSource, dtype: torch.dtype, device: torch.device) -> Tensor:
    # by columns: without projection there may be millions of them
    if dtype is torch.bfloat16:
        return _lower_rounded(rows, device)
    num_rows, width = rows.shape
    gram = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=device)
    step = min(_PART_ROWS, max(_DUAL_COLUMNS, BLOCK_BYTES // (8 * num_rows)))
    strip = max(_STRIP, num_rows // 8)
    for start in range(0, width, step):
        phi = decoded(rows, dtype, slice(start, start + step)).to(device)
        for first in range(0, num_rows, strip):
            stop = min(first + strip, num_rows)
            gram[first:stop, :stop] += phi[first:stop] @ phi[:stop].T
    return gram


def _lower_rounded(rows: RowSource, device: torch.device) -> Tensor:
    # sums over few columns, so that what they round averages out; the rows' scales come
    # last, since rows times scales would be rounded once more
    scales = rows.scales if isinstance(rows, EncodedRows) else None
    plain = replace(rows, scales=None) if isinstance(rows, EncodedRows) else rows
    num_rows, width = rows.shape
    gram = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=device)
    for start in range(0, width, _DUAL_COLUMNS):
        columns = slice(start, start + _DUAL_COLUMNS)
        phi = decoded(plain, torch.bfloat16, columns).to(device).contiguous()
        for first in range(0, num_rows, _STRIP):
            stop = min(first + _STRIP, num_rows)
            part = torch.zeros(stop - first, stop, device=device)
            for few in phi.split(_SHORT_COLUMNS, dim=1):
                part += few[first:stop] @ few[:stop].T
            gram[first:stop, :stop] += part
    if scales is not None:
        factors = torch.from_numpy(scales).to(gram)
        gram.mul_(factors).mul_(factors.T)
    return gram
