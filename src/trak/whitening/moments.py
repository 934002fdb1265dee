"""Sums over examples from which whitening is made: K-FAC factors and squares.

The gradient of a weight matrix is `G = sum_s l_s r_s^T`; its second moment is taken to be
a Kronecker product of `E[l l^T]` and `E[r r^T]` (Martens and Grosse 2015, Sec. 3.1; for
positions that share a weight, Grosse and Martens 2016, Sec. 3). Sums of two parts of the
data add up to those of the whole, whoever computed them.
"""

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.blocks import Block, ConvolvedBlock, DenseBlock, IndexedBlock, MatrixBlock, Sink
from trak.errors import InputError, NumericalError, StoreCorruptedError
from trak.whitening.patches import (
    moment_of_patches,
    occupied,
    slides,
    sliding_moment,
)

FORMAT = 1
_FEW = 1 / 8  # of the positions, whose patches are taken out again
LARGEST_SIDE = 4096
"""A side of more rows or columns is described by its diagonal alone."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over the examples for one parameter, in one of its uses.

    Attributes:
        left: of `l l^T`, `[o, o]`, or its diagonal `[o]`.
        right: of `r r^T`, `[i, i]`, or its diagonal `[i]`.
        positions: how many pairs `(l, r)` other than zeros were added up, `[]`.
    """

    left: Tensor
    right: Tensor
    positions: Tensor

    def plus(self, other: "Sums") -> "Sums":
        """The sums over both.

        Args:
            other: sums over other examples.

        Returns:
            Their sum.
        """
        return Sums(
            self.left + other.left,
            self.right + other.right,
            self.positions + other.positions,
        )


class Moments:
    """What is known of a checkpoint's gradients.

    Attributes:
        count: examples that were added up.
        matrices: parameter and use (`"layer"`, `"table"`) to sums.
        squares: parameter to the sum of squared gradients, `[p]`, where a gradient came
            multiplied out: vectors, and what no layer rule covers.
    """

    def __init__(self) -> None:
        self.count = 0
        self.matrices: dict[tuple[str, str], Sums] = {}
        self.squares: dict[str, Tensor] = {}

    @contextmanager
    def adding(self, num_samples: int) -> Generator[Sink]:
        """Adds the blocks of a batch.

        Args:
            num_samples: `b`.

        Yields:
            A consumer of all of the batch's blocks.
        """
        whole: dict[str, Tensor] = {}

        def consume(block: Block) -> None:
            if isinstance(block, DenseBlock):
                gradient = _wide(block.gradient.detach())
                known = whole.get(block.name)
                whole[block.name] = gradient if known is None else known + gradient
                return
            use = "table" if isinstance(block, IndexedBlock) else "layer"
            self._add_matrix((block.name, use), _sums(block))

        yield consume
        for name, gradient in whole.items():
            self._add_squares(name, gradient.square().sum(dim=0))
        self.count += num_samples

    def merge(self, other: "Moments") -> None:
        """Adds the sums over other examples.

        Args:
            other: the sums.

        Raises:
            InputError: if they are of a model of other shapes.
        """
        try:
            for key, sums in other.matrices.items():
                self._add_matrix(key, sums)
            for name, squares in other.squares.items():
                self._add_squares(name, squares)
        except RuntimeError as error:
            raise InputError(
                f"Whitening sums of models of different shapes cannot be added: {error}"
            ) from error
        self.count += other.count

    def refuse_nonfinite(self) -> None:
        """Refuses sums that say nothing, before they are added to others.

        Raises:
            NumericalError: names the parameter.
        """
        # what is not finite, or too large, is so on the diagonals first
        parts = [
            (name, side if side.ndim == 1 else side.diagonal())
            for (name, _), sums in self.matrices.items()
            for side in (sums.left, sums.right)
        ]
        for name, part in [*parts, *self.squares.items()]:
            if not torch.isfinite(part).all():
                raise NumericalError(
                    f"The whitening sums of {name!r} are not finite: a gradient of this "
                    "batch is NaN, infinite, or too large to be squared. Nothing of the "
                    "batch was added. Look at its examples, and at the weights."
                )

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The sums as arrays, for a file.

        Returns:
            Name to array; `left/layer/{parameter}` and the like.
        """
        found: dict[str, NDArray[Any]] = {
            "format": np.array(FORMAT),
            "count": np.array(self.count),
        }
        for (name, use), sums in self.matrices.items():
            for part in ("left", "right", "positions"):
                found[f"{part}/{use}/{name}"] = getattr(sums, part).cpu().numpy()
        for name, squares in self.squares.items():
            found[f"squares/{name}"] = squares.cpu().numpy()
        return found

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]], path: Path) -> "Moments":
        """What `arrays` was made of.

        Args:
            arrays: name to array.
            path: where they are from, for messages.

        Returns:
            The sums.

        Raises:
            StoreCorruptedError: if they are not such sums, or of a later format.
        """
        made = cls()
        try:
            if int(arrays["format"]) != FORMAT:
                raise StoreCorruptedError(
                    f"{path} holds whitening sums of format {int(arrays['format'])}; this "
                    f"version reads {FORMAT}. Use the version that wrote it."
                )
            made.count = int(arrays["count"])
            for name in arrays:
                part, _, rest = name.partition("/")
                if part == "squares":
                    made.squares[rest] = torch.from_numpy(arrays[name])
                elif part == "left":
                    use, _, parameter = rest.partition("/")
                    made.matrices[parameter, use] = Sums(
                        *(
                            torch.from_numpy(np.asarray(arrays[f"{p}/{rest}"]))
                            for p in ("left", "right", "positions")
                        )
                    )
        except KeyError as error:
            raise StoreCorruptedError(
                f"{path} lacks {error}: it is not a whole file of whitening sums. Delete "
                "it and call fit_whitening again."
            ) from error
        return made

    def _add_matrix(self, key: tuple[str, str], sums: Sums) -> None:
        known = self.matrices.get(key)
        self.matrices[key] = sums if known is None else known.plus(sums)

    def _add_squares(self, name: str, squares: Tensor) -> None:
        known = self.squares.get(name)
        self.squares[name] = squares if known is None else known + squares


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sums(block: MatrixBlock) -> Sums:
    # positions where a side is zero (padding, unused ones) have no part in G
    if isinstance(block, ConvolvedBlock) and (found := _of_patches(block)) is not None:
        return found
    if isinstance(block, IndexedBlock):
        right = _wide(block.backprops.flatten(0, 1))
        used = (right != 0).any(dim=1)
        rows = block.indices.flatten()[used]
        left = torch.bincount(rows, minlength=block.num_rows).to(right.dtype)
        return Sums(left, _second(right[used]), used.sum())
    left, right = (_wide(part.flatten(0, 1)) for part in block.factors())
    used = (left != 0).any(dim=1) & (right != 0).any(dim=1)
    if not used.all():
        left, right = left[used], right[used]
    return Sums(_second(left), _second(right), used.sum())


def _of_patches(block: ConvolvedBlock) -> Sums | None:
    # None if patches have to be told apart
    channels, width = block.inputs.shape[1], math.prod(block.kernel)
    if channels * width > LARGEST_SIDE:
        return None
    used = occupied(block)
    still = used & (block.backprops == 0).all(dim=1)
    count = int(still.sum())
    if count > _FEW * still.numel():
        return None
    used = used & ~still
    left = _wide(block.backprops.movedim(1, -1).flatten(end_dim=-2))
    if not used.all():
        left = left[used.flatten()]
    moment = sliding_moment if slides(block) else moment_of_patches
    right = moment(block, left.dtype)
    if count:
        idle = _second(block.windows()[still].flatten(1).to(left.dtype))
        if idle.trace() > right.trace() / 2:
            return None  # of the difference too few digits would be left
        right = right - idle
    return Sums(_second(left), right, used.sum())


def _second(rows: Tensor) -> Tensor:
    if rows.shape[1] > LARGEST_SIDE:
        return rows.square().sum(dim=0)
    return rows.T @ rows
