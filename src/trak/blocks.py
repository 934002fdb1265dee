"""Gradient blocks: what a gradient computer emits and a projector consumes.

A block holds the per-sample gradients of one parameter for one batch. The computer
hands it to a sink and forgets it, so one layer at a time is alive.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int64
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


@dataclass(frozen=True, slots=True)
class IndexedBlock:
    """Per-sample gradients of a table, of which each sample touches few rows.

    The gradient of sample `b` has `backprops[b, s]` added to row `indices[b, s]` of a
    matrix `[num_rows, o]` like `torch.nn.Embedding.weight`.

    Attributes:
        name: the parameter's name in `model.named_parameters()`.
        indices: rows of the table, `[b, s]`.
        backprops: the gradient at the layer's output, `[b, s, o]`.
        num_rows: rows of the table.
    """

    name: str
    indices: Int64[Tensor, "b s"]
    backprops: Float[Tensor, "b s o"]
    num_rows: int

    def dense(self) -> DenseBlock:
        """Adds the rows up.

        Returns:
            The same gradients as rows of length `num_rows * o`.
        """
        b, _, o = self.backprops.shape
        table = self.backprops.new_zeros(b, self.num_rows, o)
        index = self.indices.unsqueeze(-1).expand_as(self.backprops)
        return DenseBlock(
            self.name, table.scatter_add_(1, index, self.backprops).flatten(1)
        )


Block = DenseBlock | FactoredBlock | IndexedBlock
Sink = Callable[[Block], None]
