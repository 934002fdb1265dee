"""Image classification (any model that takes one tensor and returns logits)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trak.arguments import as_number
from trak.errors import InputError
from trak.modelout_functions.abstract import AbstractModelOutput
from trak.modelout_functions.class_weights import ClassWeighted, as_class_weights
from trak.modelout_functions.margin import (
    call,
    check_labels,
    logits_of,
    margin,
    one_minus_probability,
    split_labels,
)


def _parts(
    inputs: tuple[Any, ...],
) -> tuple[tuple[Tensor, ...], dict[str, Any], Tensor]:
    # positional inputs, named inputs and labels of a sample or batch
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        named, labels = split_labels(inputs[0])
        if set(named) == {"image"} or set(named) == {"images"}:
            return tuple(named.values()), {}, labels
        return (), named, labels
    if len(inputs) != 2:
        raise InputError(
            f"Expected a batch of two parts, (images, labels); got {len(inputs)} parts."
        )
    return (inputs[0],), {}, inputs[1]


class ImageClassificationModelOutput(ClassWeighted, AbstractModelOutput):
    """The margin of the correct class (Park et al. 2023, Sec. 3.3).

    Batches are (images, labels), or a dict whose inputs the model takes by name.

    Args:
        temperature: divides the logits inside Q.
        class_weights: how much an example of each class counts in training, as
            `torch.nn.CrossEntropyLoss(weight=...)` or a sampler has it; None if all count
            alike.
    """

    def __init__(self, temperature: float = 1.0, class_weights: Any = None) -> None:
        super().__init__()
        self.loss_temperature = as_number("temperature", temperature, zero=False)
        self._class_weights = as_class_weights(class_weights)

    def _labels(self, batch: Any) -> Tensor:
        return _parts((batch,) if isinstance(batch, Mapping) else tuple(batch))[2]

    @staticmethod
    def get_output(  # pyright: ignore[reportIncompatibleMethodOverride]
        model: Any, weights: Any, buffers: Any, image: Any, label: Any = None
    ) -> Tensor:
        """`log(p / (1 - p))` of one sample.

        Args:
            model: the model.
            weights: parameters by name.
            buffers: buffers by name.
            image: the image without the batch axis, or a dict that holds the label too.
            label: its class.

        Returns:
            A scalar.
        """
        args, kwargs, label = _parts((image,) if label is None else (image, label))
        args = tuple(part.unsqueeze(0) for part in args)
        kwargs = {name: part.unsqueeze(0) for name, part in kwargs.items()}
        logits = logits_of(call(model, (weights, buffers), args, kwargs))
        return margin(logits, label.reshape(1)).sum()

    def get_batch_output(self, model: Any, batch: Any) -> Tensor:
        """`log(p / (1 - p))` of every sample, by the model's own weights.

        Args:
            model: the model.
            batch: a whole batch.

        Returns:
            `[b]`.
        """
        inputs = (batch,) if isinstance(batch, Mapping) else tuple(batch)
        args, kwargs, labels = _parts(inputs)
        logits = logits_of(call(model, (None, None), args, kwargs))
        check_labels(logits, labels)
        return margin(logits, labels)

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: Any
    ) -> Tensor:
        """`1 - p` of every sample.

        Args:
            model: the model.
            weights: parameters by name, or None for the model's own.
            buffers: buffers by name.
            batch: (images, labels), or a dict.

        Returns:
            `[b, 1]`.
        """
        inputs = (batch,) if isinstance(batch, Mapping) else tuple(batch)
        args, kwargs, labels = _parts(inputs)
        logits = logits_of(call(model, (weights, buffers), args, kwargs))
        return one_minus_probability(logits, labels, self.loss_temperature)


class IterativeImageClassificationModelOutput(ImageClassificationModelOutput):
    """The same margin for `IterativeGradientComputer`, which asks for whole batches.

    Called with weights, `get_output` takes one sample like the parent's; called with
    None, a batch, and runs the model's own weights.
    """

    @staticmethod
    def get_output(  # pyright: ignore[reportIncompatibleMethodOverride]
        model: Any, weights: Any, buffers: Any, images: Any, labels: Any = None
    ) -> Tensor:
        """`log(p / (1 - p))` of a batch, or of one sample if weights are given.

        Args:
            model: the model.
            weights: parameters by name, or None.
            buffers: buffers by name, or None.
            images: the images, or a dict that holds the labels too.
            labels: their classes.

        Returns:
            `[b]`, or a scalar if weights are given.
        """
        if weights is not None:
            return ImageClassificationModelOutput.get_output(
                model, weights, buffers, images, labels
            )
        inputs = (images,) if labels is None else (images, labels)
        args, kwargs, labels = _parts(inputs)
        return margin(logits_of(call(model, (None, None), args, kwargs)), labels)

    def get_batch_output(self, model: Any, batch: Any) -> Tensor:
        """`log(p / (1 - p))` of every sample, by the model's own weights.

        Args:
            model: the model.
            batch: a whole batch.

        Returns:
            `[b]`.
        """
        return super().get_batch_output(model, batch)
