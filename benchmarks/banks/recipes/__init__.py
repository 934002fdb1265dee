"""One file a bank: its data, its model, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from benchmarks.banks.bank import MissingDataError
from benchmarks.banks.differences import restore
from benchmarks.banks.objectives import OBJECTIVES, Objective

NAMES = (
    "digits",
    "mnist",
    "qnli",
    "diabetes",
    "language",
    "cifar2",
)  # the banks that are built
MOMENTUM = 0.9
OPTIMIZERS = {"sgd": f"SGD, momentum {MOMENTUM}", "adamw": "AdamW"}


@dataclass(frozen=True)
class Recipe:
    """How a bank is made.

    Attributes:
        train: the training examples: inputs, as many as the model takes, and labels.
        targets: the targets, likewise.
        make_model: a model with fresh weights from torch's random state. Parameters that
            need no gradient are neither trained nor attributed.
        epochs: passes over the (sub)set.
        batch_size: examples a step.
        learning_rate: falls to zero along a cosine.
        weight_decay: of the optimizer.
        subsets: how many halves.
        seeds: models a half.
        checkpoints: models on everything.
        task: which of `OBJECTIVES`.
        optimizer: "sgd", with momentum 0.9, or "adamw".
        together: models that `train_together` trains at once. More than 1 for models
            without buffers only, where it is the same training and many times faster.
        pretrained: the weights that training begins with, or zeros. If given,
            checkpoints are stored as differences from them, a byte a weight, see
            `benchmarks.banks.differences`.
    """

    train: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    make_model: Callable[[], nn.Module]
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    subsets: int
    seeds: int
    checkpoints: int
    task: str = "image_classification"
    optimizer: str = "sgd"
    together: int = 1
    pretrained: dict[str, Tensor] | None = None

    def weights(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """A stored checkpoint's state dict.

        Args:
            stored: one of a bank's checkpoints.

        Returns:
            All weights and buffers by name.
        """
        return restore(stored, self.pretrained)

    def loss(self, stored: dict[str, Tensor]) -> float:
        """A stored checkpoint's mean loss on the targets.

        Args:
            stored: one of a bank's checkpoints.

        Returns:
            The loss.
        """
        model = self.make_model()
        model.load_state_dict(self.weights(stored))
        *inputs, labels = self.targets
        with torch.no_grad():
            return float(self.objective.loss(model.eval()(*inputs), labels))

    @property
    def objective(self) -> Objective:
        """Loss and output."""
        return OBJECTIVES[self.task]

    def describe(self) -> dict[str, Any]:
        """The numbers of the recipe.

        Returns:
            JSON values.
        """
        return {
            "optimizer": f"{OPTIMIZERS[self.optimizer]}, cosine to zero",
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
        name: of a module in this folder.

    Returns:
        The recipe.
    """
    return import_module(f"benchmarks.banks.recipes.{name}").recipe()


def with_data(names: Iterable[str]) -> list[str]:
    """Leaves out banks whose data is not there, and says what to do about it.

    Args:
        names: banks; any other name is kept.

    Returns:
        The rest.

    Raises:
        MissingDataError: if nothing is left.
    """
    kept, missing = [], []
    for name in names:
        try:
            if name in NAMES:
                recipe(name)
        except MissingDataError as error:
            missing.append(error)
            print(f"The bank {name} is left out. {error}", flush=True)
        else:
            kept.append(name)
    if missing and not kept:
        raise missing[0]
    return kept


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
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = _optimizer(recipe, trained)
    loss = recipe.objective.loss
    generator = torch.Generator().manual_seed(seed)
    rates = _rates(recipe, len(indices))
    for _ in range(recipe.epochs):
        order = indices[torch.randperm(len(indices), generator=generator)]
        for batch in order.split(recipe.batch_size):
            *inputs, labels = (part[batch] for part in recipe.train)
            optimizer.zero_grad()
            loss(model(*inputs), labels).backward()
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
        recipe: the recipe, of a model without buffers.
        subsets: the examples of each model.
        seeds: the seed of each model.

    Returns:
        The models, in evaluation mode.
    """
    models = [_fresh(recipe, seed) for seed in seeds]
    stacked, _ = stack_module_state(models)
    weights = {name: value.detach() for name, value in stacked.items()}
    optimizer = _optimizer(recipe, list(weights.values()))

    def loss(weights: dict[str, Tensor], *parts: Tensor) -> Tensor:
        predictions = functional_call(models[0], weights, parts[:-1])
        return recipe.objective.loss(predictions, parts[-1])

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rates = _rates(recipe, len(subsets[0]))
    for _ in range(recipe.epochs):
        order = torch.stack([
            subset[torch.randperm(len(subset), generator=generator)]
            for subset, generator in zip(subsets, generators, strict=True)
        ])
        for batch in order.split(recipe.batch_size, dim=1):
            parts = (part[batch] for part in recipe.train)
            for name, gradient in vmap(grad(loss))(weights, *parts).items():
                weights[name].grad = gradient
            optimizer.param_groups[0]["lr"] = next(rates)
            optimizer.step()
    for j, model in enumerate(models):
        model.load_state_dict({name: value[j] for name, value in weights.items()})
    return [model.eval() for model in models]


def _fresh(recipe: Recipe, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipe.make_model()


def _optimizer(recipe: Recipe, trained: list[Tensor]) -> torch.optim.Optimizer:
    settings: Any = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(trained, **settings)
    return torch.optim.SGD(trained, momentum=MOMENTUM, **settings)


def _rates(recipe: Recipe, size: int) -> Iterator[float]:
    # a cosine from the recipe's rate to zero
    steps = recipe.epochs * -(-size // recipe.batch_size)
    for step in range(steps):
        yield recipe.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2


def outputs(recipe: Recipe, model: nn.Module, examples: tuple[Tensor, ...]) -> Tensor:
    """The outputs that are the ground truth.

    Args:
        recipe: says which.
        model: in evaluation mode.
        examples: inputs and labels.

    Returns:
        `[m]`.
    """
    *inputs, labels = examples
    with torch.no_grad():
        return recipe.objective.output(model(*inputs), labels)
