"""`TRAKer`: upstream's signatures over this library's pipeline. No maths here."""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from trak.gradient_computers import (
    AbstractGradientComputer,
    choose_computer,
    select_parameters,
)
from trak.modelout_functions import resolve_task
from trak.pipeline import (
    CheckpointInfo,
    ExperimentInfo,
    Pipeline,
    RowMaker,
    describe_run,
    list_checkpoints,
    list_experiments,
    make_scorer,
    storage_dtype,
    store_metadata,
)
from trak.projectors import (
    AbstractProjector,
    make_projector,
    resolve_device,
)
from trak.savers import AbstractSaver, MmapSaver
from trak.score_computers import (
    AbstractScoreComputer,
    TopScores,
    top_scores,
)
from trak.settings import RunSettings
from trak.utils import get_num_params


class TRAKer:
    """Which training examples made a model predict this (Park et al. 2023)?

    For each checkpoint: `load_checkpoint`, `featurize` every batch of the training set,
    `finalize_features`; then `start_scoring_checkpoint`, `score` every batch of targets;
    at the end `finalize_scores`. A score is positive where adding the training example
    raises the target's model output.

    Args:
        model: the model; `load_checkpoint` loads weights into it and puts it into
            evaluation mode.
        task: what is attributed: a name in `trak.modelout_functions.TASK_TO_MODELOUT`, a
            class, or an instance.
        train_set_size: number of training examples, `n`.
        save_dir: the store's folder; created if absent, continued if there.
        load_from_save_dir: know the checkpoints and experiments that are in the store
            already. Nothing in it is overwritten either way.
        device: where to project and score; CUDA where present, else the CPU, if None.
        gradient_computer: class that computes per-sample gradients. If None,
            `HookGradientComputer` for tasks with a batched output, as all built-in ones
            have, else `FunctionalGradientComputer`.
        projector: instance that projects them, or the name of one
            (`trak.projectors.ProjectionType`); chosen by its cost if None.
        saver: class of the store.
        score_computer: class or instance; `RidgeScoreComputer` if None.
            `BasicScoreComputer` scales as upstream does.
        proj_dim: projection dimension `k`; a given projector's own counts instead.
        logging_level: level of the logger `trak`. No handler is installed.
        use_half_precision: store rows in float16; else in float32 (float64 for float64
            models). Arithmetic is float32 or float64 in either case.
        proj_max_batch_size: accepted as upstream's name; any batch size is right.
        projector_seed: seed of the projection.
        grad_wrt: names of the parameters to attribute to; those that require a gradient
            if None.
        lambda_reg: ridge added to the Gram matrix as it is. None stands for the mean
            squared row norm of the projected gradients.
        check_examples: refuse a batch whose examples are others than those that were
            seen for the same rows (after a resume, or at another checkpoint).
        row_dtype: how rows are stored, whatever `use_half_precision` says: `"float32"`,
            `"float16"`, `"bfloat16"`, `"int8"` (with a scale a row) or `"float64"`.

    Raises:
        InputError: if an argument cannot be used.
        StoreMismatchError: if `save_dir` holds a store of other settings.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        train_set_size: int,
        save_dir: str | Path = "./trak_results",
        load_from_save_dir: bool = True,
        device: str | torch.device | None = None,
        gradient_computer: type[AbstractGradientComputer] | None = None,
        projector: AbstractProjector | str | None = None,
        saver: type[AbstractSaver] | None = None,
        score_computer: type[AbstractScoreComputer] | AbstractScoreComputer | None = None,
        proj_dim: int = 2048,
        logging_level: int = logging.INFO,
        use_half_precision: bool = True,
        proj_max_batch_size: int = 32,
        projector_seed: int = 0,
        grad_wrt: Iterable[str] | None = None,
        lambda_reg: float | None = None,
        *,
        check_examples: bool = True,
        row_dtype: str | torch.dtype | None = None,
    ) -> None:
        self.logger = logging.getLogger("trak")
        self.logger.setLevel(logging_level)
        self.model = model
        self.task = resolve_task(task)
        self.train_set_size = train_set_size
        self.device = resolve_device(device)
        chosen = select_parameters(model, grad_wrt)
        self.grad_wrt = None if grad_wrt is None else list(chosen)
        self.lambda_reg = lambda_reg
        self.num_params = get_num_params(model)
        self.num_params_for_grad = sum(p.numel() for p in chosen.values())
        self.normalize_factor = torch.tensor(math.sqrt(self.num_params_for_grad))
        self.dtype = storage_dtype(chosen.values(), use_half_precision, row_dtype)
        # numbers are never computed in int8
        floating = self.dtype if self.dtype.is_floating_point else torch.float32
        self.proj_seed = projector_seed
        self._layout = {name: p.numel() for name, p in chosen.items()}
        self._shapes = {name: tuple(p.shape) for name, p in chosen.items()}
        self.init_projector(projector, proj_dim, proj_max_batch_size)
        everything = len(chosen) == sum(1 for _ in model.parameters())
        make_computer: Any = gradient_computer or choose_computer(self.task)
        self.gradient_computer: AbstractGradientComputer = make_computer(
            model=model,
            task=self.task,
            grad_dim=self.num_params_for_grad,
            dtype=floating,
            device=self.device,
            grad_wrt=None if everything else list(chosen),
        )
        self.score_computer = make_scorer(
            score_computer, floating, self.device, logging_level, lambda_reg
        )
        self.save_dir = Path(save_dir).resolve()
        self.load_from_save_dir = load_from_save_dir
        make_saver: Any = saver or MmapSaver
        self.saver: AbstractSaver = make_saver(
            save_dir=self.save_dir,
            metadata=store_metadata(self._settings()),
            train_set_size=train_set_size,
            proj_dim=self.proj_dim,
            load_from_save_dir=load_from_save_dir,
            logging_level=logging_level,
            use_half_precision=use_half_precision,
        )
        self._pipeline = self._make_pipeline(check_examples)

    def init_projector(
        self,
        projector: AbstractProjector | str | None,
        proj_dim: int,
        proj_max_batch_size: int,
    ) -> None:
        """Takes the given projector, or makes the named or the cheapest one.

        Args:
            projector: an instance, a name, or None.
            proj_dim: projection dimension, unless an instance is given.
            proj_max_batch_size: accepted as upstream's name.
        """
        del proj_max_batch_size
        if projector is None or isinstance(projector, str):
            projector = make_projector(
                self._shapes, proj_dim, self.proj_seed, self.device, projector
            )
        self.projector: AbstractProjector = projector
        self.proj_dim: int = self.projector.proj_dim or self.num_params_for_grad

    @property
    def ckpt_loaded(self) -> int | str:
        """The checkpoint that is loaded for featurizing, as upstream names it."""
        phase = self._pipeline.phase
        loaded = phase is not None and phase.kind == "featurize"
        return phase.model_id if phase and loaded else "no ckpt loaded"

    def load_checkpoint(
        self,
        checkpoint: Any,
        model_id: int,
        _allow_featurizing_already_registered: bool = False,
    ) -> None:
        """Loads a checkpoint's weights and makes room for its rows in the store.

        An id that is in the store already is continued where it stopped, provided that
        the weights are the same.

        Args:
            checkpoint: a state dict.
            model_id: a number of its own for this checkpoint.
            _allow_featurizing_already_registered: accepted as upstream's name.
        """
        self._pipeline.load(checkpoint, model_id)

    def featurize(
        self, batch: Any, inds: Any = None, num_samples: int | None = None
    ) -> None:
        """Computes and stores the projected gradients of a batch of training examples.

        Rows that exist are not computed again, whatever the batch size was. When this
        returns, the rows are on disk.

        Args:
            batch: tuple, list or dict of tensors, or a `BatchEncoding`.
            inds: the examples' numbers in the training set (list, array or tensor).
            num_samples: instead of `inds`: the batch's size; rows are then counted in
                the order of the calls since `load_checkpoint`.
        """
        self._pipeline.featurize(batch, inds, num_samples)

    def finalize_features(
        self, model_ids: Iterable[int] | None = None, del_grads: bool = False
    ) -> None:
        """Factors the Gram matrix of every featurized checkpoint.

        May be called again with another `lambda_reg`: no gradient is recomputed.

        Args:
            model_ids: the checkpoints; all in the store if None.
            del_grads: accepted as upstream's name; rows are kept, since scores are
                computed from them.
        """
        self.projector.free_memory()
        self._pipeline.finalize_features(model_ids)
        if del_grads:
            self.logger.warning(
                "del_grads=True deletes nothing: this store keeps the projected "
                "gradients and no second array of features."
            )

    def start_scoring_checkpoint(
        self, exp_name: str, checkpoint: Any, model_id: int, num_targets: int
    ) -> None:
        """Loads a checkpoint's weights and makes room for an experiment's targets.

        Args:
            exp_name: name of this set of targets; it becomes part of file names.
            checkpoint: a state dict with the weights that were featurized.
            model_id: the checkpoint's number.
            num_targets: how many targets there are, `m`.
        """
        self._pipeline.start_scoring(exp_name, checkpoint, model_id, num_targets)

    def score(self, batch: Any, inds: Any = None, num_samples: int | None = None) -> None:
        """Computes and stores the projected gradients of a batch of targets.

        Args:
            batch: as for `featurize`.
            inds: the targets' numbers, 0 to `num_targets - 1`.
            num_samples: instead of `inds`: the batch's size.
        """
        self._pipeline.score(batch, inds, num_samples)

    def finalize_scores(
        self,
        exp_name: str,
        model_ids: Iterable[int] | None = None,
        allow_skip: bool = False,
    ) -> NDArray[Any]:
        """Computes an experiment's scores and writes them to `scores/{exp_name}.mmap`.

        Args:
            exp_name: the experiment.
            model_ids: the checkpoints to average over; all in the store if None.
            allow_skip: leave out checkpoints that are not ready, with a warning.

        Returns:
            Scores, `[n, m]`, float32 (float64 for float64 models), backed by a plain
            `.npy` file; changing the array does not change the file.
        """
        return self._pipeline.finalize_scores(exp_name, model_ids, allow_skip=allow_skip)

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

    def _settings(self) -> RunSettings:
        return describe_run(
            model=self.model,
            task=self.task,
            layout=self._layout,
            projector=self.projector,
            proj_dim=self.proj_dim,
            train_set_size=self.train_set_size,
            dtype=self.dtype,
        )

    def _make_pipeline(self, check_examples: bool) -> Pipeline:
        maker = RowMaker(
            model=self.model,
            computer=self.gradient_computer,
            projector=self.projector,
            layout=self._layout,
            scale=math.sqrt(self.num_params_for_grad),
            device=self.device,
        )
        return Pipeline(
            model=self.model,
            task=self.task,
            maker=maker,
            saver=self.saver,
            scorer=self.score_computer,
            settings=self._settings,
            dtype=self.dtype,
            examples_are_checked=check_examples,
        )
