"""What a task is: the scalar attributed, and how the loss depends on it."""

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trak.arguments import meant
from trak.errors import InputError, InputTypeError


class AbstractModelOutput(ABC):
    """A model output function `f` and the loss weight `Q` (Park et al. 2023, Sec. 3).

    Subclasses define two methods; nothing else is needed:

    - `get_output(model, weights, buffers, *sample)`: the scalar `f(z; theta)` of one
      sample, whose parts come without the batch axis (a dict batch arrives as one dict).
      It runs the model by `torch.func.functional_call(model, (weights, buffers), ...)`.
      A static method, a plain function, or a method with `self`.
    - `get_out_to_loss_grad(self, model, weights, buffers, batch)`: `Q`, one number a
      sample, `[b]` or `[b, 1]`.

    Where training counts some examples more than others, by weights in its loss or by a
    sampler that draws them more often, a third one says so:

    - `get_sample_weights(self, batch)`: how much each sample counts, above 0, `[b]` or
      `[b, 1]`. `Q` is then that of the sample's loss without its weight.

    Further ones are asked for where there are any (docs/custom-tasks.md):
    `get_batch_output(self, model, batch)`, outputs of a whole batch, for
    `HookGradientComputer`; `settings(self)`, what the store is compared by;
    `prepare_checkpoint(self, model, digest)` and `check_ready(self, digest)`, for what a
    task computes from weights; `padding_mask(self, model, batch)`.

    Attributes:
        loss_temperature: divides the logits inside Q.
        loss_is_logistic: whether `Q = 1 / (1 + exp(f))`, as it is for classification, or
            the same with the sign of the label where `f` is the logit of one of two
            classes; it is not for a mean over a text's words. The automatic ridge, the
            curvature and the strength of whitening depend on it. None: it is found out
            from the first examples.
        loss_is_of_words: whether Q is a mean over the words of a text, each of which is
            an example of its own, so that the automatic ridge is smaller.
        softmax: over the last axis, for use in `get_out_to_loss_grad`.
    """

    loss_temperature: float = 1.0
    loss_is_logistic: bool | None = None
    loss_is_of_words: bool = False
    softmax = torch.nn.Softmax(-1)

    def __init__(self) -> None:  # noqa: B027 - subclasses may have none of their own
        pass

    @abstractmethod
    def get_output(self, model: Any, *args: Any) -> Tensor:
        """The model output of one sample.

        Args:
            model: the model.
            args: weights, buffers, then the sample's parts.

        Returns:
            A scalar.
        """

    @abstractmethod
    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: Any
    ) -> Tensor:
        """Q, minus the derivative of the loss by the model output: `-dloss/df`.

        Positive where raising the output lowers the loss; with the other sign, every score
        would flip.

        Args:
            model: the model.
            weights: its parameters by name.
            buffers: its buffers by name.
            batch: a whole batch.

        Returns:
            `[b]` or `[b, 1]`.
        """


def output_function(task: Any) -> Callable[..., Tensor]:
    """A task's `get_output`, whichever way it was written.

    Tutorials show it without `self` and without `@staticmethod`; both forms and a normal
    method are accepted.

    Args:
        task: an instance.

    Returns:
        A function of (model, weights, buffers, *sample) that returns a tensor or raises
        `InputTypeError`.
    """
    raw = inspect.getattr_static(task, "get_output")
    if not inspect.isfunction(raw) or "get_output" in vars(task):
        return _returns_tensor(task, "get_output", task.get_output)
    first = next(iter(inspect.signature(raw).parameters), "self")
    function = raw if first == "model" else task.get_output
    return _returns_tensor(task, "get_output", function)


def batch_output_function(task: Any) -> Callable[[Any, Any], Tensor] | None:
    """A task's `get_batch_output(model, batch)`, if it speaks for its `get_output`.

    Args:
        task: an instance.

    Returns:
        A function that runs the module itself on a whole batch and returns one output a
        sample, `[b]`. None if the task has none, or if a subclass changed `get_output`
        and inherited it.
    """
    order = [vars(cls) for cls in type(task).__mro__]
    batched = [j for j, names in enumerate(order) if "get_batch_output" in names]
    single = [j for j, names in enumerate(order) if "get_output" in names]
    if not batched or (single and single[0] < batched[0]):
        return None
    return _returns_tensor(task, "get_batch_output", task.get_batch_output)


def sample_weights_function(task: Any) -> Callable[[Any], Any] | None:
    """A task's `get_sample_weights(batch)`, if it has one.

    Args:
        task: an instance.

    Returns:
        The method; None if there is none, so that all examples count once.
    """
    found = getattr(task, "get_sample_weights", None)
    return found if callable(found) else None


def one_a_sample(found: Any, size: int, name: str) -> Tensor:
    """Checks what a task's method returned.

    Args:
        found: what it returned.
        size: samples of the batch.
        name: the method.

    Returns:
        `[b, 1]`.

    Raises:
        InputTypeError: if it is no tensor of real numbers.
        InputError: if it has another number of values.
    """
    if not isinstance(found, Tensor) or found.is_complex():
        raise InputTypeError(
            f"{name} must return a tensor with one real number a sample, got "
            f"{_kind(found)}."
        )
    if found.numel() != size:
        raise InputError(
            f"{name} must return one number a sample, [{size}, 1]; got shape "
            f"{tuple(found.shape)}."
        )
    return found.detach().reshape(-1, 1)


def counted(found: Any, size: int) -> Tensor:
    """Checks sample weights.

    Args:
        found: what `get_sample_weights` returned.
        size: samples of the batch.

    Returns:
        `[b, 1]`.

    Raises:
        InputError: if one is not above 0.
    """
    weights = one_a_sample(found, size, "get_sample_weights")
    wrong = (~((weights > 0) & torch.isfinite(weights))).nonzero()
    if len(wrong):
        first = int(wrong[0, 0])
        raise InputError(
            f"get_sample_weights must return numbers above 0; sample {first} of the batch "
            f"has {float(weights[first]):g}. Leave examples that training does not count "
            "out of the training set."
        )
    return weights


def _returns_tensor(
    task: Any, name: str, function: Callable[..., Any]
) -> Callable[..., Tensor]:
    def checked(*args: Any) -> Tensor:
        output = function(*args)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise InputTypeError(
                f"{name} of {type(task).__name__} must return a tensor of real numbers "
                "computed from the model's output, which gradients are taken of, got "
                f"{_kind(output)}. Return the tensor itself: no list of it, no .item(), "
                ".numpy(), comparison or argmax."
            )
        return output

    return checked


def _kind(found: Any) -> str:
    kind = type(found).__name__
    return f"a tensor of {found.dtype}" if isinstance(found, Tensor) else kind


def resolve_task(task: Any, by_name: dict[str, type]) -> Any:
    """Turns a task's name or class into an instance.

    Args:
        task: an instance, a class without required arguments, or a name.
        by_name: the built-in tasks.

    Returns:
        An instance with the two methods.

    Raises:
        InputError: if the name is not known.
        InputTypeError: if it is nothing that could be a task.
    """
    if isinstance(task, str):
        if task not in by_name:
            raise InputError(
                f"task must be one of {sorted(by_name)}, a class or an instance, got "
                f"{task!r}.{meant(task, by_name)}"
            )
        return by_name[task]()
    if isinstance(task, type):
        try:
            task = task()
        except TypeError as error:
            raise InputTypeError(
                f"The task class {task} cannot be made without arguments ({error}). "
                "Pass an instance, or define what is missing."
            ) from error
    for method in ("get_output", "get_out_to_loss_grad"):
        if not callable(getattr(task, method, None)):
            raise InputTypeError(
                f"A task needs a method {method!r}; {type(task).__name__} has none. "
                "Derive from trak.modelout_functions.AbstractModelOutput, or pass one "
                f"of the names {sorted(by_name)}."
            )
    return task


def describe_task(task: Any) -> dict[str, Any]:
    """A task's class and settings, for the store's fingerprint.

    Args:
        task: an instance. Its settings are what its method `settings()` returns, or else
            its public attributes that are numbers, strings or booleans.

    Returns:
        JSON values.

    Raises:
        InputTypeError: if `settings()` returns something else.
    """
    if callable(getattr(task, "settings", None)):
        values = task.settings()
        try:
            values = dict(values)
            json.dumps(values)
        except (TypeError, ValueError) as error:
            raise InputTypeError(
                f"settings() of {type(task).__name__} must return a dict of JSON values "
                f"(numbers, texts, lists of them), which the store keeps, got "
                f"{values!r:.80} ({error}). Of a tensor, give tensor.tolist()."
            ) from error
    else:
        values = {
            name: value
            for name, value in sorted(vars(task).items())
            if isinstance(value, bool | int | float | str) and not name.startswith("_")
        }
    # the bare name: __main__.Task in a script and train.Task when imported are one task
    described = {"class": type(task).__qualname__, **values}
    by_class = getattr(task, "_class_weights", None)
    return described if by_class is None else described | {"class_weights": list(by_class)}
