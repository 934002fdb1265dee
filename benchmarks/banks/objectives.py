"""What a bank's models minimise, and which output of theirs is the ground truth."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from trak.modelout_functions import AbstractModelOutput


@dataclass(frozen=True)
class Objective:
    """A loss and an output, both of a model's predictions and the labels.

    Attributes:
        loss: mean over a batch.
        output: one number an example: what scores are asked to predict.
        task: the same output for `TRAKer`.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    output: Callable[[Tensor, Tensor], Tensor]
    task: Any


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """`log p / (1 - p)` of the right class.

    Args:
        logits: `[..., classes]`.
        labels: `[...]`.

    Returns:
        `[...]`.
    """
    right = labels[..., None]
    others = logits.scatter(-1, right, -float("inf")).logsumexp(-1)
    return logits.gather(-1, right).squeeze(-1) - others


class Task(AbstractModelOutput):
    """A task that is told from predictions and labels."""

    @staticmethod
    @abstractmethod
    def output(predictions: Tensor, labels: Tensor) -> Tensor:
        """The model output.

        Args:
            predictions: `[b, outputs]`.
            labels: `[b, ...]`.

        Returns:
            `[b]`.
        """

    @staticmethod
    @abstractmethod
    def weight(predictions: Tensor, labels: Tensor) -> Tensor:
        """Q.

        Args:
            predictions: `[b, outputs]`.
            labels: `[b, ...]`.

        Returns:
            `[b]`.
        """

    def get_output(self, model: Any, *args: Any) -> Tensor:
        """The output of one example.

        Args:
            model: the model.
            args: its parameters and buffers, the input and the label.

        Returns:
            A scalar.
        """
        weights, buffers, x, y = args
        predictions = functional_call(model, (weights, buffers), (x[None],))
        return self.output(predictions, y[None]).sum()

    def get_batch_output(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The outputs of a batch.

        Args:
            model: the model.
            batch: inputs and labels.

        Returns:
            `[b]`.
        """
        return self.output(model(batch[0]), batch[1])

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: tuple[Tensor, ...]
    ) -> Tensor:
        """Q of a batch.

        Args:
            model: the model.
            weights: its parameters.
            buffers: its buffers.
            batch: inputs and labels.

        Returns:
            `[b]`.
        """
        predictions = functional_call(model, (weights, buffers), (batch[0],))
        return self.weight(predictions, batch[1])


class Regression(Task):
    """The prediction itself, which goes with half the squared error as loss."""

    @staticmethod
    def output(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return predictions[:, 0] + 0 * labels

    @staticmethod
    def weight(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return labels - predictions[:, 0]


class NextTokens(Task):
    """The mean over positions of the right token's margin, `log p / (1 - p)`."""

    loss_is_of_words = True

    @staticmethod
    def output(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return margin(predictions, labels).mean(1)

    @staticmethod
    def weight(predictions: Tensor, labels: Tensor) -> Tensor:
        """See `Task`."""
        return 1 - margin(predictions, labels).sigmoid().mean(1)


def _squared(predictions: Tensor, labels: Tensor) -> Tensor:
    return (predictions[:, 0] - labels).square().mean() / 2


def _next_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


OBJECTIVES = {
    "image_classification": Objective(
        nn.functional.cross_entropy, margin, "image_classification"
    ),
    "text_classification": Objective(
        nn.functional.cross_entropy, margin, "text_classification"
    ),
    "regression": Objective(_squared, Regression.output, Regression),
    "language_modelling": Objective(_next_tokens, NextTokens.output, NextTokens),
}
