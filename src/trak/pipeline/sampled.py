"""Rows, and wider ones of the few examples that the automatic ridge is told from.

Of a narrow row of a wide model most is noise of the sketch, so little can be told from
narrow rows about how the model was trained (docs/ridge.md).
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.batches import Batch
from trak.blocks import Block, of_samples
from trak.pipeline.project import RowMaker
from trak.projectors import AbstractProjector
from trak.savers import AbstractSaver
from trak.savers.wide_rows import WideRows


@dataclass(frozen=True, kw_only=True)
class SamplingMaker(RowMaker):
    """Makes rows as `RowMaker` does, and keeps wide ones of a sample beside the store's.

    Attributes:
        sketch: makes the wide rows, of blocks.
        sample: row numbers of the examples that get one, ascending, `[s]`.
        saver: the store.
        files: checkpoint to where they go.
    """

    sketch: AbstractProjector
    sample: NDArray[np.int64]
    saver: AbstractSaver
    files: dict[int, WideRows | None] = field(default_factory=dict[int, WideRows | None])

    @contextmanager
    def making(
        self, batch: Batch, model_id: int, numbers: list[int], *, training: bool
    ) -> Generator[tuple[Tensor, Tensor | None]]:
        """Makes rows that belong to the store once the caller has committed them.

        Args:
            batch: a normalized batch.
            model_id: the checkpoint.
            numbers: the samples' row numbers.
            training: training examples, some of which get wide rows; else targets.

        Yields:
            `[b, k]` and, for training examples, what `loss_weights` gives.
        """
        files = self._files_of(model_id) if training else None
        chosen = np.isin(numbers, self.sample)
        if files is None or not chosen.any():
            yield self.rows(batch, model_id, numbers, with_weights=training)
            return

        def project(piece: Batch, own: list[int]) -> Tensor:
            return self.with_copies(lambda: self._both(piece, model_id, own)) / self.scale

        made, weights = self.worked(batch, model_id, numbers, project, with_weights=True)
        width = self.projector.proj_dim
        wide = made[torch.from_numpy(chosen), width:]
        own = np.asarray(numbers)[chosen]
        files.write(self.sample, own, wide.float().cpu().numpy())
        yield made[:, :width], weights

    def _files_of(self, model_id: int) -> WideRows | None:
        if model_id not in self.files:
            self.files[model_id] = self.saver.wide_rows(model_id)
        return self.files[model_id]

    def _both(self, piece: Batch, model_id: int, numbers: list[int]) -> Tensor:
        # rows of the piece, and beside them wide ones, which are 0 outside of the sample
        chosen = np.isin(numbers, self.sample)
        every = bool(chosen.all())
        places = torch.from_numpy(np.flatnonzero(chosen))
        found = self.blank(len(places), self.sketch.proj_dim)
        with self.gathering(self.sketch, found, model_id, None) as sink:

            def sampled(block: Block) -> None:
                sink(block if every else of_samples(block, places))

            also = sampled if len(places) else None
            rows = self.projected(self.projector, piece, model_id, None, also)
        wide = rows.new_zeros(len(rows), found.shape[1])
        wide[places] = found
        return torch.cat([rows, wide], dim=1)
