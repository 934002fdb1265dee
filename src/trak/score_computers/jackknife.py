"""How scores would differ with some of the projection's columns left out."""

import math
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from trak.encodings import RowSource
from trak.errors import InputError
from trak.score_computers.factor import factorize
from trak.score_computers.linear import (
    BlockScorer,
    Kept,
    Weighted,
    blocks_of,
    product,
    safe_products,
)
from trak.score_computers.ridge import RidgeScoreComputer
from trak.score_computers.stream import decoded

GROUPS = 8


def group_contrasts(
    computer: RidgeScoreComputer,
    kept: Kept,
    rows: RowSource,
    targets: Tensor,
    loss: Any,
) -> list[BlockScorer]:
    """Differences of scores with one of eight groups of columns left out.

    Columns of a random projection are independent sketches of the gradient, or, where
    entries are hashed, as good as that. The ridge keeps its size relative to the rows.
    There are seven contrasts of the eight replicates: the sum of their squares is that of
    the replicates' squared distances from their mean.

    Args:
        computer: made the factor.
        kept: the factor of all columns, and its description.
        rows: Phi, `[n, k]`.
        targets: `[m, k]`, float64.
        loss: Q, `[n, 1]`, or `Losses`.

    Returns:
        Functions of first and end row that give contrasts before Q, `[rows, m]`, float64.

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
    groups = torch.arange(width, device="cpu").tensor_split(GROUPS)
    if computer.factor(kept, computer.where(rows)).form == "primal":
        weights = list(_contrasts(_primal(computer, kept, rows, targets, groups)))
        dtype = safe_products([rows], weights)
        block = blocks_of(rows, dtype, weights[0].device)
        return [Weighted(block, each.to(dtype)) for each in weights]
    scores = _dual(computer, kept, rows, targets, groups, loss)
    return [lambda start, stop, s=each: s[start:stop] for each in _contrasts(scores)]


def _contrasts(replicates: Iterable[Tensor]) -> Generator[Tensor]:
    # Helmert's, as Welford's updates of the mean
    mean: Tensor | None = None
    for count, each in enumerate(replicates):
        if mean is None:
            mean = each
            continue
        apart = each - mean
        mean = mean + apart / (count + 1)
        yield apart * math.sqrt(count / (count + 1))


def _primal(
    computer: RidgeScoreComputer,
    kept: Kept,
    rows: RowSource,
    targets: Tensor,
    groups: Sequence[Tensor],
) -> Generator[Tensor]:
    # weights without each group, [k, m]
    factor = computer.factor(kept, computer.where(rows))
    gram, width = factor.gram(), rows.shape[1]
    targets = targets.to(gram)
    for group in groups:
        left = torch.ones(width, dtype=torch.bool, device="cpu")
        left[group] = False
        left = left.to(gram.device)
        part = gram[left][:, left]
        ridge = factor.ridge * float(part.trace() / gram.trace())
        solver = factorize(part, form="primal", ridge=ridge, num_rows=rows.shape[0])
        weights = torch.zeros(width, len(targets), device="cpu").to(gram)
        weights[left] = solver.solve(targets[:, left].T)
        yield weights


def _dual(
    computer: RidgeScoreComputer,
    kept: Kept,
    rows: RowSource,
    targets: Tensor,
    groups: Sequence[Tensor],
    loss: Any,
) -> Generator[Tensor]:
    # scores without each group, [n, m]
    factor = computer.factor(kept, computer.where(rows))
    gram = factor.gram()
    targets = targets.to(gram)
    weighted = computer.weighted(rows, loss)
    whole = product(weighted, targets.T)
    for group in groups:
        columns = slice(int(group[0]), int(group[-1]) + 1)
        phi = decoded(weighted, torch.float64, columns).to(gram)
        part = gram - phi @ phi.T
        ridge = factor.ridge * float(part.trace() / gram.trace())
        solver = factorize(part, form="dual", ridge=ridge, num_rows=rows.shape[0])
        scores = solver.solve(whole - phi @ targets[:, columns].T)
        yield computer.unweighted(scores, loss)
