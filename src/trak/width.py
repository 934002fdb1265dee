"""How many coordinates of whitened gradients are worth keeping.

Products of rows cost as much as there are columns, and whitened gradients have many
coordinates that hardly vary. Those that hold nearly all of the variance give the same
scores (docs/whitening.md has the measurements).
"""

import logging
import math
from typing import Any

from trak.pipeline import Whitener, usual_projector
from trak.projectors.leading import coordinates_holding

logger = logging.getLogger(__name__)

HELD = 0.98
"""Share of the whitened gradients' variance that is kept."""
WHOLE = 1 << 23
"""Numbers in all rows up to which nothing is left out."""
_WORTH = 0.8  # of all coordinates: more are not left out for the rest
_STEP = 256


def width_of(whitener: Whitener, strength: float) -> int | None:
    """How many leading coordinates of the first checkpoint's gradients to keep.

    Args:
        whitener: has fitted it.
        strength: of whitening.

    Returns:
        `k`, a multiple of 256; None where all coordinates had better be kept.
    """
    if usual_projector(None, whitener.maker.computer, whitened=True) is None:
        return None  # gradients that do not come in factors
    whitening = whitener.made(whitener.sums[0], strength, in_bases=True)
    every = sum(math.prod(shape) for shape in whitener.shapes.values())
    needed = coordinates_holding(whitening, whitener.shapes, HELD)
    width = math.ceil(needed / _STEP) * _STEP
    kept = width if 0 < width <= _WORTH * every else None
    logger.info(
        "%d of %d coordinates hold %.3g %% of the whitened gradients' variance: %s.",
        needed,
        every,
        100 * HELD,
        "all are kept" if kept is None else f"{kept} are kept",
    )
    return kept


def known_width(metadata: dict[str, Any]) -> int | None:
    """How many leading coordinates a store keeps.

    Args:
        metadata: the store's.

    Returns:
        `k`; None if it keeps something else.
    """
    found = metadata.get("projection", {})
    return found.get("proj_dim") if found.get("kind") == "leading" else None
