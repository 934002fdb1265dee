"""Featurize, finalize, score: the computer, projector, store and scoring put together."""

import logging
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from trak.arguments import MOST, Ridge, as_integer
from trak.batches import normalize
from trak.errors import ModelIDException, PhaseError
from trak.modes import evaluation_mode
from trak.pipeline.describe import as_model_id, store_metadata
from trak.pipeline.finalizing import finalize_checkpoints
from trak.pipeline.model_state import WeightWatch, validate_state
from trak.pipeline.phase import Phase
from trak.pipeline.project import RowMaker
from trak.pipeline.readiness import (
    chosen_ids,
    not_ready,
    refuse_dropped,
    scores_with_record,
    warn_of_other_groups,
    warn_of_other_ridge,
    warn_of_twins,
    what_counts,
)
from trak.pipeline.scoring import ScorePass
from trak.pipeline.solving import ScoreSet, features_of, ridge_name, score_sets
from trak.pipeline.sources import phi_of
from trak.pipeline.storing import RowStorer
from trak.pipeline.task_state import prepare_task
from trak.pipeline.whiten import Whitener
from trak.precision import full_precision
from trak.savers import AbstractSaver
from trak.score_computers import AbstractScoreComputer
from trak.settings import RunSettings

logger = logging.getLogger(__name__)


class Pipeline:
    """The steps of TRAK over one store.

    Args:
        model: the model.
        task: the task.
        maker: turns batches into rows.
        saver: the store.
        scorer: turns rows into scores.
        whitener: whitens gradients before they are projected.
        settings: the run's settings as they are now.
        dtype: dtype of the stored rows.
        examples_are_checked: refuse other examples in rows seen before.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        task: Any,
        maker: RowMaker,
        saver: AbstractSaver,
        scorer: AbstractScoreComputer,
        whitener: Whitener,
        settings: Callable[[], RunSettings],
        dtype: torch.dtype,
        examples_are_checked: bool,
    ) -> None:
        self.model = model
        self.task = task
        self.maker = maker
        self.saver = saver
        self.scorer = scorer
        self.whitener = whitener
        self.losses = maker.losses  # finds out which kind of loss it is
        self.settings = settings
        self.dtype = dtype
        self._storer = RowStorer(
            model=model,
            task=task,
            maker=maker,
            saver=saver,
            whitener=whitener,
            dtype=dtype,
            examples_are_checked=examples_are_checked,
        )
        self.phase: Phase | None = None
        self._features: tuple[int, dict[str, Any], NDArray[Any]] | None = None
        saver.features = self.features

    def verify(self) -> None:
        """Refuses to go on if the store was written with other settings."""
        self.saver.verify(store_metadata(self.settings()))

    def load(self, checkpoint: Any, model_id: int) -> None:
        """Registers a checkpoint and loads its weights.

        Args:
            checkpoint: a state dict that fits the model.
            model_id: its id.
        """
        model_id = as_model_id(model_id)
        self.verify()
        digest = validate_state(self.model, checkpoint)
        self.saver.register_model_id(model_id, digest)
        warn_of_twins(self.saver, model_id, digest)
        self.load_weights(checkpoint, digest)
        self.saver.load_current_store(model_id)
        self.phase = Phase("featurize", model_id, "", digest, WeightWatch(self.model))

    def start_scoring(
        self, exp_name: str, checkpoint: Any, model_id: int, num_targets: Any
    ) -> None:
        """Opens an experiment and loads the checkpoint's weights.

        Args:
            exp_name: the experiment.
            checkpoint: a state dict with the weights that were featurized.
            model_id: its id.
            num_targets: how many targets the experiment has.

        Raises:
            ModelIDException: if the checkpoint was not featurized.
        """
        model_id = as_model_id(model_id)
        num_targets = as_integer("num_targets", num_targets, least=1, most=MOST)
        self.verify()
        digest = validate_state(self.model, checkpoint)
        if self.saver.checkpoint_digest(model_id) is None:
            raise ModelIDException(
                f"model_id={model_id} is not in {self.saver.save_dir}. Load, featurize "
                "and finalize it before scoring."
            )
        self.saver.register_model_id(model_id, digest)
        self.saver.init_experiment(exp_name, num_targets, model_id)
        self.load_weights(checkpoint, digest)
        watch = WeightWatch(self.model)
        self.phase = Phase("score", model_id, exp_name, digest, watch)

    def fit_whitening(self, batch: Any) -> None:
        """Adds a batch of training examples to what whitening is made of.

        Args:
            batch: the examples.
        """
        phase = self._expect("featurize", "load_checkpoint", "fit_whitening")
        phase.watch.check()
        normal = normalize(batch, next(self.model.parameters()).device)
        prepare_task(self.task, self.model, phase.digest)
        with evaluation_mode(self.model):
            self.whitener.fit(normal, phase.model_id)

    def save_whitening(self) -> None:
        """Writes what this process added up, for others to add to theirs."""
        phase = self._expect("featurize", "load_checkpoint", "save_whitening")
        self.whitener.save(phase.model_id)

    def featurize(self, batch: Any, inds: Any, num_samples: int | None) -> None:
        """Stores the rows of a batch of training examples that are not there yet.

        Args:
            batch: the examples.
            inds: their row numbers, or None.
            num_samples: how many follow the last ones, or None.
        """
        phase = self._expect("featurize", "load_checkpoint")
        rows = self.saver.train_rows(phase.model_id)
        others = [
            (f"model_id={other}", self.saver.train_rows(other))
            for other in self._own_first(phase.model_id)
        ]
        self._storer.store(phase, rows, others, batch, inds, num_samples)

    def score(self, batch: Any, inds: Any, num_samples: int | None) -> None:
        """Stores the rows of a batch of targets that are not there yet.

        Args:
            batch: the targets.
            inds: their numbers, or None.
            num_samples: how many follow the last ones, or None.

        Raises:
            ModelIDException: if the checkpoint is not finalized.
        """
        phase = self._expect("score", "start_scoring_checkpoint")
        if not self.saver.model_ids[phase.model_id]["is_finalized"]:
            raise ModelIDException(
                f"model_id={phase.model_id} is not finalized, so it cannot be scored. "
                "Call finalize_features() first."
            )
        rows = self.saver.target_rows(phase.exp_name, phase.model_id)
        others = [
            (
                f"experiment {phase.exp_name!r} of model_id={other}",
                self.saver.target_rows(phase.exp_name, other),
            )
            for other in self._own_first(phase.model_id)
            if self.saver.has_targets(phase.exp_name, other)
        ]
        self._storer.store(phase, rows, others, batch, inds, num_samples)

    @full_precision()
    def finalize_features(
        self, model_ids: Iterable[int] | None, *, del_grads: bool
    ) -> None:
        """Factors the Gram matrix of every checkpoint that needs it.

        Args:
            model_ids: the checkpoints; all of the store if None.
            del_grads: the user's wish to delete the rows, which is not granted.
        """
        self.maker.projector.free_memory()
        self.verify()
        finalized = finalize_checkpoints(
            self.scorer, self.saver, self.maker, self.whitener, self.losses, model_ids
        )
        if finalized:
            self._features = None
        if del_grads:
            logger.warning(
                "del_grads=True deletes nothing: this store keeps the projected "
                "gradients and no second array of features."
            )
        if self.phase is not None:
            self.phase.cursor = 0

    @full_precision()
    def finalize_scores(
        self, exp_name: str, model_ids: Iterable[int] | None, *, allow_skip: bool
    ) -> NDArray[Any]:
        """Computes and writes an experiment's scores.

        Args:
            exp_name: the experiment.
            model_ids: the checkpoints to average over; all of the store if None.
            allow_skip: leave out checkpoints that are not ready, with a warning.

        Returns:
            Scores, `[n, m]`.
        """
        sets = [ScoreSet(exp_name)]
        found = self._write(sets, self.ready(sets, model_ids, allow_skip=allow_skip))
        return found[0]

    @full_precision()
    def sweep(
        self,
        exp_names: Iterable[str],
        lambda_regs: Iterable[Ridge] | None,
        model_ids: Iterable[int] | None,
        *,
        top_k: int | None,
        helpful: bool,
        allow_skip: bool,
    ) -> dict[tuple[str, Ridge], Any]:
        """Computes the scores of several experiments and ridges in one pass.

        Args:
            exp_names: the experiments.
            lambda_regs: the ridges; the run's own if None.
            model_ids: the checkpoints to average over; all of the store if None.
            top_k: how many training examples to keep for each target; if None, all scores
                are written.
            helpful: keep the largest scores; if False, the smallest.
            allow_skip: leave out checkpoints that are not ready, with a warning.

        Returns:
            By experiment and ridge: `TopScores`, or scores `[n, m]`.
        """
        sets = score_sets(self.scorer, exp_names, lambda_regs)
        ready = self.ready(sets, model_ids, allow_skip=allow_skip)
        if top_k is None:
            found: list[Any] = self._write(sets, ready)
        else:
            found = self._pass(sets, ready).top(top_k, helpful=helpful)
        keys = [(each.exp_name, each.lambda_reg) for each in sets]
        return dict(zip(keys, found, strict=True))

    def _pass(self, sets: list[ScoreSet], ready: list[int]) -> ScorePass:
        return ScorePass(
            scorer=self.scorer,
            saver=self.saver,
            sets=sets,
            model_ids=ready,
            device=self.maker.device,
        )

    def _write(self, sets: list[ScoreSet], ready: list[int]) -> list[NDArray[Any]]:
        taken = self._pass(sets, ready)
        info = {
            "model_ids": ready,
            "computer": type(self.scorer).__name__,
            "factors": {str(i): what_counts(kept[1]) for i, kept in taken.kept.items()},
        }
        names = [(each.exp_name, ridge_name(each)) for each in sets]
        with closing(taken.arrays()) as blocks:
            scores = self.saver.save_score_sets(names, blocks, info)
        if self.phase is not None:
            self.phase.cursor = 0
        return scores

    def ready(
        self,
        sets: list[ScoreSet],
        model_ids: Iterable[int] | None,
        *,
        allow_skip: bool | None,
    ) -> list[int]:
        """Chooses the checkpoints that can be scored.

        Args:
            sets: what is to be scored.
            model_ids: the checkpoints asked for; all of the store if None.
            allow_skip: leave out checkpoints that are not ready, with a warning; None
                where the user has no such argument.

        Returns:
            Their ids.

        Raises:
            ModelIDException: says what a checkpoint lacks.
            PhaseError: if none is ready.
        """
        self.verify()
        self.saver.refresh()
        chosen = chosen_ids(self.saver, model_ids)
        names = sorted({each.exp_name for each in sets})
        for name in names:
            self.saver.experiment(name)  # raises if there is none
        ready: list[int] = []
        for model_id in chosen:
            problems = (not_ready(self.scorer, self.saver, each, model_id) for each in sets)
            problem = next((text for text in problems if text is not None), None)
            if problem is None:
                ready.append(model_id)
            elif allow_skip:
                logger.warning("Left out of %s: %s", names, problem)
            else:
                more = "" if allow_skip is None else ", or pass allow_skip=True"
                raise ModelIDException(
                    f"{problem} To average over the other checkpoints only, name them "
                    f"in model_ids{more}."
                )
        if not ready:
            raise PhaseError(f"No checkpoint is ready to score {names}.")
        warn_of_other_groups(self.scorer, self.saver, sets, ready)
        return ready

    @full_precision()
    def scores(self, exp_name: str) -> NDArray[Any]:
        """Reads an experiment's scores, if they are still what the store would give.

        Args:
            exp_name: the experiment.

        Returns:
            Scores, `[n, m]`.

        Raises:
            PhaseError: if a checkpoint was finalized anew since, or taken away.
        """
        self.verify()
        scores, record = scores_with_record(self.saver, exp_name)
        refuse_dropped(self.saver, exp_name, record["model_ids"])
        warn_of_other_ridge(self.scorer, self.saver, exp_name, record["model_ids"])
        now, then = self._factors(record["model_ids"]), record["factors"]
        if {i: what_counts(f) for i, f in then.items()} != {
            i: what_counts(f) for i, f in now.items()
        }:
            raise PhaseError(
                f"The scores of {exp_name!r} were computed before a checkpoint was "
                "finalized with another ridge or score computer. Call "
                f"finalize_scores(exp_name={exp_name!r}) again."
            )
        return scores

    def _factors(self, model_ids: list[int]) -> dict[str, Any]:
        # JSON object keys are strings
        return {str(i): self.saver.load_factor(i)[1] for i in model_ids}

    @full_precision()
    def features(self, model_id: int) -> NDArray[Any]:
        """Upstream's features of a checkpoint, computed when asked for and kept.

        Args:
            model_id: the checkpoint.

        Returns:
            `[n, k]` in the store's dtype (float32 where that is float16).
        """
        matrix, info = self.saver.load_factor(model_id)
        made = what_counts(info)
        if self._features is None or self._features[:2] != (model_id, made):
            rows = phi_of(self.saver, model_id, self.maker.device)
            kept = matrix, info
            features = features_of(self.scorer, self.saver, model_id, rows, kept)
            dtype = torch.promote_types(self.dtype, torch.float32)
            self._features = (model_id, made, features.to(dtype).cpu().numpy())
        return self._features[2]

    def _own_first(self, model_id: int) -> list[int]:
        others = sorted(set(self.saver.model_ids) - {model_id})
        return [model_id, *others]

    def load_weights(self, checkpoint: Any, digest: str) -> None:
        """Loads weights into the model and the gradient computer.

        Args:
            checkpoint: a state dict that fits the model.
            digest: of it, by `validate_state`.
        """
        self.model.load_state_dict(checkpoint)
        self.model.eval()
        self.maker.computer.load_model_params(self.model)
        self.maker.computer.recall(digest)
        self._features = None

    def _expect(self, kind: str, method: str, own: str = "") -> Phase:
        phase = self.phase
        if phase is None or phase.kind != kind:
            state = "nothing is loaded" if phase is None else f"{phase.kind} is under way"
            raise PhaseError(f"Call {method} before {own or kind}; at present {state}.")
        return phase
