"""Exact per-sample gradients by plain autograd, one backward pass a sample."""

from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import Batch, batch_size, normalize, select
from trak.errors import AttributionError, InputError
from trak.gradient_computers.abstract import SelectingGradientComputer
from trak.gradient_computers.memory import is_out_of_memory
from trak.gradient_computers.surroundings import forget_kept, undisturbed, without_graph
from trak.modelout_functions import output_function
from trak.precision import without_autocast
from trak.utils import parameters_to_vector


class IterativeGradientComputer(SelectingGradientComputer):
    """One forward pass a batch, then one backward pass a sample.

    For tasks whose `get_output(model, None, None, *batch)` takes a whole batch, runs the
    module itself and returns one output a sample, such as
    `IterativeImageClassificationModelOutput`. Uses no `torch.func`.

    Arguments as for `SelectingGradientComputer`.
    """

    def load_model_params(self, model: nn.Module) -> None:
        """Takes over the model's present weights.

        Args:
            model: the model.
        """
        self.model = model
        forget_kept(model)
        named = dict(model.named_parameters())
        self.model_params = [named[name] for name in self.selected]

    def compute_per_sample_grad(self, batch: Any) -> Tensor:
        """Computes df(z_i)/dtheta for every sample of a batch.

        A task that does not take a whole batch, or does not return one output a sample, is
        an `InputError`.

        Args:
            batch: tuple or dict of tensors whose first axis is the sample axis.

        Returns:
            Rows in the order of the selected parameters, `[b, p]`.
        """
        normal = normalize(batch)
        with undisturbed(self.model):
            return self._rows(normal)

    def _rows(self, normal: Batch) -> Tensor:
        parts = (normal,) if isinstance(normal, dict) else normal
        frozen = [p for p in self.model_params if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            outputs = self._outputs(parts)
            if outputs.shape != (batch_size(normal),):
                raise InputError(
                    "IterativeGradientComputer needs a task whose get_output takes a "
                    "batch and returns one output a sample, "
                    f"[{batch_size(normal)}]; {type(self.modelout_fn).__name__} "
                    f"returned {tuple(outputs.shape)}."
                )
            with torch.enable_grad():
                each = outputs.unbind()
            return torch.stack([self._row(output) for output in each])
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    def _outputs(self, parts: tuple[Any, ...]) -> Tensor:
        get_output = output_function(self.modelout_fn)
        try:
            with torch.enable_grad():
                return get_output(self.model, None, None, *parts)
        except RuntimeError as error:
            if isinstance(error, AttributionError) or is_out_of_memory(error):
                raise
            raise InputError(
                f"get_output of {type(self.modelout_fn).__name__} fails on a whole batch "
                f"({error}). IterativeGradientComputer calls get_output(model, None, None, "
                "*batch): take a task that is made for it, such as "
                "'iterative_image_classification', or leave gradient_computer out."
            ) from error

    def compute_loss_grad(self, batch: Any) -> Tensor:
        """Computes the loss weight Q of every sample of a batch.

        Args:
            batch: tuple or dict of tensors whose first axis is the sample axis.

        Returns:
            `[b]` or `[b, 1]`, as the task gives it.
        """
        task, normal = self.modelout_fn, normalize(batch)
        with undisturbed(self.model):
            return without_graph(
                self.model,
                lambda: task.get_out_to_loss_grad(self.model, None, None, normal),
            )

    def compute_outputs(self, batch: Any, most: int) -> Tensor:
        """Computes the model output of samples of a batch, without gradients.

        Args:
            batch: tuple or dict of tensors whose first axis is the sample axis.
            most: how many samples are asked for.

        Returns:
            Of the first `most` samples.
        """
        normal = select(normalize(batch), slice(0, most))
        parts = (normal,) if isinstance(normal, dict) else normal
        outputs = output_function(self.modelout_fn)
        with undisturbed(self.model):
            return without_graph(
                self.model, lambda: outputs(self.model, None, None, *parts)
            )

    def _row(self, output: Tensor) -> Tensor:
        with without_autocast():  # which is for forward passes
            found = torch.autograd.grad(
                output, self.model_params, retain_graph=True, allow_unused=True
            )
        pairs = zip(found, self.model_params, strict=True)
        return parameters_to_vector(
            p.new_zeros(p.shape) if g is None else g.to_dense()  # pyright: ignore[reportUnnecessaryComparison]
            for g, p in pairs
        )
