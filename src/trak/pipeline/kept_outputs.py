"""Keeps model outputs of the training examples that the automatic ridge is told from."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.batches import Batch, batch_size, select
from trak.gradient_computers import AbstractGradientComputer
from trak.savers import AbstractSaver
from trak.savers.sample_outputs import SampleOutputs
from trak.score_computers.ridge_sample import drawn


@dataclass(frozen=True, kw_only=True)
class OutputKeeper:
    """Keeps them beside a checkpoint's rows.

    Attributes:
        computer: computes model outputs.
        saver: the store.
        count: training examples that there are, `n`.
        files: checkpoint to where they go; None where the store has no place for them.
    """

    computer: AbstractGradientComputer
    saver: AbstractSaver
    count: int
    files: dict[int, SampleOutputs | None] = field(
        default_factory=dict[int, SampleOutputs | None]
    )

    @cached_property
    def sample(self) -> NDArray[np.int64]:
        """Row numbers of the examples whose outputs are kept, ascending."""
        return drawn(self.count)

    def keep(self, batch: Batch, numbers: list[int], model_id: int) -> None:
        """Computes and keeps those of a batch.

        Args:
            batch: a normalized batch.
            numbers: its samples' row numbers.
            model_id: the checkpoint, whose weights are loaded.
        """
        chosen = np.isin(numbers, self.sample)
        if not chosen.any() or self._file_of(model_id) is None:
            return
        rows = np.asarray(numbers)
        if not (chosen.all() or self.computer.remembers_outputs):
            batch = select(batch, torch.from_numpy(np.flatnonzero(chosen)))
            rows = rows[chosen]
        outputs = self.computer.compute_outputs(batch, batch_size(batch))
        if outputs is not None:
            self.put(rows, outputs, model_id)

    def put(self, numbers: NDArray[np.int64], outputs: Tensor, model_id: int) -> None:
        """Keeps outputs that are known.

        Args:
            numbers: row numbers, `[b]`; those outside of the sample are left out.
            outputs: theirs, `[b]`.
            model_id: the checkpoint.
        """
        file, chosen = self._file_of(model_id), np.isin(numbers, self.sample)
        if file is not None and chosen.any():
            found = outputs.detach().to("cpu", torch.float64).flatten().numpy()
            file.write(self.sample, numbers[chosen], found[chosen])

    def _file_of(self, model_id: int) -> SampleOutputs | None:
        if model_id not in self.files:
            self.files[model_id] = self.saver.sample_outputs(model_id)
        return self.files[model_id]
