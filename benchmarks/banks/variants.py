"""Small banks that are trained when they are asked for.

They differ in what a ridge depends on: how long and how strongly regularized training was,
how much noise is in the labels, width, depth, number of examples, data and loss. The rule
of the automatic ridge was made with those above `UNSEEN`; the rest was kept for judging it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import (
    load_breast_cancer,
    load_digits,
    load_iris,
    load_wine,
    make_classification,
    make_friedman1,
    make_friedman2,
    make_moons,
)
from torch import Tensor, nn

from benchmarks.banks import losses  # noqa: F401 - adds objectives
from benchmarks.banks.bank import Bank
from benchmarks.banks.recipes import Recipe, train_together
from benchmarks.banks.recipes import outputs as evaluate

SUBSETS, SEEDS, CHECKPOINTS, TOGETHER = 64, 4, 10, 32
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
        activation: between layers.
        task: a name in `OBJECTIVES`; empty for cross entropy, or the squared loss where
            labels are fractions.
    """

    widths: tuple[int, ...]
    data: Callable[[], tuple[Examples, Examples]]
    epochs: int
    rate: float
    decay: float
    activation: Callable[[], nn.Module] = nn.ReLU
    task: str = ""


def digits(
    count: int = 1000, wrong: float = 0.0, *, binary: bool = False
) -> tuple[Examples, Examples]:
    """8 x 8 pixels.

    Args:
        count: training examples.
        wrong: share of random labels among them.
        binary: whether a digit is odd.

    Returns:
        Training examples, and 150 targets.
    """
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.tensor(images[order] / 16, dtype=torch.float32)
    y = torch.tensor(labels[order] % 2 if binary else labels[order])
    return mistaken(((x[:count], y[:count]), (x[-150:], y[-150:])), wrong, seed=1)


def table(load: Callable[..., Any], count: int) -> tuple[Examples, Examples]:
    """A data set of scikit-learn's, with inputs of mean 0 and variance 1.

    Args:
        load: gives inputs and labels.
        count: training examples; the others are targets, 169 at most.

    Returns:
        Training examples and targets.
    """
    inputs, labels = load()
    order = np.random.default_rng(0).permutation(len(inputs))
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    x = torch.tensor(inputs[order], dtype=torch.float32)
    if np.issubdtype(labels.dtype, np.floating):
        labels = ((labels - labels.mean()) / labels.std()).astype(np.float32)
    y = torch.tensor(labels[order])
    stop = count + 169
    return (x[:count], y[:count]), (x[count:stop], y[count:stop])


def blurred(count: int, spread: float) -> tuple[Examples, Examples]:
    """Digits with noise on every pixel, hard to tell apart.

    Args:
        count: training examples.
        spread: standard deviation of the noise; pixels lie between 0 and 1.

    Returns:
        Training examples, and 150 targets.
    """
    generator = torch.Generator().manual_seed(3)
    (x, y), (others, labels) = digits(count)
    noise = [torch.randn(each.shape, generator=generator) for each in (x, others)]
    return (x + spread * noise[0], y), (others + spread * noise[1], labels)


def cancer(count: int = 400) -> tuple[Examples, Examples]:
    """30 measurements, two classes that are easy to tell apart.

    Args:
        count: training examples.

    Returns:
        Training examples, and 169 targets.
    """
    return table(lambda: load_breast_cancer(return_X_y=True), count)


def some(data: tuple[Examples, Examples], *classes: int) -> tuple[Examples, Examples]:
    """The examples of some classes, which are numbered anew.

    Args:
        data: training examples and targets.
        classes: which.

    Returns:
        Training examples and targets.
    """
    numbers = torch.tensor(classes)
    parts: list[Examples] = []
    for x, y in data:
        found = y[:, None] == numbers
        parts.append((x[found.any(1)], found[found.any(1)].long().argmax(1)))
    return parts[0], parts[1]


def mistaken(
    data: tuple[Examples, Examples], share: float, seed: int = 3
) -> tuple[Examples, Examples]:
    """Random labels for some of the training examples.

    Args:
        data: training examples and targets.
        share: of the training examples.
        seed: of the choice and the labels.

    Returns:
        Training examples and targets.
    """
    (x, y), targets = data
    rng, y = np.random.default_rng(seed), y.clone()
    chosen = rng.permutation(len(y))[: int(share * len(y))]
    y[chosen] = torch.tensor(rng.integers(0, int(y.max()) + 1, len(chosen)))
    return (x, y), targets


def relabelled(
    data: tuple[Examples, Examples], change: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Examples, Examples]:
    """Examples with other labels.

    Args:
        data: training examples and targets.
        change: of inputs and labels.

    Returns:
        Training examples and targets.
    """
    (x, y), (others, labels) = data
    return (x, change(x, y)), (others, change(others, labels))


def fractions(_: Tensor, labels: Tensor) -> Tensor:
    """Labels 0 and 1 as floating point numbers.

    Args:
        labels: `[n]`.

    Returns:
        `[n]`.
    """
    return labels.float()


def bits(_: Tensor, labels: Tensor) -> Tensor:
    """The four binary digits of a digit.

    Args:
        labels: `[n]`.

    Returns:
        `[n, 4]`, 0 or 1.
    """
    return (labels[:, None] >> torch.arange(4) & 1).float()


def blobs(count: int, features: int, classes: int, flip: float, **options: Any) -> Any:
    """Classes of several clusters each.

    Args:
        count: training examples.
        features: of the inputs.
        classes: how many.
        flip: share of random labels.
        options: of scikit-learn's generator.

    Returns:
        Training examples, and 150 targets.
    """
    options = {"n_informative": 8, "n_classes": classes, "flip_y": flip, **options}
    return table(
        lambda: make_classification(count + 150, features, random_state=0, **options), count
    )


def friedman(make: Callable[..., Any], count: int, noise: float) -> Any:
    """A regression on a function that is not linear.

    Args:
        make: scikit-learn's generator.
        count: training examples.
        noise: standard deviation.

    Returns:
        Training examples, and 150 targets.
    """
    return table(lambda: make(count + 150, noise=noise, random_state=0), count)


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
    "150": Variant((64, 64, 10), lambda: digits(150), 40, 0.1, 5e-3),
    "half wrong": Variant((64, 64, 10), lambda: digits(wrong=0.5), 15, 0.05, 1e-3),
    "odd": Variant((64, 64, 2), lambda: digits(binary=True), 20, 0.1, 1e-3),
    "slow": Variant(MLP, digits, 6, 0.02, 0.0),
    "gelu": Variant((64, 128, 10), lambda: digits(800), 40, 0.1, 0.0, nn.GELU),
    "blobs": Variant((20, 64, 64, 3), lambda: blobs(1200, 20, 3, 0.05), 30, 0.05, 1e-3),
    "friedman": Variant(
        (10, 64, 64, 1), lambda: friedman(make_friedman1, 600, 1.0), 60, 0.02, 1e-3
    ),
    "blurred, long": Variant((64, 64, 10), lambda: blurred(1000, 0.8), 60, 0.1, 1e-3),
    "20 classes": Variant(
        (40, 96, 20),
        lambda: blobs(1200, 40, 20, 0.3, n_informative=12, n_clusters_per_class=1),
        25,
        0.05,
        1e-3,
    ),
    "eight blobs": Variant((20, 64, 8), lambda: blobs(900, 20, 8, 0.5), 80, 0.1, 1e-4),
    "cancer, tanh": Variant((30, 48, 2), cancer, 40, 0.05, 2e-3, nn.Tanh),
    "cancer, long": Variant((30, 64, 64, 2), cancer, 80, 0.05, 0.0),
    "cancer, few": Variant((30, 32, 2), lambda: cancer(120), 50, 0.05, 2e-3),
    "cancer, linear": Variant((30, 2), cancer, 40, 0.05, 1e-3),
    "three or eight": Variant((64, 64, 2), lambda: some(digits(1600), 3, 8), 30, 0.1, 1e-3),
    "three clusters": Variant(
        (10, 48, 3),
        lambda: blobs(500, 10, 3, 0.02, n_clusters_per_class=1, class_sep=2.0),
        40,
        0.05,
        1e-3,
    ),
    "rare, 1000": Variant(
        (20, 48, 1),
        lambda: relabelled(blobs(1000, 20, 2, 0.01, weights=[0.95]), fractions),
        30,
        0.05,
        1e-3,
        task="one_logit",
    ),
}
UNSEEN = {
    "wine": Variant(
        (13, 32, 3), lambda: table(lambda: load_wine(return_X_y=True), 120), 60, 0.05, 1e-3
    ),
    "tanh, 20 % wrong": Variant(
        (64, 96, 10), lambda: digits(500, 0.2), 30, 0.1, 1e-2, nn.Tanh
    ),
    "many blobs": Variant((30, 64, 5), lambda: blobs(2500, 30, 5, 0.0), 20, 0.05, 1e-3),
    "binary blobs": Variant((15, 48, 2), lambda: blobs(500, 15, 2, 0.02), 40, 0.05, 2e-3),
    "friedman 2": Variant(
        (4, 64, 64, 1), lambda: friedman(make_friedman2, 500, 50.0), 60, 0.02, 1e-3
    ),
    "silu, long": Variant((64, 64, 64, 10), lambda: digits(700), 80, 0.1, 1e-4, nn.SiLU),
    "40 % wrong": Variant((64, 64, 10), lambda: digits(wrong=0.4), 15, 0.05, 1e-3),
    "70 % wrong": Variant((64, 64, 10), lambda: digits(wrong=0.7), 15, 0.05, 1e-3),
    "tanh, half wrong": Variant(
        (64, 96, 10), lambda: digits(600, 0.5), 40, 0.1, 3e-3, nn.Tanh
    ),
    "half wrong, long": Variant((64, 64, 10), lambda: digits(wrong=0.5), 60, 0.1, 0.0),
    "moons": Variant(
        (2, 64, 64, 2),
        lambda: table(lambda: make_moons(950, noise=0.3, random_state=0), 800),
        60,
        0.05,
        1e-3,
    ),
    "iris": Variant(
        (4, 16, 3), lambda: table(lambda: load_iris(return_X_y=True), 100), 100, 0.05, 1e-3
    ),
    "ten blobs": Variant((40, 128, 10), lambda: blobs(1500, 40, 10, 0.1), 30, 0.05, 1e-3),
    "one logit": Variant(
        (64, 64, 1),
        lambda: relabelled(digits(500, binary=True), fractions),
        25,
        0.1,
        1e-3,
        task="one_logit",
    ),
    "one logit, rare": Variant(
        (15, 48, 1),
        lambda: relabelled(blobs(500, 15, 2, 0.02, weights=[0.93]), fractions),
        40,
        0.05,
        2e-3,
        task="one_logit",
    ),
    "several labels": Variant(
        (64, 64, 4),
        lambda: relabelled(digits(500), bits),
        25,
        0.05,
        1e-3,
        task="several_labels",
    ),
    "hinge": Variant(
        (15, 48, 1),
        lambda: relabelled(blobs(500, 15, 2, 0.1), fractions),
        40,
        0.05,
        2e-3,
        task="hinge",
    ),
    "reconstruction": Variant(
        (64, 32, 64),
        lambda: relabelled(digits(400), lambda x, _: x),
        60,
        0.5,
        1e-4,
        nn.Tanh,
        task="reconstruction",
    ),
    "one or seven": Variant((64, 48, 2), lambda: some(digits(1600), 1, 7), 40, 0.1, 5e-4),
    "four or nine, tanh": Variant(
        (64, 64, 2), lambda: some(digits(1600), 4, 9), 30, 0.1, 3e-3, nn.Tanh
    ),
    "cancer, 15 % wrong": Variant(
        (30, 48, 2), lambda: mistaken(cancer(), 0.15), 60, 0.05, 1e-3
    ),
    "cancer, one logit": Variant(
        (30, 48, 1),
        lambda: relabelled(cancer(350), fractions),
        50,
        0.05,
        1e-3,
        nn.Tanh,
        task="one_logit",
    ),
    "moons, clean": Variant(
        (2, 48, 2),
        lambda: table(lambda: make_moons(650, noise=0.12, random_state=4), 500),
        60,
        0.1,
        1e-3,
    ),
    "eight or not": Variant(
        (64, 48, 1),
        lambda: relabelled(digits(800), lambda _, y: (y == 8).float()),
        25,
        0.1,
        1e-3,
        task="one_logit",
    ),
    "class weights": Variant(
        (15, 48, 3),
        lambda: blobs(700, 15, 3, 0.02, weights=[0.85, 0.1], class_sep=1.2),
        30,
        0.05,
        1e-3,
        task="weights of three",
    ),
    "class weights, two": Variant(
        (15, 48, 2),
        lambda: blobs(600, 15, 2, 0.02, weights=[0.88], class_sep=1.2),
        60,
        0.05,
        1e-4,
        task="weights of two",
    ),
    "positive weight": Variant(
        (20, 48, 1),
        lambda: blobs(800, 20, 2, 0.03, weights=[0.9]),
        30,
        0.05,
        1e-3,
        task="positive weight",
    ),
    "30 features": Variant((30, 64, 64, 2), lambda: blobs(900, 30, 2, 0.0), 60, 0.1, 0.0),
}
VARIANTS |= UNSEEN


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
    usual = "regression" if train[1].is_floating_point() else "image_classification"
    made = Recipe(
        train=train,
        targets=targets,
        make_model=lambda: _mlp(variant.widths, variant.activation),
        epochs=variant.epochs,
        batch_size=50,
        learning_rate=variant.rate,
        weight_decay=variant.decay,
        subsets=SUBSETS,
        seeds=SEEDS,
        checkpoints=CHECKPOINTS,
        together=TOGETHER,
        task=variant.task or usual,
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


def _mlp(widths: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])
