"""How one layer family's per-sample gradients follow from its input and output gradient.

A rule is a function of a `LayerCall` that yields one block for each wanted parameter.
One file a layer family; `register` ties a rule to layer types.
"""

from trak.gradient_computers.rules import activation, conv, embedding, linear, norm
from trak.gradient_computers.rules.registry import LayerCall, Rule, register, rule_for

_FAMILIES = (activation, conv, embedding, linear, norm)  # imported, they register rules

__all__ = [
    "LayerCall",
    "Rule",
    "register",
    "rule_for",
]
