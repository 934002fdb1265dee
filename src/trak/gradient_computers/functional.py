"""Exact per-sample gradients with `torch.func`: what every other computer must equal."""

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trak.batches import Batch, batch_size, leaves, normalize, select
from trak.errors import InputError
from trak.gradient_computers.abstract import SelectingGradientComputer
from trak.gradient_computers.capture import asking
from trak.gradient_computers.memory import is_out_of_memory
from trak.gradient_computers.surroundings import (
    forget_kept,
    own_parameters,
    undisturbed,
    without_graph,
)
from trak.modelout_functions import output_function
from trak.precision import without_autocast

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class FunctionalGradientComputer(SelectingGradientComputer):
    """`vmap(grad(f))` over the samples, for the selected parameters only.

    Some models cannot be run under `vmap`: those whose control flow depends on data
    (Hugging Face models of `transformers` 5 when they build attention masks), and those
    that use operators without a batching rule. They get one backward pass a sample from
    the first such batch on, with the same gradients; a log line says so and why. So do
    models that keep a second reference to a parameter (in a list, say, or a partial
    function), which `functional_call` does not swap: one sample of every shape is looked at
    for it.

    Arguments as for `SelectingGradientComputer`; the task's `get_output` takes one sample.
    """

    _without_vmap = False

    def load_model_params(self, model: nn.Module) -> None:
        """Takes over the model's present weights.

        Args:
            model: the model.
        """
        self.model = model
        forget_kept(model)
        self._looked_at: set[tuple[object, ...]] = set()
        self.func_weights = {n: p.detach() for n, p in model.named_parameters()}
        self.func_buffers = dict(model.named_buffers())

    def compute_per_sample_grad(self, batch: Any) -> dict[str, Tensor]:
        """Computes df(z_i)/dtheta for every sample of a batch.

        Args:
            batch: tuple or dict of tensors whose first axis is the sample axis.

        Returns:
            Name of each selected parameter to its gradients, `[b, *parameter.shape]`.
        """
        normal = normalize(batch)
        if not batch_size(normal):
            chosen = self._chosen().items()
            return {name: weight.new_zeros(0, *weight.shape) for name, weight in chosen}
        with undisturbed(self.model):
            return self._per_sample(normal)

    def _per_sample(self, normal: Batch) -> dict[str, Tensor]:
        if self._without_vmap:
            return self._one_by_one(normal)
        try:
            rows = self._vectorized(normal)
            kept = self._kept_elsewhere(normal)
            if kept is None:
                return rows
            logger.info(
                "The model reads %s by a reference of its own, which torch.func cannot "
                "swap; per-sample gradients are computed with one backward pass a sample "
                "instead.",
                kept,
            )
        except RuntimeError as error:
            if is_out_of_memory(error) or not self._blames_vmap(error, normal):
                raise
            logger.info(
                "torch.func.vmap cannot follow this model; per-sample gradients are "
                "computed with one backward pass a sample instead, which gives the "
                "same numbers. Reason: %s",
                str(error).strip().splitlines()[0],
            )
        self._without_vmap = True
        return self._one_by_one(normal)

    def _kept_elsewhere(self, batch: Batch) -> str | None:
        # a parameter that the output depends on also where others are given for all
        shape = tuple((part.shape[1:], part.dtype) for part in leaves(batch))
        if shape in self._looked_at:
            return None
        copies = {name: weight.detach() for name, weight in self._chosen().items()}
        sample = next(_samples(select(batch, slice(0, 1))))
        with self._own() as own, torch.enable_grad():
            output = self._output(copies, *sample)
            found: Any = (None,) * len(own)
            if output.requires_grad:
                with without_autocast():
                    found = torch.autograd.grad(
                        output, list(own.values()), allow_unused=True
                    )
        self._looked_at.add(shape)
        reached = (n for n, g in zip(own, found, strict=True) if g is not None)
        return next(reached, None)

    def _blames_vmap(self, error: RuntimeError, batch: Batch) -> bool:
        text = str(error)
        if "vmap" in text or "atching rule" in text:
            return True
        try:  # other messages, as of dtypes that differ: is it the model or vmap?
            self._one_by_one(select(batch, slice(0, 1)))
        except RuntimeError:
            return False
        return True

    def compute_loss_grad(self, batch: Any) -> Tensor:
        """Computes the loss weight Q of every sample of a batch.

        Args:
            batch: tuple or dict of tensors whose first axis is the sample axis.

        Returns:
            `[b]` or `[b, 1]`, as the task gives it.
        """
        state = self.func_weights, self.func_buffers
        task, normal = self.modelout_fn, normalize(batch)
        with undisturbed(self.model), own_parameters(self.model):
            return without_graph(
                self.model,
                lambda: task.get_out_to_loss_grad(self.model, *state, normal),
            )

    def compute_outputs(self, batch: Any, most: int) -> Tensor:
        """Computes the model output of samples of a batch.

        Args:
            batch: tuple or dict of tensors whose first axis is the sample axis.
            most: how many samples are asked for.

        Returns:
            Of the first `most` samples.
        """
        some = select(normalize(batch), slice(0, most))
        with undisturbed(self.model):
            return without_graph(self.model, lambda: self._outputs(some))

    def _outputs(self, batch: Batch) -> Tensor:
        if not self._without_vmap:
            with suppress(RuntimeError):  # whose reason the gradients tell
                return self._at_once(batch, lambda *sample: self._output({}, *sample))
        return torch.stack([self._output({}, *each) for each in _samples(batch)])

    @property
    def samples_at_once(self) -> int | None:
        """How many samples are best handed over together; None if it does not matter."""
        return 1 if self._without_vmap else None

    def _output(self, chosen: dict[str, Tensor], *sample: Any) -> Tensor:
        weights = {**self.func_weights, **chosen}
        get_output = output_function(self.modelout_fn)
        with own_parameters(self.model):
            output = get_output(self.model, weights, self.func_buffers, *sample)
        if output.numel() != 1:
            raise InputError(
                "get_output must return one number for one sample; "
                f"{type(self.modelout_fn).__name__} returned {tuple(output.shape)}."
            )
        return output.reshape(())

    def _chosen(self) -> dict[str, Tensor]:
        return {name: self.func_weights[name] for name in self.selected}

    def _vectorized(self, batch: Batch) -> dict[str, Tensor]:
        chosen = self._chosen()
        return self._at_once(batch, lambda *sample: self._gradient(chosen, *sample))

    @staticmethod
    def _at_once(batch: Batch, function: Callable[..., _T]) -> _T:
        sample = (batch,) if isinstance(batch, dict) else batch
        return torch.func.vmap(function, randomness="different")(*sample)

    def _gradient(self, chosen: dict[str, Tensor], *sample: Any) -> dict[str, Tensor]:
        def outputs(given: dict[str, Tensor]) -> Tensor:
            return self._output(given, *sample)

        found: Any = torch.func.vjp(outputs, chosen)
        output, pull = found
        with without_autocast():  # which is for forward passes
            return pull(torch.ones_like(output))[0]

    def _one_by_one(self, batch: Batch) -> dict[str, Tensor]:
        with self._own() as chosen:
            rows = [self._row(chosen, sample) for sample in _samples(batch)]
        if len(rows) == 1:  # a view: embeddings make these too large to copy idly
            stacked = [gradient.unsqueeze(0) for gradient in rows[0]]
        else:
            stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        return dict(zip(chosen, stacked, strict=True))

    @contextmanager
    def _own(self) -> Generator[dict[str, nn.Parameter]]:
        # the model's own parameters, which it may also read by another reference
        named = dict(self.model.named_parameters())
        chosen = {name: named[name] for name in self.selected}
        with asking(named.values(), chosen.values()):
            yield chosen

    def _row(
        self, chosen: dict[str, nn.Parameter], sample: tuple[Any, ...]
    ) -> list[Tensor]:
        with torch.enable_grad():
            output = self._output({**chosen}, *sample)
            found: tuple[Tensor | None, ...] = (None,) * len(chosen)
            if output.requires_grad:  # else this sample reaches none of them
                with without_autocast():
                    found = torch.autograd.grad(
                        output, list(chosen.values()), allow_unused=True
                    )
        pairs = zip(found, chosen.values(), strict=True)
        return [_or_zeros(gradient, weight.detach()) for gradient, weight in pairs]


def _samples(batch: Batch) -> Iterator[tuple[Any, ...]]:
    # each without its batch axis
    for j in range(batch_size(batch)):
        one = select(batch, slice(j, j + 1))
        if isinstance(one, dict):
            yield ({name: part[0] for name, part in one.items()},)
        else:
            yield tuple(part[0] for part in leaves(one))


def _or_zeros(gradient: Tensor | None, weight: Tensor) -> Tensor:
    return weight.new_zeros(weight.shape) if gradient is None else gradient.to_dense()
