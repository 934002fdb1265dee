"""Ways to compress gradients to `k` columns: random, leading, and both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from benchmarks.systems import Checkpoint, Gradients, kernel_of
from trak.projectors import SparseProjector, make_projector
from trak.whitening.whitening import DAMPING, from_left, times

RANDOM = ("rademacher", "sparse", "hadamard", "factored", "masked")
LEADING_KFAC, LEADING_GRAM = "leading K-FAC", "leading Gram"
PREDICTED = "leading K-FAC, predicted"
MIXED_KFAC, MIXED_GRAM = "mixed K-FAC", "mixed Gram"
DERIVED = (LEADING_KFAC, PREDICTED, LEADING_GRAM, MIXED_KFAC, MIXED_GRAM)
FIXED = frozenset({LEADING_KFAC, PREDICTED, LEADING_GRAM})  # the same for every seed
DENSE_UP_TO = 100_000  # parameters; beyond, dense rows are drawn by way of the kernel
_PIECE = 256
_KNOWN = 0.5  # a strength from whose matrices the factors are had back


@dataclass(frozen=True)
class Source:
    """Gradients of one checkpoint at one strength of whitening.

    Attributes:
        found: the checkpoint.
        gradients: its gradients, whitened or not.
        strength: of the whitening.
        widest: columns of the dense rows that narrower ones are the beginning of.
        dense: seed to these rows, once they are made.
    """

    found: Checkpoint
    gradients: Gradients
    strength: float = 0.0
    widest: int = 0
    dense: dict[int, Tensor] = field(default_factory=dict, compare=False)

    @property
    def width(self) -> int:
        """Parameters."""
        return sum(rows.shape[1] for rows in self.gradients.values())

    @cached_property
    def kernel(self) -> Tensor:
        """Inner products of all rows, `[n + m, n + m]`, float64."""
        every = len(next(iter(self.gradients.values())))
        return kernel_of(list(self.gradients.values()), every).double()

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, descending, and eigenvectors of the train Gram matrix."""
        n = self.found.n
        values, vectors = torch.linalg.eigh(self.kernel[:n, :n])
        return values.flip(0).clamp(min=0), vectors.flip(1)

    @cached_property
    def root(self) -> Tensor:
        """Rows with the inner products of the gradients, `[n + m, n + m]`."""
        values, vectors = torch.linalg.eigh(self.kernel)
        return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()

    @cached_property
    def rotated(self) -> tuple[Tensor, Tensor]:
        """Gradients in the K-FAC eigenbases, and their coordinates by variance."""
        rows = torch.cat(list(rotate(self.found, self.gradients).values()), dim=1)
        variance = rows[: self.found.n].square().mean(0)
        return rows, variance.argsort(descending=True)

    @cached_property
    def predicted(self) -> Tensor:
        """The same coordinates by the variance that the factors speak for."""
        variance = predicted_variances(self.found, self.gradients, self.strength)
        return variance.argsort(descending=True)


def rotate(found: Checkpoint, gradients: Gradients) -> Gradients:
    """Rotates each layer into the eigenbases of its K-FAC factors.

    Whitening has the same eigenvectors as the factors it is made of.

    Args:
        found: the checkpoint, with its factors.
        gradients: whitened or not.

    Returns:
        Parameter to `[n + m, p]`; vectors are left alone.
    """
    turned = {}
    sides = found.whitening(_KNOWN).sides
    for name, rows in gradients.items():
        if name not in sides:
            turned[name] = rows
            continue
        left, right = (
            side if side.ndim == 1 else torch.linalg.eigh(side.double())[1].float()
            for side in (sides[name].left, sides[name].right)
        )
        matrices = rows.unflatten(1, (len(left), len(right)))
        if right.ndim == 2:
            matrices = times(matrices, right)
        if left.ndim == 2:
            matrices = from_left(matrices, left.T)
        turned[name] = matrices.flatten(1)
    return turned


def predicted_variances(found: Checkpoint, gradients: Gradients, strength: float) -> Tensor:
    """Variances of the coordinates of `rotate`, from the sums that whitening keeps.

    For a matrix the product of the two factors' eigenvalues, each times what whitening
    leaves of it; for vectors their mean square, likewise.

    Args:
        found: the checkpoint, with its sums.
        gradients: say which parameters there are, in order.
        strength: of the whitening.

    Returns:
        `[p]`.
    """
    half = math.sqrt(DAMPING)
    sides = found.whitening(_KNOWN).sides
    parts = []
    for name, rows in gradients.items():
        if name in sides:
            left, right = (
                _left_over(_values(side), half, strength)
                for side in (sides[name].left, sides[name].right)
            )
            parts.append(torch.outer(left, right).flatten())
        elif name in found.moments.squares:
            mean = found.moments.squares[name].double() / found.moments.count
            shift = DAMPING * mean.mean()
            parts.append(mean / (mean + shift).clamp(min=1e-30) ** strength)
        else:
            parts.append(torch.zeros(rows.shape[1]).double())
    return torch.cat([part.flatten() for part in parts])


def leading_cost(
    shapes: Mapping[str, Sequence[int]], chosen: Tensor, positions: int
) -> float:
    """What the chosen coordinates cost, by the smallest rectangle of each layer.

    Both sides are multiplied by as many eigenvectors as the rectangle has, and the sum over
    positions is taken of these, as `projection_costs` counts it for two-sided projections.

    Args:
        shapes: of the parameters.
        chosen: coordinates of `rotate`, those of large eigenvalues first.
        positions: `s`, how often a layer's weight is used for one sample.

    Returns:
        Operations a sample.
    """
    start, cost = 0, 0.0
    for shape in shapes.values():
        size = math.prod(shape)
        own = chosen[(chosen >= start) & (chosen < start + size)] - start
        start += size
        if len(shape) < 2 or not len(own):
            cost += len(own)
            continue
        columns = size // shape[0]
        rows, width = int((own // columns).max()) + 1, int((own % columns).max()) + 1
        cost += 2.0 * positions * (rows * shape[0] + width * columns + rows * width)
    return cost


def _values(side: Tensor) -> Tensor:
    # eigenvalues of (A + shift)^(-1/4), in the order of the eigenvectors
    return (side if side.ndim == 1 else torch.linalg.eigh(side.double())[0]).double()


def _left_over(powers: Tensor, damping: float, strength: float) -> Tensor:
    # a (a + shift)^(-strength), from (a + shift)^(-1/4)
    shifted = powers ** (-2 / _KNOWN)
    shift = damping / (1 + damping) * shifted.mean()
    return (shifted - shift).clamp(min=0) * shifted ** (-strength)


def compress(source: Source, kind: str, k: int, seed: int) -> Tensor | None:
    """Rows of `k` columns, scaled so that inner products are kept.

    Args:
        source: gradients.
        kind: of compression.
        k: columns.
        seed: of the random part.

    Returns:
        `[n + m, k]`; None where the kind is nothing else than no projection.
    """
    if kind == LEADING_GRAM:
        return _gram_coordinates(source, k) if k < source.found.n else None
    if kind == MIXED_GRAM:
        return _mixed_gram(source, k, seed) if k // 2 < source.found.n else None
    if kind in (LEADING_KFAC, PREDICTED, MIXED_KFAC):
        rows, order = source.rotated
        if kind == PREDICTED:
            return rows[:, source.predicted[:k]]
        if kind == LEADING_KFAC:
            return rows[:, order[:k]]
        taken = order[: k // 2]
        rest = rows.clone()
        rest[:, taken] = 0
        sketch = SparseProjector(rows.shape[1], k - k // 2, seed, device="cpu")
        return torch.cat([rows[:, taken], _sketched(sketch, rest, source, k - k // 2)], 1)
    if kind == "rademacher":
        return _dense_rows(source, k, seed)
    return random_rows(source, kind, k, seed)


def random_rows(source: Source, kind: str | None, k: int, seed: int) -> Tensor:
    """A projection of the library.

    Args:
        source: gradients.
        kind: its name; None for what the library chooses.
        k: columns.
        seed: of the entries.

    Returns:
        `[n + m, k]`.
    """
    projector = make_projector(source.found.shapes, k, seed, torch.device("cpu"), kind)
    size = len(next(iter(source.gradients.values())))
    pieces = [
        projector.project(
            {name: rows[start : start + _PIECE] for name, rows in source.gradients.items()},
            model_id=source.found.model_id,
        )
        for start in range(0, size, _PIECE)
    ]
    return torch.cat(pieces) / math.sqrt(k)


def _dense_rows(source: Source, k: int, seed: int) -> Tensor:
    # entries do not depend on k: the first columns of a wide matrix are the narrow one
    wide = max(k, source.widest)
    if seed not in source.dense or source.dense[seed].shape[1] < k:
        if source.width > DENSE_UP_TO:
            rng = np.random.default_rng([seed, source.found.model_id])
            drawn = rng.standard_normal((wide, len(source.root)), dtype=np.float32)
            source.dense[seed] = source.root @ torch.from_numpy(drawn).T
        else:
            rows = random_rows(source, "rademacher", wide, seed)
            source.dense[seed] = rows * math.sqrt(wide)
    return source.dense[seed][:, :k] / math.sqrt(k)


def _sketched(sketch: SparseProjector, rows: Tensor, source: Source, k: int) -> Tensor:
    model_id = source.found.model_id
    pieces = [sketch.project(piece, model_id=model_id) for piece in rows.split(_PIECE)]
    return torch.cat(pieces) / math.sqrt(k)


def _gram_coordinates(source: Source, k: int) -> Tensor:
    # coordinates of all rows along the leading eigenvectors of the training rows
    values, vectors = source.eigen
    scale = values[:k].clamp(min=1e-12 * float(values[0])).rsqrt()
    return (source.kernel[:, : source.found.n] @ vectors[:, :k] * scale).float()


def _mixed_gram(source: Source, k: int, seed: int) -> Tensor:
    half = k // 2
    leading = _gram_coordinates(source, half).double()
    random = random_rows(source, "sparse", k - half, seed).double()
    values, vectors = source.eigen
    scale = values[:half].clamp(min=1e-12 * float(values[0])).rsqrt()
    # sketches of the eigenvectors themselves, by which the rest of each row is found
    basis = (vectors[:, :half] * scale).T @ random[: source.found.n]
    return torch.cat([leading, random - leading @ basis], dim=1).float()
