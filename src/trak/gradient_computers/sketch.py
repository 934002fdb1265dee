"""Gradients made small, to compare two ways of computing them."""

import math

import torch
from torch import Tensor

from trak.blocks import Block, DenseBlock

_LARGE = 1 << 18  # scalars; smaller gradients are compared as they are
_COLUMNS = 8


class Sketcher:
    """`L^T G` with a random normal `L` of eight columns, for large matrices `G`.

    Norms of sketches, and of their differences, are those of the gradients on average;
    a sketch is zero, or not finite, where the gradient is.

    Args:
        shapes: name to shape of every parameter.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._matrices: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, block: Block) -> Tensor:
        """Makes a block small.

        Args:
            block: gradients of one parameter.

        Returns:
            `[b, q]`; the gradient itself for small parameters.
        """
        shape = self._shapes[block.name]
        if _is_small(shape):
            return block.dense().gradient.detach()
        if isinstance(block, DenseBlock):
            gradient = block.gradient.detach()
            rows = gradient.reshape(len(gradient), shape[0], -1)
            left = self._matrix(shape[0], gradient)
            return (left.t() @ rows).flatten(start_dim=1)
        return block.sketch(self._matrix(shape[0], block.backprops), None).flatten(1)

    @property
    def numbers(self) -> int:
        """How many numbers a sample's sketches of all parameters hold."""
        return sum(
            math.prod(shape) if _is_small(shape) else _COLUMNS * math.prod(shape[1:])
            for shape in self._shapes.values()
        )

    def _matrix(self, size: int, like: Tensor) -> Tensor:
        key = (size, like.dtype, like.device)
        if key not in self._matrices:
            generator = torch.Generator().manual_seed(size)
            entries = (
                torch.randn(size, _COLUMNS, generator=generator, device="cpu")
                / _COLUMNS**0.5
            )
            self._matrices[key] = entries.to(like.device, like.dtype)
        return self._matrices[key]


def _is_small(shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or math.prod(shape) <= _LARGE
