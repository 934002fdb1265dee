"""Small banks that are trained when they are asked for: nine ways to train an MLP.

They differ in what a ridge depends on: how long and how strongly regularized training was,
how much noise is in the labels, width, depth and number of examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

from benchmarks.banks.bank import Bank
from benchmarks.banks.recipes import Recipe, train_together
from benchmarks.banks.recipes import outputs as evaluate

SUBSETS, SEEDS, CHECKPOINTS, TOGETHER = 64, 4, 5, 32
Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        widths: of the MLP.
        data: training examples and targets.
        epochs: how many.
        rate: learning rate.
        decay: weight decay.
    """

    widths: tuple[int, ...]
    data: Callable[[], tuple[Examples, Examples]]
    epochs: int
    rate: float
    decay: float


def digits(count: int = 1000, wrong: float = 0.0) -> tuple[Examples, Examples]:
    """8 x 8 pixels.

    Args:
        count: training examples.
        wrong: share of random labels among them.

    Returns:
        Training examples, and 150 targets.
    """
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.tensor(images[order] / 16, dtype=torch.float32)
    y = torch.tensor(labels[order])
    train = x[:count], y[:count].clone()
    rng = np.random.default_rng(1)
    chosen = rng.permutation(count)[: int(wrong * count)]
    train[1][chosen] = torch.tensor(rng.integers(0, 10, len(chosen)))
    return train, (x[-150:], y[-150:])


def cancer() -> tuple[Examples, Examples]:
    """30 measurements, two classes that are easy to tell apart.

    Returns:
        400 training examples, and 169 targets.
    """
    table, labels = load_breast_cancer(return_X_y=True)
    table = (table - table.mean(0)) / table.std(0)
    order = np.random.default_rng(0).permutation(len(table))
    x = torch.tensor(table[order], dtype=torch.float32)
    y = torch.tensor(labels[order])
    return (x[:400], y[:400]), (x[400:], y[400:])


MLP = (64, 96, 64, 10)
VARIANTS = {
    "no decay": Variant(MLP, digits, 15, 0.05, 0.0),
    "long": Variant(MLP, digits, 60, 0.1, 0.0),
    "few": Variant(MLP, lambda: digits(300), 40, 0.1, 5e-3),
    "wide": Variant((64, 256, 10), digits, 20, 0.1, 1e-3),
    "noisy": Variant(MLP, lambda: digits(wrong=0.2), 20, 0.1, 5e-3),
    "brief": Variant(MLP, digits, 3, 0.05, 0.0),
    "linear": Variant((64, 10), digits, 30, 0.1, 1e-3),
    "cancer": Variant((30, 64, 2), cancer, 30, 0.05, 5e-3),
    "deep": Variant((64, 64, 64, 64, 64, 10), digits, 25, 0.05, 2e-3),
}


def make(name: str) -> tuple[Recipe, Bank]:
    """Trains a bank; about half a minute.

    Args:
        name: of the variant.

    Returns:
        Data and model, and the ground truth.
    """
    variant = VARIANTS[name]
    train, targets = variant.data()
    count = len(train[1])
    made = Recipe(
        train=train,
        targets=targets,
        make_model=lambda: _mlp(variant.widths),
        epochs=variant.epochs,
        batch_size=50,
        learning_rate=variant.rate,
        weight_decay=variant.decay,
        subsets=SUBSETS,
        seeds=SEEDS,
        checkpoints=CHECKPOINTS,
        together=TOGETHER,
    )
    rng = np.random.default_rng(5)
    masks = np.zeros((SUBSETS, count), dtype=bool)
    for mask in masks:
        mask[rng.permutation(count)[: count // 2]] = True
    outputs = np.zeros((SUBSETS, SEEDS, len(targets[1])))
    jobs = [(j, seed) for j in range(SUBSETS) for seed in range(SEEDS)]
    for start in range(0, len(jobs), TOGETHER):
        part = jobs[start : start + TOGETHER]
        chosen = [torch.tensor(np.flatnonzero(masks[j])) for j, _ in part]
        models = train_together(made, chosen, [seed * SUBSETS + j for j, seed in part])
        for (j, seed), model in zip(part, models, strict=True):
            outputs[j, seed] = evaluate(made, model, targets).numpy()
    every: list[Any] = [torch.arange(count)] * CHECKPOINTS
    whole = train_together(made, every, [9000 + j for j in range(CHECKPOINTS)])
    states = [dict(model.state_dict()) for model in whole]
    return made, Bank(masks, outputs, states, {"name": name})


def _mlp(widths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
