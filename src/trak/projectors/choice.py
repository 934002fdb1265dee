"""The projector that `projector=None` stands for."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from trak.errors import InputError
from trak.projectors.abstract import BlockProjector, ProjectionType
from trak.projectors.dense import BasicProjector
from trak.projectors.sparse import SparseProjector

logger = logging.getLogger(__name__)

DENSE_UP_TO = 1 << 25


def make_projector(
    layout: Mapping[str, int], proj_dim: Any, seed: int, device: torch.device
) -> BlockProjector:
    """Chooses by the size of the projection matrix: dense Rademacher or sparse.

    A dense projection costs `2 p k` operations a sample, the sparse one about `p`
    whatever `k` is. The choice looks at sizes only and not at the device, so that a store
    begun on one machine can be finished on another.

    Args:
        layout: name to number of scalars of every selected parameter.
        proj_dim: projection dimension `k`.
        seed: seed of the entries.
        device: where to project.

    Returns:
        Dense Rademacher for matrices of up to 2^25 entries, else sparse.

    Raises:
        InputError: if `proj_dim` is not a positive integer.
    """
    if isinstance(proj_dim, bool) or not isinstance(proj_dim, int) or proj_dim < 1:
        raise InputError(f"proj_dim must be an integer of at least 1, got {proj_dim!r}.")
    grad_dim = sum(layout.values())
    size = f"{grad_dim:,} parameters to {proj_dim:,} numbers"
    if grad_dim * proj_dim <= DENSE_UP_TO:
        logger.info("Projecting %s with a dense Rademacher matrix.", size)
        kind = ProjectionType.rademacher
        return BasicProjector(grad_dim, proj_dim, seed, kind, device, layout=layout)
    logger.info("Projecting %s with a sparse matrix, one nonzero a parameter.", size)
    return SparseProjector(grad_dim, proj_dim, seed, device=device, layout=layout)
