"""Finds out, from a checkpoint's first examples, whether its loss is logistic.

The automatic ridge and the strength of whitening depend on it.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trak.batches import Batch, batch_size, select
from trak.gradient_computers import AbstractGradientComputer
from trak.savers import AbstractSaver
from trak.score_computers.logistic import is_logistic

logger = logging.getLogger(__name__)

_ENOUGH = 16  # examples


@dataclass(frozen=True, kw_only=True)
class LossWatch:
    """Looks at training examples as they come, until enough were seen.

    Attributes:
        task: may say itself, by an attribute `loss_is_logistic`.
        computer: computes model outputs.
        saver: keeps what was found.
        seen: checkpoint to outputs and loss weights, `[b, 2]`.
    """

    task: Any
    computer: AbstractGradientComputer
    saver: AbstractSaver
    seen: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])

    def look(self, batch: Batch, loss: Tensor, model_id: int) -> None:
        """Takes some examples of a batch into account.

        Args:
            batch: a normalized batch.
            loss: its Q, `[b, 1]`.
            model_id: the checkpoint, whose weights are loaded.
        """
        parts = self.seen.setdefault(model_id, [])
        count = sum(map(len, parts))
        if count >= _ENOUGH or not batch_size(batch):
            return
        part = self._outputs_and_loss(batch, loss, _ENOUGH - count)
        if part is None:
            return
        parts.append(part)
        if count + len(part) >= _ENOUGH and self.saver.loss_record(model_id) is None:
            found = self._told(torch.cat(parts))
            if found is not None:
                self.saver.record_loss(model_id, {"logistic": found})

    def tell(self, batches: list[Batch], losses: list[Tensor]) -> bool | None:
        """The same from some batches alone, by the weights that are loaded.

        Args:
            batches: normalized batches.
            losses: their Q, `[b, 1]` each.

        Returns:
            Whether the loss is logistic; None if that cannot be told.
        """
        parts: list[Tensor] = []
        for batch, loss in zip(batches, losses, strict=True):
            part = self._outputs_and_loss(batch, loss, _ENOUGH - sum(map(len, parts)))
            if part is None:
                return None
            parts.append(part)
        return self._told(torch.cat(parts))

    def known(self, model_id: int) -> bool | None:
        """What was found of a checkpoint.

        Args:
            model_id: the checkpoint.

        Returns:
            Whether its loss is logistic; None if that was not found out.
        """
        record = self.saver.loss_record(model_id)
        return None if record is None else bool(record["logistic"])

    def _told(self, pairs: Tensor) -> bool | None:
        said = getattr(self.task, "loss_is_logistic", None)
        if said is not None:
            return bool(said)
        found = is_logistic(pairs[:, 0], pairs[:, 1])
        softened = getattr(self.task, "loss_temperature", 1.0) != 1
        return None if softened and not found else found

    def _outputs_and_loss(self, batch: Batch, loss: Tensor, most: int) -> Tensor | None:
        # one after the other, since featurizing may have room for no more
        pairs: list[Tensor] = []
        for j in range(min(most, batch_size(batch))):
            output = self.computer.compute_outputs(select(batch, slice(j, j + 1)))
            if output is None:
                return None
            pairs.append(torch.cat([output.flatten(), loss[j].flatten().to(output)]))
        if not pairs:
            return torch.empty(0, 2, dtype=torch.float64)
        return torch.stack(pairs).to("cpu", torch.float64)
