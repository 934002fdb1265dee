"""Standard errors of scores, from the spread of what they are averages of."""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.encodings import RowSource
from trak.errors import InputError, NumericalError
from trak.pipeline.pipeline import Pipeline
from trak.pipeline.ranks_of_scores import Ranked, critical, noise_limit
from trak.pipeline.solving import ScoreSet, block_scorer, row_source
from trak.savers import AbstractSaver
from trak.score_computers import (
    AbstractScoreComputer,
    LinearScoreComputer,
    RidgeScoreComputer,
    RunningTop,
)
from trak.score_computers.auto_ridge import drawn
from trak.score_computers.jackknife import GROUPS, without_groups
from trak.score_computers.linear import BlockScorer
from trak.score_computers.moderation import (
    PEERS,
    Moderation,
    Stretch,
    learned,
)
from trak.score_computers.stream import decoded
from trak.score_computers.topk import how_many

_BLOCK_BYTES = 32 << 20
_COMPARISONS = 1 << 24
_LEARNED_ROWS, _TOGETHER = 2048, 16  # from which is learned how errors differ

Stretches = Generator[tuple[int, Tensor, Tensor]]
Takes = Sequence[Callable[[int, int], Tensor]]


@dataclass(frozen=True)
class ScoresWithError:
    """Scores, and how sure they are.

    Attributes:
        scores: `[n, m]`.
        errors: their standard errors, `[n, m]`.
        degrees: degrees of freedom of the errors; whole where none were borrowed.
        source: what varied: `"checkpoints"` (with them their projections), or `"sketch"`,
            which leaves out how much another training would change.
    """

    scores: NDArray[np.float32]
    errors: NDArray[np.float32]
    degrees: float
    source: str

    def interval(self, level: float = 0.9) -> tuple[NDArray[np.float32], ...]:
        """Intervals that hold the scores' expectations.

        Args:
            level: share of intervals that do.

        Returns:
            Their ends, `[n, m]` each, by Student's t.
        """
        reach = np.float32(critical(level, self.degrees)) * self.errors
        return self.scores - reach, self.scores + reach


@dataclass(frozen=True, kw_only=True)
class ErrorPass:
    """Passes over the rows of some checkpoints that give scores and their errors.

    With several checkpoints by the jackknife that leaves out one of them, of the whole
    formula `mean(tau) mean(q)`, without what it overestimates of a product's variance
    (`Var(mean(tau)) Var(mean(q))`; at most half is taken away), moderated by the variances
    of like scores (`trak.score_computers.moderation`); with one by the jackknife that
    leaves out one of eight groups of the projection's columns (Efron and Tibshirani 1993,
    Ch. 11: the variance is `(B - 1) / B` times the sum of squared distances from the
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

    @property
    def source(self) -> str:
        """What varies."""
        return "checkpoints" if len(self.model_ids) > 1 else "sketch"

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the errors."""
        return self._own if self._moderation is None else self._moderation.degrees

    @property
    def _own(self) -> int:
        return (len(self.model_ids) if len(self.model_ids) > 1 else GROUPS) - 1

    def scores(self) -> ScoresWithError:
        """All scores of the experiment.

        Returns:
            Scores and errors.
        """
        found = [
            (scores.float().cpu().numpy(), errors.float().cpu().numpy())
            for _, scores, errors in self.blocks()
        ]
        scores, errors = (np.concatenate(part) for part in zip(*found, strict=True))
        return ScoresWithError(scores, errors, self.degrees, self.source)

    def top(self, k: int, *, helpful: bool, level: float = 0.9) -> Ranked:
        """The strongest training examples, and the ranks that they could have.

        Two passes: the second compares every example with the strongest ones.

        Args:
            k: how many a target.
            helpful: the largest scores; if False, the smallest.
            level: of the comparisons.

        Returns:
            Rows, scores, errors and ranks.
        """
        sign = 1 if helpful else -1
        k = how_many(k, self._num_rows)
        top: RunningTop | None = None
        for start, scores, _ in self.blocks():
            if top is None:
                top = RunningTop(scores.shape[1], k, scores.dtype, self.device)
            top.add(start, sign * scores)
        assert top is not None  # noqa: S101 - there is at least one training example
        rows, best = top.result()
        places = torch.from_numpy(rows).to(self.device)  # [m, k]
        values = torch.from_numpy(best).to(self.device, torch.float64)
        errors = torch.zeros_like(values)
        for start, _, spread in self.blocks():
            own = (places >= start) & (places < start + len(spread))
            inside = (places - start).clamp(0, len(spread) - 1)
            errors = torch.where(own, spread.T.gather(1, inside), errors)
        reach = critical(level, self.degrees)
        above, below, count = torch.zeros_like(places), torch.zeros_like(places), 0
        for _, scores, spread in self.blocks():
            count += len(scores)
            more, less = _compare(sign * scores.T, spread.T, values, errors, reach)
            above, below = above + more, below + less
        return Ranked(
            indices=rows,
            scores=(sign * values).float().cpu().numpy(),
            errors=errors.float().cpu().numpy(),
            rank_low=(1 + above).cpu().numpy(),
            rank_high=(count - below).cpu().numpy(),
            level=level,
            source=self.source,
            projected=self.projected,
            limit=noise_limit(k, count),
        )

    def blocks(self) -> Stretches:
        """Scores and errors in stretches of rows.

        Yields:
            First row, scores and errors, `[rows, m]`, float64.
        """
        for start, stop in self._stretches():
            scores, squares = self._stretch(self._takes, start, stop)
            if self._levels is not None and self._moderation is not None:
                stretch = Stretch(self._effects[start:stop], scores, squares)
                squares = self._moderation.moderated(self._levels, stretch)
            yield start, scores, squares.sqrt()

    def _stretches(self) -> list[tuple[int, int]]:
        columns = max(self._num_targets, PEERS)
        size = max(64, _BLOCK_BYTES // (8 * columns * max(len(self._takes), GROUPS)))
        return _cut(self._num_rows, size)

    def _stretch(self, takes: Takes, start: int, stop: int) -> tuple[Tensor, Tensor]:
        # scores and their variances
        scores, squares = self._jackknife(*self._parts(takes, start, stop))
        if not torch.isfinite(scores).all() or not torch.isfinite(squares).all():
            raise NumericalError(
                f"Scores of {self.exp_name!r}, or their errors, are not finite from "
                f"row {start} on (checkpoints {self.model_ids}). Use a larger ridge "
                "(lambda_reg), or featurize again if a file is damaged."
            )
        return scores, squares

    def _parts(self, takes: Takes, start: int, stop: int) -> tuple[Tensor, Tensor]:
        # of every checkpoint (or group of columns): scores before Q, and Q
        parts = torch.stack([take(start, stop) for take in takes])
        loss = [self.saver.train_rows(i).array("out_to_loss") for i in self.model_ids]
        stretches = [np.asarray(one[start:stop], np.float64) for one in loss]
        return parts, torch.from_numpy(np.stack(stretches)).to(parts)

    @cached_property
    def _peers(self) -> Tensor:
        # a score computer of another kind may take its targets for what they are
        alike = isinstance(self.scorer, LinearScoreComputer)
        count = PEERS if alike and self.source == "checkpoints" else 0
        return torch.from_numpy(drawn(self._num_rows, count))

    @cached_property
    def _peer_takes(self) -> Takes:
        found: list[BlockScorer] = []
        for model_id in self.model_ids:
            rows = self._rows(model_id)
            aims = [decoded(rows[i : i + 1], torch.float64) for i in self._peers.tolist()]
            one = block_scorer(self.scorer, self.saver, model_id, rows, torch.cat(aims))
            found.append(one)
        return found

    def _some(self) -> list[tuple[int, int]]:
        # scattered rows, since neighbours may be alike
        stretches = _cut(self._num_rows, _TOGETHER)
        return stretches[:: -(-len(stretches) * _TOGETHER // _LEARNED_ROWS)]

    @cached_property
    def _moderation(self) -> Moderation | None:
        if not len(self._peers):
            return None
        takes, some = self._peer_takes, self._some()
        found = [self._stretch(takes, *each) for each in some]
        scores, squares = (torch.cat(each) for each in zip(*found, strict=True))
        numbers = torch.cat([torch.arange(*each) for each in some]).to(scores.device)
        peers = self._peers.to(scores.device)
        return learned(numbers, scores, squares, peers, self._own)

    @cached_property
    def _effects(self) -> Tensor:
        # of every example, `[n]`
        found: list[Tensor] = []
        moderation = self._moderation
        if moderation is None:
            return torch.empty(0)
        for start, stop in self._stretches():
            scores, squares = self._stretch(self._peer_takes, start, stop)
            numbers = torch.arange(start, stop, device=scores.device)
            found.append(moderation.effects(numbers, scores, squares))
        return torch.cat(found)

    @cached_property
    def _levels(self) -> Tensor | None:
        if self._moderation is None:
            return None

        def stretches() -> Generator[Stretch]:
            for start, stop in self._some():
                found = self._stretch(self._takes, start, stop)
                yield Stretch(self._effects[start:stop], *found)

        return self._moderation.target_levels(stretches)

    def _jackknife(self, parts: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        if self.source == "sketch":
            deleted = parts[1:] * q[0]
            return parts[0] * q[0], _variance(deleted) * ((GROUPS - 1) ** 2 / GROUPS)
        count, whole = len(parts), parts.mean(dim=0) * q.mean(dim=0)
        squares = _apart(parts, q).square().sum(dim=0) * ((count - 1) / count)
        # for a product it is too large by the product of both means' variances
        both = _variance(parts) * _variance(q) / count**2
        return whole, torch.maximum(squares - both, squares / 2)

    @cached_property
    def _takes(self) -> Takes:
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
        rows = self._rows(model_id)
        targets = decoded(
            row_source(self.saver.target_rows(self.exp_name, model_id)), torch.float64
        )
        loss = self.saver.train_rows(model_id).array("out_to_loss")
        kept = self.saver.load_factor(model_id)
        deleted = without_groups(self.scorer, kept, rows, targets, loss)
        return [self._scorer_of(model_id), *deleted]

    def _scorer_of(self, model_id: int) -> BlockScorer:
        rows = self._rows(model_id)
        targets = row_source(self.saver.target_rows(self.exp_name, model_id))
        aims = decoded(targets, torch.float64)
        return block_scorer(self.scorer, self.saver, model_id, rows, aims)

    def _rows(self, model_id: int) -> RowSource:
        rows = row_source(self.saver.train_rows(model_id))
        return rows.to(self.device) if isinstance(rows, Tensor) else rows

    @property
    def _num_rows(self) -> int:
        return len(self.saver.train_rows(self.model_ids[0]).done)

    @property
    def _num_targets(self) -> int:
        return int(self.saver.experiment(self.exp_name)["num_targets"])


def error_pass(
    pipeline: Pipeline, exp_name: str, model_ids: Iterable[int] | None
) -> ErrorPass:
    """Passes over the rows of a run's store.

    Args:
        pipeline: the run.
        exp_name: the experiment.
        model_ids: the checkpoints; all of the store if None.

    Returns:
        The passes.
    """
    ready = pipeline.ready([ScoreSet(exp_name)], model_ids, allow_skip=None)
    return ErrorPass(
        scorer=pipeline.scorer,
        saver=pipeline.saver,
        exp_name=exp_name,
        model_ids=ready,
        device=pipeline.maker.device,
        projected=bool(pipeline.maker.projector.random_dim),
    )


def _apart(parts: Tensor, q: Tensor) -> Tensor:
    # of the products without each checkpoint from their mean
    count = len(parts)
    left = (parts.sum(dim=0) - parts) * (q.sum(dim=0) - q) / (count - 1) ** 2
    return left - left.mean(dim=0)


def _variance(values: Tensor) -> Tensor:
    # Tensor.var takes several times as long over the first axis
    return (values - values.mean(dim=0)).square().sum(dim=0) / (len(values) - 1)


def _cut(count: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _compare(
    scores: Tensor, spread: Tensor, values: Tensor, errors: Tensor, reach: float
) -> tuple[Tensor, Tensor]:
    # how many of [m, b] are clearly above and below each of [m, k]
    above, below = [], []
    size = max(1, _COMPARISONS // max(1, scores.shape[1] * values.shape[1]))
    for start in range(0, len(scores), size):
        part = slice(start, start + size)
        apart = scores[part, :, None] - values[part, None, :]
        unsure = reach * torch.hypot(spread[part, :, None], errors[part, None, :])
        above.append((apart > unsure).sum(dim=1))
        below.append((apart < -unsure).sum(dim=1))
    return torch.cat(above), torch.cat(below)
