"""How wide the rows are, where the user leaves it open."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trak.arguments import MOST, as_integer
from trak.errors import InputError
from trak.projectors.abstract import AbstractProjector
from trak.projectors.choice import POSITIONS, make_projector
from trak.projectors.kernel import (
    KernelProjector,
    in_words,
    kernel_cost,
    predict,
    room_at,
)
from trak.projectors.noop import NoOpProjector

logger = logging.getLogger(__name__)

USUAL = 4096
NARROWEST = 512
BUDGET = 8 << 30
"""Bytes of rows of one checkpoint that `"auto"` stays below, if it can."""
WIDEST = 32_768
CHEAP = 128 << 20
"""Bytes of rows up to which `"auto"` takes more than the usual dimension, for few rows."""

EXACT = "exact"
FEW = 1 << 26
"""Numbers in all unprojected rows (256 MiB in float32) up to which nothing is cheaper."""


def projector_of_width(
    shapes: Mapping[str, tuple[int, ...]],
    proj_dim: Any,
    seed: int,
    device: torch.device,
    kind: str | None,
    num_rows: int,
    row_bytes: int,
    folder: Path,
    *,
    usual: str | None = None,
    tables: Collection[str] = (),
) -> AbstractProjector:
    """The projector that the facade's arguments stand for.

    Args:
        shapes: name to shape of every selected parameter.
        proj_dim: a number, `"auto"`, or `"exact"` for no projection.
        seed: seed of the entries.
        device: where to project.
        kind: a projection's name; chosen if None.
        num_rows: training examples, `n`.
        row_bytes: bytes of a stored number.
        folder: where the rows will be.
        usual: the name that None stands for where something is projected; chosen by cost
            if None.
        tables: names of embedding tables.

    Returns:
        The projector.

    Raises:
        InputError: if the arguments do not go together, or rows would not fit.
    """
    width = sum(math.prod(shape) for shape in shapes.values())
    found = chosen_dimension(proj_dim, num_rows, width, row_bytes)
    if found is None and kind is not None:
        if proj_dim == EXACT:
            raise InputError(
                f"proj_dim='exact' means no projection, so projector={kind!r} has nothing "
                "to do. Leave one of the two out."
            )
        found = width
    if found is not None:
        return make_projector(shapes, found, seed, device, kind or usual)
    if proj_dim == EXACT:
        if kernel_is_smaller(shapes, num_rows, row_bytes, tables):
            return KernelProjector(num_rows, device)
        kernel = kernel_cost(shapes, num_rows, row_bytes, 1, tables).disk
        refuse_too_much(num_rows, width, row_bytes, folder, kernel)
    return NoOpProjector(device=device)


def kernel_is_smaller(
    shapes: Mapping[str, Sequence[int]],
    num_rows: int,
    row_bytes: int,
    tables: Collection[str] = (),
) -> bool:
    """Whether the exact kernel needs less of the disk than rows of gradients.

    Each layer is taken to be used at 64 positions of a sample. Where all rows fill no more
    than 256 MiB, they are kept as they are: one pass over the data needs no earlier ones.

    Args:
        shapes: name to shape of every selected parameter.
        num_rows: training examples, `n`.
        row_bytes: bytes of a stored number.
        tables: names of embedding tables.

    Returns:
        The answer.
    """
    width = sum(math.prod(shape) for shape in shapes.values())
    expected = kernel_cost(shapes, num_rows, row_bytes, POSITIONS, tables)
    few = num_rows * width <= FEW
    return not few and expected.disk < num_rows * width * row_bytes


def is_exact(projector: Any, proj_dim: Any) -> bool:
    """Whether rows stand for unprojected gradients, and are worth more than half precision.

    Args:
        projector: an instance, a name, or None.
        proj_dim: a number, `"auto"` or `"exact"`.

    Returns:
        The answer.
    """
    return isinstance(projector, KernelProjector) or (
        projector is None and isinstance(proj_dim, str) and proj_dim == EXACT
    )


def width_of_rows(
    projector: AbstractProjector,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    num_rows: int,
    row_bytes: int,
    folder: Path,
) -> int:
    """Columns of the stored rows; of the exact kernel also says what it will cost.

    Args:
        projector: what makes rows.
        shapes: name to shape of every selected parameter.
        dtype: dtype of the stored rows.
        num_rows: training examples, `n`.
        row_bytes: bytes of a stored number.
        folder: where the rows will be.

    Returns:
        `k`.

    Raises:
        InputError: if the kernel is of another number of examples, would not fit, or if
            rounding would spoil it.
    """
    if not isinstance(projector, KernelProjector):
        return projector.proj_dim or sum(math.prod(shape) for shape in shapes.values())
    if projector.num_rows != num_rows:
        raise InputError(
            f"KernelProjector({projector.num_rows}) is for as many training examples; "
            f"train_set_size is {num_rows}."
        )
    if dtype not in {torch.float32, torch.float64}:
        raise InputError(
            f"row_dtype={str(dtype).removeprefix('torch.')!r} is too coarse for the exact "
            "kernel, whose rows are computed from each other (docs/numerics.md). Use "
            "'float32' or 'float64'."
        )
    predict(shapes, num_rows, row_bytes, folder)
    return projector.row_width


def chosen_dimension(
    proj_dim: Any, num_rows: int, num_params: int, row_bytes: int
) -> int | None:
    """The projection dimension that an argument stands for.

    A larger sketch is better on every bank (docs/whitening.md) and costs little on the
    factored path. So `"auto"` takes 4096 columns; half as many, down to 512, while the
    rows would fill more than 8 GiB; twice as many, up to 32,768, while there are fewer rows
    than columns (which the solve then hardly notices) and they fill no more than 128 MiB.
    Gradients of no more entries are not projected.

    Args:
        proj_dim: a number, `"auto"`, or `"exact"` for no projection.
        num_rows: training examples, `n`.
        num_params: selected parameters, `p`.
        row_bytes: bytes of a stored number.

    Returns:
        `k`; None for no projection.

    Raises:
        InputError: if it is something else.
    """
    if not isinstance(proj_dim, str):
        return as_integer("proj_dim", proj_dim, least=1, most=MOST)
    if proj_dim == EXACT:
        return None
    if proj_dim != "auto":
        raise InputError(
            "proj_dim must be a positive integer, 'auto', or 'exact' for no projection; "
            f"got {proj_dim!r}."
        )
    width = USUAL
    while width > NARROWEST and num_rows * width * row_bytes > BUDGET:
        width //= 2
    while num_rows < width < WIDEST and 2 * num_rows * width * row_bytes <= CHEAP:
        width *= 2
    if num_params <= width:
        logger.info("Not projected: the gradient has %d entries only.", num_params)
        return None
    logger.info("proj_dim='auto' stands for %d.", width)
    return width


def exact_cost(num_rows: int, num_params: int, row_bytes: int) -> tuple[int, float]:
    """What unprojected rows cost.

    Args:
        num_rows: training examples, `n`.
        num_params: selected parameters, `p`.
        row_bytes: bytes of a stored number.

    Returns:
        Bytes on disk for one checkpoint, and multiplications of its Gram matrix (the
        smaller of `n x n` and `p x p`).
    """
    size, inner = sorted((num_rows, num_params))
    return num_rows * num_params * row_bytes, float(size) * size * inner


def refuse_too_much(
    num_rows: int, num_params: int, row_bytes: int, folder: Path, kernel: int
) -> None:
    """Says what unprojected rows will cost, before the first is made.

    Args:
        num_rows: training examples, `n`.
        num_params: selected parameters, `p`.
        row_bytes: bytes of a stored number.
        folder: where they will be, or a folder that does not exist yet.
        kernel: bytes of the exact kernel where layers are used once a sample.

    Raises:
        InputError: if there is no room for one checkpoint.
    """
    size, products = exact_cost(num_rows, num_params, row_bytes)
    there, room = room_at(folder)
    cost = (
        f"{num_rows:,} rows of {num_params:,} numbers: {size / 2**30:.3g} GiB on disk for "
        f"each checkpoint, and {products:.2g} multiplications for its Gram matrix"
    )
    logger.info("Not projected: %s.", cost)
    if size > room:
        other = (
            f"projector=KernelProjector({num_rows}), as exact and from {in_words(kernel)} "
            "on if a sample uses layers at few positions (docs/numerics.md), "
        )
        raise InputError(
            f"Unprojected gradients do not fit: {cost}, with {room / 2**30:.3g} GiB free "
            f"at {there}. Use {other if kernel <= room else ''}proj_dim='auto' or a "
            "number, select parameters with grad_wrt, or another save_dir."
        )
