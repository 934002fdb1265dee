"""How many coordinates of whitened gradients are worth keeping.

Products of rows cost as much as there are columns, and whitened gradients have many
coordinates that hardly vary. Those that hold nearly all of the variance give the same
scores (docs/whitening.md has the measurements).
"""

import logging
import math
from typing import Any, NamedTuple

from trak.pipeline import Whitener, usual_projector
from trak.projectors.leading import coordinates_holding

logger = logging.getLogger(__name__)


class Share(NamedTuple):
    """Of the whitened gradients' variance that is kept.

    Attributes:
        usual: where columns are few.
        least: where they are many.
        many: so many for each training example are not few.
    """

    usual: float
    least: float
    many: float


ONE, SEVERAL = Share(0.98, 0.95, 5), Share(0.95, 0.8, 3)
"""With one checkpoint and with several, which average out what is left out."""
WHOLE = 1 << 23
"""Numbers in all rows up to which nothing is left out."""
_WORTH = 0.8  # of all coordinates: more are not left out for the rest
_STEP = 256


def width_of(
    whitener: Whitener, strength: float, count: int, checkpoints: int = 1
) -> int | None:
    """How many leading coordinates of the first checkpoint's gradients to keep.

    Those that hold 98 % of the variance; where that is more than 8 for each training
    example, so many, or those that hold 95 % if that is more still. With several
    checkpoints 95 %, 3, and 80 %.

    Args:
        whitener: has fitted it.
        strength: of whitening.
        count: training examples, `n`.
        checkpoints: whose scores are averaged.

    Returns:
        `k`, a multiple of 256; None where all coordinates had better be kept.
    """
    if usual_projector(None, whitener.maker.computer, whitened=True) is None:
        return None  # gradients that do not come in factors
    whitening = whitener.foresee(0, strength)
    every = sum(math.prod(shape) for shape in whitener.shapes.values())
    share = ONE if checkpoints == 1 else SEVERAL
    held, many = share.usual, share.many * count
    needed = coordinates_holding(whitening, whitener.shapes, held)
    if needed > many:
        held = share.least
        needed = max(many, coordinates_holding(whitening, whitener.shapes, held))
    width = math.ceil(needed / _STEP) * _STEP
    kept = width if 0 < width <= _WORTH * every else None
    logger.info(
        "%d of %d coordinates hold at least %.3g %% of the whitened variance: %s.",
        needed,
        every,
        100 * held,
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
