"""What a small bank is trained by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.banks.small_data import Examples


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        widths: of the MLP.
        data: training examples and targets.
        epochs: how many.
        rate: learning rate.
        decay: weight decay.
        activation: between layers.
        task: a name in `OBJECTIVES`; empty for cross entropy, or the squared loss where
            labels are fractions.
        start: the training, on everything, of which all layers but the last are taken over
            before this one begins; None for random layers.
        optimizer: a name in `benchmarks.banks.recipes.OPTIMIZERS`.
        normalized: layer normalization comes before every activation.
    """

    widths: tuple[int, ...]
    data: Callable[[], tuple[Examples, Examples]]
    epochs: int
    rate: float
    decay: float
    activation: Callable[[], nn.Module] = nn.ReLU
    task: str = ""
    start: Variant | None = None
    optimizer: str = "sgd"
    normalized: bool = False
