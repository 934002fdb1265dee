"""Losses of small banks, beside cross entropy and the squared error of one number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.banks.objectives import OBJECTIVES, Objective, Task, margin
from trak.modelout_functions import ImageClassificationModelOutput

bce = nn.functional.binary_cross_entropy_with_logits


class OneLogit(Task):
    """The logit of one of two classes, and `Q = y - p` with its sign."""

    @staticmethod
    def output(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return predictions[:, 0] + 0 * labels

    @staticmethod
    def weight(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return labels - predictions[:, 0].sigmoid()


class SeveralLabels(Task):
    """The mean of the labels' margins, and one minus the mean probability."""

    @staticmethod
    def output(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return ((2 * labels - 1) * predictions).mean(1)

    @staticmethod
    def weight(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return 1 - ((2 * labels - 1) * predictions).sigmoid().mean(1)


class Hinge(Task):
    """The margin of a support vector machine, whose loss has slope 1 or 0."""

    @staticmethod
    def output(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return (2 * labels - 1) * predictions[:, 0]

    @staticmethod
    def weight(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return (Hinge.output(predictions, labels) < 1).to(predictions)


class Reconstruction(Task):
    """Minus half the mean squared error of an autoencoder, and `Q = 1`."""

    @staticmethod
    def output(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return -(predictions - labels).square().mean(1) / 2

    @staticmethod
    def weight(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return torch.ones_like((predictions - labels)[:, 0])


def _hinge(predictions: Tensor, labels: Tensor) -> Tensor:
    return (1 - Hinge.output(predictions, labels)).clamp(min=0).mean()


def _counted(*weights: float) -> Objective:
    task = ImageClassificationModelOutput(class_weights=weights)
    loss = nn.CrossEntropyLoss(weight=torch.tensor(weights))
    return Objective(loss, margin, task)


def _positive(weight: float) -> Objective:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        pos_weight = torch.tensor(weight)
        return bce(logits[:, 0], labels.to(logits), pos_weight=pos_weight)

    def output(logits: Tensor, labels: Tensor) -> Tensor:
        return (2 * labels - 1) * logits[:, 0]

    return Objective(
        loss, output, ImageClassificationModelOutput(class_weights=[1, weight])
    )


OBJECTIVES |= {
    "weights of three": _counted(0.4, 3.0, 6.0),
    "weights of two": _counted(0.6, 4.0),
    "positive weight": _positive(9.0),
    "one_logit": Objective(lambda f, y: bce(f[:, 0], y), OneLogit.output, OneLogit),
    "several_labels": Objective(
        lambda f, y: len(y[0]) * bce(f, y), SeveralLabels.output, SeveralLabels
    ),
    "hinge": Objective(_hinge, Hinge.output, Hinge),
    "reconstruction": Objective(
        lambda f, y: -Reconstruction.output(f, y).mean(),
        Reconstruction.output,
        Reconstruction,
    ),
}
