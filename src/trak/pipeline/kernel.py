"""Rows of the exact kernel's Cholesky factor, as batches come.

For a batch `b` after earlier examples `e`, the products `K_be` and `K_bb` of unprojected
gradients are computed layer by layer, and the factor's further rows from these: see
`trak.projectors.cholesky`. Rows are final when the batch is stored, in whatever batches
and order the examples come.
"""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trak.batches import Batch, batch_size
from trak.encodings import encoding_of
from trak.errors import InputError, PhaseError
from trak.pipeline.earlier import Earlier
from trak.pipeline.phase import OvertakenError
from trak.pipeline.project import GRADIENT_BYTES, RowMaker
from trak.projectors.cholesky import forward, lower_factor
from trak.projectors.kept import Collector, Part, kernel, kernel_products
from trak.projectors.kernel import KernelCost, KernelProjector
from trak.savers import AbstractSaver

logger = logging.getLogger(__name__)

_SAFETY = 8  # times the rows' precision: the smallest pivot
_EXACT = 1e-13  # smallest pivot of float64 rows


class _Gathered(NamedTuple):
    parts: list[Part]
    places: Tensor  # of the batch's samples among those of the parts
    weights: Tensor | None


@dataclass(frozen=True, kw_only=True)
class KernelMaker(RowMaker):
    """Makes rows whose inner products are exactly those of the gradients.

    Attributes:
        projector: says so.
        saver: keeps earlier gradients.
        dtype: dtype of the stored rows.
        earlier: the checkpoint at hand to what its earlier batches left.
        widths: numbers that a sample's gradient was kept as, of every piece so far.
    """

    projector: KernelProjector
    saver: AbstractSaver
    dtype: torch.dtype
    earlier: dict[int, Earlier] = field(default_factory=dict[int, Earlier])
    widths: list[int] = field(default_factory=list[int])

    def rows(
        self, batch: Batch, model_id: int, numbers: list[int], *, with_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Is not possible without a store: see `making`.

        Args:
            batch: not used.
            model_id: not used.
            numbers: not used.
            with_weights: not used.

        Raises:
            PhaseError: always.
        """
        del batch, model_id, numbers, with_weights
        raise PhaseError(
            "Rows of the exact kernel depend on those that are stored. Use "
            "TRAKer.featurize and score."
        )

    @contextmanager
    def making(
        self, batch: Batch, model_id: int, numbers: list[int], *, training: bool
    ) -> Generator[tuple[Tensor, Tensor | None]]:
        """Makes rows that belong to the store once the caller has committed them.

        Args:
            batch: a normalized batch of at least one sample.
            model_id: the checkpoint.
            numbers: the samples' row numbers.
            training: training examples, whose gradients are kept; else targets.

        Yields:
            `[b, n + 1]`, float64, and what `loss_weights` gives, or None for targets.
        """
        found = self._gathered(batch, model_id, numbers, training=training)
        earlier = self._earlier_of(model_id)
        with torch.no_grad():
            if not training:
                earlier.update()
                yield self._targets(found.parts, earlier)[found.places], None
                return
            with earlier.files.locked():
                earlier.update()
                self._expect(found.parts, earlier)
                made = self._grown(found.parts, earlier)
                earlier.write(found.parts)
                yield made[found.places], found.weights
                earlier.confirm(found.parts)

    def _earlier_of(self, model_id: int) -> Earlier:
        if model_id not in self.earlier:
            files = self.saver.gradient_files(model_id)
            self.earlier.clear()
            self.earlier[model_id] = Earlier(files, self.saver.train_rows(model_id))
        return self.earlier[model_id]

    def _gathered(
        self, batch: Batch, model_id: int, numbers: list[int], *, training: bool
    ) -> _Gathered:
        whitening = self.whitenings.get(model_id)
        pieces: list[Part] = []
        made = 0

        def gather(piece: Batch, own: list[int]) -> Tensor:
            del own
            nonlocal made

            def attempt() -> Collector:
                collector = Collector(whitening)
                self.computer.run(piece, collector, self.layout)
                return collector

            kept, size = self.with_copies(attempt), batch_size(piece)
            # row numbers are known once the pieces are put in the batch's order
            part = Part(np.arange(made, made + size), kept.arrays())
            self.widths.append(part.size() // (4 * size))
            pieces.append(part)
            made += size
            return torch.stack([torch.from_numpy(part.rows), kept.largest(size)], dim=1)

        found, weights = self.worked(
            batch, model_id, numbers, gather, with_weights=training
        )
        order = found[:, 0].long().numpy()
        row_of = np.full(made, -1, dtype=np.int64)
        row_of[order] = numbers
        # a piece that ran out of memory after its gradients was gathered again
        parts = [
            Part(row_of[piece.rows], piece.arrays)
            for piece in pieces
            if row_of[piece.rows[0]] >= 0
        ]
        place_of = {int(row): at for at, row in enumerate(_rows_of(parts))}
        places = torch.tensor([place_of[number] for number in numbers], device="cpu")
        return _Gathered(parts, places.to(self.device), weights)

    def _most(self) -> int:
        formed = self.computer.scalars_at_once(self.layout, formed=True)
        kept = self.widths[-1] if self.widths else sum(self.layout.values())
        fitting = max(1, GRADIENT_BYTES // max(1, 4 * (formed + kept)))
        return min(fitting, self.computer.samples_at_once or fitting)

    def _grown(self, parts: list[Part], earlier: Earlier) -> Tensor:
        # further rows of the factor, [b, n + 1]
        across = forward(earlier.strips(self.device), self._across(parts, earlier))
        own = self._own(parts)
        schur = own - across.T @ across
        lower = lower_factor(schur, own.diagonal(), smallest_pivot(self.dtype))
        made = own.new_zeros(len(own), self.projector.row_width)
        made[:, torch.from_numpy(earlier.order).to(made.device)] = across.T
        made[:, torch.from_numpy(_rows_of(parts)).to(made.device)] = lower
        return made

    def _targets(self, parts: list[Part], earlier: Earlier) -> Tensor:
        missing = self.projector.num_rows - len(earlier.order)
        if missing:
            raise PhaseError(
                f"{missing} training examples are not featurized, and the exact kernel's "
                "targets need all of them. Call featurize for these first."
            )
        inside = forward(earlier.strips(self.device), self._across(parts, earlier))
        squares = self._own(parts).diagonal()
        rest = (squares - inside.square().sum(dim=0)).clamp(min=0).sqrt()
        made = inside.new_zeros(len(rest), self.projector.row_width)
        made[:, torch.from_numpy(earlier.order).to(made.device)] = inside.T
        made[:, -1] = rest
        return made

    def _across(self, parts: list[Part], earlier: Earlier) -> Tensor:
        # [earlier, b]
        strips = [
            torch.cat([kernel(stored, part, self.device) for part in parts], dim=1)
            for stored in earlier.parts()
        ]
        width = sum(len(part.rows) for part in parts)
        strips = strips or [torch.zeros(0, width, dtype=torch.float64, device=self.device)]
        return torch.cat(strips) / self.scale**2

    def _own(self, parts: list[Part]) -> Tensor:
        # [b, b]
        strips = [
            torch.cat([kernel(one, other, self.device) for other in parts], dim=1)
            for one in parts
        ]
        found = torch.cat(strips)
        return (found + found.T) / (2 * self.scale**2)

    def _expect(self, parts: list[Part], earlier: Earlier) -> None:
        # before anything of the batch is stored
        rows = _rows_of(parts)
        taken = rows[earlier.rows.done[rows]]
        if len(taken):
            raise OvertakenError(
                f"Row {taken[0]} was written by another process meanwhile. Repeat the call."
            )
        if len(earlier.order):
            return
        total, size = self.projector.num_rows, len(rows)
        bytes_each = sum(part.size() for part in parts) / size
        pairs = sum(kernel_products(one, other) for one in parts for other in parts)
        cost = KernelCost(
            round(total * bytes_each),
            total * self.projector.row_width * self.dtype.itemsize,
            pairs / size**2 * total * (total + 1) / 2,
            total**3 / 6,
        )
        reading = bytes_each * total * max(0, total - size) / (2 * size)
        logger.info(
            "The exact kernel, by the first %d examples: %s; in batches of that size "
            "%.3g GiB of gradients are read. Larger batches need less of both.",
            size,
            cost,
            reading / 2**30,
        )
        room = earlier.files.room()
        if cost.gradients > room:
            raise InputError(
                f"The gradients of {total:,} examples do not fit: {cost}, with "
                f"{room / 2**30:.3g} GiB free at {earlier.files.folder.parent}. Use "
                "proj_dim='auto' or a number, select parameters with grad_wrt, or another "
                "save_dir."
            )


def smallest_pivot(dtype: torch.dtype) -> float:
    """Below which a pivot of the factor is lost in rounding.

    Args:
        dtype: dtype of the stored rows.

    Returns:
        A share of the example's own square.
    """
    return max(_SAFETY * encoding_of(dtype).eps, _EXACT)


def _rows_of(parts: list[Part]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.concatenate([part.rows for part in parts])
