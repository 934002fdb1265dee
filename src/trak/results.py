"""What a `TRAKer` reads back: scores, the strongest of them, and what the store holds."""

from collections.abc import Iterable, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from trak.arguments import Ridge, as_flag, as_integer
from trak.errors import InputError
from trak.lost import tells_of_files
from trak.pipeline import (
    CheckpointInfo,
    ExperimentInfo,
    Pipeline,
    error_pass,
    group_matrix,
    is_trak,
    list_checkpoints,
    list_experiments,
    method_named,
    method_pass,
)
from trak.precision import full_precision
from trak.savers import AbstractSaver
from trak.score_computers import TopScores, top_scores


class Results:
    """The reading half of `TRAKer`.

    Attributes:
        saver: the store.
    """

    saver: AbstractSaver
    _pipeline: Pipeline

    @tells_of_files
    @full_precision()
    def scores(
        self,
        exp_name: str,
        method: str = "trak",
        *,
        groups: Sequence[Any] | None = None,
        model_ids: Iterable[int] | None = None,
        checkpoint_weights: Iterable[float] | None = None,
        with_error: bool = False,
    ) -> Any:
        """An experiment's scores, by TRAK or by another method over the same rows.

        Positive where adding the training example raises the target's model output. With
        rows `phi`, targets `psi`, loss weights `q` and `K = Phi^T Phi + lambda I` of a
        checkpoint, or `Phi^T R Phi + lambda I` with `curvature=True`; means are over
        checkpoints:

        - `"trak"`: `mean(phi^T K^-1 psi) mean(q)`, what `finalize_scores` computed; `q` is
          what `loss_power` makes of Q, here and in `self_influence`.
        - `"dot"`: `mean(q phi^T psi)`, the product of the training loss's and the target's
          gradients. `"tracin"`: its sum with `checkpoint_weights`, the learning rates:
          TracInCP (Pruthi et al. 2020) of the target's model output. TracInCP of its loss
          has the target's own `q` at each checkpoint as a further factor.
        - `"cosine"`: `mean(s cos(phi, psi))`, where `s` is the sign of `q`: -1 for examples
          whose loss pulls their output down, as a regression's may, and 1 otherwise.
        - `"relatif"`: `mean(s phi^T K^-1 psi / |K^-1 phi|)`; `"l_relatif"`:
          `mean(s phi^T K^-1 psi / sqrt(phi^T K^-1 phi))` (theta- and l-RelatIF; Barshan,
          Brunet and Dziugaite 2020): what speaks for this target, not for everything.
        - `"unit_norm"`: `s` times the cosine in the metric of `K^-1`, as in TrackStar
          (Chang et al. 2024), without its optimizer state.

        Args:
            exp_name: the experiment.
            method: one of the above.
            groups: for each group the numbers of its targets; one column a group then
                holds the mean over its targets.
            model_ids: the checkpoints. For `"trak"` those that `finalize_scores` took; for
                others all of the store if None.
            checkpoint_weights: one number a checkpoint, in the order of `model_ids`, or
                else of their ids; not for `"trak"`.
            with_error: for `"trak"` without groups: standard errors, too, from the rows.

        Returns:
            `[n, m]`, or `[n, groups]`; `ScoresWithError` if errors are asked for. Only
            `"trak"` without them reads a file; others take a pass over the rows.
        """
        num_targets = self.saver.experiment(exp_name)["num_targets"]
        averages = group_matrix(groups, num_targets)
        if as_flag("with_error", with_error):
            _refuse_error_of(method, groups, checkpoint_weights)
            if model_ids is None:
                model_ids = self.saver.experiment(exp_name).get("model_ids")
            return error_pass(self._pipeline, exp_name, model_ids).scores()
        if is_trak(method):
            chosen_here = model_ids is not None or checkpoint_weights is not None
            return self._written(exp_name, averages, chosen_here=chosen_here)
        chosen = method_named(method)
        taken = method_pass(self._pipeline, model_ids, exp_name, checkpoint_weights)
        return taken.scores(exp_name, chosen, averages)

    @tells_of_files
    @full_precision()
    def self_influence(self, model_ids: Iterable[int] | None = None) -> NDArray[Any]:
        """How much each training example moves its own model output.

        `mean(phi_i^T K^-1 phi_i) |mean(q_i)|` over checkpoints: the size of the diagonal of
        TRAK's scores if the training set were the targets. Large for examples that the
        model could not have known from others, mislabelled ones among them.

        Args:
            model_ids: the checkpoints; all in the store if None.

        Returns:
            `[n]`.
        """
        return method_pass(self._pipeline, model_ids).self_influence()

    def top_k(self, exp_name: str, k: int = 10, *, helpful: bool = True) -> TopScores:
        """The training examples with the strongest scores for every target.

        Args:
            exp_name: the experiment.
            k: how many a target.
            helpful: the largest scores; if False, the smallest (the most harmful).

        Returns:
            `indices` and `scores`, each `[m, k]`, strongest first.
        """
        k, helpful = as_integer("k", k, least=1), as_flag("helpful", helpful)
        return top_scores(self.scores(exp_name), k, helpful=helpful)

    @tells_of_files
    @full_precision()
    def top_scores(
        self,
        exp_name: str,
        k: int = 10,
        *,
        helpful: bool = True,
        method: str = "trak",
        groups: Sequence[Any] | None = None,
        model_ids: Iterable[int] | None = None,
        checkpoint_weights: Iterable[float] | None = None,
        with_error: bool = False,
    ) -> Any:
        """Like `top_k`, but in one pass over the rows and without an `[n, m]` file.

        Neither needs `finalize_scores` nor touches what it wrote.

        Args:
            exp_name: the experiment.
            k: how many a target.
            helpful: the largest scores; if False, the smallest (the most harmful).
            method: as for `scores`.
            groups: as for `scores`; not for `"trak"`, whose groups need all scores.
            model_ids: the checkpoints; all of the store if None.
            checkpoint_weights: as for `scores`; not for `"trak"`.
            with_error: for `"trak"`: standard errors and the ranks that each example could
                have, in two passes; a warning is logged where the lists are mostly noise.

        Returns:
            `TopScores`: `indices` and `scores`, each `[m, k]`, strongest first; `Ranked` if
            errors are asked for.

        Raises:
            InputError: if arguments do not go together.
        """
        helpful = as_flag("helpful", helpful)
        if as_flag("with_error", with_error):
            _refuse_error_of(method, groups, checkpoint_weights)
            taken = error_pass(self._pipeline, exp_name, model_ids)
            ranked = taken.top(k, helpful=helpful)
            ranked.warn_of_noise()
            return ranked
        if not is_trak(method):
            num_targets = self.saver.experiment(exp_name)["num_targets"]
            averages = group_matrix(groups, num_targets)
            found = method_pass(self._pipeline, model_ids, exp_name, checkpoint_weights)
            return found.top(exp_name, method_named(method), averages, k, helpful=helpful)
        if groups is not None:
            raise InputError(
                "For groups of targets by TRAK: top_scores(traker.scores(exp_name, "
                "groups=...), k) with trak.score_computers.top_scores."
            )
        if checkpoint_weights is not None:
            raise InputError(
                "TRAK averages over checkpoints without weights: leave checkpoint_weights "
                "out, or use another method, such as 'tracin'."
            )
        k = as_integer("k", k, least=1)  # without a k, sweep would write all scores
        found = self.sweep([exp_name], top_k=k, helpful=helpful, model_ids=model_ids)
        return next(iter(found.values()))

    @tells_of_files
    def sweep(
        self,
        exp_names: Iterable[str],
        lambda_regs: Iterable[Ridge] | None = None,
        *,
        top_k: int | None = None,
        helpful: bool = True,
        model_ids: Iterable[int] | None = None,
        allow_skip: bool = False,
    ) -> dict[tuple[str, Ridge], Any]:
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
            helpful=as_flag("helpful", helpful),
            allow_skip=as_flag("allow_skip", allow_skip),
        )

    def _written(
        self, exp_name: str, averages: Tensor | None, *, chosen_here: bool
    ) -> NDArray[Any]:
        if chosen_here:
            raise InputError(
                "TRAK's scores are read as finalize_scores wrote them: choose checkpoints "
                "there (model_ids=...); they are averaged without weights."
            )
        scores = self._pipeline.scores(exp_name)
        if averages is None:
            return scores
        return scores @ averages.numpy().astype(scores.dtype)

    @tells_of_files
    def checkpoints(self) -> list[CheckpointInfo]:
        """Lists the checkpoints of the store.

        Returns:
            One entry a checkpoint, by id.
        """
        return list_checkpoints(self.saver)

    @tells_of_files
    def experiments(self) -> list[ExperimentInfo]:
        """Lists the experiments of the store.

        Returns:
            One entry an experiment, by name.
        """
        return list_experiments(self.saver)


def _refuse_error_of(method: str, *others: Any) -> None:
    if not is_trak(method):
        method_named(method)  # raises if there is none
    if not is_trak(method) or any(other is not None for other in others):
        raise InputError(
            "with_error=True is for TRAK's scores of single targets: leave groups, "
            f"checkpoint_weights and method out (this is method={method!r})."
        )
