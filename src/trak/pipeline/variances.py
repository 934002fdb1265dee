"""Scores and their variances by the jackknife, in stretches of rows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.encodings import RowSource
from trak.errors import InputError, NumericalError
from trak.pipeline.solving import block_scorer, kept_factor
from trak.pipeline.sources import loss_sizes, phi_of, score_weights, targets_of
from trak.savers import AbstractSaver
from trak.score_computers import AbstractScoreComputer, RidgeScoreComputer
from trak.score_computers.jackknife import GROUPS, group_contrasts
from trak.score_computers.linear import BlockScorer, Kept, Weighted

_BLOCK_BYTES = 32 << 20
_FEWEST_COLUMNS = 32
_MANY = 16  # if so large a part of a stretch's scores is asked for, all are computed

Takes = Sequence[Callable[[int, int], Tensor]]
"""Functions of first and end row that give scores before Q, `[rows, m]`, float64."""


class Pairs(NamedTuple):
    """Single scores.

    Attributes:
        rows: row numbers, ascending, `[p]`.
        targets: numbers of targets, `[p]`.
    """

    rows: Tensor
    targets: Tensor

    def between(self, start: int, stop: int) -> "Pairs":
        """Those of some rows.

        Args:
            start: first row.
            stop: end row.

        Returns:
            Some of the pairs.
        """
        ends = torch.tensor([start, stop], device=self.rows.device)
        first, end = torch.searchsorted(self.rows, ends).tolist()
        return Pairs(self.rows[first:end], self.targets[first:end])


@dataclass(frozen=True, kw_only=True)
class VariancePass:
    """Passes over the rows of some checkpoints that give scores and their variances.

    With several checkpoints by the jackknife that leaves out one of them, of the whole
    formula `mean(tau) mean(q)`, without what it overestimates of a product's variance
    (`Var(mean(tau)) Var(mean(q))`; at most half is taken away); with one by the jackknife
    that leaves out one of eight groups of the projection's columns (Efron and Tibshirani
    1993, Ch. 11: the variance is `(B - 1) / B` times the sum of squared distances from the
    replicates' mean).

    Attributes:
        scorer: the score computer.
        saver: the store.
        exp_name: the experiment.
        model_ids: the checkpoints.
        device: where to compute.
        projected: whether rows are random projections.
    """

    scorer: AbstractScoreComputer
    saver: AbstractSaver
    exp_name: str
    model_ids: list[int]
    device: torch.device
    projected: bool

    @cached_property
    def kept(self) -> dict[int, Kept]:
        """Each checkpoint's factor, read once: other processes may replace it meanwhile."""
        return {i: kept_factor(self.scorer, self.saver, i) for i in self.model_ids}

    @property
    def source(self) -> str:
        """What varies: `"checkpoints"` or `"sketch"`."""
        return "checkpoints" if len(self.model_ids) > 1 else "sketch"

    @property
    def own_degrees(self) -> int:
        """Degrees of freedom of a variance by itself."""
        return (len(self.model_ids) if len(self.model_ids) > 1 else GROUPS) - 1

    @property
    def num_rows(self) -> int:
        """Training examples that there are, `n`."""
        return len(self.saver.train_rows(self.model_ids[0]).done)

    @property
    def num_targets(self) -> int:
        """Targets of the experiment, `m`."""
        return int(self.saver.experiment(self.exp_name)["num_targets"])

    @cached_property
    def takes(self) -> Takes:
        """Of every checkpoint; or of all columns, and contrasts between groups of them.

        Raises:
            InputError: if there is neither a second checkpoint nor a random projection.
        """
        if len(self.model_ids) > 1:
            return [self._scorer_of(model_id) for model_id in self.model_ids]
        model_id = self.model_ids[0]
        if not isinstance(self.scorer, RidgeScoreComputer) or not self.projected:
            why = "no random projection" if not self.projected else "another score computer"
            raise InputError(
                "Errors are told from several checkpoints, or from the columns of one "
                f"projection; this run has one checkpoint and {why}. Add checkpoints, or "
                "use a random projection with RidgeScoreComputer."
            )
        rows, targets = self.rows(model_id), self._targets(model_id)
        kept = self.kept[model_id]
        loss = loss_sizes(self.saver, model_id, kept[1])
        contrasts = group_contrasts(self.scorer, kept, rows, targets, loss)
        return [self._scorer_of(model_id), *contrasts]

    def stretches(self) -> list[tuple[int, int]]:
        """First and end rows that fit into memory with all targets.

        Returns:
            All rows.
        """
        columns = max(self.num_targets, _FEWEST_COLUMNS)
        size = max(64, _BLOCK_BYTES // (8 * columns * max(len(self.takes), GROUPS)))
        return cut(self.num_rows, size)

    def stretch(
        self, takes: Takes, start: int, stop: int, pairs: Pairs | None = None
    ) -> tuple[Tensor, Tensor]:
        """Scores of some rows, and their variances.

        Args:
            takes: as `takes` are, of these or of other targets.
            start: first row.
            stop: end row.
            pairs: which scores of these rows; all if None.

        Returns:
            `[rows, m]` each, float64; of pairs `[p, 1]`.

        Raises:
            NumericalError: if one is not finite.
        """
        if pairs is None:
            parts = (take(start, stop) for take in takes)
        else:
            parts = (_single(take, start, stop, pairs) for take in takes)
        weights = [np.asarray(one[start:stop], np.float64) for one in self._loss]
        q = torch.from_numpy(np.stack(weights))
        if pairs is not None:
            q = q[:, (pairs.rows - start).cpu()]
        jackknife = _of_groups if self.source == "sketch" else _of_checkpoints
        scores, squares = jackknife(parts, q)
        if not torch.isfinite(scores).all() or not torch.isfinite(squares).all():
            raise NumericalError(
                f"Scores of {self.exp_name!r}, or their errors, are not finite from "
                f"row {start} on (checkpoints {self.model_ids}). Use a larger ridge "
                "(lambda_reg), or featurize again if a file is damaged."
            )
        return scores, squares

    def rows(self, model_id: int) -> RowSource:
        """A checkpoint's Phi.

        Args:
            model_id: the checkpoint.

        Returns:
            `[n, k]`, on the device unless it is in a file.
        """
        return phi_of(self.saver, model_id, self.device)

    @cached_property
    def _loss(self) -> list[NDArray[Any]]:
        return [score_weights(self.saver, i, self.kept[i][1]) for i in self.model_ids]

    def _targets(self, model_id: int) -> Tensor:
        return targets_of(self.saver, self.exp_name, model_id)

    def _scorer_of(self, model_id: int) -> BlockScorer:
        rows, targets = self.rows(model_id), self._targets(model_id)
        kept = self.kept[model_id]
        return block_scorer(self.scorer, self.saver, model_id, rows, targets, kept)


def cut(count: int, size: int) -> list[tuple[int, int]]:
    """Cuts rows into stretches.

    Args:
        count: rows that there are.
        size: of a stretch.

    Returns:
        First and end rows.
    """
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _single(
    take: Callable[[int, int], Tensor], start: int, stop: int, pairs: Pairs
) -> Tensor:
    places, targets = pairs.rows - start, pairs.targets
    if isinstance(take, Weighted):
        few = _MANY * len(places) < (stop - start) * take.weights.shape[1]
        if few:
            return take.pairs(start, stop, places, targets)[:, None]
    return take(start, stop)[places, targets][:, None]


def _of_groups(parts: Iterable[Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    whole, *contrasts = parts
    q = q.to(whole)
    squares = torch.zeros_like(whole)
    for contrast in contrasts:
        squares.addcmul_(contrast, contrast)
    count = len(contrasts) + 1
    return whole * q[0], squares * (q[0].square() * ((count - 1) / count))


def _of_checkpoints(parts: Iterable[Tensor], q: Tensor) -> tuple[Tensor, Tensor]:
    taus = torch.stack(list(parts))
    q = q.to(taus)
    count = len(taus)
    left = taus.sum(dim=0) - taus
    left *= (q.sum(dim=0) - q) / (count - 1) ** 2
    squares = _variance(left) * ((count - 1) ** 2 / count)
    # for a product it is too large by the product of both means' variances
    both = _variance(taus) * (_variance(q) / count**2)
    whole = taus.mean(dim=0) * q.mean(dim=0)
    return whole, torch.maximum(squares - both, squares / 2)


def _variance(values: Tensor) -> Tensor:
    # Tensor.var takes several times as long over the first axis
    return (values - values.mean(dim=0)).square_().sum(dim=0) / (len(values) - 1)
