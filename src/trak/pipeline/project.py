"""A batch of examples to rows of projected gradients."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trak.batches import Batch, batch_size, select
from trak.blocks import Block
from trak.errors import InputError, NumericalError
from trak.gradient_computers import AbstractGradientComputer
from trak.projectors import AbstractProjector, BlockProjector

_GRADIENT_BYTES = 1 << 30


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
    """

    model: nn.Module
    computer: AbstractGradientComputer
    projector: AbstractProjector
    layout: Mapping[str, int]
    scale: float
    device: torch.device

    def rows(self, batch: Batch, model_id: int, numbers: list[int]) -> Tensor:
        """Projected gradients, `P^T grad f / sqrt(p)`.

        Park et al. 2023, Sec. 3.2, Steps 1 and 2.

        Large models are worked through in smaller batches, so that no more than 1 GiB of
        per-sample gradients exist at once.

        Args:
            batch: a normalized batch.
            model_id: the checkpoint.
            numbers: the samples' row numbers, for messages.

        Returns:
            `[b, k]`, finite, float32 or float64.

        Raises:
            NumericalError: names the first sample and parameter whose gradient is not
                finite.
        """
        total = batch_size(batch)
        fitting = max(1, _GRADIENT_BYTES // (4 * sum(self.layout.values())))
        parts: list[Tensor] = []
        start = 0
        while start < total:
            # asked anew each time: the first batch may change the computer's mind
            step = min(fitting, self.computer.samples_at_once or fitting)
            piece = select(batch, slice(start, start + step))
            part = self._project(piece, model_id) / self.scale
            finite = torch.isfinite(part).all(dim=1)
            if not finite.all():
                bad = int((~finite).nonzero()[0])
                where = self._first_bad_parameter(select(piece, slice(bad, bad + 1)))
                raise NumericalError(
                    f"The gradient of sample {numbers[start + bad]} is not finite at "
                    f"model_id={model_id}{where}. Nothing of this batch was stored. "
                    "Look at the sample (NaN in its input?) and at the weights."
                )
            parts.append(part)
            start += len(part)
        return torch.cat(parts)

    def loss_weights(self, batch: Batch, numbers: list[int]) -> Tensor:
        """The loss weight Q of every sample (Park et al. 2023, Sec. 3.2, Step 3).

        Args:
            batch: a normalized batch.
            numbers: the samples' row numbers, for messages.

        Returns:
            `[b, 1]`, finite.

        Raises:
            InputError: if the task does not give one number a sample.
            NumericalError: names the first sample whose Q is not finite.
        """
        weights = self.computer.compute_loss_grad(batch)
        if weights.numel() != batch_size(batch):
            raise InputError(
                "get_out_to_loss_grad must return one number a sample, "
                f"[{batch_size(batch)}, 1]; got shape {tuple(weights.shape)}."
            )
        weights = weights.detach().reshape(-1, 1)
        finite = torch.isfinite(weights).flatten()
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise NumericalError(
                f"The loss weight Q of sample {numbers[bad]} is not finite: the model's "
                "output for it is NaN or infinite. Nothing of this batch was stored."
            )
        return weights

    def _project(self, batch: Batch, model_id: int) -> Tensor:
        projector = self.projector
        if isinstance(projector, BlockProjector) and projector.layout is not None:
            parameters = dict(self.model.named_parameters())
            double = any(parameters[name].dtype is torch.float64 for name in self.layout)
            shape = (batch_size(batch), projector.proj_dim)
            dtype = torch.float64 if double else torch.float32
            out = torch.zeros(shape, dtype=dtype, device=self.device)
            with projector.gathering(out, model_id) as sink:
                self.computer.run(batch, sink, self.layout)
            return out
        grads = self.computer.compute_per_sample_grad(batch)
        rows = projector.project(grads, model_id=model_id).detach()
        expected = (batch_size(batch), projector.proj_dim or sum(self.layout.values()))
        if tuple(rows.shape) != expected:
            raise InputError(
                f"{type(projector).__name__}.project returned shape "
                f"{tuple(rows.shape)}; expected {expected}."
            )
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return rows.to(self.device, dtype)

    def _first_bad_parameter(self, sample: Batch) -> str:
        bad: list[str] = []

        def look(block: Block) -> None:
            if not torch.isfinite(block.dense().gradient).all():
                bad.append(block.name)

        self.computer.run(sample, look, self.layout)
        return f", first in parameter {bad[0]!r}" if bad else ""
