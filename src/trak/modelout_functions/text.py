"""Text classification (Hugging Face encoders and their wrappers)."""

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

_NAMES = {
    4: ("input_ids", "token_type_ids", "attention_mask"),
    3: ("input_ids", "attention_mask"),
}


def _parts(inputs: tuple[Any, ...]) -> tuple[dict[str, Tensor], Tensor]:
    # named inputs and labels of a sample or batch
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return split_labels(inputs[0])
    if len(inputs) not in _NAMES:
        raise InputError(
            "Expected a dict batch, (input_ids, token_type_ids, attention_mask, labels) "
            f"or (input_ids, attention_mask, labels); got {len(inputs)} parts."
        )
    names = _NAMES[len(inputs)]
    return dict(zip(names, inputs[:-1], strict=True)), inputs[-1]


class TextClassificationModelOutput(ClassWeighted, AbstractModelOutput):
    """The margin of the correct class, for models that take token tensors by name.

    Batches are (input_ids, token_type_ids, attention_mask, labels), the same without
    token types, or a dict with `labels` in it. The model returns a tensor of logits or a
    Hugging Face output.

    Args:
        temperature: divides the logits inside Q.
        trim_padding: leave out columns that are padding, and put samples of similar length
            together, for Hugging Face models whose outputs do not change by it.
        class_weights: how much an example of each class counts in training, as
            `torch.nn.CrossEntropyLoss(weight=...)` or a sampler has it; None if all count
            alike.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        trim_padding: bool = True,
        class_weights: Any = None,
    ) -> None:
        super().__init__()
        self.loss_temperature = as_number("temperature", temperature, zero=False)
        self._class_weights = as_class_weights(class_weights)
        self._trim_padding = trim_padding  # not a setting: rows are the same

    def _labels(self, batch: Any) -> Tensor:
        return _parts((batch,) if isinstance(batch, Mapping) else tuple(batch))[1]

    @staticmethod
    def get_output(  # pyright: ignore[reportIncompatibleMethodOverride]
        model: Any,
        weights: Any,
        buffers: Any,
        input_id: Any,
        token_type_id: Any = None,
        attention_mask: Any = None,
        label: Any = None,
    ) -> Tensor:
        """`log(p / (1 - p))` of one sample.

        Args:
            model: the model.
            weights: parameters by name.
            buffers: buffers by name.
            input_id: token ids without the batch axis, or a dict of all parts.
            token_type_id: segment of every token; may be left out of the batch.
            attention_mask: 1 for tokens, 0 for padding.
            label: the class.

        Returns:
            A scalar.
        """
        sample = (input_id, token_type_id, attention_mask, label)
        named, wanted = _parts(tuple(part for part in sample if part is not None))
        kwargs = {name: part.unsqueeze(0) for name, part in named.items()}
        logits = logits_of(call(model, (weights, buffers), (), kwargs))
        return margin(logits, wanted.reshape(1)).sum()

    def get_batch_output(self, model: Any, batch: Any) -> Tensor:
        """`log(p / (1 - p))` of every sample, by the model's own weights.

        Args:
            model: the model.
            batch: a whole batch.

        Returns:
            `[b]`.
        """
        inputs = (batch,) if isinstance(batch, Mapping) else tuple(batch)
        kwargs, labels = _parts(inputs)
        logits = logits_of(call(model, (None, None), (), kwargs))
        check_labels(logits, labels)
        return margin(logits, labels)

    def padding_mask(self, model: Any, batch: Any) -> Tensor | None:
        """Says where the padding is that may be left out.

        Args:
            model: the model.
            batch: a whole batch.

        Returns:
            `[b, s]`, 0 at padding; None if nothing may be left out: without a mask, where
            `trim_padding` is off, for models that are not from Hugging Face, and for
            padding on the left of models that count positions from the first column.
        """
        inputs = (batch,) if isinstance(batch, Mapping) else tuple(batch)
        named, _ = _parts(inputs)
        mask = named.get("attention_mask")
        if mask is None or mask.ndim != 2 or not self._trim_padding:
            return None
        own = (model, *model.children())
        kinds = [getattr(getattr(m, "config", None), "model_type", None) for m in own]
        if not any(isinstance(kind, str) for kind in kinds):
            return None
        on_the_left = bool((mask[:, 0] == 0).any())
        return None if on_the_left and "position_ids" not in named else mask

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: Any
    ) -> Tensor:
        """`1 - p` of every sample.

        Args:
            model: the model.
            weights: parameters by name.
            buffers: buffers by name.
            batch: a whole batch.

        Returns:
            `[b, 1]`.
        """
        inputs = (batch,) if isinstance(batch, Mapping) else tuple(batch)
        kwargs, labels = _parts(inputs)
        logits = logits_of(call(model, (weights, buffers), (), kwargs))
        return one_minus_probability(logits, labels, self.loss_temperature)
