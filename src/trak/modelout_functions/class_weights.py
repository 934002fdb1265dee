"""Sample weights by class, as of `torch.nn.CrossEntropyLoss(weight=...)`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trak.arguments import as_number, is_listed
from trak.errors import InputError, InputTypeError


def as_class_weights(class_weights: Any) -> tuple[float, ...] | None:
    """Accepts weights of classes.

    Args:
        class_weights: one number above 0 a class, listed or as a tensor; None for none.

    Returns:
        The numbers.

    Raises:
        InputTypeError: if they are no list of numbers.
        InputError: if one is not above 0, or there are fewer than two.
    """
    if class_weights is None:
        return None
    if not is_listed(class_weights):
        raise InputTypeError(
            "class_weights must list one number a class, as torch.nn.CrossEntropyLoss's "
            f"weight does; got {class_weights!r}."
        )
    found = [each.item() if isinstance(each, Tensor) else each for each in class_weights]
    if len(found) < 2:
        raise InputError(
            f"class_weights must have one number a class, two at least; got {found}."
        )
    return tuple(
        as_number(f"class_weights[{j}]", each, zero=False) for j, each in enumerate(found)
    )


class ClassWeighted(ABC):
    """What image and text classification share of them."""

    _class_weights: tuple[float, ...] | None = None

    @property
    def get_sample_weights(self) -> Callable[[Any], Tensor] | None:
        """How much each sample of a batch counts, by its class.

        Returns:
            A function of a batch that gives `[b]`; None without `class_weights`.
        """
        return None if self._class_weights is None else self._weights_of

    def _weights_of(self, batch: Any) -> Tensor:
        labels = self._labels(batch)
        known = self._class_weights or ()
        highest = int(labels.max()) if len(labels) else 0
        if highest >= len(known):
            raise InputError(
                f"A sample has label {highest}, but class_weights has {len(known)} "
                "numbers, one a class."
            )
        weights = torch.tensor(known, dtype=torch.float64, device="cpu")
        return weights.to(labels.device)[labels.long()]

    @abstractmethod
    def _labels(self, batch: Any) -> Tensor:
        """Classes of a batch's samples, `[b]`."""
