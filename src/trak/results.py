"""What a `TRAKer` reads back: scores, the strongest of them, and what the store holds."""

from collections.abc import Iterable
from typing import Any

from numpy.typing import NDArray

from trak.pipeline import (
    CheckpointInfo,
    ExperimentInfo,
    Pipeline,
    list_checkpoints,
    list_experiments,
)
from trak.savers import AbstractSaver
from trak.score_computers import TopScores, top_scores


class Results:
    """The reading half of `TRAKer`.

    Attributes:
        saver: the store.
    """

    saver: AbstractSaver
    _pipeline: Pipeline

    def scores(self, exp_name: str) -> NDArray[Any]:
        """Reads an experiment's finalized scores.

        Args:
            exp_name: the experiment.

        Returns:
            `[n, m]`.
        """
        return self._pipeline.scores(exp_name)

    def top_k(self, exp_name: str, k: int = 10, *, helpful: bool = True) -> TopScores:
        """The training examples with the strongest scores for every target.

        Args:
            exp_name: the experiment.
            k: how many a target.
            helpful: the largest scores; if False, the smallest (the most harmful).

        Returns:
            `indices` and `scores`, each `[m, k]`, strongest first.
        """
        return top_scores(self.scores(exp_name), k, helpful=helpful)

    def top_scores(self, exp_name: str, k: int = 10, *, helpful: bool = True) -> TopScores:
        """Like `top_k`, but in one pass over the rows and without an `[n, m]` file.

        Neither needs `finalize_scores` nor touches what it wrote.

        Args:
            exp_name: the experiment.
            k: how many a target.
            helpful: the largest scores; if False, the smallest (the most harmful).

        Returns:
            `indices` and `scores`, each `[m, k]`, strongest first.
        """
        found = self.sweep([exp_name], top_k=k, helpful=helpful)
        return next(iter(found.values()))

    def sweep(
        self,
        exp_names: Iterable[str],
        lambda_regs: Iterable[float | None] | None = None,
        *,
        top_k: int | None = None,
        helpful: bool = True,
        model_ids: Iterable[int] | None = None,
        allow_skip: bool = False,
    ) -> dict[tuple[str, float | None], Any]:
        """Scores several experiments at several ridges in one pass over the rows.

        Args:
            exp_names: the experiments.
            lambda_regs: the ridges; None among them stands for the default one. The run's
                own ridge only, if left out.
            top_k: keep this many training examples for each target, and write nothing. If
                None, write all scores: those at the run's ridge as `finalize_scores` does,
                others to `scores/ridge={lambda_reg}/{exp_name}.mmap`.
            helpful: for `top_k`, the largest scores; if False, the smallest.
            model_ids: the checkpoints to average over; all in the store if None.
            allow_skip: leave out checkpoints that are not ready for every experiment, with
                a warning.

        Returns:
            By experiment and ridge: `TopScores`, or scores `[n, m]`.
        """
        return self._pipeline.sweep(
            exp_names,
            lambda_regs,
            model_ids,
            top_k=top_k,
            helpful=helpful,
            allow_skip=allow_skip,
        )

    def checkpoints(self) -> list[CheckpointInfo]:
        """Lists the checkpoints of the store.

        Returns:
            One entry a checkpoint, by id.
        """
        return list_checkpoints(self.saver)

    def experiments(self) -> list[ExperimentInfo]:
        """Lists the experiments of the store.

        Returns:
            One entry an experiment, by name.
        """
        return list_experiments(self.saver)
