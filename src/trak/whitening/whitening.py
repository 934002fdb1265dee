"""Features whitened by the K-FAC factors of their own second moment."""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from trak.blocks import Block, DenseBlock, FactoredBlock, IndexedBlock
from trak.errors import InputError, NumericalError
from trak.whitening.basis import Basis
from trak.whitening.moments import Moments, Sums

STRENGTH = 0.4
"""The strength that `whitening="auto"` stands for; see docs/whitening.md."""
DAMPING = 0.1
"""Of a layer's mean second moment; see docs/whitening.md."""
_ROUNDING = 8  # machine epsilons: gradients that are smaller by so much may be zeros


@dataclass(frozen=True, slots=True)
class Sides:
    """What a weight matrix's gradient is multiplied by: `left G right`.

    Attributes:
        left: symmetric `[o, o]`, or a diagonal `[o]`.
        right: symmetric `[i, i]`, or a diagonal `[i]`.
    """

    left: Tensor
    right: Tensor


class Whitening:
    """`G -> A^(-alpha/2) G B^(-alpha/2)` for every weight matrix's gradient `G`.

    `A` and `B` are the K-FAC factors of the gradients' second moment (`Moments`), each
    with `sqrt(damping)` times its mean eigenvalue added (the two dampings of Martens and
    Grosse 2015, Sec. 6.3, at equal shares). Their Kronecker product approximates
    `E[vec(G) vec(G)^T]`, so strength `alpha = 1` makes a layer's features about white,
    and 0 leaves them alone. For vectors, and where gradients come multiplied out,
    entries are divided by `(v + damping mean(v))^(alpha/2)` with `v` their mean square.
    So are those of parameters that some batches gave factors of and others did not, such as
    experts, whose tokens are told apart in batches of one sample only.
    Parameters whose gradients are zero, or so small beside the largest ones that they may
    be rounding (the biases of an attention layer's keys), are left alone.

    Args:
        moments: of the checkpoint's gradients.
        shapes: name to shape of every parameter.
        strength: `alpha`, 0 to 1; `-alpha` takes that whitening off again.
        damping: above 0.
        dtype: of the multiplications.
        in_bases: for `LeadingProjector`, which wants eigenvectors and eigenvalues instead
            of the matrices that are made of them.

    Attributes:
        sides: name to what its gradient is multiplied by; empty if `in_bases`.
        scales: name to what its entries are multiplied by, where there are no factors.
        entries: name to the mean squares and damping that `scales` are made of.
        bases: name to the eigendecompositions of both factors; empty unless `in_bases`.

    Raises:
        InputError: if there is no example in the moments, or a shape does not fit.
        NumericalError: if a moment is not finite.
    """

    def __init__(
        self,
        moments: Moments,
        shapes: Mapping[str, Sequence[int]],
        strength: float,
        damping: float = DAMPING,
        dtype: torch.dtype = torch.float32,
        *,
        in_bases: bool = False,
    ) -> None:
        if not moments.count:
            raise InputError("There are no examples to whiten by: the sums are empty.")
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.sides: dict[str, Sides] = {}
        self.scales: dict[str, Tensor] = {}
        self.bases: dict[str, tuple[Basis, Basis]] = {}
        self.entries: dict[str, Basis] = {}
        factors = {
            name: found
            for name, shape in self._shapes.items()
            if (found := _factors(moments, name, shape))
        }
        sizes = {name: _mean_square(sides) for name, sides in factors.items()}
        least = max(sizes.values(), default=0.0) * _rounding(moments) ** 2
        for name, sides in factors.items():
            power = strength if sizes[name] > least else None
            each = damping ** (1 / len(sides))
            bases = [_basis(side, each, power) for side in sides]
            if len(bases) == 1:
                self.entries[name] = bases[0]
                self.scales[name] = bases[0].powers.to(dtype)
            elif in_bases:
                self.bases[name] = (bases[0].to(dtype), bases[1].to(dtype))
            else:
                self.sides[name] = Sides(*(basis.power().to(dtype) for basis in bases))

    def at(self, strength: float) -> "Whitening":
        """The same with another strength, without decomposing anything again.

        Args:
            strength: `alpha`, 0 to 1.

        Returns:
            As if made with it.

        Raises:
            InputError: if it was made without `in_bases`.
        """
        if self.sides:
            raise InputError(
                "Eigenvectors are needed for another strength, and this whitening has kept "
                "none. Make it with in_bases=True."
            )
        made = copy(self)
        made.entries = {name: basis.at(strength) for name, basis in self.entries.items()}
        made.scales = {
            name: basis.powers.to(self.scales[name].dtype)
            for name, basis in made.entries.items()
        }
        made.bases = {
            name: (left.at(strength), right.at(strength))
            for name, (left, right) in self.bases.items()
        }
        return made

    def apply(self, block: Block) -> Block:
        """Whitens a block.

        Args:
            block: gradients of one parameter.

        Returns:
            The same, whitened; factored where it was and can be. A parameter whose
            gradients were never seen is left alone.
        """
        sides = self.sides.get(block.name)
        if sides is None:
            return self._scaled(block)
        if isinstance(block, FactoredBlock):
            return FactoredBlock(
                block.name,
                times(block.activations, sides.right),
                times(block.backprops, sides.left),
            )
        if isinstance(block, IndexedBlock) and sides.left.ndim == 1:
            weights = _like(sides.left, block.backprops)[block.indices].unsqueeze(-1)
            backprops = times(block.backprops, sides.right) * weights
            return IndexedBlock(block.name, block.indices, backprops, block.num_rows)
        gradient = block.dense().gradient
        matrices = gradient.unflatten(1, (len(sides.left), len(sides.right)))
        return DenseBlock(block.name, self.both(block.name, matrices).flatten(1))

    def whole(
        self, grads: Tensor | Mapping[str, Tensor], layout: Mapping[str, int]
    ) -> Tensor | dict[str, Tensor]:
        """Whitens gradients that were multiplied out.

        Args:
            grads: name to `[b, ...]`, or `[b, p]`.
            layout: name to number of scalars, in the order of `[b, p]`.

        Returns:
            The same, whitened; `[b, p]`, or name to `[b, *parameter.shape]`.
        """
        if not isinstance(grads, Mapping):
            return self.rows(grads, layout)
        return {
            name: self
            .apply(DenseBlock(name, grad.reshape(len(grad), -1)))
            .dense()
            .gradient.reshape(grad.shape)
            for name, grad in grads.items()
        }

    def rows(self, grads: Tensor, layout: Mapping[str, int]) -> Tensor:
        """Whitens gradients that were multiplied out, all parameters beside each other.

        Args:
            grads: `[b, p]`.
            layout: name to number of scalars, in their order.

        Returns:
            `[b, p]`, whitened.
        """
        pieces = zip(layout, grads.split(list(layout.values()), dim=1), strict=True)
        blocks = (self.apply(DenseBlock(name, piece)) for name, piece in pieces)
        return torch.cat([block.dense().gradient for block in blocks], dim=1)

    def both(self, name: str, matrices: Tensor) -> Tensor:
        """`left G right` of a parameter with sides.

        Args:
            name: the parameter.
            matrices: `[b, o, i]`.

        Returns:
            `[b, o, i]`.
        """
        sides = self.sides[name]
        return from_left(times(matrices, sides.right), sides.left)

    def _scaled(self, block: Block) -> Block:
        scale = self.scales.get(block.name)
        if scale is None:
            return block
        gradient = block.dense().gradient
        return DenseBlock(block.name, gradient * _like(scale, gradient))


def times(rows: Tensor, side: Tensor) -> Tensor:
    """Multiplies from the right by a symmetric matrix, or by a diagonal.

    Args:
        rows: `[..., i]`.
        side: `[i, i]` or `[i]`.

    Returns:
        `[..., i]`.
    """
    side = _like(side, rows)
    return rows * side if side.ndim == 1 else rows @ side


def from_left(matrices: Tensor, side: Tensor) -> Tensor:
    """Multiplies from the left by a symmetric matrix, or by a diagonal.

    Args:
        matrices: `[..., o, i]`.
        side: `[o, o]` or `[o]`.

    Returns:
        `[..., o, i]`.
    """
    side = _like(side, matrices)
    return matrices * side.unsqueeze(-1) if side.ndim == 1 else side @ matrices


def _like(side: Tensor, other: Tensor) -> Tensor:
    return side.to(other.device, other.dtype)


def _product(uses: list[Sums], count: int) -> tuple[Tensor, Tensor]:
    # one Kronecker product for the sum over a parameter's uses, each side weighed by the
    # size of the other; the traces multiply to E|G|^2 if positions are independent
    lefts, rights, sizes = [], [], []
    for sums in uses:
        left = sums.left.double() / count
        right = sums.right.double() / max(1, int(sums.positions))
        lefts.append(left * _trace(right))
        rights.append(right * _trace(left))
        sizes.append(_trace(left) * _trace(right))
    root = math.sqrt(sum(sizes)) or 1.0
    return _sum(lefts) / root, _sum(rights) / root


def _squares(uses: list[Sums]) -> Tensor:
    # of the gradient's entries, summed over the examples, if positions are independent
    total = torch.zeros((), dtype=torch.float64, device=uses[0].left.device)
    for sums in uses:
        sides = (sums.left.double(), sums.right.double())
        left, right = (side if side.ndim == 1 else side.diagonal() for side in sides)
        total = total + torch.outer(left, right) / max(1, int(sums.positions))
    return total.flatten()


def _trace(side: Tensor) -> float:
    return float(side.sum() if side.ndim == 1 else side.trace())


def _sum(sides: list[Tensor]) -> Tensor:
    if len({side.ndim for side in sides}) > 1:
        sides = [side.diag() if side.ndim == 1 else side for side in sides]
    return torch.stack(sides).sum(dim=0)


def _factors(moments: Moments, name: str, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    # of both sides, or the mean square of each entry; nothing if it was never seen
    uses = [sums for (own, _), sums in moments.matrices.items() if own == name]
    if uses:
        found = _product(uses, moments.count)
        expected = (shape[0] if shape else 1, math.prod(shape[1:]))
        if tuple(map(len, found)) != expected:
            raise InputError(
                f"The whitening sums of {name!r} are of a matrix of "
                f"{len(found[0])} x {len(found[1])}, the parameter's shape is {shape}."
            )
        if name in moments.squares:  # some batches gave factors, others whole gradients
            squares = moments.squares[name].double() + _squares(uses)
            found = (squares / moments.count,)
    elif name in moments.squares:
        found = (moments.squares[name].double() / moments.count,)
    else:
        return ()
    if not all(bool(torch.isfinite(side).all()) for side in found):
        raise NumericalError(
            f"The whitening sums of {name!r} are not finite: a gradient was NaN or "
            "infinite while they were added up. Look for NaN in the examples and weights."
        )
    return found


def _mean_square(sides: tuple[Tensor, ...]) -> float:
    return math.prod(_trace(side) / len(side) for side in sides)


def _rounding(moments: Moments) -> float:
    # how large gradients that are zero may be, relative to the largest ones
    parts = [*moments.squares.values(), *(sums.left for sums in moments.matrices.values())]
    return _ROUNDING * max((torch.finfo(part.dtype).eps for part in parts), default=0.0)


def _basis(side: Tensor, damping: float, strength: float | None) -> Basis:
    # with damping times the mean eigenvalue added; None leaves gradients alone
    mean = _trace(side) / len(side)
    if mean <= 0 or strength is None:
        values = side.new_zeros(len(side))
        vectors = None if side.ndim == 1 else torch.eye(len(side), device="cpu").to(side)
        return Basis(vectors, values, torch.ones_like(values), None)
    vectors, values = None, side
    if side.ndim > 1:
        values, vectors = torch.linalg.eigh(side)
    return Basis.of(vectors, values, damping * mean, strength)
