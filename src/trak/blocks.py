"""Gradient blocks: what a gradient computer emits and a projector consumes.

A block holds the per-sample gradients of one parameter for one batch. The computer
hands it to a sink and forgets it, so one layer at a time is alive.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DenseBlock:
    """Per-sample gradients of one parameter.

    Attributes:
        name: the parameter's name in `model.named_parameters()`.
        gradient: df(z_i)/dtheta, flattened to one row a sample, `[b, p]`.
    """

    name: str
    gradient: Float[Tensor, "b p"]

    def dense(self) -> "DenseBlock":
        """The block itself.

        Returns:
            This block.
        """
        return self


@dataclass(frozen=True, slots=True)
class FactoredBlock:
    """Per-sample gradients of a weight matrix, as sums of outer products.

    The gradient of sample `b` is `sum_s outer(backprops[b, s], activations[b, s])`,
    a matrix `[o, i]` like `torch.nn.Linear.weight`.

    Attributes:
        name: the parameter's name in `model.named_parameters()`.
        activations: the layer's input, `[b, s, i]`.
        backprops: the gradient at the layer's output, `[b, s, o]`.
    """

    name: str
    activations: Float[Tensor, "b s i"]
    backprops: Float[Tensor, "b s o"]

    def dense(self) -> DenseBlock:
        """Multiplies the factors out.

        Returns:
            The same gradients as rows of length `o * i`.
        """
        matrix = self.backprops.transpose(1, 2) @ self.activations  # [b, o, i]
        return DenseBlock(self.name, matrix.flatten(start_dim=1))


Block = DenseBlock | FactoredBlock
Sink = Callable[[Block], None]
