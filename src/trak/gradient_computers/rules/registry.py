"""Which rule belongs to which layer type."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trak.blocks import Block
from trak.errors import InputError


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a layer: all that its parameters' gradients depend on.

    Attributes:
        layer: the layer.
        inputs: its positional inputs.
        backprops: the gradient at its output.
        names: own parameter name (`weight`) to name in the model, of those wanted.
        num_samples: `b`, the length of the batch.
    """

    layer: Any
    inputs: tuple[Any, ...]
    backprops: Tensor
    names: dict[str, str]
    num_samples: int


Rule = Callable[[LayerCall], Iterator[Block]]

_RULES: dict[type[nn.Module] | str, Rule] = {}


def register(*layer_types: type[nn.Module] | str) -> Callable[[Rule], Rule]:
    """Registers a rule for layer types; a second one for a type is an `InputError`.

    Args:
        layer_types: the types, or `module.Name` of types in packages that may not be
            installed; subclasses that inherit `forward` are included.

    Returns:
        A decorator that returns the rule unchanged.
    """

    def keep(rule: Rule) -> Rule:
        for layer_type in layer_types:
            if layer_type in _RULES:
                known = getattr(_RULES[layer_type], "__name__", "another function")
                raise InputError(
                    f"{layer_type} has a rule already, {known}. Register one for a class "
                    "of your own that is derived from it and has a forward of its own."
                )
            _RULES[layer_type] = rule
        return rule

    return keep


def rule_for(layer: nn.Module) -> Rule | None:
    """Finds the rule of a layer.

    Args:
        layer: the layer.

    Returns:
        The rule of its type, or of a base class whose `forward` it inherits; None if
        there is none.
    """
    for base in type(layer).__mro__:
        rule = _RULES.get(base) or _RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            # a subclass with a forward of its own computes something else
            same = getattr(type(layer), "forward", None) is getattr(base, "forward", None)
            return rule if same else None
    return None


def positions(tensor: Tensor, num_samples: int) -> Tensor:
    """Brings a layer's input or output gradient into the form `[b, s, width]`.

    Args:
        tensor: `[b, ..., width]`, or `[b * s, width]` where a model folds positions into
            the batch axis.
        num_samples: `b`.

    Returns:
        `[b, s, width]`.
    """
    return tensor.reshape(num_samples, -1, tensor.shape[-1])
