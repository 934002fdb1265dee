"""MNIST and a small convolutional network with BatchNorm, 19 thousand parameters."""

import gzip

import numpy as np
import torch
from torch import nn

from benchmarks.banks.bank import FOLDER
from benchmarks.banks.recipes import Recipe


def recipe() -> Recipe:
    """The recipe.

    Returns:
        1,500 training examples, 250 targets, 80 halves with 5 seeds each.
    """
    with gzip.open(FOLDER / "data" / "mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    table = table[np.random.default_rng(0).permutation(len(table))]
    x = torch.tensor(table[:, :-1], dtype=torch.float32).div_(255).view(-1, 1, 28, 28)
    y = torch.tensor(table[:, -1].astype(np.int64))
    return Recipe(
        train=(x[:1500], y[:1500]),
        targets=(x[1500:1750], y[1500:1750]),
        make_model=_model,
        epochs=15,
        batch_size=50,
        learning_rate=0.1,
        weight_decay=5e-3,
        subsets=80,
        seeds=5,
        checkpoints=10,
    )


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
