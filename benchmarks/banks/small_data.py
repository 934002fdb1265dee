"""Data of small banks, made or loaded from what scikit-learn ships."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, make_classification
from torch import Tensor

Examples = tuple[Tensor, Tensor]


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


def pairs(count: int = 800) -> tuple[Examples, Examples]:
    """Digits that `digits` leaves out up to 750, with two digits in each class.

    Args:
        count: training examples.

    Returns:
        Training examples, and 97 targets.
    """
    (x, y), _ = digits(750 + count + 97)
    x, y = x[750:], y[750:] // 2
    return (x[:count], y[:count]), (x[count:], y[count:])


def merged(count: int, classes: int, *, first: int = 0) -> tuple[Examples, Examples]:
    """Eight hard classes, some of them taken for one.

    Args:
        count: training examples.
        classes: that are left.
        first: how many examples come before.

    Returns:
        Training examples, and 150 targets.
    """
    (x, y), targets = blobs(2000, 30, 8, 0.03, n_informative=12, class_sep=1.5)
    some = slice(first, first + count)
    return relabelled(((x[some], y[some]), targets), lambda _, y: y % classes)


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
