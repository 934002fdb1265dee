"""GraSS: a few coordinates of each side of a layer, then signed hashing into `k`."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trak.blocks import Block, FactoredBlock
from trak.projectors import counter
from trak.projectors.factored import FactoredProjector

_BLOW_UP = 4


class MaskedProjector(FactoredProjector):
    """Keeps random rows and columns of each layer's gradient, and hashes what is left.

    `FactoredProjector` with sides that select: `r` of the `o` rows and `q` of the `i`
    columns, drawn without replacement and scaled by `sqrt(o)` and `sqrt(i)`, so that
    entries of the whole matrix have mean 0, variance 1 and `E<P^T x, P^T y> = k <x, y>`.
    Hu et al. 2025, "GraSS: Scalable data attribution with gradient sparsification and
    sparse projection" (FactGraSS). The cheapest projection of layers, and the one that
    loses most: what is not selected is never seen, and gradients with few large
    coordinates are met or missed.

    Args:
        shapes: name to shape of every parameter, in order.
        proj_dim: projection dimension `k`.
        seed: seed of the entries.
        device: where to project.
        rank: rows and columns to keep, one number or a pair; `sqrt(4 k)` each, as the
            authors do, if None. Vectors are not masked.

    Raises:
        InputError: if a rank is no positive integer.
    """

    kind = "masked"

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        proj_dim: int,
        seed: int = 0,
        device: str | torch.device | None = None,
        rank: int | tuple[int, int] | None = None,
    ) -> None:
        if rank is None:
            rank = math.isqrt(_BLOW_UP * max(1, proj_dim))
        pair = rank if isinstance(rank, tuple) else (rank, rank)
        super().__init__(shapes, proj_dim, seed, device, pair)

    def _entries(self, name: str, side: int, size: int, rank: int) -> Tensor:
        entries = torch.zeros(size, rank, dtype=torch.float64, device=self.device)
        columns = torch.arange(rank, device=self.device)
        entries[self._places(name, side, size, rank), columns] = math.sqrt(size)
        return entries

    def _compress(self, block: Block) -> Tensor:
        # whitened coordinates are mixtures of all, so that nothing can be picked
        mixed = self._whitening is not None and block.name in self._whitening.sides
        if mixed or not isinstance(block, FactoredBlock):
            return super()._compress(block)
        sides = self.sides[block.name]
        factors = [block.backprops, block.activations]
        scale = 1.0
        for side, rank in enumerate(sides.ranks):
            if rank is not None:
                size = sides.shape[side]
                places = self._places(block.name, side, size, rank)
                factors[side] = factors[side].index_select(2, places)
                scale *= math.sqrt(size)
        return FactoredBlock(block.name, factors[1], factors[0]).sketch(None, None) * scale

    def _places(self, name: str, side: int, size: int, rank: int) -> Tensor:
        key = (name, side, torch.int64)
        if key not in self._matrices:
            source = self._stream(name, side)
            self._matrices[key] = counter.sample(source, size, rank, self.device)
        return self._matrices[key]
