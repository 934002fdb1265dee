"""scikit-learn's digits, 8 x 8 pixels, and an MLP of 13 thousand parameters."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.banks.recipes import Recipe


def recipe() -> Recipe:
    """The recipe.

    Returns:
        1,200 training examples, 300 targets, 120 halves with 5 seeds each.
    """
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.tensor(images[order] / 16, dtype=torch.float32)
    y = torch.tensor(labels[order])
    return Recipe(
        train=(x[:1200], y[:1200]),
        targets=(x[1200:1500], y[1200:1500]),
        make_model=_model,
        epochs=20,
        batch_size=50,
        learning_rate=0.1,
        weight_decay=5e-3,
        subsets=120,
        seeds=5,
        checkpoints=10,
        together=20,
    )


def _model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 96),
        nn.ReLU(),
        nn.Linear(96, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
