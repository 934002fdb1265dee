"""What scores would be with some of the projection's columns left out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trak.encodings import RowSource
from trak.errors import InputError
from trak.score_computers.factor import factorize
from trak.score_computers.linear import BlockScorer, Kept, product
from trak.score_computers.ridge import RidgeScoreComputer
from trak.score_computers.stream import decoded

GROUPS = 8


def without_groups(
    computer: RidgeScoreComputer,
    kept: Kept,
    rows: RowSource,
    targets: Tensor,
    loss: Any,
) -> list[BlockScorer]:
    """Scores with one of eight groups of columns left out, for each group.

    Columns of a random projection are independent sketches of the gradient, or, where
    entries are hashed, as good as that. The ridge keeps its size relative to the rows.

    Args:
        computer: made the factor.
        kept: the factor of all columns, and its description.
        rows: Phi, `[n, k]`.
        targets: `[m, k]`, float64.
        loss: Q, `[n, 1]`.

    Returns:
        Functions of first and end row that give scores before Q, `[rows, m]`, float64.

    Raises:
        InputError: if there are fewer than two columns a group.
    """
    width = rows.shape[1]
    if width < 2 * GROUPS:
        raise InputError(
            f"The error of a sketch is told from {GROUPS} groups of its columns; "
            f"proj_dim={width} is too small. Use at least {2 * GROUPS}, or several "
            "checkpoints."
        )
    groups = torch.arange(width, device="cpu").chunk(GROUPS)
    primal = computer.factor(kept, computer.where(rows)).form == "primal"
    make = _primal if primal else _dual
    return make(computer, kept, rows, targets, groups, loss)


def _primal(
    computer: RidgeScoreComputer,
    kept: Kept,
    rows: RowSource,
    targets: Tensor,
    groups: Sequence[Tensor],
    loss: Any,
) -> list[BlockScorer]:
    del loss  # it is in the Gram matrix
    factor = computer.factor(kept, computer.where(rows))
    gram, width = factor.gram(), rows.shape[1]
    targets = targets.to(gram)
    found: list[BlockScorer] = []
    for group in groups:
        left = torch.ones(width, dtype=torch.bool, device="cpu")
        left[group] = False
        left = left.to(gram.device)
        part = gram[left][:, left]
        ridge = factor.ridge * float(part.trace() / gram.trace())
        solver = factorize(part, form="primal", ridge=ridge, num_rows=rows.shape[0])
        weights = torch.zeros(width, len(targets), device="cpu").to(gram)
        weights[left] = solver.solve(targets[:, left].T)
        found.append(
            lambda start, stop, w=weights: decoded(rows[start:stop], w.dtype).to(w) @ w
        )
    return found


def _dual(
    computer: RidgeScoreComputer,
    kept: Kept,
    rows: RowSource,
    targets: Tensor,
    groups: Sequence[Tensor],
    loss: Any,
) -> list[BlockScorer]:
    factor = computer.factor(kept, computer.where(rows))
    gram = factor.gram()
    targets = targets.to(gram)
    weighted = computer.weighted(rows, loss)
    whole = product(weighted, targets.T)
    found: list[BlockScorer] = []
    for group in groups:
        columns = slice(int(group[0]), int(group[-1]) + 1)
        phi = decoded(weighted, torch.float64, columns).to(gram)
        part = gram - phi @ phi.T
        ridge = factor.ridge * float(part.trace() / gram.trace())
        solver = factorize(part, form="dual", ridge=ridge, num_rows=rows.shape[0])
        scores = solver.solve(whole - phi @ targets[:, columns].T)
        scores = computer.unweighted(scores, loss)
        found.append(lambda start, stop, s=scores: s[start:stop])
    return found
