"""What every gradient computer offers, and the ways from gradients to blocks."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trak.blocks import DenseBlock, Sink
from trak.errors import InputError
from trak.gradient_computers.coverage import Coverage

Gradients = Tensor | dict[str, Tensor]


class AbstractGradientComputer(ABC):
    """Per-sample gradients of the model output.

    A subclass of one's own takes the constructor arguments below (and `grad_wrt`) and
    defines `load_model_params`, `compute_per_sample_grad` and `compute_loss_grad`.

    Attributes:
        model: the model.
        modelout_fn: the task.
        grad_dim: number of selected parameters `p`.
        dtype: dtype in which rows will be stored; gradients keep the model's.
        device: where rows will be projected.
    """

    @abstractmethod
    def __init__(
        self,
        model: nn.Module,
        task: Any,
        grad_dim: int | None = None,
        dtype: torch.dtype | None = torch.float16,
        device: str | torch.device | None = None,
    ) -> None:
        self.model = model
        self.modelout_fn = task
        self.grad_dim = grad_dim
        self.dtype = dtype
        self.device = device

    @abstractmethod
    def load_model_params(self, model: nn.Module) -> None:
        """Takes over the model's present weights.

        Args:
            model: the model.
        """

    @abstractmethod
    def compute_per_sample_grad(self, batch: Any) -> Gradients:
        """Computes df(z_i)/dtheta for every sample of a batch.

        Args:
            batch: tensors whose first axis is the sample axis.

        Returns:
            Name to gradient `[b, ...]`, or rows `[b, p]`.
        """

    @abstractmethod
    def compute_loss_grad(self, batch: Any) -> Tensor:
        """Computes the loss weight Q of every sample of a batch.

        Args:
            batch: tensors whose first axis is the sample axis.

        Returns:
            `[b]` or `[b, 1]`.
        """

    def compute_outputs(self, batch: Any, most: int) -> Tensor | None:
        """Computes the model output of samples of a batch, without gradients.

        Args:
            batch: tensors whose first axis is the sample axis.
            most: how many samples are asked for.

        Returns:
            Of the first `most` samples at least; None from computers that cannot tell.
        """
        del batch, most
        return None

    def recall(self, weights: str) -> None:
        """Goes on with what was found out about the weights when they were loaded before.

        Args:
            weights: a digest of those that were loaded just now.
        """
        del weights

    def learn_from(self, other: "AbstractGradientComputer") -> None:
        """Takes over what another one found out, for `recall`.

        Args:
            other: of the same model and task.
        """
        del other

    @property
    def remembers_outputs(self) -> bool:
        """Whether `compute_outputs` costs nothing, right after the batch's gradients."""
        return False

    @property
    def samples_at_once(self) -> int | None:
        """How many samples are best handed over together; None if it does not matter."""
        return None

    def scalars_at_once(self, layout: Mapping[str, int], *, formed: bool = True) -> int:
        """How many gradient entries of one sample exist at once while `run` emits blocks.

        Args:
            layout: name to number of scalars of the selected parameters, in order.
            formed: whether the sink multiplies factors out.

        Returns:
            All of them, where a computer does not know better.
        """
        del formed
        return sum(layout.values())

    @property
    def disproved(self) -> frozenset[str]:
        """Parameters whose earlier gradients may be wrong, as was found since."""
        return frozenset()

    def coverage(self) -> Coverage | None:
        """Tells how the selected parameters' gradients are computed.

        Returns:
            Numbers of scalars by way; None for computers that do not count them.
        """
        return None

    def copy_inputs(self) -> bool:
        """Asks to copy what layers read, since the model changes it in place afterwards.

        Returns:
            Whether this makes a difference, so that `run` should be tried again.
        """
        return False

    def run(self, batch: Any, sink: Sink, layout: Mapping[str, int]) -> None:
        """Emits the batch's gradients as blocks; where it raises, these are void.

        Args:
            batch: tensors whose first axis is the sample axis.
            sink: consumes the blocks.
            layout: name to number of scalars of the selected parameters, in order.

        Raises:
            InputError: if the gradients are not as wide as the layout.
        """
        grads = self.compute_per_sample_grad(batch)
        if isinstance(grads, Tensor):
            if grads.ndim != 2 or grads.shape[1] != sum(layout.values()):
                raise InputError(
                    f"{type(self).__name__}.compute_per_sample_grad gave rows of shape "
                    f"{tuple(grads.shape)}; expected [b, {sum(layout.values())}]."
                )
            pieces = grads.split(list(layout.values()), dim=1)
            grads = dict(zip(layout, pieces, strict=True))
        for name, gradient in grads.items():
            sink(DenseBlock(name, gradient.reshape(len(gradient), -1)))


class SelectingGradientComputer(AbstractGradientComputer):
    """Takes gradients of some parameters, chosen before anything is computed.

    Args:
        model: the model.
        task: the task.
        grad_dim: accepted as upstream's name.
        dtype: accepted as upstream's name; gradients keep the model's dtype.
        device: accepted as upstream's name.
        grad_wrt: names of the parameters to take gradients of; those that require one
            if None.

    Attributes:
        selected: names of the chosen parameters, in the model's order.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        grad_dim: int | None = None,
        dtype: torch.dtype | None = torch.float16,
        device: str | torch.device | None = None,
        grad_wrt: Iterable[str] | None = None,
    ) -> None:
        super().__init__(model, task, grad_dim, dtype, device)
        self.selected = tuple(select_parameters(model, grad_wrt))
        self.grad_wrt = None if grad_wrt is None else self.selected
        self.load_model_params(model)

    def coverage(self) -> Coverage:
        """Tells how the selected parameters' gradients are computed.

        Returns:
            All of them one sample at a time.
        """
        named = dict(self.model.named_parameters())
        total = sum(named[name].numel() for name in self.selected)
        return Coverage(0, total, 0, self.selected)


def select_parameters(
    model: nn.Module, grad_wrt: Iterable[str] | None
) -> dict[str, nn.Parameter]:
    """The parameters whose gradients are taken, chosen before anything is computed.

    Args:
        model: the model.
        grad_wrt: names as in `model.named_parameters()`; None selects all parameters
            that require a gradient. Naming a frozen parameter selects it.

    Returns:
        Name to parameter, in the model's order.

    Raises:
        InputError: if a name is unknown, nothing is selected, or a parameter is not real.
    """
    named = dict(model.named_parameters())
    if grad_wrt is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        if not chosen:
            raise InputError(
                "No parameter of the model requires a gradient. Unfreeze those to be "
                "attributed (requires_grad_(True)), or name them in grad_wrt."
            )
        return _real(chosen)
    wanted = {grad_wrt} if isinstance(grad_wrt, str) else set(grad_wrt)
    unknown = sorted(wanted - set(named))
    if unknown:
        raise InputError(
            f"grad_wrt names {unknown[:5]}, which the model does not have. Its "
            f"parameters are {sorted(named)[:10]}... ({len(named)} in all; a tied "
            "parameter goes by its first name)."
        )
    if not wanted:
        raise InputError("grad_wrt is empty; leave it out to select every parameter.")
    return _real({name: p for name, p in named.items() if name in wanted})


def _real(chosen: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    # rows are real numbers: of a complex gradient, half would be lost
    for name, parameter in chosen.items():
        if not parameter.is_floating_point():
            raise InputError(
                f"Gradients are taken of real parameters, and {name!r} has the dtype "
                f"{parameter.dtype}. Leave it out (requires_grad_(False), or the names of "
                "the others in grad_wrt); or hold complex numbers as a real parameter "
                "[..., 2], which the forward pass reads by torch.view_as_complex."
            )
    return chosen
