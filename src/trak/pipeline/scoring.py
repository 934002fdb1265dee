"""One pass over the rows: what is kept of a checkpoint, and any sets of scores."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.encodings import RowSource, row_encoding
from trak.errors import NumericalError
from trak.pipeline.solving import ScoreSet, kept_factor, solve
from trak.pipeline.sources import phi_of, row_source, score_weights
from trak.savers import AbstractSaver
from trak.score_computers import AbstractScoreComputer, TopScores
from trak.score_computers.linear import BlockScorer, Kept, safe_products
from trak.score_computers.running import top_of
from trak.score_computers.stream import (
    Multiplier,
    refuse_nonfinite,
    rows_per_block,
    stream,
)
from trak.score_computers.topk import how_many

_SOLVED_ROWS = 4096
_SCORE_BYTES = 32 << 20
_BUFFERS = 3  # one is made, one waits, one is being written

Scored = Generator[tuple[int, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ScorePass:
    """One pass over the rows of some checkpoints, for any number of sets of scores.

    Attributes:
        scorer: the score computer.
        saver: the store.
        sets: what to compute; their columns stand side by side.
        model_ids: the checkpoints to average over.
        device: where to compute.
    """

    scorer: AbstractScoreComputer
    saver: AbstractSaver
    sets: list[ScoreSet]
    model_ids: list[int]
    device: torch.device

    @cached_property
    def kept(self) -> dict[int, Kept]:
        """Each checkpoint's factor, read once: other processes may replace it meanwhile."""
        if not any(each.own for each in self.sets):
            return {i: self.saver.load_factor(i) for i in self.model_ids}
        return {i: kept_factor(self.scorer, self.saver, i) for i in self.model_ids}

    def columns(self) -> list[slice]:
        """Where each set's columns are.

        Returns:
            One slice a set.
        """
        counts = [self.saver.experiment(s.exp_name)["num_targets"] for s in self.sets]
        ends = np.cumsum(counts).tolist()
        return [slice(e - c, e) for c, e in zip(counts, ends, strict=True)]

    def top(self, k: int, *, helpful: bool) -> list[TopScores]:
        """The strongest training examples of every target, in memory that has no `n`.

        Args:
            k: how many a target.
            helpful: the largest scores; if False, the smallest.

        Returns:
            One result a set.
        """
        columns = self.columns()
        k = how_many(k, len(self.saver.train_rows(self.model_ids[0]).done))
        with closing(self.blocks()) as blocks:
            rows, scores = top_of(blocks, k, helpful=helpful)
        scores = scores.astype(self._stored(), copy=False)
        return [TopScores(rows[part], scores[part]) for part in columns]

    def arrays(self) -> Generator[tuple[int, NDArray[np.floating]]]:
        """Scores of all sets, as a saver takes them.

        Yields:
            First row and scores `[rows, m]`, to be used before two more are asked for.
        """
        with closing(self.blocks()) as blocks:
            for start, block in blocks:
                yield start, block.cpu().numpy()

    def blocks(self) -> Scored:
        """Scores in stretches of rows, averaged over checkpoints.

        `(mean_c Phi_c K_c^-1 phi_c^T) * (mean_c Q_c)`: Park et al. 2023, Sec. 3.2, Step
        4, with the averages taken apart as upstream does.

        Yields:
            First row and finite scores `[rows, m]`, to be used before two more are asked
            for.
        """
        sources = [phi_of(self.saver, i, self.device) for i in self.model_ids]
        solved = [
            solve(self.scorer, self.saver, self.sets, i, rows, self.kept[i])
            for i, rows in zip(self.model_ids, sources, strict=True)
        ]
        weights = [w for w in solved if isinstance(w, Tensor)]
        if len(weights) == len(solved):
            share = 1 / len(weights)
            found = self._multiplied(sources, [w * share for w in weights])
        else:
            found = self._looked_up([s for s in solved if not isinstance(s, Tensor)])
        for start, block in found:
            # a sum is quick, and finite unless a term is not, or it overflows
            if not torch.isfinite(block.sum()) and not torch.isfinite(block).all():
                self._refuse(sources, start, block)
            yield start, block

    def _multiplied(self, sources: list[RowSource], weights: list[Tensor]) -> Scored:
        dtype = safe_products(sources, weights)
        weights = [w.to(dtype) for w in weights]
        width, columns = weights[0].shape
        fitting = max(64, _SCORE_BYTES // (columns * dtype.itemsize))
        rows = min(rows_per_block(width, dtype), fitting)
        shape = (min(rows, sources[0].shape[0]), columns)
        outs = [
            torch.empty(shape, dtype=dtype, device=self.device) for _ in range(_BUFFERS)
        ]
        last = len(sources) - 1
        for source, start, block in stream(sources, dtype, self.device, rows, self._q()):
            out = outs[start // rows % _BUFFERS][: len(block)]
            # with beta=0 the product replaces whatever the buffer held
            out.addmm_(block, weights[source], beta=0 if source == 0 else 1)
            if source == last:
                yield start, out

    def _looked_up(self, scorers: list[list[BlockScorer]]) -> Scored:
        q = self._q()
        num_rows = len(self.saver.train_rows(self.model_ids[0]).done)
        for start in range(0, num_rows, _SOLVED_ROWS):
            stop = min(start + _SOLVED_ROWS, num_rows)
            parts = [
                torch.cat([score(start, stop) for score in part], dim=1) for part in scorers
            ]
            mean = torch.stack(parts).mean(dim=0)
            yield start, mean * q(start, stop).to(mean)

    def _stored(self) -> type[np.floating]:
        # as in score files: float64 for float64 models only
        rows = row_source(self.saver.train_rows(self.model_ids[0]))
        return np.float64 if row_encoding(rows).name == "float64" else np.float32

    def _q(self) -> Multiplier:
        weights = [score_weights(self.saver, i, self.kept[i][1]) for i in self.model_ids]

        @lru_cache(maxsize=1)  # every checkpoint of a stretch asks for it
        def mean(start: int, stop: int) -> Tensor:
            parts = [w[start:stop] for w in weights]
            q = np.mean(parts, axis=0, dtype=np.float64)
            return torch.from_numpy(q).to(self.device)

        return mean

    def _refuse(self, sources: list[RowSource], start: int, block: Tensor) -> None:
        for rows in sources:
            refuse_nonfinite(rows, rows_per_block(rows.shape[1], torch.float64))
        row, column = (int(i) for i in (~torch.isfinite(block)).nonzero()[0])
        for part, (name, *_) in zip(self.columns(), self.sets, strict=True):
            if part.start <= column < part.stop:
                raise NumericalError(
                    f"The score of training example {start + row} for target "
                    f"{column - part.start} of {name!r} is not finite (checkpoints "
                    f"{self.model_ids}). Use a larger ridge (lambda_reg), or leave it out."
                )
