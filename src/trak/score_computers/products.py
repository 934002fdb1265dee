"""The dtype in which a Gram matrix is multiplied, by what its ridge hides."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trak.arguments import Ridge, multiple_of
from trak.encodings import RowSource, encoding_of, row_encoding
from trak.score_computers.factor import Form
from trak.score_computers.stream import products_dtype

_ROUNDED = torch.finfo(torch.float32).eps
"""Times the trace: what float32 sums may round."""
_AMPLE = 100 * _ROUNDED  # a ridge that hides it
_HIDES_BFLOAT16, _BY_ROOT, _WIDTH, _LEAST = 1.0, 0.03, 8192, 0.25
"""Ridges, in mean squared row norms, for rows of 8,192 columns, and the least of all. What
bfloat16 rounds of a matrix grows by the root of how many rows it has, and averages out over
columns."""
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def products_for(
    rows: RowSource,
    ridges: Sequence[Ridge],
    auto: float,
    form: Form,
    device: torch.device,
) -> torch.dtype:
    """The cheapest dtype whose rounding none of the ridges lets through.

    Args:
        rows: Phi, `[n, k]`.
        ridges: that will be added to the Gram matrix.
        auto: the automatic one, of which None among them is short.
        form: of the Gram matrix.
        device: where it is computed.

    Returns:
        float64 where a ridge is so small that it needs that; float32 for float32 rows
        beside one that hides what it rounds; bfloat16 for the dual form of bfloat16 rows,
        where the processor multiplies such numbers itself, beside one that hides what that
        rounds; else `products_dtype`.
    """
    usual, (count, width) = products_dtype(rows), rows.shape
    found = [auto if reg is None else multiple_of(reg) for reg in ridges]
    multiples = [float("nan") if multiple is None else multiple for multiple in found]
    if any(multiple < _ROUNDED * count for multiple in multiples):
        return torch.float64
    ample = all(multiple > _AMPLE * count for multiple in multiples)
    if row_encoding(rows).raw is torch.float32 and ample:
        return torch.float32
    hidden = all(hides_bfloat16(multiple, count, width) for multiple in multiples)
    rounded = form == "dual" and row_encoding(rows).raw is torch.bfloat16
    return torch.bfloat16 if hidden and rounded and multiplies_bfloat16(device) else usual


def hides_bfloat16(multiple: float, count: int, width: int) -> bool:
    """Whether a ridge hides what bfloat16 products round of a Gram matrix.

    Args:
        multiple: the ridge, in mean squared row norms.
        count: rows, `n`.
        width: columns, `k`.

    Returns:
        Whether it is 1 and `0.03 sqrt(n)`, times `sqrt(8192 / k)`, or more, and at least
        0.25.
    """
    least = max(_HIDES_BFLOAT16, _BY_ROOT * count**0.5)
    return multiple >= max(_LEAST, least * (_WIDTH / max(1, width)) ** 0.5)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 numbers faster than float32 ones.

    Args:
        device: a device.

    Returns:
        True for processors with instructions for that, where torch tells of them (2.10
        and later). GPUs multiply in float32, which they do in no time.
    """
    known = getattr(torch.cpu, "get_capabilities", None)
    if device.type != "cpu" or known is None:
        return False
    found: Mapping[str, Any] = known()
    return any(found.get(name, False) for name in _INSTRUCTIONS)


def made_with(info: Mapping[str, Any], rows: RowSource) -> torch.dtype:
    """The dtype in which a factor's Gram matrix was multiplied.

    Args:
        info: description of the factor.
        rows: of that matrix.

    Returns:
        A floating dtype.
    """
    found = info.get("products")
    return products_dtype(rows) if found is None else encoding_of(found).raw
