"""Finds out, from a checkpoint's first examples, which loss it was trained with.

Whether it is the logistic one, the automatic ridge and the strength of whitening depend
on; of a squared one the ridge also asks for outputs.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.batches import Batch, batch_size, select
from trak.gradient_computers import AbstractGradientComputer
from trak.pipeline.chance import warn_of_chance
from trak.pipeline.kept_outputs import OutputKeeper
from trak.pipeline.squared import slope_of
from trak.savers import AbstractSaver
from trak.score_computers.logistic import is_logistic, weights_in
from trak.score_computers.losses import Losses, losses_beside

logger = logging.getLogger(__name__)

_ENOUGH, _MOST = 16, 64  # examples
_MOSTLY = 0.75  # of the examples; residuals of regressions have either sign


@dataclass(frozen=True, kw_only=True)
class LossWatch:
    """Looks at training examples as they come, until enough were seen.

    Attributes:
        task: may say itself, by an attribute `loss_is_logistic`.
        computer: computes model outputs.
        saver: keeps what was found.
        keeper: keeps outputs where the loss is a squared one.
        seen: checkpoint to outputs and loss weights, `[b, 2]`.
        slopes: checkpoint to what its record says of Q's slope.
    """

    task: Any
    computer: AbstractGradientComputer
    saver: AbstractSaver
    keeper: OutputKeeper
    seen: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])
    slopes: dict[int, float | None] = field(default_factory=dict[int, float | None])

    def outputs(self, batch: Batch, model_id: int) -> Tensor | None:
        """Outputs to look at, right after the gradients, whose forward pass may answer.

        Args:
            batch: a normalized batch.
            model_id: the checkpoint, whose weights are loaded.

        Returns:
            Of some of the first samples; None where enough were seen.
        """
        if not self.seen and batch_size(batch):
            warn_of_chance(self.computer, batch)
        missing = _ENOUGH - sum(map(len, self.seen.setdefault(model_id, [])))
        return self.computer.compute_outputs(batch, missing) if missing > 0 else None

    def look(
        self,
        batch: Batch,
        outputs: Tensor,
        loss: Tensor,
        model_id: int,
        numbers: list[int] | None,
    ) -> None:
        """Takes some examples into account.

        Args:
            batch: a normalized batch.
            outputs: what `outputs` gave of it, `[c]`.
            loss: of all its samples, as `RowMaker.loss_weights`.
            model_id: the checkpoint, whose weights are loaded.
            numbers: row numbers of the samples; None if their rows are stored.
        """
        pairs = _pairs(outputs, loss)
        if not any(map(len, self.seen[model_id])):
            _tell_of_nan(pairs[:, 0], model_id)
        self.seen[model_id].append(pairs)
        if self.saver.checkpoint_digest(model_id) is None:
            return  # a trial has no checkpoint in the store
        record = self._record(model_id)
        if "logistic" not in record:
            self._record_more(batch, [*record.get("seen", []), *pairs.tolist()], model_id)
        if numbers is not None:
            self._keep_first(batch, outputs, model_id, numbers)

    def keep(self, batch: Batch, model_id: int, numbers: list[int]) -> None:
        """Keeps outputs of a squared loss, right after the gradients, as for `outputs`.

        Args:
            batch: a normalized batch.
            model_id: the checkpoint, whose weights are loaded.
            numbers: row numbers of the samples.
        """
        if self.slope(model_id) is not None:
            self.keeper.keep(batch, numbers, model_id)

    def slope(self, model_id: int) -> float | None:
        """The slope of Q in the output.

        Args:
            model_id: the checkpoint.

        Returns:
            That of a squared loss; None of others, and where it was not found out.
        """
        if model_id not in self.slopes:
            record = self._record(model_id)
            if "logistic" not in record:
                return None
            self.slopes[model_id] = record.get("slope")
        return self.slopes[model_id]

    def _record_more(
        self, batch: Batch, seen: Sequence[Sequence[float]], model_id: int
    ) -> None:
        # processes with few examples each add theirs up
        every = seen[:_MOST]
        known = torch.tensor(every, device="cpu").double()
        found = self._told(known) if len(every) >= _ENOUGH else None
        told: dict[str, Any] = {"seen": every} if found is None else {"logistic": found}
        if found is False:
            _tell_of_weights(known)
            slope = None if self.words else slope_of(self.computer, batch)
            told |= {} if slope is None else {"slope": slope}
        self.saver.record_loss(model_id, told)

    def _keep_first(
        self, batch: Batch, outputs: Tensor, model_id: int, numbers: list[int]
    ) -> None:
        # also before it is known whether anybody will ask for them
        record = self._record(model_id)
        if "logistic" in record:
            self.keep(batch, model_id, numbers)
        elif len(record.get("seen", [])) < _ENOUGH:
            self.keeper.put(np.asarray(numbers[: len(outputs)]), outputs, model_id)

    def look_again(
        self, batch: Batch, loss: NDArray[Any], model_id: int, *, whole: bool
    ) -> None:
        """Takes stored examples into account, where what they once told is lost.

        Args:
            batch: a normalized batch of stored examples.
            loss: their stored Q, and how much they count if that differs, `[b, 1]` or
                `[b, 2]`.
            model_id: the checkpoint, whose weights are loaded.
            whole: whether all of its rows are stored, so that no others will tell.
        """
        missing = _ENOUGH - sum(map(len, self.seen.get(model_id, [])))
        if not whole or missing <= 0 or "logistic" in self._record(model_id):
            return
        outputs = self.outputs(batch, model_id)
        if outputs is not None:
            known = torch.from_numpy(np.array(loss))
            self.look(batch, outputs, known, model_id, None)

    def tell(self, batches: list[Batch], losses: list[Tensor]) -> bool | None:
        """Told from some batches alone, by the weights that are loaded.

        Args:
            batches: normalized batches.
            losses: of each, as `RowMaker.loss_weights`.

        Returns:
            Whether the loss is logistic; None if that cannot be told.
        """
        parts: list[Tensor] = []
        for batch, loss in zip(batches, losses, strict=True):
            missing = _ENOUGH - sum(map(len, parts))
            if missing > 0:
                some = select(batch, slice(0, missing))
                outputs = self.computer.compute_outputs(some, missing)
                if outputs is None:
                    return None
                parts.append(_pairs(outputs, loss))
        return self._told(torch.cat(parts)) if parts else None

    def known(self, model_id: int) -> bool | None:
        """What was found of a checkpoint.

        Args:
            model_id: the checkpoint.

        Returns:
            Whether its loss is logistic; None if that was not found out.
        """
        return self._record(model_id).get("logistic")

    def together(self, model_ids: Iterable[int]) -> bool | None:
        """One answer for checkpoints whose scores are averaged: they share a task.

        Args:
            model_ids: the checkpoints.

        Returns:
            False where one checkpoint's examples contradict a logistic loss, since others
            can only fail to; None if nothing was found out.
        """
        found = {model_id: self.known(model_id) for model_id in model_ids}
        if not {True, False} <= set(found.values()):
            return next((known for known in found.values() if known is not None), None)
        logger.warning(
            "The loss looks logistic at checkpoints %s and does not at %s, by the outputs "
            "and loss weights Q of their first examples. It is taken for not logistic at "
            "all of them, which ridge and weights by curvature depend on. Say which it is "
            "by loss_is_logistic = True or False in the task, and use a new save_dir; "
            "with a smoothed, weighted or focal cross entropy, 1 - p as Q and True.",
            [i for i, known in found.items() if known],
            [i for i, known in found.items() if known is False],
        )
        return False

    def _record(self, model_id: int) -> Mapping[str, Any]:
        return self.saver.loss_record(model_id) or {}

    @property
    def words(self) -> bool:
        """Whether the task says that Q is a mean over the words of a text."""
        return bool(getattr(self.task, "loss_is_of_words", False))

    def _told(self, pairs: Tensor) -> bool | None:
        said = getattr(self.task, "loss_is_logistic", None)
        if said is not None:
            return bool(said)
        found = is_logistic(pairs[:, 0], pairs[:, 1])
        softened = getattr(self.task, "loss_temperature", 1.0) != 1
        return None if softened and not found else found


def tell_of_strays(losses: Losses, model_id: int) -> None:
    """Says so where a few loss weights are the reason for other settings, or all are 0.

    Args:
        losses: what `trak.pipeline.sources.loss_sizes` gave.
        model_id: the checkpoint.
    """
    loss = losses.own
    if not bool(loss.any()):
        logger.warning(
            "Q of model_id=%d is 0 for all training examples, and so are its scores: the "
            "model is certain about all of them, or get_out_to_loss_grad rounds (1 - p in "
            "float32). Take an earlier checkpoint, a Q that does not vanish "
            "(torch.sigmoid(-f) with f the output, for a hinge loss, too), or a method "
            "that asks for the sign of Q alone (scores(method='cosine'), 'relatif', "
            "'unit_norm').",
            model_id,
        )
    inside = (loss >= 0) & (loss <= 1)
    share = float(inside.double().mean())
    if _MOSTLY <= share < 1:
        strays = loss[~inside]
        logger.info(
            "Q of model_id=%d is between 0 and 1 but for %.2g %% of the examples (%.3g to "
            "%.3g), so that the loss is treated as the squared one: no weights by curvature"
            ", another automatic ridge. With a smoothed, weighted or focal cross entropy, "
            "1 - p as Q makes better scores (docs/custom-tasks.md).",
            model_id,
            100 * (1 - share),
            float(strays.min()),
            float(strays.max()),
        )


def _tell_of_nan(outputs: Tensor, model_id: int) -> None:
    # with gradients that are finite, or else there would be an error
    found = int(outputs.isnan().sum())
    if found:
        logger.warning(
            "Model outputs of %d of the first %d samples are NaN at model_id=%d, though "
            "their gradients are finite: scores may have the wrong sign. Does the task "
            "take the log of a negative number (log(p / (1 - p)) with p = exp(-loss), of a "
            "loss below 0: take minus the loss, and Q = 1), or divide by 0?",
            found,
            len(outputs),
            model_id,
        )


def _tell_of_weights(pairs: Tensor) -> None:
    found = weights_in(pairs[:, 0], pairs[:, 1])
    if found:
        logger.warning(
            "Loss weights Q are those of a logistic loss times %s: weights by class? Then "
            "let get_out_to_loss_grad leave them out and get_sample_weights(batch) return "
            "them, or use class_weights of the built-in tasks, and a new save_dir. As it "
            "is, curvature and automatic ridge do not fit (docs/custom-tasks.md).",
            ", ".join(f"{each:.3g}" for each in found),
        )


def _pairs(outputs: Tensor, loss: Tensor) -> Tensor:
    own = losses_beside(loss).own.flatten()
    pair = [outputs.detach().flatten(), own[: outputs.numel()]]
    return torch.stack([part.to("cpu", torch.float64) for part in pair], dim=1)
