"""Coordinates of largest variance in the eigenbases of layers' K-FAC factors."""

import logging
import math
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.blocks import Block, DenseBlock, IndexedBlock, Sink
from trak.errors import InputError, NumericalError, PhaseError, StoreCorruptedError
from trak.projectors.abstract import BlockProjector, ProjectionType
from trak.whitening import Whitening

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the rules by which coordinates are chosen."""
_WITHOUT = 0.5  # of the variance
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Part:
    """What is kept of one parameter's gradient `G`, `[o, i]`.

    Attributes:
        left: `[o, a]`, eigenvectors times what whitening leaves of them; None for a
            parameter without factors, whose entries are taken as they are.
        right: `[i, q]`; None likewise.
        inside: which entries of `left^T G right` (or of `G`) are kept, `[c]`.
        scale: what they are multiplied by, `[c]`; None for ones.
        picks: column and value of the only entry of each row of `left`, `[o]` each, as a
            table has it, where most rows have none; None for others.
    """

    left: Tensor | None
    right: Tensor | None
    inside: Tensor
    scale: Tensor | None
    picks: tuple[Tensor, Tensor] | None = None


class LeadingProjector(BlockProjector):
    """The `k` coordinates of largest variance, of gradients that are whitened.

    A layer's gradient is rotated into the eigenbases of its K-FAC factors (`Whitening`), in
    which the entry `(u, v)` has about the variance `a_u b_v`, the product of the factors'
    eigenvalues (George et al. 2018, Sec. 3), and whitening multiplies it by a power of
    that. The `k` entries of largest variance over all layers are kept, and those of
    vectors by their mean squares. Nothing is random, and inner products lack what is left
    out: `P` has orthonormal columns before whitening.

    The entries kept of a layer lie in a rectangle of leading eigenvectors `L` and `R` of
    both sides, so that `L^T G R = sum_s (L^T g_s)(R^T a_s)^T` needs no whole gradient.
    Eigenvectors are no function of the factors alone (signs, multiple eigenvalues), so that
    `basis` is computed once and kept with the rows.

    Args:
        shapes: name to shape of every parameter, in order.
        proj_dim: how many coordinates, `k`. Columns beyond those that there are are 0.
        device: where to project.
    """

    kind = "leading"
    forms_gradients = False  # coordinates of layers are picked from products of factors

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        proj_dim: int,
        device: str | torch.device | None = None,
    ) -> None:
        layout = {name: math.prod(shape) for name, shape in shapes.items()}
        kind = ProjectionType(self.kind)
        super().__init__(sum(layout.values()), proj_dim, 0, kind, device, layout)
        self.shapes = {name: _as_matrix(shape) for name, shape in shapes.items()}
        self.parts: dict[str, Part] = {}

    @property
    def random_dim(self) -> int:
        """No column is random."""
        return 0

    def settings(self) -> dict[str, Any]:
        """What rows depend on, for the store's fingerprint.

        Returns:
            JSON values.
        """
        return {"kind": self.kind, "proj_dim": self.proj_dim, "version": VERSION}

    def basis(self, whitening: Whitening, *, quietly: bool = False) -> Arrays:
        """Chooses the coordinates.

        Args:
            whitening: of one checkpoint.
            quietly: say nothing of what is left out.

        Returns:
            Name to array, for `use`.
        """
        found: Arrays = {}
        for name, coordinates in self._chosen(whitening, quietly=quietly).items():
            sides = whitening.bases.get(name)
            if sides is None:
                found[f"inside/{name}"] = coordinates.numpy()
                scale = whitening.scales[name].cpu()[coordinates]
                found[f"scale/{name}"] = scale.float().numpy()
                continue
            left, right = sides
            u, v = coordinates // right.size, coordinates % right.size
            (us, u), (vs, v) = (torch.unique(part, return_inverse=True) for part in (u, v))
            found[f"left/{name}"] = left.columns(us).float().numpy()
            found[f"right/{name}"] = right.columns(vs).float().numpy()
            found[f"inside/{name}"] = (u * len(vs) + v).numpy()
        return found

    def powers(self, whitening: Whitening) -> Tensor:
        """What whitening multiplied each chosen coordinate by.

        Args:
            whitening: with its bases, as it was given to `basis`.

        Returns:
            `[c]`, float32, on the CPU; `c` is `k`, or less if there are fewer coordinates.
        """
        found: list[Tensor] = []
        for name, coordinates in self._chosen(whitening, quietly=True).items():
            sides = whitening.bases.get(name)
            if sides is None:
                found.append(whitening.scales[name].cpu()[coordinates])
                continue
            left, right = (side.powers.cpu() for side in sides)
            u, v = coordinates // len(right), coordinates % len(right)
            found.append(left[u] * right[v])
        return torch.cat([part.float() for part in found])

    def scales(self, arrays: Mapping[str, NDArray[Any]]) -> Tensor:
        """The same of coordinates that were chosen before, from the lengths of `L` and `R`.

        Args:
            arrays: what `basis` gave.

        Returns:
            `[k]`, float32; 1 for columns beyond those that there are.
        """
        found: list[Tensor] = []
        for name in self.shapes:
            part = self._taken(name, arrays) if f"inside/{name}" in arrays else None
            if part is None:
                continue
            scale = part.scale
            if part.left is not None and part.right is not None:
                lengths = part.left.norm(dim=0)[:, None] * part.right.norm(dim=0)
                scale = lengths.flatten()[part.inside]
            found.append(torch.ones_like(part.inside) if scale is None else scale)
        known = torch.cat([scale.float() for scale in found])
        return torch.cat([known, known.new_ones(self.proj_dim - len(known))])

    def use(self, arrays: Mapping[str, NDArray[Any]], model_id: int) -> None:
        """Takes the coordinates of a checkpoint.

        Args:
            arrays: what `basis` gave.
            model_id: the checkpoint.

        Raises:
            StoreCorruptedError: if they are of other shapes.
        """
        self._turn_to(model_id)
        self.parts = {}
        taken = {
            name: self._taken(name, arrays)
            for name in self.shapes
            if f"inside/{name}" in arrays
        }
        self.parts = {name: part for name, part in taken.items() if part is not None}
        kept = sum(len(part.inside) for part in self.parts.values())
        if len(taken) != len(self.parts) or kept > self.proj_dim:
            self.parts = {}
            raise StoreCorruptedError(
                f"The leading coordinates of model_id={model_id} are those of a model of "
                f"other shapes, or damaged: {kept} for k = {self.proj_dim}."
            )

    def matrix(self, name: str, num_rows: int, model_id: int) -> Tensor:
        """One parameter's matrix, with whitening in it, written out: the definition.

        Args:
            name: the parameter's name.
            num_rows: number of scalars of the parameter, `p`.
            model_id: the checkpoint.

        Returns:
            `[p, k]`, float32.
        """
        out = torch.zeros(num_rows, self.proj_dim, device=self.device)
        self.add(DenseBlock(name, torch.eye(num_rows, device=self.device)), out, model_id)
        return out

    def add(self, block: DenseBlock, out: Tensor, model_id: int) -> None:
        """Adds a block's coordinates.

        Args:
            block: gradients of one parameter, not whitened.
            out: `[b, k]`, float32 or float64.
            model_id: the checkpoint.
        """
        self.sink(out, model_id)(block)

    def sink(self, out: Tensor, model_id: int) -> Sink:
        """A consumer of blocks that adds each block's coordinates to `out`.

        Args:
            out: `[b, k]`, zeros to begin with.
            model_id: the checkpoint.

        Returns:
            A function to hand to a gradient computer.

        Raises:
            PhaseError: if no coordinates were chosen for the checkpoint.
        """
        if not self.parts or self._cached_model_id != model_id:
            raise PhaseError(
                f"projector='leading' keeps coordinates that whitening finds, and none "
                f"are known for model_id={model_id}. Make the TRAKer with whitening='auto' "
                "or a number, and call fit_whitening before featurize."
            )
        places, start = {}, 0
        for name, part in self.parts.items():
            places[name] = out[:, start : start + len(part.inside)]
            start += len(part.inside)

        def consume(block: Block) -> None:
            if block.name in self.parts:
                found = self._coordinates(block, self.parts[block.name])
                places[block.name].add_(found.to(out.device))

        return consume

    @contextmanager
    def gathering(
        self, out: Tensor, model_id: int, whitening: Whitening | None = None
    ) -> Generator[Sink]:
        """Like `sink`; whitening is in the coordinates already.

        Args:
            out: `[b, k]`, to which the coordinates are added.
            model_id: the checkpoint.
            whitening: not used.

        Yields:
            A function to hand to a gradient computer.
        """
        del whitening
        yield self.sink(out, model_id)

    def _chosen(self, whitening: Whitening, *, quietly: bool) -> dict[str, Tensor]:
        # numbers of coordinates by parameter, ascending
        names, scores, numbers = [], [], []
        sizes = dict.fromkeys((True, False), 0.0)  # with factors, and without
        for place, (name, shape) in enumerate(self.shapes.items()):
            variance = _variance(whitening, name)
            if variance is None:
                continue
            if len(variance) != math.prod(shape):
                raise InputError(
                    f"The projector was made for parameters of other shapes: {name!r} has "
                    f"{len(variance)} scalars here and its shape is {shape} there."
                )
            sizes[name in whitening.bases] += float(variance.sum(dtype=torch.float64))
            most = variance.topk(min(self.proj_dim, len(variance)))
            names.append(torch.full_like(most.indices, place))
            scores.append(most.values)
            numbers.append(most.indices)
        if not scores:
            raise NumericalError(
                "Every gradient that whitening was fitted to is zero, so no coordinate of "
                "them varies: does the model output depend on the selected parameters?"
            )
        every = torch.cat(scores)
        order = every.argsort(descending=True, stable=True)[: self.proj_dim]
        if not quietly:
            _tell(len(order), float(every[order].sum(dtype=torch.float64)), sizes)
        owners, own = torch.cat(names)[order], torch.cat(numbers)[order]
        return {
            name: own[owners == place].sort().values
            for place, name in enumerate(self.shapes)
            if bool((owners == place).any())
        }

    def _taken(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> Part | None:
        left, right, scale = (
            torch.from_numpy(arrays[f"{side}/{name}"]).to(self.device)
            if f"{side}/{name}" in arrays
            else None
            for side in ("left", "right", "scale")
        )
        inside = torch.from_numpy(arrays[f"inside/{name}"]).to(self.device)
        rows, columns = self.shapes[name]
        if left is None or right is None:
            size, fits = rows * columns, scale is not None and len(scale) == len(inside)
        else:
            size = left.shape[1] * right.shape[1]
            fits = (len(left), len(right)) == (rows, columns)
        return (
            Part(left, right, inside, scale, _picks(left))
            if fits and int(inside.max()) < size
            else None
        )

    def _coordinates(self, block: Block, part: Part) -> Tensor:
        if part.left is None or part.right is None:
            gradient = block.dense().gradient.detach().to(self.device)
            kept = gradient.index_select(1, part.inside)
            return kept * part.scale.to(gradient)  # type: ignore[union-attr]
        if isinstance(block, DenseBlock):
            gradient = block.gradient.detach().to(self.device)
            matrices = gradient.unflatten(1, self.shapes[block.name])
            rectangle = part.left.to(gradient).T @ (matrices @ part.right.to(gradient))
        elif isinstance(block, IndexedBlock) and part.picks is not None:
            like = block.backprops.detach()
            columns, factors = part.picks
            width, right = part.left.shape[1], part.right.to(like)
            rectangle = block.picked(
                columns.to(like.device), factors.to(like), width, right
            ).detach()
        else:
            like = block.backprops.detach()
            rectangle = block.sketch(part.left.to(like), part.right.to(like)).detach()
        return rectangle.flatten(1).index_select(1, part.inside.to(rectangle.device))


def coordinates_holding(whitening: Whitening, names: Collection[str], share: float) -> int:
    """How many leading coordinates hold a share of the whitened gradients' variance.

    Args:
        whitening: of one checkpoint, with its bases.
        names: of parameters.
        share: below 1.

    Returns:
        The smallest number; 0 if nothing varies.
    """
    found = [_variance(whitening, name) for name in names]
    parts = [part.double() for part in found if part is not None]
    if not parts:
        return 0
    held = torch.cat(parts).sort(descending=True).values.cumsum(0)
    return int((held < share * held[-1]).sum()) + 1 if held[-1] > 0 else 0


def _picks(left: Tensor | None) -> tuple[Tensor, Tensor] | None:
    if left is None or bool(((left != 0).sum(dim=1) > 1).any()):
        return None
    columns = left.abs().argmax(dim=1)
    factors = left.gather(1, columns[:, None])[:, 0]
    return torch.where(factors == 0, left.shape[1], columns), factors


def _tell(count: int, kept: float, sizes: Mapping[bool, float]) -> None:
    total = sum(sizes.values()) or 1.0
    logger.info(
        "%d leading coordinates hold %.3g %% of the whitened gradients' variance.",
        count,
        100 * kept / total,
    )
    if sizes[False] > _WITHOUT * total:
        logger.warning(
            "%.0f %% of the whitened gradients' variance is in parameters whose gradients "
            "do not come in factors, such as vectors and layers without a rule; of these "
            "single entries are kept, which may lose more than projector='sparse' would.",
            100 * sizes[False] / total,
        )


def _as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def _variance(whitening: Whitening, name: str) -> Tensor | None:
    # of every coordinate after whitening, [p]; None for gradients that were never seen
    if name in whitening.bases:
        left, right = whitening.bases[name]
        return torch.outer(left.variances(), right.variances()).flatten()
    return whitening.entries[name].variances() if name in whitening.entries else None
