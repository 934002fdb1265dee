"""scikit-learn's diabetes data, a regression, and an MLP of 5 thousand parameters."""

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from torch import nn

from benchmarks.banks.recipes import Recipe


def recipe() -> Recipe:
    """The recipe.

    Returns:
        342 training examples, 100 targets, 120 halves with 10 seeds each.
    """
    inputs, labels = load_diabetes(return_X_y=True, scaled=False)
    order = np.random.default_rng(0).permutation(len(inputs))
    x, y = (torch.tensor(part[order], dtype=torch.float32) for part in (inputs, labels))
    x = (x - x[:342].mean(0)) / x[:342].std(0)
    y = (y - y[:342].mean()) / y[:342].std()
    return Recipe(
        train=(x[:342], y[:342]),
        targets=(x[342:], y[342:]),
        make_model=_model,
        epochs=30,
        batch_size=19,
        learning_rate=0.03,
        weight_decay=5e-3,
        subsets=120,
        seeds=10,
        checkpoints=10,
        task="regression",
        together=40,
    )


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 1),
    )
