"""Gradient blocks: what a gradient computer emits and a projector consumes.

A block holds the per-sample gradients of one parameter for one batch. The computer
hands it to a sink and forgets it, so one layer at a time is alive.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_PATCHES = 1 << 23  # numbers that are cut out at a time
_SLOWER = 0.75  # of the multiplications, where they are no longer one large product


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
        return DenseBlock(self.name, self.sketch(None, None).flatten(start_dim=1))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The vectors whose outer products add up to the gradient.

        Returns:
            `[b, s, o]` and `[b, s, i]`.
        """
        return self.backprops, self.activations

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """`left^T G right` of every sample's gradient `G`, without forming `G`.

        Args:
            left: `[o, r]`; None stands for the identity.
            right: `[i, q]`; None stands for the identity.

        Returns:
            `[b, r, q]`.
        """
        if left is not None and right is not None:
            return self._between(left, right)
        backprops = self.backprops if left is None else self.backprops @ left
        activations = self.activations if right is None else self.activations @ right
        if left is None and right is not None:  # the long axis innermost is faster
            return (activations.transpose(1, 2) @ backprops).transpose(1, 2)
        return backprops.transpose(1, 2) @ activations

    def _between(self, left: Tensor, right: Tensor) -> Tensor:
        # in the order that takes the fewest multiplications
        (o, r), (i, q), s = left.shape, right.shape, self.backprops.shape[1]
        both = s * (o * r + i * q + r * q)
        left_first = s * (o * r + r * i) + r * i * q
        right_first = s * (i * q + o * q) + o * r * q
        if left_first <= min(right_first, _SLOWER * both):
            return ((self.backprops @ left).transpose(1, 2) @ self.activations) @ right
        if right_first <= _SLOWER * both:
            return left.T @ (self.backprops.transpose(1, 2) @ (self.activations @ right))
        return (self.backprops @ left).transpose(1, 2) @ (self.activations @ right)


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

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """`left^T G right` of every sample's gradient `G`, without forming `G`.

        Args:
            left: `[num_rows, r]`; None stands for the identity.
            right: `[o, q]`; None stands for the identity.

        Returns:
            `[b, r, q]`.
        """
        backprops = self.backprops if right is None else self.backprops @ right
        if left is None:
            rows = IndexedBlock(self.name, self.indices, backprops, self.num_rows).dense()
            return rows.gradient.unflatten(1, (self.num_rows, -1))
        return left[self.indices].transpose(1, 2) @ backprops

    def picked(self, columns: Tensor, factors: Tensor, width: int, right: Tensor) -> Tensor:
        """`sketch` where no row of `left` has more than one entry.

        Args:
            columns: where each row's entry is, `[num_rows]`; `width` for none.
            factors: the entries, `[num_rows]`.
            width: columns of `left`, `r`.
            right: `[o, q]`.

        Returns:
            `[b, r, q]`.
        """
        values = (self.backprops @ right) * factors[self.indices].unsqueeze(-1)
        places = columns[self.indices].unsqueeze(-1).expand_as(values)
        found = values.new_zeros(len(values), width + 1, values.shape[2])
        return found.scatter_add_(1, places, values)[:, :width]


@dataclass(frozen=True, slots=True)
class ConvolvedBlock:
    """Per-sample gradients of a convolution's weight, whose patches are never cut out.

    Like a `FactoredBlock` with the patches that the kernel sees as activations: the
    gradient of sample `b` is a matrix `[o, c * kernel]`.

    Attributes:
        name: the parameter's name in `model.named_parameters()`.
        inputs: the padded input, `[b, c, *space]`.
        backprops: the gradient at the output, `[b, o, *positions]`.
        kernel: size of the kernel along each axis of space.
        stride: step of the kernel along each axis.
        dilation: distance between the kernel's taps along each axis.
    """

    name: str
    inputs: Float[Tensor, "b c *space"]
    backprops: Float[Tensor, "b o *positions"]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]

    def dense(self) -> DenseBlock:
        """Multiplies patches and backprops.

        Returns:
            The same gradients as rows of length `o * c * kernel`.
        """
        return DenseBlock(self.name, self.sketch(None, None).flatten(start_dim=1))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The vectors whose outer products add up to the gradient.

        Returns:
            Backprops `[b, s, o]`, and the patches that the kernel sees, cut out,
            `[b, s, c * kernel]`.
        """
        width = self.inputs.shape[1] * torch.Size(self.kernel).numel()
        patches = self.windows().reshape(len(self.inputs), -1, width)
        return self.backprops.flatten(start_dim=2).mT, patches

    def windows(self, first: int = 0) -> Tensor:
        """What the kernel sees at each position, as a view of a contiguous input.

        Args:
            first: axis of space from which on the kernel is looked through; those before
                stay as they are in the input.

        Returns:
            `[b, *space[:first], *positions[first:], c, *kernel[first:]]`.
        """
        count, channels, *space = self.inputs.shape
        inputs, positions = self.inputs.contiguous(), self.backprops.shape[2 + first :]
        each, channel, *axes = inputs.stride()
        seen = list(zip(axes, self.stride, self.dilation, strict=True))[first:]
        steps = [axis * step for axis, step, _ in seen]
        taps = [axis * apart for axis, _, apart in seen]
        return inputs.as_strided(
            (count, *space[:first], *positions, channels, *self.kernel[first:]),
            (each, *axes[:first], *steps, channel, *taps),
        )

    def taps(self) -> Tensor:
        """What each tap of the kernel sees at every position, as a view.

        Copied in this order, row after row of the input, patches take a tenth of the time
        that those of `factors` do.

        Returns:
            `[b, c, *kernel, *positions]`.
        """
        seen, axes = self.windows(), 1 + len(self.kernel)
        return seen.permute(0, *range(axes, seen.ndim), *range(1, axes))

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """`left^T G right` of every sample's gradient `G`.

        The patches times `right` are a convolution of the input with `right`'s columns
        as kernels. Where these are many, `G` is formed first.

        Args:
            left: `[o, r]`; None stands for the identity.
            right: `[c * kernel, q]`; None stands for the identity.

        Returns:
            `[b, r, q]`.
        """
        if right is None:
            formed = self._formed()
            return formed if left is None else left.t() @ formed
        if self._is_short(left, right):
            found = self._formed() @ right
            return found if left is None else left.t() @ found
        backprops = self.backprops.flatten(start_dim=2)  # [b, o, s]
        if left is not None:
            backprops = left.t() @ backprops
        return backprops @ self._seen(right).transpose(1, 2)

    def _is_short(self, left: Tensor | None, right: Tensor) -> bool:
        # whether forming the gradient takes fewer multiplications
        outputs, positions = self.backprops.shape[1], self.backprops.shape[2:].numel()
        width, columns = right.shape
        rows = outputs if left is None else left.shape[1]
        inside = 0 if left is None else outputs * rows
        formed = positions * outputs * width + outputs * width * columns + inside * columns
        straight = positions * (width * columns + rows * columns + inside)
        return formed < straight

    def _formed(self) -> Tensor:
        # G, [b, o, c * kernel], of so many samples at a time that patches stay small
        backprops, seen = self.backprops.flatten(start_dim=2), self.taps()
        width = self.inputs.shape[1] * torch.Size(self.kernel).numel()
        some = max(1, _PATCHES // max(1, width * backprops.shape[2]))
        parts = [
            part @ taps.reshape(len(taps), width, -1).transpose(1, 2)
            for part, taps in zip(backprops.split(some), seen.split(some), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _seen(self, right: Tensor) -> Tensor:
        # the patches times the columns of a matrix, [b, q, s]
        kernels = right.t().reshape(-1, self.inputs.shape[1], *self.kernel)
        convolve: Any = _CONVOLUTIONS[len(self.kernel)]
        seen = convolve(self.inputs, kernels, stride=self.stride, dilation=self.dilation)
        # a stride may leave room for positions that the layer's output does not have
        space = tuple(slice(size) for size in self.backprops.shape[2:])
        return seen[(slice(None), slice(None), *space)].flatten(start_dim=2)


_CONVOLUTIONS = {
    1: torch.nn.functional.conv1d,
    2: torch.nn.functional.conv2d,
    3: torch.nn.functional.conv3d,
}

MatrixBlock = FactoredBlock | IndexedBlock | ConvolvedBlock
Block = DenseBlock | MatrixBlock
Sink = Callable[[Block], None]


def of_samples(block: Block, places: Tensor) -> Block:
    """The gradients of some of the samples.

    Args:
        block: of a batch.
        places: which samples, int64, `[c]`.

    Returns:
        A block of `c` samples.
    """
    held = {field.name: getattr(block, field.name) for field in fields(block)}
    taken: dict[str, Any] = {
        name: value[places] for name, value in held.items() if isinstance(value, Tensor)
    }
    return replace(block, **taken)
