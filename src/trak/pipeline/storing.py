"""Rows of a batch that are not there yet, from its samples to the store."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trak.batches import Batch, batch_size, normalize
from trak.errors import NumericalError
from trak.modes import evaluation_mode
from trak.pipeline.order import refuse_shuffled_loader
from trak.pipeline.phase import OvertakenError, Phase
from trak.pipeline.project import RowMaker
from trak.pipeline.proofs import refuse_disproved
from trak.pipeline.recheck import warn_of_other_code
from trak.pipeline.rows import (
    check_examples,
    hash_examples,
    missing_rows,
    narrow,
    row_numbers,
    to_store,
)
from trak.pipeline.task_state import prepare_task
from trak.pipeline.whiten import Whitener
from trak.savers import AbstractSaver, Rows


@dataclass(frozen=True, kw_only=True)
class RowStorer:
    """Stores what a batch lacks.

    Attributes:
        model: the model.
        task: the task.
        maker: turns batches into rows.
        saver: the store.
        whitener: whitens gradients before they are projected.
        dtype: dtype of the stored rows.
        examples_are_checked: refuse other examples in rows seen before.
    """

    model: nn.Module
    task: Any
    maker: RowMaker
    saver: AbstractSaver
    whitener: Whitener
    dtype: torch.dtype
    examples_are_checked: bool

    def store(
        self,
        phase: Phase,
        rows: Rows,
        others: list[tuple[str, Rows]],
        batch: Any,
        inds: Any,
        num_samples: int | None,
    ) -> None:
        """Stores the rows of a batch that are not there yet.

        Args:
            phase: what is loaded.
            rows: where to.
            others: descriptions and rows of everything stored for the same examples.
            batch: the samples.
            inds: their row numbers, or None.
            num_samples: how many follow the last ones, or None.
        """
        phase.watch.check()
        normal = normalize(batch, next(self.model.parameters()).device)
        training = phase.kind == "featurize"
        what = "train_set_size" if training else "num_targets"
        size = batch_size(normal)
        numbers = row_numbers(inds, num_samples, phase.cursor, size, len(rows.done), what)
        if size and num_samples is not None and phase.cursor == 0:
            refuse_shuffled_loader()
        digests = hash_examples(normal, enabled=self.examples_are_checked)
        kind = "training example" if training else "target"
        check_examples(numbers, digests, others, kind)
        wanted = missing_rows(rows, numbers)
        if (training and size) or len(wanted):
            prepare_task(self.task, self.model, phase.digest)
        if training and not phase.began and len(wanted) < size:
            warn_of_other_code(self.model, self.maker, rows, normal, numbers)
        if training and size and not len(wanted):
            self._look_again(phase, rows, normal, numbers)
        phase.began = phase.began or size > 0
        while len(wanted):
            own = numbers[wanted]
            try:
                self._commit(phase, rows, narrow(normal, wanted), own, digests[wanted])
            except OvertakenError:
                check_examples(numbers, digests, others, kind)
                wanted = missing_rows(rows, numbers)
            else:
                self.saver.refresh(phase.model_id)
                self._record_coverage(phase)
                break
        if num_samples is not None:
            phase.cursor += size

    def _look_again(
        self, phase: Phase, rows: Rows, batch: Batch, numbers: NDArray[np.int64]
    ) -> None:
        names = ["out_to_loss", "sample_weights"][: self.maker.loss_columns]
        loss = np.concatenate([rows.array(name)[numbers] for name in names], axis=1)
        whole = bool(rows.done.all())
        with evaluation_mode(self.model):
            self.maker.losses.look_again(batch, loss, phase.model_id, whole=whole)

    def _record_coverage(self, phase: Phase) -> None:
        coverage = self.maker.computer.coverage()
        if coverage is not None and coverage != phase.coverage:
            self.saver.record_coverage(phase.model_id, coverage.describe())
            phase.coverage = coverage

    def _commit(
        self,
        phase: Phase,
        rows: Rows,
        batch: Batch,
        numbers: NDArray[np.int64],
        digests: NDArray[np.int64],
    ) -> None:
        self.whitener.prepare(phase.model_id)
        making = self.maker.making(
            batch, phase.model_id, numbers.tolist(), training=phase.kind == "featurize"
        )
        with evaluation_mode(self.model), making as (made, weights):
            if phase.coverage is None or self.maker.computer.disproved:
                refuse_disproved(self.saver, phase.model_id, self.maker.computer, batch)
            values = {"examples": digests[:, None]}
            values["grads"] = to_store(made, self.dtype, numbers)
            if weights is not None:
                loss = weights.to(torch.float64).cpu().numpy()
                _refuse_too_large(loss, rows.array("out_to_loss").dtype, numbers)
                values["out_to_loss"] = loss[:, :1]
                values |= {"sample_weights": loss[:, 1:]} if loss.shape[1] > 1 else {}
            rows.commit(numbers, values)


def _refuse_too_large(
    loss: NDArray[np.float64], dtype: np.dtype[Any], numbers: NDArray[np.int64]
) -> None:
    fits = (np.abs(loss) <= np.finfo(dtype).max).all(axis=1)
    if not fits.all():
        raise NumericalError(
            f"The loss weight Q of sample {numbers[np.argmin(fits)]} is larger than "
            f"{dtype} holds, in which Q is stored. Nothing of this batch was stored. "
            "Divide the task's Q by a constant, which scores are then divided by, too."
        )
