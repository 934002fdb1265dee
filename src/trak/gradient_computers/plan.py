"""Which way each parameter's gradient is taken, and what a model offers to choose from."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from trak.gradient_computers.rules import Rule, rule_for

Samples = Literal["first", "shared", "added", "second"]


@dataclass(frozen=True, slots=True)
class Placement:
    """How a parameter is given out once a sample.

    Attributes:
        axis: where the sample axis goes.
        instead: whether it takes the place of the parameter's own axis of length one.
        ones: axes of length one that are put behind a new sample axis.
    """

    axis: int
    instead: bool = False
    ones: int = 0

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter can be placed so.

        Args:
            shape: its shape.

        Returns:
            False if there is no axis of length one to take the place of.
        """
        return not self.instead or (len(shape) > self.axis and shape[self.axis] == 1)

    def expand(self, parameter: Tensor, num_samples: int) -> Tensor:
        """Gives the parameter out.

        Args:
            parameter: the parameter.
            num_samples: `b`.

        Returns:
            A view with a sample axis of length `b`.
        """
        if self.instead:
            sizes = list(parameter.shape)
            sizes[self.axis] = num_samples
            return parameter.expand(sizes)
        before = (1,) * self.axis
        view = parameter.reshape(*before, 1, *(1,) * self.ones, *parameter.shape)
        sizes = list(view.shape)
        sizes[self.axis] = num_samples
        return view.expand(sizes)


PLACEMENTS = (
    Placement(0, instead=True),  # class tokens and position embeddings [1, l, d]
    Placement(0),  # x [b, d] + p [d]
    Placement(0, ones=1),  # x [b, l, d] * p [d]
    Placement(1, instead=True),  # sequence first: [l, 1, d]
    Placement(1),
    Placement(0, ones=2),
    Placement(0, ones=3),
)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to a parameter's per-sample gradients.

    Attributes:
        kind: by the rule of its layer; by the function it is an argument of; by giving
            it out once a sample; by the exact computer; or not needed as far as is known.
        samples: where the sample axis of a layer's output is: `first`; `second`, as in
            sequence-first models; or nowhere, since the output is `shared` by the batch
            (`[1, ...]`, or with a sample axis to be `added`).
        placement: how it is given out.
    """

    kind: Literal["layer", "function", "leaf", "exact", "unseen"]
    samples: Samples = "first"
    placement: Placement | None = None

    @property
    def changes_shapes(self) -> bool:
        """Whether the model sees other shapes than by itself."""
        return self.kind == "leaf" or self.samples in {"shared", "added"}


EXACT = Way("exact")
UNSEEN = Way("unseen")
Plan = dict[str, Way]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with a rule.

    Attributes:
        module: the layer.
        rule: its rule.
        names: own parameter name to name in the model, of the selected ones.
    """

    module: nn.Module
    rule: Rule
    names: dict[str, str]


class Anatomy:
    """The selected parameters of a model, and where they live.

    Args:
        model: the model.
        selected: their names.

    Attributes:
        model: the model.
        parameters: name to parameter.
        names: `id` of a parameter to its name.
        layers: path to layer with a rule.
        places: name to every (module, own name) under which the parameter is found.
    """

    def __init__(self, model: nn.Module, selected: Iterable[str]) -> None:
        self.model = model
        named = dict(model.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: named[name] for name in selected}
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.layers: dict[str, Layer] = {}
        self.places: dict[str, list[tuple[nn.Module, str]]] = {
            name: [] for name in self.parameters
        }
        for path, module in model.named_modules():
            own = {
                key: self.names[id(p)]
                for key, p in module.named_parameters(recurse=False, remove_duplicate=False)
                if id(p) in self.names
            }
            for key, name in own.items():
                self.places[name].append((module, key))
            rule = rule_for(module)
            if rule is not None and own:
                self.layers[path] = Layer(module, rule, own)
        self.ruled = {n for layer in self.layers.values() for n in layer.names.values()}

    def is_like(self, other: "Anatomy") -> bool:
        """Whether another one is of the same parameters in the same layers.

        Args:
            other: perhaps made earlier.

        Returns:
            False if the model, its parameters or its layers were replaced.
        """
        return (
            self.model is other.model
            and self.names == other.names
            and self.layers == other.layers
            and self.places == other.places
        )

    def default_plan(self) -> Plan:
        """Every parameter of a layer with a rule by its rule, the others exactly.

        Returns:
            Name to way.
        """
        by_rule = Way("layer")
        return {n: by_rule if n in self.ruled else EXACT for n in self.parameters}

    def kind_of(self, name: str) -> tuple[Any, ...]:
        """Tells which parameters have the same use, such as those of repeated blocks.

        Args:
            name: a parameter.

        Returns:
            Module type, own name and shape.
        """
        module, key = self.places[name][0]
        return type(module), key, tuple(self.parameters[name].shape)
