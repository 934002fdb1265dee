"""One file a bank: its data, its model, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

NAMES = ("digits", "mnist")
MOMENTUM = 0.9


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
        task: the task whose output is the ground truth.
        together: models that `train_together` trains at once. More than 1 for models
            without buffers only, where it is the same training and many times faster.
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
    task: str = "image_classification"
    together: int = 1

    def describe(self) -> dict[str, Any]:
        """The numbers of the recipe.

        Returns:
            JSON values.
        """
        return {
            "optimizer": f"SGD, momentum {MOMENTUM}, cosine to zero",
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "task": self.task,
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
    """Trains a model on some examples, and on nothing else.

    Args:
        recipe: the recipe.
        indices: the examples, `[size]`.
        seed: of the weights and of the order.

    Returns:
        The model, in evaluation mode.
    """
    model = _fresh(recipe, seed).train()
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=MOMENTUM,
        weight_decay=recipe.weight_decay,
    )
    inputs, labels = recipe.train
    generator = torch.Generator().manual_seed(seed)
    rates = _rates(recipe, len(indices))
    for _ in range(recipe.epochs):
        order = indices[torch.randperm(len(indices), generator=generator)]
        for batch in order.split(recipe.batch_size):
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.param_groups[0]["lr"] = next(rates)
            optimizer.step()
    return model.eval()


def train_together(
    recipe: Recipe, subsets: Sequence[Tensor], seeds: Sequence[int]
) -> list[nn.Module]:
    """`train` for several subsets of one size at once, each with batches of its own.

    The weights of all models are stacked, and one batched product a layer stands for one
    product a layer and model. No model sees another's examples.

    Args:
        recipe: the recipe; its model has no buffers.
        subsets: the examples of each model.
        seeds: the seed of each model.

    Returns:
        The models, in evaluation mode.
    """
    models = [_fresh(recipe, seed) for seed in seeds]
    stacked, _ = stack_module_state(models)
    weights = {name: value.detach() for name, value in stacked.items()}
    velocity = {name: torch.zeros_like(value) for name, value in weights.items()}

    def loss(weights: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(models[0], weights, (inputs,))
        return nn.functional.cross_entropy(logits, labels)

    inputs, labels = recipe.train
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rates = _rates(recipe, len(subsets[0]))
    for _ in range(recipe.epochs):
        order = torch.stack([
            subset[torch.randperm(len(subset), generator=generator)]
            for subset, generator in zip(subsets, generators, strict=True)
        ])
        for batch in order.split(recipe.batch_size, dim=1):
            gradients = vmap(grad(loss))(weights, inputs[batch], labels[batch])
            rate = next(rates)
            for name, weight in weights.items():
                step = gradients[name].add_(weight, alpha=recipe.weight_decay)
                velocity[name].mul_(MOMENTUM).add_(step)
                weight.sub_(velocity[name], alpha=rate)
    for j, model in enumerate(models):
        model.load_state_dict({name: value[j] for name, value in weights.items()})
    return [model.eval() for model in models]


def _fresh(recipe: Recipe, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipe.make_model()


def _rates(recipe: Recipe, size: int) -> Iterator[float]:
    # a cosine from the recipe's rate to zero
    steps = recipe.epochs * -(-size // recipe.batch_size)
    for step in range(steps):
        yield recipe.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2


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
