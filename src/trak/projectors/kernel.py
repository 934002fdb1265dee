"""No projection, and no rows as wide as the gradient: the exact kernel's factor."""

import logging
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trak.arguments import as_integer
from trak.errors import InputError
from trak.projectors.abstract import AbstractProjector

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the rules by which rows are made from gradients."""


class KernelProjector(AbstractProjector):
    """Stands for rows whose inner products are exactly those of the gradients.

    With `K = G G^T` of the training examples' unprojected gradients and its Cholesky
    factor `K = L L^T`, row `i` is row `i` of `L`. A target's row is `L^-1 K_train,t`, and,
    in one more column, the length of what is left of its gradient outside the training
    gradients' span. So `Phi Phi^T` and `Phi phi_t` are those of the gradients, whatever the
    number of parameters; `k = n + 1`.

    It is no function of a gradient alone: rows are made by `trak.pipeline.kernel`.

    Args:
        num_rows: number of training examples, `n`.
        device: where to compute.
    """

    def __init__(self, num_rows: int, device: str | torch.device | None = None) -> None:
        self.num_rows = as_integer("num_rows", num_rows, least=1)
        super().__init__(0, 0, 0, "kernel", device)

    @property
    def row_width(self) -> int:
        """Columns of a stored row."""
        return self.num_rows + 1

    def settings(self) -> dict[str, Any]:
        """What rows depend on, for the store's fingerprint.

        Returns:
            JSON values.
        """
        return {"kind": "kernel", "version": VERSION}

    def project(self, grads: Tensor | Mapping[str, Tensor], model_id: int) -> Tensor:
        """Is not possible for a gradient alone.

        Args:
            grads: not used.
            model_id: not used.

        Raises:
            InputError: always.
        """
        del grads, model_id
        raise InputError(
            "A row of the exact kernel depends on the examples before it, so gradients "
            "cannot be projected one by one. Use TRAKer.featurize, or NoOpProjector."
        )


class KernelCost(NamedTuple):
    """What the exact kernel costs, for one checkpoint.

    Attributes:
        gradients: bytes of all training examples' gradients on disk.
        rows: bytes of the rows.
        products: multiplications of the kernel.
        factor: multiplications of its Cholesky factor.
    """

    gradients: int
    rows: int
    products: float
    factor: float

    @property
    def disk(self) -> int:
        """Bytes on disk."""
        return self.gradients + self.rows

    def __str__(self) -> str:
        return (
            f"{in_words(self.gradients)} of gradients and {in_words(self.rows)} of rows on "
            f"disk for each checkpoint; about {self.products:.2g} multiplications for the "
            f"kernel and {self.factor:.2g} for its factor"
        )


def kernel_cost(
    shapes: Mapping[str, Sequence[int]],
    num_rows: int,
    row_bytes: int,
    positions: int | None = None,
    tables: Collection[str] = (),
) -> KernelCost:
    """What the exact kernel costs, before a gradient was seen.

    A layer `[o, i]` whose weight is used at `s` positions is kept as `s (o + i)` numbers
    if these are fewer than `o i`; a table `[v, e]` as `s` indices of 8 bytes and `s e`
    numbers.

    Args:
        shapes: name to shape of every selected parameter.
        num_rows: training examples, `n`.
        row_bytes: bytes of a stored number of a row.
        positions: `s`; as many as make gradients largest if None.
        tables: names of embedding tables.

    Returns:
        Bytes, and multiplications `n^2 p / 2` of the kernel as if gradients were at hand,
        and `n^3 / 6` of its factor.
    """
    width = sum(math.prod(shape) for shape in shapes.values())
    number = max(4, row_bytes)
    kept = 0
    for name, shape in shapes.items():
        rows = 8 // number if name in tables else shape[0] if shape else 1
        kept += _kept(shape, rows, positions)
    return KernelCost(
        num_rows * kept * number + 8 * num_rows,
        num_rows * (num_rows + 1) * row_bytes,
        num_rows * (num_rows + 1) / 2 * width,
        num_rows**3 / 6,
    )


def predict(
    shapes: Mapping[str, Sequence[int]], num_rows: int, row_bytes: int, folder: Path
) -> None:
    """Says what the exact kernel will cost, before the first gradient is computed.

    Args:
        shapes: name to shape of every selected parameter.
        num_rows: training examples, `n`.
        row_bytes: bytes of a stored number.
        folder: where the store will be, or a folder that does not exist yet.

    Raises:
        InputError: if there is no room for one checkpoint, however small its gradients.
    """
    most = kernel_cost(shapes, num_rows, row_bytes)
    # a layer used at one position, or a table of which one row is used
    sides = {n: (min(s[0], math.prod(s[1:])),) for n, s in shapes.items() if len(s) > 1}
    least = kernel_cost({**shapes, **sides}, num_rows, row_bytes)
    logger.info("The exact kernel of %s examples: at most %s.", f"{num_rows:,}", most)
    there, room = room_at(folder)
    if least.disk > room:
        raise InputError(
            f"The exact kernel does not fit: at least {least}, with {in_words(room)} free "
            f"at {there}. Use proj_dim='auto' or a number, select parameters with "
            "grad_wrt, or another save_dir."
        )


def room_at(folder: Path) -> tuple[Path, int]:
    """Free space on the disk where a folder is or will be.

    Args:
        folder: need not exist.

    Returns:
        The nearest folder that exists, and bytes.
    """
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    return there, shutil.disk_usage(there).free


def in_words(size: int) -> str:
    """A number of bytes for people.

    Args:
        size: bytes.

    Returns:
        In GiB or MiB.
    """
    return f"{size / 2**30:.3g} GiB" if size >= 1 << 30 else f"{size / 2**20:.3g} MiB"


def _kept(shape: Sequence[int], rows: int, positions: int | None) -> int:
    # numbers of one sample, if those that tell a position's rows count as `rows`
    size = math.prod(shape)
    if positions is None or len(shape) < 2:
        return size
    return min(size, positions * (rows + size // max(1, shape[0])))
