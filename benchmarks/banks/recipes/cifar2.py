"""CIFAR-10's cats against dogs and a small ResNet with BatchNorm.

The images are not in the repository: `benchmarks.banks.fetch_cifar2` fetches them.
"""

import numpy as np
import torch
from torch import nn

from benchmarks.banks.fetch_cifar2 import read
from benchmarks.banks.networks import ResNet
from benchmarks.banks.recipes import Recipe


def recipe() -> Recipe:
    """The recipe.

    Returns:
        1,500 training examples, 250 targets, 64 halves with 3 seeds each.
    """
    images, labels = read()
    order = np.random.default_rng(0).permutation(len(images))[:1750]
    x = torch.tensor(images[order]).permute(0, 3, 1, 2).contiguous().float().div_(255)
    x = (x - x[:1500].mean((0, 2, 3), keepdim=True)) / x[:1500].std((0, 2, 3), keepdim=True)
    y = torch.tensor(labels[order].astype(np.int64))
    return Recipe(
        train=(x[:1500], y[:1500]),
        targets=(x[1500:], y[1500:]),
        make_model=make_model,
        epochs=16,
        batch_size=50,
        learning_rate=0.2,
        weight_decay=5e-3,
        subsets=64,
        seeds=3,
        checkpoints=10,
    )


def make_model() -> nn.Module:
    """The network, which needs no data.

    Returns:
        A ResNet of 20 thousand parameters.
    """
    return ResNet((16, 32), 2)
