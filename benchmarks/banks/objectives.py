"""What a bank's models minimise, and which output of theirs is the ground truth."""

from __future__ import annotations

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


class Regression(AbstractModelOutput):
    """The prediction itself, which goes with half the squared error as loss."""

    @staticmethod
    def get_output(model: Any, weights: Any, buffers: Any, x: Tensor, _: Tensor) -> Tensor:
        """The prediction for one example.

        Args:
            model: the model.
            weights: its parameters.
            buffers: its buffers.
            x: the input.

        Returns:
            A scalar.
        """
        return functional_call(model, (weights, buffers), (x[None],)).sum()

    def get_batch_output(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The predictions for a batch.

        Args:
            model: the model.
            batch: inputs and labels.

        Returns:
            `[b]`.
        """
        return model(batch[0])[:, 0]

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: tuple[Tensor, ...]
    ) -> Tensor:
        """Label minus prediction.

        Args:
            model: the model.
            weights: its parameters.
            buffers: its buffers.
            batch: inputs and labels.

        Returns:
            `[b]`.
        """
        x, y = batch
        return y - functional_call(model, (weights, buffers), (x,))[:, 0]


class NextTokens(AbstractModelOutput):
    """The mean over positions of the right token's margin, `log p / (1 - p)`."""

    loss_is_of_words = True

    @staticmethod
    def get_output(model: Any, weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
        """The output of one text.

        Args:
            model: the model.
            weights: its parameters.
            buffers: its buffers.
            x: tokens, `[s]`.
            y: the token after each, `[s]`.

        Returns:
            A scalar.
        """
        logits = functional_call(model, (weights, buffers), (x[None],))
        return margin(logits, y[None]).mean()

    def get_batch_output(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The outputs of a batch.

        Args:
            model: the model.
            batch: tokens, and the token after each.

        Returns:
            `[b]`.
        """
        return margin(model(batch[0]), batch[1]).mean(1)

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: tuple[Tensor, ...]
    ) -> Tensor:
        """One minus the mean probability of the right token.

        Args:
            model: the model.
            weights: its parameters.
            buffers: its buffers.
            batch: tokens, and the token after each.

        Returns:
            `[b]`.
        """
        logits = functional_call(model, (weights, buffers), (batch[0],))
        return 1 - margin(logits, batch[1]).sigmoid().mean(1)


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
    "regression": Objective(_squared, lambda f, _: f[:, 0], Regression),
    "language_modelling": Objective(
        _next_tokens, lambda f, y: margin(f, y).mean(1), NextTokens
    ),
}
