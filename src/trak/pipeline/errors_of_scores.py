"""Standard errors of scores, from the spread of what they are averages of."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.pipeline.pipeline import Pipeline
from trak.pipeline.ranks_of_scores import Aims, Ranked, critical, noise_limit
from trak.pipeline.scoring import ScorePass
from trak.pipeline.solving import ScoreSet, block_scorer
from trak.pipeline.variances import Pairs, Takes, VariancePass, cut
from trak.score_computers import LinearScoreComputer
from trak.score_computers.linear import BlockScorer
from trak.score_computers.moderation import (
    PEERS,
    Moderation,
    ScoredRows,
    learned,
)
from trak.score_computers.ridge_sample import drawn
from trak.score_computers.stream import decoded
from trak.score_computers.topk import how_many

_LEARNED_ROWS, _TOGETHER = 2048, 16  # from which is learned how errors differ

Stretches = Generator[tuple[int, Tensor, Tensor]]


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
class ErrorPass(VariancePass):
    """Passes over the rows of some checkpoints that give scores and their errors.

    Variances over checkpoints are moderated by those of like scores
    (`trak.score_computers.moderation`); those over the columns of one sketch are not.
    """

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the errors."""
        moderation = self._moderation
        return self.own_degrees if moderation is None else moderation.degrees

    def scores(self) -> ScoresWithError:
        """All scores of the experiment.

        Returns:
            Scores and errors.
        """
        shape = (self.num_rows, self.num_targets)
        found, errors = np.empty(shape, np.float32), np.empty(shape, np.float32)
        for start, scores, squares in self.blocks():
            part = slice(start, start + len(scores))
            found[part] = scores.float().cpu().numpy()
            errors[part] = squares.sqrt().float().cpu().numpy()
        return ScoresWithError(found, errors, self.degrees, self.source)

    def top(self, k: int, *, helpful: bool, level: float = 0.9) -> Ranked:
        """The strongest training examples, and the ranks that they could have.

        Two passes: the first is that of scores without errors, the second compares every
        example with the strongest ones.

        Args:
            k: how many a target.
            helpful: the largest scores; if False, the smallest.
            level: of the comparisons.

        Returns:
            Rows, scores, errors and ranks.
        """
        sign = 1 if helpful else -1
        k = how_many(k, self.num_rows)
        _ = self.takes  # refuses before the first pass
        strongest = ScorePass(
            scorer=self.scorer,
            saver=self.saver,
            sets=[ScoreSet(self.exp_name)],
            model_ids=self.model_ids,
            device=self.device,
        )
        rows = strongest.top(k, helpful=helpful)[0].indices
        values, own = self.single(torch.from_numpy(rows).to(self.device))
        reach = critical(level, self.degrees)
        aims = Aims(sign * values, own, reach)
        above, below = torch.zeros((2, *rows.shape), dtype=torch.int64, device=self.device)
        for _, scores, squares in self.blocks():
            more, less = aims.compared(sign * scores, squares)
            above, below = above + more, below + less
        return Ranked(
            indices=rows,
            scores=values.float().cpu().numpy(),
            errors=own.sqrt().float().cpu().numpy(),
            rank_low=(1 + above).cpu().numpy(),
            rank_high=(self.num_rows - below).cpu().numpy(),
            level=level,
            source=self.source,
            projected=self.projected,
            limit=noise_limit(k, self.num_rows),
        )

    def blocks(self) -> Stretches:
        """Scores and their variances in stretches of rows.

        Yields:
            First row, scores and variances, `[rows, m]`, float64.
        """
        for start, stop in self.stretches():
            scores, squares = self.stretch(self.takes, start, stop)
            yield start, scores, self._moderated(slice(start, stop), ..., scores, squares)

    def single(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Some scores of every target and their variances, without computing the others.

        Args:
            rows: numbers of training examples, `[m, k]`.

        Returns:
            `[m, k]` each, float64.
        """
        order = rows.flatten().argsort()
        pairs = Pairs(rows.flatten()[order], order // rows.shape[1])
        found: list[tuple[Tensor, Tensor]] = []
        for start, stop in self.stretches():
            some = pairs.between(start, stop)
            if not len(some.rows):
                continue
            scores, squares = self.stretch(self.takes, start, stop, some)
            columns = (some.targets, None)
            squares = self._moderated(some.rows, columns, scores, squares)
            found.append((scores.flatten(), squares.flatten()))
        parts = (torch.cat(each) for each in zip(*found, strict=True))
        scores, squares = (
            torch.empty_like(part).scatter_(0, order, part).view_as(rows) for part in parts
        )
        return scores, squares

    def _moderated(
        self, rows: Any, targets: Any, scores: Tensor, squares: Tensor
    ) -> Tensor:
        # of what effects and levels have at these places
        if self._levels is None or self._moderation is None:
            return squares
        found = ScoredRows(self._effects[rows], scores, squares)
        return self._moderation.moderated(self._levels[targets], found)

    @cached_property
    def _peers(self) -> Tensor:
        # a score computer of another kind may take its targets for what they are
        alike = isinstance(self.scorer, LinearScoreComputer)
        count = PEERS if alike and self.source == "checkpoints" else 0
        return torch.from_numpy(drawn(self.num_rows, count))

    @cached_property
    def _peer_takes(self) -> Takes:
        found: list[BlockScorer] = []
        for model_id in self.model_ids:
            rows = self.rows(model_id)
            aims = [decoded(rows[i : i + 1], torch.float64) for i in self._peers.tolist()]
            given = self.scorer, self.saver, model_id, rows, torch.cat(aims)
            found.append(block_scorer(*given, self.kept[model_id]))
        return found

    def _some(self) -> list[tuple[int, int]]:
        # scattered rows, since neighbours may be alike
        stretches = cut(self.num_rows, _TOGETHER)
        return stretches[:: -(-len(stretches) * _TOGETHER // _LEARNED_ROWS)]

    @cached_property
    def _moderation(self) -> Moderation | None:
        if not len(self._peers):
            return None
        takes, some = self._peer_takes, self._some()
        found = [self.stretch(takes, *each) for each in some]
        scores, squares = (torch.cat(each) for each in zip(*found, strict=True))
        numbers = torch.cat([torch.arange(*each, device="cpu") for each in some]).to(
            scores.device
        )
        peers = self._peers.to(scores.device)
        return learned(numbers, scores, squares, peers, self.own_degrees)

    @cached_property
    def _effects(self) -> Tensor:
        # of every example, `[n]`
        found: list[Tensor] = []
        moderation = self._moderation
        if moderation is None:
            return torch.empty(0, device="cpu")
        for start, stop in self.stretches():
            scores, squares = self.stretch(self._peer_takes, start, stop)
            numbers = torch.arange(start, stop, device=scores.device)
            found.append(moderation.effects(numbers, scores, squares))
        return torch.cat(found)

    @cached_property
    def _levels(self) -> Tensor | None:
        if self._moderation is None:
            return None

        def stretches() -> Generator[ScoredRows]:
            for start, stop in self._some():
                found = self.stretch(self.takes, start, stop)
                yield ScoredRows(self._effects[start:stop], *found)

        return self._moderation.target_levels(list(stretches()))


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
