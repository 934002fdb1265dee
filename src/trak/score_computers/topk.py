"""The strongest training examples of every target, without sorting whole columns."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from trak.arguments import as_integer
from trak.score_computers.running import RunningTop, TopScores

_BLOCK_BYTES = 32 << 20
_FEWEST_ROWS = 256


def how_many(k: Any, num_rows: int) -> int:
    """How many examples a list holds.

    Args:
        k: how many are asked for.
        num_rows: how many there are.

    Returns:
        The smaller of both.
    """
    return min(as_integer("k", k, least=1), num_rows)


def top_scores(
    scores: Float[np.ndarray, "n m"], k: int, *, helpful: bool = True
) -> TopScores:
    """Finds the `k` largest (or smallest) scores of every column.

    One pass over blocks of rows, keeping `k` candidates a target.

    Args:
        scores: `[n, m]`, possibly backed by a file. NaN comes last.
        k: how many; all are given if there are fewer.
        helpful: largest scores first; if False, smallest first (the most harmful).

    Returns:
        Indices and scores, equal scores in the order of their rows.
    """
    num_rows, num_targets = scores.shape
    signed = np.positive if helpful else np.negative  # either gives a copy
    size = max(_FEWEST_ROWS, _BLOCK_BYTES // max(1, num_targets * scores.itemsize))
    kind = torch.from_numpy(signed(np.empty(0, scores.dtype))).dtype
    k = as_integer("k", k, least=1)
    top = RunningTop(num_targets, k, kind, torch.device("cpu"))
    for start in range(0, num_rows, size):
        block = torch.from_numpy(signed(scores[start : start + size]))
        if block.isnan().any():
            block = block.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        top.add(start, block)
    rows, found = top.result(negated=not helpful)
    target, rank = np.isinf(found).nonzero()
    found[target, rank] = scores[rows[target, rank], target]  # NaN where it was
    return TopScores(rows, found)
