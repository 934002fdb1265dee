"""A batch of examples to rows of projected gradients."""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trak.batches import Batch, batch_size, select
from trak.blocks import Block, Sink
from trak.errors import InputError, NumericalError
from trak.gradient_computers import AbstractGradientComputer
from trak.gradient_computers.capture import InputChangedError
from trak.gradient_computers.memory import is_out_of_memory
from trak.modelout_functions.abstract import (
    counted,
    one_a_sample,
    sample_weights_function,
)
from trak.pipeline.lengths import Trimmer
from trak.pipeline.losses import LossWatch
from trak.pipeline.memory import MicroBatches
from trak.precision import apart_from_autocast, without_autocast
from trak.projectors import (
    AbstractProjector,
    BlockProjector,
    LeadingProjector,
    NoOpProjector,
)
from trak.whitening import Moments, Whitening

logger = logging.getLogger(__name__)

GRADIENT_BYTES = 1 << 30
"""Of per-sample gradients that exist at once."""
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class RowMaker:
    """Wires a gradient computer to a projector.

    Attributes:
        model: the model.
        computer: emits gradients.
        projector: consumes them.
        layout: name to number of scalars of the selected parameters.
        scale: rows are divided by it (the square root of the number of parameters).
        device: where to project.
        losses: is shown the first training examples.
        trimmer: leaves padding out.
        micro: splits batches that do not fit into memory.
        whitenings: checkpoint to what is done to its gradients before they are projected;
            None where the projector does it.
    """

    model: nn.Module
    computer: AbstractGradientComputer
    projector: AbstractProjector
    layout: Mapping[str, int]
    scale: float
    device: torch.device
    losses: LossWatch
    trimmer: Trimmer
    micro: MicroBatches = field(default_factory=MicroBatches)
    whitenings: dict[int, Whitening | None] = field(
        default_factory=dict[int, Whitening | None]
    )

    def rows(
        self, batch: Batch, model_id: int, numbers: list[int], *, with_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Projected gradients, `P^T grad f / sqrt(p)`, and the loss weights Q.

        Park et al. 2023, Sec. 3.2, Steps 1 and 2; Q is of Step 3.

        Batches are worked through in pieces, so that no more than 1 GiB of per-sample
        gradients exist at once, and in smaller ones where memory runs out all the same.

        Args:
            batch: a normalized batch.
            model_id: the checkpoint.
            numbers: the samples' row numbers, for messages.
            with_weights: compute Q too.

        Returns:
            `[b, k]`, finite, float32 or float64, and what `loss_weights` gives, or None.
        """
        if not batch_size(batch):
            blank = self.blank(0, self.projector.proj_dim)
            return blank, self.blank(0, self.loss_columns) if with_weights else None

        def project(piece: Batch, own: list[int]) -> Tensor:
            del own
            return self._project(piece, model_id) / self.scale

        return self.worked(batch, model_id, numbers, project, with_weights=with_weights)

    def rows_by(
        self, projector: AbstractProjector, batch: Batch, model_id: int
    ) -> tuple[Tensor, Tensor | None]:
        """Rows by another projector than the run's, not whitened, and the loss weights Q.

        Args:
            projector: makes the rows, of blocks.
            batch: a normalized batch of at least one sample.
            model_id: the checkpoint.

        Returns:
            `[b, k]`, finite, not scaled, and what `loss_weights` gives.
        """

        def project(piece: Batch, own: list[int]) -> Tensor:
            del own
            return self.with_copies(
                lambda: self.projected(projector, piece, model_id, None)
            )

        numbers = list(range(batch_size(batch)))
        return self.worked(batch, model_id, numbers, project, with_weights=True)

    def whiten(self, model_id: int, whitening: Whitening) -> None:
        """Whitens the rows of one checkpoint, and of no other, from now on.

        Args:
            model_id: the checkpoint.
            whitening: of its gradients.
        """
        self.whitenings.clear()
        self.whitenings[model_id] = whitening

    def keep(self, model_id: int, basis: Mapping[str, NDArray[Any]]) -> None:
        """The same by the coordinates that a `LeadingProjector` keeps.

        Args:
            model_id: the checkpoint.
            basis: these coordinates, whitening included.
        """
        if isinstance(self.projector, LeadingProjector):
            self.projector.use(basis, model_id)
        self.whitenings.clear()
        self.whitenings[model_id] = None

    @contextmanager
    def making(
        self, batch: Batch, model_id: int, numbers: list[int], *, training: bool
    ) -> Generator[tuple[Tensor, Tensor | None]]:
        """Makes rows that belong to the store once the caller has committed them.

        Args:
            batch: a normalized batch.
            model_id: the checkpoint.
            numbers: the samples' row numbers.
            training: training examples; else targets.

        Yields:
            `[b, k]` and, for training examples, what `loss_weights` gives.
        """
        yield self.rows(batch, model_id, numbers, with_weights=training)

    def worked(
        self,
        batch: Batch,
        model_id: int,
        numbers: list[int],
        project: Callable[[Batch, list[int]], Tensor],
        *,
        with_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Works through a batch in pieces that fit into memory.

        Args:
            batch: a normalized batch of at least one sample.
            model_id: the checkpoint.
            numbers: the samples' row numbers, for messages.
            project: what to do with a piece and its row numbers; gives rows that must be
                finite.
            with_weights: compute Q too.

        Returns:
            What `project` gave, in the batch's order, and what `loss_weights` gives, or
            None.
        """

        def make(bucket: Batch, own: list[int]) -> Tensor:
            def work(piece: Batch, start: int) -> Tensor:
                its = own[start : start + batch_size(piece)]
                part = project(piece, its)
                self._check(part, piece, model_id, its)
                if not with_weights:
                    return part
                # right after the gradients, whose forward pass may answer for these
                outputs = self.losses.outputs(piece, model_id)
                if outputs is None:
                    self.losses.keep(piece, model_id, its)
                weights = self.finite_weights(piece, its)
                if outputs is not None:
                    self.losses.look(piece, outputs, weights, model_id, its)
                return torch.cat([part, weights.to(part)], dim=1)

            return self.micro.rows(bucket, work, self._most)

        try:
            made = self._by_length(batch, model_id, numbers, make)
        except Exception as error:
            if not is_out_of_memory(error) and not isinstance(error, NumericalError):
                # the task's own checks say more, and see the whole batch
                self.computer.compute_loss_grad(batch)
            raise
        return self.parted(made) if with_weights else (made, None)

    def with_copies(self, attempt: Callable[[], _T]) -> _T:
        """Tries again, with copies of layers' inputs, where the model changed one.

        Args:
            attempt: computes gradients; starts over when it is called again.

        Returns:
            What it returned.

        Raises:
            InputChangedError: if it changed one again.
        """
        try:
            return attempt()
        except InputChangedError as error:
            if not self.computer.copy_inputs():
                raise
            logger.info("%s Inputs are copied, which takes memory.", error)
            return attempt()

    def parted(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Takes rows apart from the loss weights beside them.

        Args:
            rows: `[b, k + c]`, with what `loss_weights` gives as the last columns.

        Returns:
            `[b, k]` and `[b, c]`.
        """
        return rows[:, : -self.loss_columns], rows[:, -self.loss_columns :]

    def moments(self, batch: Batch) -> Moments:
        """What whitening needs to know of a batch's gradients.

        Args:
            batch: a normalized batch.

        Returns:
            Its sums.
        """
        return self.moments_and_rows(batch, 0, None)[0]

    def moments_and_rows(
        self, batch: Batch, model_id: int, projector: AbstractProjector | None
    ) -> tuple[Moments, Tensor]:
        """What whitening needs to know, and rows that are not whitened, in one pass.

        Args:
            batch: a normalized batch.
            model_id: the checkpoint.
            projector: makes the rows, of blocks; None for no rows.

        Returns:
            The batch's sums, and its rows with what `loss_weights` gives as last columns,
            `[b, k + c]`; `[b, 0]` without a projector.
        """
        total = Moments()
        if not batch_size(batch):
            return total, torch.zeros(0, 0, device="cpu")

        def work(piece: Batch, start: int) -> Tensor:
            size = batch_size(piece)

            def attempt() -> tuple[Moments, Tensor]:
                # sums of its own, since an attempt may fail half way
                found = Moments()
                with found.adding(size) as sink:
                    if projector is not None:
                        made = self.projected(projector, piece, model_id, None, sink)
                        return found, made
                    self.computer.run(piece, apart_from_autocast(sink), self.layout)
                    return found, torch.zeros(size, 0, device="cpu")

            found, rows = self.with_copies(attempt)
            if projector is not None:
                numbers = [f"{start + j} of the batch" for j in range(size)]
                self._check(rows, piece, model_id, numbers)
                weights = self.finite_weights(piece, numbers)
                rows = torch.cat([rows, weights.to(rows)], dim=1)
            total.merge(found)
            return rows

        return total, self.micro.rows(batch, work, self._most)

    def _by_length(
        self,
        batch: Batch,
        model_id: int,
        numbers: list[int],
        make: Callable[[Batch, list[int]], Tensor],
    ) -> Tensor:
        # rows in the order of the batch, whatever the order in which they are made
        buckets = self.trimmer.buckets(batch, model_id)
        made = [make(bucket, [numbers[j] for j in own]) for own, bucket in buckets]
        if len(made) == 1:
            return made[0]
        order = torch.as_tensor([j for own, _ in buckets for j in own], device="cpu")
        rows = torch.cat(made)
        return rows[order.argsort().to(rows.device)]

    def _most(self) -> int:
        # asked anew each time: the first batch may change the computer's mind
        width = sum(self.layout.values())
        projector = self.projector
        if isinstance(projector, BlockProjector) and by_blocks(projector):
            formed = projector.forms_gradients
            width = self.computer.scalars_at_once(self.layout, formed=formed)
        fitting = max(1, GRADIENT_BYTES // max(1, 4 * width))
        return min(fitting, self.computer.samples_at_once or fitting)

    def _check(
        self, part: Tensor, piece: Batch, model_id: int, numbers: Sequence[int | str]
    ) -> None:
        if bool(torch.isfinite(part.sum(dim=1)).all()):
            return
        finite = torch.isfinite(part).all(dim=1)  # a sum of finite numbers may be infinite
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            where = self._first_bad_parameter(select(piece, slice(bad, bad + 1)))
            raise NumericalError(
                f"The gradient of sample {numbers[bad]} is not finite at "
                f"model_id={model_id}{where}. Nothing of this batch was stored. "
                "Look at the sample (NaN in its input?) and at the weights."
            )

    @property
    def loss_columns(self) -> int:
        """How many numbers `loss_weights` gives of an example: 2 with sample weights."""
        return 1 if sample_weights_function(self.computer.modelout_fn) is None else 2

    def loss_weights(self, batch: Batch) -> Tensor:
        """Q of a batch, and how much its samples count, where the task says so.

        Args:
            batch: a normalized batch.

        Returns:
            `[b, 1]`; of a task with `get_sample_weights` `[b, 2]`, Q times these and these.
        """
        size = batch_size(batch)
        found: Any = self.computer.compute_loss_grad(batch)
        loss = one_a_sample(found, size, "get_out_to_loss_grad")
        counting = sample_weights_function(self.computer.modelout_fn)
        if counting is None:
            return loss
        loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
        counts = counted(counting(batch), size).to(loss)
        return torch.cat([loss * counts, counts], dim=1)

    def finite_weights(self, batch: Batch, numbers: Sequence[int | str]) -> Tensor:
        """Q of a batch, all of which must be finite.

        Args:
            batch: a normalized batch.
            numbers: the samples' row numbers, or what to call them in a message.

        Returns:
            As `loss_weights`.

        Raises:
            NumericalError: names the first sample whose Q is not.
        """
        weights = self.loss_weights(batch)
        finite = torch.isfinite(weights).all(dim=1)
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise NumericalError(
                f"The loss weight Q of sample {numbers[bad]} is not finite: the model's "
                "output for it is NaN or infinite. Nothing of this batch was stored."
            )
        return weights

    def blank(self, size: int, width: int) -> Tensor:
        """Rows of zeros.

        Args:
            size: how many.
            width: of each; 0 for the number of selected parameters.

        Returns:
            `[size, width]` in the dtype that rows are made in, on the projector's device.
        """
        parameters = dict(self.model.named_parameters())
        double = any(parameters[name].dtype is torch.float64 for name in self.layout)
        width = width or sum(self.layout.values())
        dtype = torch.float64 if double else torch.float32
        return torch.zeros((size, width), dtype=dtype, device=self.device)

    def _project(self, batch: Batch, model_id: int) -> Tensor:
        projector, whitening = self.projector, self.whitenings.get(model_id)
        if by_blocks(projector):
            return self.with_copies(
                lambda: self.projected(projector, batch, model_id, whitening)
            )
        grads = self.computer.compute_per_sample_grad(batch)
        if whitening is not None:
            grads = whitening.whole(grads, self.layout)
        with without_autocast():
            rows = projector.project(grads, model_id=model_id).detach()
        expected = (batch_size(batch), projector.proj_dim or sum(self.layout.values()))
        if tuple(rows.shape) != expected:
            raise InputError(
                f"{type(projector).__name__}.project returned shape "
                f"{tuple(rows.shape)}; expected {expected}."
            )
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return rows.to(self.device, dtype)

    def projected(
        self,
        projector: AbstractProjector,
        batch: Batch,
        model_id: int,
        whitening: Whitening | None,
        also: Sink | None = None,
    ) -> Tensor:
        """Rows of a piece of a batch by a projector that takes blocks.

        Args:
            projector: makes the rows.
            batch: the piece.
            model_id: the checkpoint.
            whitening: is done to the gradients before.
            also: is given every block, too, before it is whitened.

        Returns:
            `[b, k]`, not scaled.
        """
        out = self.blank(batch_size(batch), projector.proj_dim)
        with self.gathering(projector, out, model_id, whitening) as sink:

            @apart_from_autocast
            def both(block: Block) -> None:
                if also is not None:
                    also(block)
                sink(block)

            self.computer.run(batch, both, self.layout)
        return out

    def gathering(
        self,
        projector: AbstractProjector,
        out: Tensor,
        model_id: int,
        whitening: Whitening | None,
    ) -> AbstractContextManager[Sink]:
        """A sink of blocks that become rows.

        Args:
            projector: makes the rows; one that does not take blocks is not asked.
            out: zeros, `[b, k]`, for the rows.
            model_id: the checkpoint.
            whitening: is done to the gradients before.

        Returns:
            Gives the sink; the rows are there when it is left.
        """
        if isinstance(projector, BlockProjector):
            return projector.gathering(out, model_id, whitening)
        return NoOpProjector().gathering(out, self.layout, whitening)

    def _first_bad_parameter(self, sample: Batch) -> str:
        bad: list[str] = []

        def look(block: Block) -> None:
            if not torch.isfinite(block.dense().gradient).all():
                bad.append(block.name)

        self.computer.run(sample, look, self.layout)
        return f", first in parameter {bad[0]!r}" if bad else ""


def by_blocks(projector: AbstractProjector) -> bool:
    """Whether gradients go to a projector block by block, and not multiplied out.

    Args:
        projector: any.

    Returns:
        False for projectors of the user's own.
    """
    if isinstance(projector, BlockProjector):
        return projector.layout is not None
    return type(projector) is NoOpProjector
