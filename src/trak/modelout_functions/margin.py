"""The margin `log(p / (1 - p))` of the correct class, and what tasks share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trak.errors import InputError, InputTypeError

LABEL_NAMES = ("labels", "label", "targets", "target")


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a model returned.

    Args:
        output: a tensor, a Hugging Face output, a dict with `"logits"`, or a tuple that
            begins with them.

    Returns:
        The logits.

    Raises:
        InputTypeError: if there are none, or they are no real numbers.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple) and output:
        logits = output[0]
    if isinstance(logits, Tensor) and logits.is_floating_point():
        return logits
    found = type(output).__name__
    if isinstance(logits, Tensor):
        found = f"{logits.dtype}, whose gradients cannot be attributed"
    raise InputTypeError(
        "Expected the model to return logits as a tensor of real numbers, as `.logits`, "
        f"as ['logits'] or first in a tuple; got {found}. Wrap the model in one whose "
        "forward returns them, or write a task (docs/custom-tasks.md)."
    )


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """`log(p / (1 - p))` with `p` the softmax probability of the label.

    Park et al. 2023, Sec. 3.3. Computed as `logit_y - logsumexp(other logits)`. A single
    logit is read as binary classification: `p = sigmoid(+-logit)`.

    Args:
        logits: `[b, classes]`.
        labels: integers, `[b]`.

    Returns:
        `[b]`.
    """
    if not labels.is_floating_point():
        labels = labels.long()  # gather needs it, and 2 * labels - 1 a sign
    if logits.shape[-1] == 1:
        return logits[..., 0] * (2 * labels - 1)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    correct = classes == labels.unsqueeze(-1)
    others = logits.masked_fill(correct, -torch.inf).logsumexp(dim=-1)
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - others


def one_minus_probability(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`Q = 1 - p`, minus the derivative of the loss `log(1 + exp(-f))` by `f`.

    Park et al. 2023, Sec. 3.3. Computed as `sigmoid(-margin)`, which keeps its relative
    precision where `1 - softmax` would round to 0.

    Args:
        logits: `[b, classes]`.
        labels: integers, `[b]`.
        temperature: divides the logits.

    Returns:
        `[b, 1]`.
    """
    check_labels(logits, labels)
    scaled = logits.detach() / temperature
    return torch.sigmoid(-margin(scaled, labels)).unsqueeze(-1)


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Refuses labels that do not fit the logits.

    Args:
        logits: `[b, classes]`.
        labels: integers, `[b]`.

    Raises:
        InputError: says which sample has which label.
        InputTypeError: if labels are not integers.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise InputTypeError(
            f"Labels are integers, got dtype {labels.dtype}. Those that BCEWithLogitsLoss "
            "wants as fractions are handed over as labels.long(); soft labels, and several "
            "a sample, need a task of their own (docs/custom-tasks.md)."
        )
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            "Expected logits [b, classes] and labels [b], got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}. A single logit is [b, 1], "
            "and its label [b]. Several labels, words or pixels a sample need a task of "
            "their own (docs/custom-tasks.md)."
        )
    labels = labels.long()
    num_classes = max(logits.shape[-1], 2)
    wrong = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if wrong.numel():
        first = int(wrong[0])
        raise InputError(
            f"Sample {first} of the batch has label {int(labels[first])}; the model has "
            f"{num_classes} classes, 0 to {num_classes - 1}."
        )


def split_labels(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Separates a dict batch into model inputs and labels.

    Args:
        batch: names to tensors.

    Returns:
        The inputs and the labels.

    Raises:
        InputError: if there is not exactly one of the known label names.
    """
    found = [name for name in LABEL_NAMES if name in batch]
    if len(found) != 1:
        raise InputError(
            f"A dict batch needs its labels under one of {list(LABEL_NAMES)}; this one "
            f"has {sorted(batch)}."
        )
    inputs = {name: value for name, value in batch.items() if name != found[0]}
    return inputs, batch[found[0]]


class OwnTensors(dict[str, Tensor]):
    """A module's own parameters by name, where a task is to run it as it is."""


def call(model: Any, state: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs the model, functionally where weights are given.

    Args:
        model: the module.
        state: (weights, buffers), or (None, None) or `OwnTensors` for the module's own.
        args: positional inputs.
        kwargs: named inputs.

    Returns:
        What the model returns.
    """
    if state[0] is None or isinstance(state[0], OwnTensors):
        return model(*args, **kwargs)
    return torch.func.functional_call(model, state, args, dict(kwargs))
