"""How scores would differ with some of the projection's columns left out."""

import math
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from trak.encodings import RowSource
from trak.errors import InputError
from trak.score_computers.factor import RidgeFactor, factorize
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
    factor = computer.factor(kept, computer.where(rows))
    if factor.form == "primal":
        weights = list(_contrasts(_primal(factor, rows.shape[0], targets, groups)))
        dtype = safe_products([rows], weights)
        block = blocks_of(rows, dtype, weights[0].device)
        return [Weighted(block, each.to(dtype)) for each in weights]
    scores = _dual(factor, computer.weighted(rows, loss), targets, groups)
    found = _contrasts(computer.unweighted(each, loss) for each in scores)
    return [lambda start, stop, s=each: s[start:stop] for each in found]


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
    factor: RidgeFactor, num_rows: int, targets: Tensor, groups: Sequence[Tensor]
) -> Generator[Tensor]:
    # weights without each group, [k, m]
    gram = factor.gram()
    targets = targets.to(gram)
    for group in groups:
        left = torch.ones(len(gram), dtype=torch.bool, device="cpu")
        left[group] = False
        left = left.to(gram.device)
        weights = torch.zeros(len(gram), len(targets), device="cpu").to(gram)
        part = _of_part(factor, gram, gram[left][:, left], num_rows)
        weights[left] = part.solve(targets[:, left].T)
        yield weights


def _dual(
    factor: RidgeFactor, rows: RowSource, targets: Tensor, groups: Sequence[Tensor]
) -> Generator[Tensor]:
    # scores without each group, [n, m]
    gram = factor.gram()
    targets = targets.to(gram)
    whole = product(rows, targets.T)
    for group in groups:
        columns = slice(int(group[0]), int(group[-1]) + 1)
        phi = decoded(rows, torch.float64, columns).to(gram)
        part = _of_part(factor, gram, gram - phi @ phi.T, rows.shape[0])
        yield part.solve(whole - phi @ targets[:, columns].T)


def _of_part(factor: RidgeFactor, gram: Tensor, part: Tensor, num_rows: int) -> RidgeFactor:
    # of a part of the columns, with a ridge of the same size relative to the rows
    ridge = factor.ridge * float(part.trace() / gram.trace())
    return factorize(part, form=factor.form, ridge=ridge, num_rows=num_rows)
