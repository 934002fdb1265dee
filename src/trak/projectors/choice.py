"""The projector that a name, or `projector=None`, stands for."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trak.arguments import MOST, as_integer, meant
from trak.errors import InputError
from trak.projectors.abstract import BlockProjector, ProjectionType
from trak.projectors.dense import BasicProjector
from trak.projectors.factored import FactoredProjector
from trak.projectors.hadamard import HadamardProjector
from trak.projectors.leading import LeadingProjector
from trak.projectors.masked import MaskedProjector
from trak.projectors.sparse import SparseProjector

logger = logging.getLogger(__name__)

POSITIONS = 64
"""Assumed times that a layer's weight is used for one sample."""
_SCATTER = 75  # one scattered addition costs as much as this many multiplications
_UNNOTICED = 1 << 24  # operations a sample, about 0.2 ms
_BEST_FIRST = ("rademacher", "sparse")  # by LDS at equal k, see docs/compression.md

Shapes = Mapping[str, Sequence[int] | int]


def make_projector(
    shapes: Shapes,
    proj_dim: Any,
    seed: int,
    device: torch.device,
    kind: str | None = None,
) -> BlockProjector:
    """Makes the projector of a name, or chooses one by what it would cost.

    The choice looks at the parameters' shapes and `k` only, and not at the device, so
    that a store begun on one machine can be finished on another.

    Args:
        shapes: name to shape (or number of scalars) of every selected parameter.
        proj_dim: projection dimension `k`.
        seed: seed of the entries.
        device: where to project.
        kind: `"rademacher"`, `"normal"`, `"sparse"`, `"factored"`, `"hadamard"`,
            `"masked"` or `"leading"`; chosen if None, see `projection_costs`: dense
            Rademacher where it costs no more than 2^24 operations a sample, else sparse
            where that costs no more, else the cheapest.

    Returns:
        The projector.

    Raises:
        InputError: if `proj_dim` is not a positive integer or the name is not known.
    """
    proj_dim = as_integer("proj_dim", proj_dim, least=1, most=MOST)
    full = {n: (s,) if isinstance(s, int) else tuple(s) for n, s in shapes.items()}
    layout = {name: math.prod(shape) for name, shape in full.items()}
    size = f"{sum(layout.values()):,} parameters to {proj_dim:,} numbers"
    if kind is None:
        costs = projection_costs(full, proj_dim)
        kind = cheapest(full, proj_dim)
        logger.info(
            "Projecting %s with projector=%r: %.2g operations a sample, against %s.",
            size,
            kind,
            costs[kind],
            ", ".join(f"{cost:.2g} for {k!r}" for k, cost in costs.items() if k != kind),
        )
    try:
        kind = ProjectionType(kind).value
    except ValueError:
        names = sorted(known.value for known in ProjectionType)
        raise InputError(
            f"projector must be an instance or one of the names {names}, got {kind!r}."
            f"{meant(kind, names)}"
        ) from None
    if kind == "leading":
        return LeadingProjector(full, proj_dim, device)
    if kind in {"factored", "masked"}:
        by_shape = FactoredProjector if kind == "factored" else MaskedProjector
        return by_shape(full, proj_dim, seed, device)
    width = sum(layout.values())
    if kind in {"rademacher", "normal"}:
        return BasicProjector(width, proj_dim, seed, kind, device, layout=layout)
    by_size = SparseProjector if kind == "sparse" else HadamardProjector
    return by_size(width, proj_dim, seed, device=device, layout=layout)


def projection_costs(
    shapes: Mapping[str, Sequence[int]], proj_dim: int, positions: int = POSITIONS
) -> dict[str, float]:
    """What the projections that may be chosen would cost.

    Forming a layer's gradient from `s` positions costs `2 s p`, projecting it densely
    `2 p k`, hashing it `p` scattered additions; compressing the longer side of `[o, i]`
    to `r` first costs `2 s r (o + i)`, and `r min(o, i)` entries are left to hash.

    Args:
        shapes: name to shape of every selected parameter.
        proj_dim: projection dimension `k`.
        positions: `s`, how often a layer's weight is used for one sample.

    Returns:
        Operations a sample for `"rademacher"`, `"sparse"` and, if some parameter is a
        matrix, `"factored"`.
    """
    width = sum(math.prod(shape) for shape in shapes.values())
    formed = 2.0 * positions * width
    costs = {
        "rademacher": formed + 2.0 * width * proj_dim,
        "sparse": formed + float(_SCATTER * width),
    }
    if any(len(shape) > 1 for shape in shapes.values()):
        sides = FactoredProjector(shapes, proj_dim, device="cpu").sides.values()
        costs["factored"] = 0.0
        for side in sides:
            ranks = [rank for rank in side.ranks if rank is not None]
            compressed = 2.0 * positions * sum(side.shape) * (ranks[0] if ranks else 0)
            whole = 0.0 if ranks else 2.0 * positions * math.prod(side.shape)
            costs["factored"] += compressed + whole + _SCATTER * math.prod(side.kept)
    return costs


def cheapest(shapes: Mapping[str, Sequence[int]], proj_dim: int) -> str:
    """The random projection that None stands for.

    Args:
        shapes: name to shape of every selected parameter.
        proj_dim: projection dimension `k`.

    Returns:
        Its name.
    """
    costs = projection_costs(shapes, proj_dim)
    for kind in _BEST_FIRST:
        if costs[kind] <= _UNNOTICED:
            return kind
    return min((kind for kind in costs if kind != "rademacher"), key=lambda k: costs[k])
