"""`TRAKer`: upstream's signatures over this library's pipeline. No maths here."""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from trak.arguments import MOST, as_flag, as_integer, as_level, as_ridge
from trak.gradient_computers import AbstractGradientComputer, select_parameters
from trak.lost import tells_of_files
from trak.modelout_functions import resolve_task
from trak.pipeline import (
    Pipeline,
    as_folder,
    as_names,
    as_strength,
    check_model,
    check_parts,
    make_computer,
    make_pipeline,
    make_saver,
    make_scorer,
    storage_dtype,
    tables_of,
    usual_projector,
)
from trak.projectors import (
    AbstractProjector,
    is_exact,
    projector_of_width,
    resolve_device,
    width_of_rows,
)
from trak.results import Results
from trak.savers import AbstractSaver
from trak.score_computers import AbstractScoreComputer
from trak.utils import get_num_params


class TRAKer(Results):
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
            (`trak.projectors.ProjectionType`). If None, leading coordinates where whitened
            gradients are compressed, else a random one that the model's size decides.
        saver: class of the store.
        score_computer: class or instance; `RidgeScoreComputer` if None.
            `BasicScoreComputer` scales as upstream does.
        proj_dim: projection dimension `k`; `"auto"` for 4096, less where rows would
            fill more than 8 GiB, more where there are few, and no projection of gradients
            that have no more entries; `"exact"` for none in any case, by rows of
            gradients or, where these are too wide, by the exact kernel (its cost is logged,
            and rows are float32 unless `row_dtype` says otherwise). A given projector's own
            counts instead.
        logging_level: level of the logger `trak`. No handler is installed.
        use_half_precision: store rows in float16; else in float32 (float64 for float64
            models). Arithmetic is float32 or float64 in either case.
        proj_max_batch_size: accepted as upstream's name; any batch size is right.
        projector_seed: seed of the projection.
        grad_wrt: names of the parameters to attribute to; those that require a gradient
            if None.
        lambda_reg: ridge of the Gram matrix. `"auto"` (or None) chooses it from the rows;
            a number is added as it is, as upstream does; `"3x"` is three times the mean
            squared row norm of the projected gradients.
        check_examples: refuse a batch whose examples are others than those that were
            seen for the same rows (after a resume, or at another checkpoint).
        row_dtype: how rows are stored, whatever `use_half_precision` says: `"float32"`,
            `"float16"`, `"bfloat16"`, `"int8"` (with a scale a row) or `"float64"`.
        whitening: how much layers' gradients are whitened before they are projected: 0 or
            None for plain TRAK, up to 1, or `"auto"`. Asks for `fit_whitening`.
        curvature: weigh the training examples in the Gram matrix by the curvature of
            their loss, `q (1 - q / 2)`; TRAK's derivation has such weights, and leaves
            them out at last.
        loss_power: exponent of the loss weights Q that scores are multiplied by, where they
            are probabilities: 1 for TRAK, down to 0, or `"auto"`, which lets what they
            added up to in training have a share, too (docs/choices.md).

    Raises:
        InputError: if an argument cannot be used.
        InputTypeError: if one is of another kind than it must be.
        StoreMismatchError: if `save_dir` holds a store of other settings.
        UnsupportedModuleError: if a forward pass of the model changes its weights.
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
        proj_dim: int | str = "auto",
        logging_level: int | str = logging.INFO,
        use_half_precision: bool = True,
        proj_max_batch_size: int = 32,
        projector_seed: int = 0,
        grad_wrt: Iterable[str] | None = None,
        lambda_reg: float | str | None = "auto",
        *,
        check_examples: bool = True,
        row_dtype: str | torch.dtype | None = None,
        whitening: float | str | None = None,
        curvature: bool = False,
        loss_power: float | str = 1.0,
    ) -> None:
        self.logger = logging.getLogger("trak")
        logging_level = as_level(logging_level)
        self.logger.setLevel(logging_level)
        check_model(model)
        check_parts(gradient_computer, projector, saver)
        self.model = model
        self.task = resolve_task(task)
        size = as_integer("train_set_size", train_set_size, least=1, most=MOST)
        self.train_set_size = size
        self.device = resolve_device(device)
        self.lambda_reg = as_ridge(lambda_reg)
        self.whitening = as_strength(whitening)
        chosen = self._select(grad_wrt)
        half = as_flag("use_half_precision", use_half_precision, numbers=True)
        known = as_flag("load_from_save_dir", load_from_save_dir, numbers=True)
        checked = as_flag("check_examples", check_examples)
        fine = is_exact(projector, proj_dim)
        self.dtype = storage_dtype(chosen.values(), half and not fine, row_dtype)
        self.proj_seed = as_integer("projector_seed", projector_seed)
        self.save_dir = as_folder(save_dir)
        self.gradient_computer = make_computer(gradient_computer, self, chosen)
        self.init_projector(projector, proj_dim, proj_max_batch_size)
        self.score_computer = make_scorer(
            score_computer,
            self.dtype,
            self.device,
            logging_level,
            self.lambda_reg,
            curvature=curvature,
            loss_power=loss_power,
        )
        self.load_from_save_dir = known
        options = {"logging_level": logging_level, "use_half_precision": half}
        self._open(saver, options, examples_are_checked=checked)

    def _open(
        self, saver: Any, options: dict[str, Any], *, examples_are_checked: bool
    ) -> None:
        layout = {name: math.prod(shape) for name, shape in self._shapes.items()}
        options = {"load_from_save_dir": self.load_from_save_dir, **options}
        self.saver: AbstractSaver = make_saver(saver, self, layout, **options)
        self._pipeline = make_pipeline(
            self, self._shapes, examples_are_checked=examples_are_checked
        )

    def _select(self, grad_wrt: Iterable[str] | None) -> dict[str, nn.Parameter]:
        chosen = select_parameters(self.model, as_names(grad_wrt))
        self.grad_wrt = None if grad_wrt is None else list(chosen)
        self.num_params = get_num_params(self.model)
        self.num_params_for_grad = sum(p.numel() for p in chosen.values())
        self.normalize_factor = torch.tensor(
            math.sqrt(self.num_params_for_grad), device="cpu"
        )
        self._shapes = {name: tuple(p.shape) for name, p in chosen.items()}
        return dict(chosen)

    def init_projector(
        self,
        projector: AbstractProjector | str | None,
        proj_dim: int | str,
        proj_max_batch_size: int,
    ) -> None:
        """Takes the given projector, or makes the named or the cheapest one.

        Args:
            projector: an instance, a name, or None.
            proj_dim: projection dimension, `"auto"` or `"exact"`, unless an instance is
                given.
            proj_max_batch_size: accepted as upstream's name.
        """
        del proj_max_batch_size
        size = self.train_set_size, self.dtype.itemsize, self.save_dir
        usual = usual_projector(
            projector, self.gradient_computer, whitened=self.whitening > 0
        )
        if projector is None or isinstance(projector, str):
            made = self._shapes, proj_dim, self.proj_seed, self.device, projector
            tables = tables_of(self.model, self.gradient_computer)
            projector = projector_of_width(*made, *size, usual=usual, tables=tables)
        self.projector: AbstractProjector = projector
        self.proj_dim: int = width_of_rows(projector, self._shapes, self.dtype, *size)

    @property
    def pipeline(self) -> Pipeline:
        """The steps that the methods stand for, for those who change the library."""
        return self._pipeline

    @property
    def ckpt_loaded(self) -> int | str:
        """The checkpoint that is loaded for featurizing, as upstream names it."""
        phase = self._pipeline.phase
        loaded = phase is not None and phase.kind == "featurize"
        return phase.model_id if phase and loaded else "no ckpt loaded"

    @tells_of_files
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

    @tells_of_files
    def fit_whitening(self, batch: Any) -> None:
        """Adds a batch of training examples to what whitening is made of.

        Between `load_checkpoint` and the first `featurize`, for every batch of the training
        set or of a sample of it; about a thousand do. Which examples they are counts,
        and not in which batches they come; but for layers that few examples use, such as
        experts, and for batches of a single example (docs/whitening.md). A checkpoint whose
        rows are in the store already asks for nothing: see `whitening_is_fitted`.

        Args:
            batch: as for `featurize`.
        """
        self._pipeline.fit_whitening(batch)

    @tells_of_files
    def save_whitening(self) -> None:
        """Writes what this process has fitted to the store, where several processes fit.

        Each fits its part of the sample and calls this; once all have, any of them may
        featurize, by the sums of all. With one process `featurize` does it.
        """
        self._pipeline.save_whitening()

    @property
    @tells_of_files
    def whitening_is_fitted(self) -> bool:
        """Whether the loaded checkpoint asks for no `fit_whitening` (any more)."""
        phase = self._pipeline.phase
        return phase is not None and self._pipeline.whitener.fitted(phase.model_id)

    @tells_of_files
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

    @tells_of_files
    def finalize_features(
        self, model_ids: Iterable[int] | None = None, del_grads: bool = False
    ) -> None:
        """Factors the Gram matrix of every featurized checkpoint.

        Another `TRAKer` of the same store may have another `lambda_reg`, `curvature` or
        `loss_power`: its call factors anew, and no gradient is recomputed.

        Args:
            model_ids: the checkpoints; all in the store if None.
            del_grads: accepted as upstream's name; rows are kept, since scores are
                computed from them.
        """
        self._pipeline.finalize_features(model_ids, del_grads=del_grads)

    @tells_of_files
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

    @tells_of_files
    def score(self, batch: Any, inds: Any = None, num_samples: int | None = None) -> None:
        """Computes and stores the projected gradients of a batch of targets.

        Args:
            batch: as for `featurize`.
            inds: the targets' numbers, 0 to `num_targets - 1`.
            num_samples: instead of `inds`: the batch's size.
        """
        self._pipeline.score(batch, inds, num_samples)

    @tells_of_files
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
            Scores, `[n, m]`, float32 (float64 where rows are), backed by a plain
            `.npy` file; changing the array does not change the file.
        """
        skips = as_flag("allow_skip", allow_skip, numbers=True)
        return self._pipeline.finalize_scores(exp_name, model_ids, allow_skip=skips)
