"""Per-sample gradients of the model output, for the selected parameters only."""

from trak.gradient_computers.abstract import (
    AbstractGradientComputer,
    SelectingGradientComputer,
    select_parameters,
)
from trak.gradient_computers.choice import choose_computer
from trak.gradient_computers.coverage import Coverage
from trak.gradient_computers.functional import FunctionalGradientComputer
from trak.gradient_computers.hooks import HookGradientComputer
from trak.gradient_computers.iterative import IterativeGradientComputer
from trak.gradient_computers.rules.embedding import embedding_tables

__all__ = [
    "AbstractGradientComputer",
    "Coverage",
    "FunctionalGradientComputer",
    "HookGradientComputer",
    "IterativeGradientComputer",
    "SelectingGradientComputer",
    "choose_computer",
    "embedding_tables",
    "select_parameters",
]
