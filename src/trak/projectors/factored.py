"""Two-sided projection of a layer's gradient, then hashing into the shared `k`."""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trak.blocks import Block, DenseBlock, FactoredBlock, Sink
from trak.errors import InputError
from trak.projectors import counter
from trak.projectors.abstract import BlockProjector, ProjectionType
from trak.projectors.scatter import scatter
from trak.whitening import Whitening
from trak.whitening.whitening import from_left, times

_SMALLEST_RANK = 16
_ENTRIES = 4  # of all compressed gradients together, for each column
_SMALLEST_PRODUCT = 2048


@dataclass(frozen=True, slots=True)
class Sides:
    """How one parameter is compressed before it is hashed.

    Attributes:
        shape: the gradient as a matrix, `(o, i)`.
        ranks: width of the left and right random matrix; None stands for the identity.
        start: where the parameter's compressed entries begin among those of all.
    """

    shape: tuple[int, int]
    ranks: tuple[int | None, int | None]
    start: int

    @property
    def kept(self) -> tuple[int, int]:
        """The compressed gradient's shape."""
        (rows, columns), (left, right) = self.shape, self.ranks
        return left or rows, right or columns

    @property
    def stop(self) -> int:
        """Where the parameter's compressed entries end."""
        return self.start + math.prod(self.kept)


@dataclass(frozen=True, slots=True)
class _Tables:
    """One checkpoint's random numbers: a bucket and a weight for each compressed entry."""

    buckets: Tensor
    weights: Tensor


class FactoredProjector(BlockProjector):
    """`G -> L^T G R` for each layer's gradient `G`, then signed hashing into `k` columns.

    `L` (`[o, r]`) and `R` (`[i, q]`) have entries +-1, or are the identity; entry `(u, v)`
    of the compressed gradient is added, with a random sign, to one column. The gradient of
    a layer whose weight is shared by `s` positions is `G = sum_s g_s a_s^T`, so that
    `L^T G R = sum_s (L^T g_s)(R^T a_s)^T` and `G` is never formed. Compression from both
    sides: Choe et al. 2024, "What is your data worth to GPT?" (LoGra), Sec. 3.2; signed
    hashing: Charikar, Chen, Farach-Colton 2002.

    Entries of the whole matrix have mean 0 and variance 1, so that
    `E<P^T x, P^T y> = k <x, y>`. The compressed entries are scaled by `sqrt(k / c)`,
    where `c` is the product of the widths of those of `L` and `R` that are random. For
    gradients of rank one, the relative variance of a layer's inner products is about
    `1 / r + 1 / q` beside the hash's `1 / k` (a side that is kept whole adds nothing); it
    averages out over layers.

    By default the shorter side of each layer is kept whole and the longer one compressed
    to `r = max(16, sqrt(k) / 4)`; more where the shorter side has less than 2048 / r
    entries, and where all layers together would keep less than `4 k` entries, since more
    columns than that bring nothing. A side shorter than `2 r` stays whole. This has the
    variance of compressing both sides to `2 r` at half the cost, since the sum over
    positions does the multiplication by the kept side anyway. Vectors (biases,
    normalisation layers) and small matrices are hashed as they are.

    Args:
        shapes: name to shape of every parameter, in order.
        proj_dim: projection dimension `k`.
        seed: seed of the entries.
        device: where to project.
        rank: `r` for the longer side; or a pair for the rows and columns of every matrix.
            A side that is no longer than its rank stays whole.

    Raises:
        InputError: if a rank is no positive integer.
    """

    kind = "factored"
    forms_gradients = False

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        proj_dim: int,
        seed: int = 0,
        device: str | torch.device | None = None,
        rank: int | tuple[int, int] | None = None,
    ) -> None:
        layout = {name: math.prod(shape) for name, shape in shapes.items()}
        kind = ProjectionType(self.kind)
        super().__init__(sum(layout.values()), proj_dim, seed, kind, device, layout)
        matrices = [tuple(shape) for shape in shapes.values() if len(shape) > 1]
        self.rank = _default_rank(proj_dim, matrices) if rank is None else _checked(rank)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.sides: dict[str, Sides] = {}
        start = 0
        for name, shape in self.shapes.items():
            sides = _sides(shape, self.rank, start)
            self.sides[name] = sides
            start = sides.stop
        self._matrices: dict[tuple[str, int, torch.dtype], Tensor] = {}
        self._whitening: Whitening | None = None  # what the matrices are folded with
        self._tables: _Tables | None = None

    def settings(self) -> dict[str, Any]:
        """What the entries depend on, for the store's fingerprint.

        Returns:
            JSON values.
        """
        rank = list(self.rank) if isinstance(self.rank, tuple) else self.rank
        return {**super().settings(), "rank": rank}

    def matrix(self, name: str, num_rows: int, model_id: int) -> Tensor:
        """One parameter's projection matrix, written out: the definition.

        Args:
            name: the parameter's name.
            num_rows: number of scalars of the parameter, `p`.
            model_id: the checkpoint.

        Returns:
            `[p, k]`, float64, since entries are sums.
        """
        self._turn_to(model_id)
        self._unfold()
        like: Any = {"dtype": torch.float64, "device": self.device}
        rows, columns = self._sides_of(name, num_rows).shape
        left, right = (self._side(name, side, torch.float64) for side in (0, 1))
        left = torch.eye(rows, **like) if left is None else left
        right = torch.eye(columns, **like) if right is None else right
        buckets, weights = self._hash(name)
        matrix = torch.zeros(num_rows, self.proj_dim, **like)
        return matrix.index_add_(1, buckets, torch.kron(left, right) * weights)

    def add(self, block: DenseBlock, out: Tensor, model_id: int) -> None:
        """Adds `block.gradient @ matrix(block.name, p, model_id)` to `out`.

        Args:
            block: per-sample gradients of one parameter.
            out: `[b, k]`, float32 or float64.
            model_id: the checkpoint.
        """
        self._turn_to(model_id)
        self._unfold()
        compressed = self._compress(block).flatten(start_dim=1).to(out.dtype)
        buckets, weights = self._hash(block.name)
        scatter(compressed * weights.to(out.dtype), buckets, out)

    def sink(self, out: Tensor, model_id: int) -> Sink:
        """A consumer of blocks that adds each block's projection to `out`.

        Args:
            out: `[b, k]`, zeros to begin with.
            model_id: the checkpoint.

        Returns:
            A function to hand to a gradient computer.
        """

        def consume(block: Block) -> None:
            with self.gathering(out, model_id) as gather:
                gather(block)

        return consume

    @contextmanager
    def gathering(
        self, out: Tensor, model_id: int, whitening: Whitening | None = None
    ) -> Generator[Sink]:
        """Compresses blocks as they come and hashes all of them at the end, at once.

        Whitening is folded into `L` and `R`: `L^T (A G B) R = (A L)^T G (B R)`.

        Args:
            out: `[b, k]`, to which the projection is added.
            model_id: the checkpoint.
            whitening: is done to the gradients before.

        Yields:
            A function to hand to a gradient computer.
        """
        self._turn_to(model_id)
        if whitening is not self._whitening:
            self._matrices.clear()
            self._whitening = whitening
        parts: dict[str, Tensor] = {}

        def consume(block: Block) -> None:
            if whitening is None:
                compressed = self._compress(block)
            else:
                compressed = self._whitened(block, whitening)
            part = compressed.flatten(start_dim=1).to(out.device, out.dtype)
            known = parts.get(block.name)
            parts[block.name] = part if known is None else known + part

        yield consume
        names = [name for name in self.sides if name in parts]
        if names:
            gathered = torch.cat([parts.pop(name) for name in names], dim=1)
            tables = self._hashes_of(names)
            scatter(gathered.mul_(tables.weights.to(out.dtype)), tables.buckets, out)

    def free_memory(self) -> None:
        """Drops the generated entries."""
        self._unfold()
        self._matrices.clear()
        self._tables = None

    def _sides_of(self, name: str, num_rows: int) -> Sides:
        sides = self.sides.get(name)
        if sides is None or math.prod(sides.shape) != num_rows:
            raise InputError(
                f"The projector was made for parameters of other shapes: {name!r} has "
                f"{num_rows} scalars here and its shape is {self.shapes.get(name)} there. "
                "Make one for this model's shapes."
            )
        return sides

    def _compress(self, block: Block) -> Tensor:
        # L^T G R of each sample
        name = block.name
        if isinstance(block, DenseBlock):
            sides = self._sides_of(name, block.gradient.shape[1])
            if len(self.shapes[name]) < 2:
                return block.gradient.detach().to(self.device)
            matrices = block.gradient.detach().to(self.device).unflatten(1, sides.shape)
            left, right = (self._side(name, side, matrices.dtype) for side in (0, 1))
            if right is not None:
                matrices = matrices @ right
            if left is not None:
                matrices = left.t() @ matrices
            return matrices
        dtype = block.backprops.dtype
        left, right = (self._side(name, side, dtype) for side in (0, 1))
        compressed = block.sketch(left, right).to(self.device)
        return compressed.reshape(-1, *self.sides[name].kept)

    def _whitened(self, block: Block, whitening: Whitening) -> Tensor:
        # L^T A G B R of each sample
        name = block.name
        whole = whitening.sides.get(name)
        if whole is None or len(self.shapes[name]) < 2:
            return self._compress(whitening.apply(block))
        ranks = self.sides[name].ranks
        if isinstance(block, FactoredBlock) and None in ranks:
            # a side that is kept whole is multiplied where it has fewer rows: here, or
            # in the compressed gradient
            positions, (rows, columns) = block.activations.shape[1], self.sides[name].kept
            backprops, activations = block.backprops, block.activations
            if ranks[0] is None and positions < columns:
                backprops, ranks = times(backprops, whole.left), (rows, ranks[1])
            if ranks[1] is None and positions < rows:
                activations, ranks = times(activations, whole.right), (ranks[0], columns)
            block = FactoredBlock(name, activations, backprops)
        compressed = self._compress(block)
        if ranks[1] is None:
            compressed = times(compressed, whole.right)
        if ranks[0] is None:
            compressed = from_left(compressed, whole.left)
        return compressed

    def _unfold(self) -> None:
        if self._whitening is not None:
            self._matrices.clear()
            self._whitening = None

    def _side(self, name: str, side: int, dtype: torch.dtype) -> Tensor | None:
        # A L for side 0 and B R for side 1; None for the identity
        sides = self.sides[name]
        rank = sides.ranks[side]
        if rank is None:
            return None
        key = (name, side, dtype)
        if key not in self._matrices:
            entries = self._entries(name, side, sides.shape[side], rank)
            whole = self._whitening.sides.get(name) if self._whitening else None
            if whole is not None:
                entries = from_left(entries.to(whole.left), (whole.left, whole.right)[side])
            self._matrices[key] = entries.to(dtype)
        return self._matrices[key]

    def _entries(self, name: str, side: int, size: int, rank: int) -> Tensor:
        # [size, rank], of variance 1
        rows = (0, size)
        return counter.rademacher(self._stream(name, side), rows, rank, self.device)

    def _stream(self, name: str, side: int) -> counter.Stream:
        purpose = f"{self.kind}-{('left', 'right')[side]}"
        return counter.stream(purpose, self.seed, self._cached_model_id or 0, name)

    def _hash(self, name: str) -> tuple[Tensor, Tensor]:
        sides = self.sides[name]
        tables = self._all_hashes()
        part = slice(sides.start, sides.stop)
        return tables.buckets[part], tables.weights[part]

    def _hashes_of(self, names: list[str]) -> _Tables:
        if len(names) == len(self.sides):
            return self._all_hashes()
        found = [self._hash(name) for name in names]
        buckets, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
        return _Tables(buckets, weights)

    def _all_hashes(self) -> _Tables:
        if self._tables is None:
            found = [self._generate(name) for name in self.sides]
            buckets, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
            self._tables = _Tables(buckets, weights)
        return self._tables

    def _generate(self, name: str) -> tuple[Tensor, Tensor]:
        sides = self.sides[name]
        source = counter.stream(
            "factored-hash", self.seed, self._cached_model_id or 0, name
        )
        rows = (0, sides.stop - sides.start)
        buckets, signs = counter.hashes(source, rows, 0, self.proj_dim, self.device)
        random_width = math.prod(rank or 1 for rank in sides.ranks)
        return buckets, signs * math.sqrt(self.proj_dim / random_width)


def _default_rank(proj_dim: int, matrices: Sequence[tuple[int, ...]]) -> int:
    quarter_of_root = math.ceil(math.sqrt(proj_dim) / 4)
    shorter = sum(min(shape[0], math.prod(shape[1:])) for shape in matrices)
    enough = -(-_ENTRIES * proj_dim // max(1, shorter))
    return max(_SMALLEST_RANK, -(-max(quarter_of_root, enough) // 8) * 8)


def _checked(rank: Any) -> int | tuple[int, int]:
    pair = tuple(rank) if isinstance(rank, tuple | list) else (rank, rank)
    whole = all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in pair)
    if len(pair) != 2 or not whole:
        raise InputError(
            f"rank must be an integer of at least 1, or a pair of them, got {rank!r}."
        )
    return rank if isinstance(rank, int) else (pair[0], pair[1])


def _sides(shape: tuple[int, ...], rank: int | tuple[int, int], start: int) -> Sides:
    if len(shape) < 2:
        return Sides((math.prod(shape), 1), (None, None), start)
    rows, columns = matrix = (shape[0], math.prod(shape[1:]))
    if isinstance(rank, tuple):
        left, right = (
            r if r < size else None for r, size in zip(rank, matrix, strict=True)
        )
        return Sides(matrix, (left, right), start)
    shorter, longer = sorted(matrix)
    kept = max(rank, -(-_SMALLEST_PRODUCT // max(1, shorter)))
    if 2 * kept > longer:
        return Sides(matrix, (None, None), start)
    return Sides(matrix, (kept, None) if rows >= columns else (None, kept), start)
