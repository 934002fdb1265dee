"""One file a bank: its data, its model, and how it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("digits", "mnist")


@dataclass(frozen=True)
class Recipe:
    """How a bank is made.

    Attributes:
        train: the training examples, inputs and labels.
        targets: the targets, inputs and labels.
        make_model: a model with fresh weights from torch's random state.
        epochs: passes over the (sub)set.
        batch_size: examples a step.
        learning_rate: of SGD with momentum 0.9, falling to zero along a cosine.
        weight_decay: of SGD.
        subsets: how many halves.
        seeds: models a half.
        checkpoints: models on everything.
    """

    train: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    make_model: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    subsets: int
    seeds: int
    checkpoints: int

    def describe(self) -> dict[str, Any]:
        """The numbers of the recipe.

        Returns:
            JSON values.
        """
        return {
            "optimizer": "SGD, momentum 0.9, cosine to zero",
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "model": str(self.make_model()),
        }


def recipe(name: str) -> Recipe:
    """Loads a recipe with its data.

    Args:
        name: one of `NAMES`.

    Returns:
        The recipe.
    """
    return import_module(f"benchmarks.banks.recipes.{name}").recipe()


def train(recipe: Recipe, indices: Tensor, seed: int) -> nn.Module:
    """Trains a model on some examples.

    Args:
        recipe: the recipe.
        indices: the examples, `[size]`.
        seed: of the weights and of the order.

    Returns:
        The model, in evaluation mode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = recipe.make_model().train()
        optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.learning_rate,
            momentum=0.9,
            weight_decay=recipe.weight_decay,
        )
        steps = recipe.epochs * -(-len(indices) // recipe.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        inputs, labels = recipe.train
        for _ in range(recipe.epochs):
            order = indices[torch.randperm(len(indices))]
            for batch in order.split(recipe.batch_size):
                loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def margins(model: nn.Module, examples: tuple[Tensor, Tensor]) -> Tensor:
    """`log p / (1 - p)` of the right class.

    Args:
        model: in evaluation mode.
        examples: inputs and labels.

    Returns:
        `[m]`.
    """
    inputs, labels = examples
    with torch.no_grad():
        logits = model(inputs)
    right = labels[:, None]
    others = logits.scatter(1, right, -torch.inf).logsumexp(1)
    return logits.gather(1, right).squeeze(1) - others
