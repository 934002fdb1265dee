"""The one call: scores of targets from a model, its training data and its checkpoints."""

import inspect
import logging
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from trak.arguments import as_flag, is_listed, meant
from trak.digests import is_plain
from trak.errors import InputError, InputTypeError, PhaseError, StoreNotWritableError
from trak.loaders import count_of, ordered, size_of, some_of, state_of
from trak.pipeline import Whitener, as_names, check_model, try_first_batches
from trak.preparation import Preparation, fitted, whole_rows
from trak.savers.filesystem import made_folder
from trak.savers.layout import check_experiment_name
from trak.traker import TRAKer

logger = logging.getLogger(__name__)


def attribute(
    model: nn.Module,
    *,
    task: Any,
    train: Iterable[Any],
    targets: Iterable[Any],
    checkpoints: Sequence[Any] | None = None,
    save_dir: str | Path = "./trak_results",
    exp_name: str = "targets",
    whitening: float | str | None = "auto",
    curvature: bool = True,
    loss_power: float | str = "auto",
    lambda_reg: float | str | None = "auto",
    proj_dim: int | str = "auto",
    progress: bool = True,
    **options: Any,
) -> NDArray[Any]:
    """Which training examples made a model predict these targets?

    TRAK with the settings that were best against retraining (docs/whitening.md); `TRAKer`
    does so step by step, with plain TRAK as its default. The model has its weights and mode
    back afterwards. `save_dir` keeps everything: a call that was interrupted goes on there,
    others add targets (`exp_name`) or checkpoints, with the strength that was chosen first.

    Args:
        model: the model, on the device where it is to run.
        task: what is attributed, as for `TRAKer`.
        train: batches of it in a fixed order: a `DataLoader` that does not shuffle, a list.
        targets: batches of the examples whose predictions are to be explained.
        checkpoints: a list of state dicts, models, or functions that return a state dict,
            best of independent trainings; the model as it is if None.
        save_dir: the store's folder.
        exp_name: name of this set of targets.
        whitening: 0 to 1; `"auto"` chooses (`trak.strength`).
        curvature: weigh training examples by the curvature of their loss.
        loss_power: exponent of Q; `"auto"` tells it by how training went (docs/choices.md).
        lambda_reg: the ridge, as for `TRAKer`.
        proj_dim: as for `TRAKer`; `"auto"` keeps (nearly) all of up to 256 MiB of rows.
        progress: show progress bars.
        options: further arguments of `TRAKer`.

    Returns:
        Scores `[n, m]`, positive where adding the example raises the target's model output.
    """
    _check_names(exp_name, options)
    folder = _folder(model, save_dir)
    examples, aims = ordered("train", train), ordered("targets", targets)
    count = count_of("training examples", examples)
    own = {"lambda_reg": lambda_reg, "proj_dim": proj_dim, "loss_power": loss_power}
    settings: dict[str, Any] = {"task": task, "train_set_size": count, **options, **own}
    settings |= {"curvature": curvature, "grad_wrt": as_names(options.get("grad_wrt"))}
    settings |= (whole := whole_rows(model, settings))
    with torch.inference_mode(False), _restored(model) as before:
        states = [_apart(c, model, before) for c in _listed(checkpoints, model)]
        _try_batches(model, states[0], examples, aims, settings)
        bar = _Bar(len(states), as_flag("progress", progress, numbers=True))
        found = Preparation(model, states, examples, folder, settings, bar.over, options)
        found.choose(whitening, narrow=bool(whole))
        traker = TRAKer(model, save_dir=folder, **found.settings)
        return _Run(traker, states, bar, found.fitted).scores(examples, aims, exp_name)


def _folder(model: Any, save_dir: Any) -> Path:
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}."
        )
    check_model(model)  # before its weights are kept, which some do not let put back
    return made_folder(save_dir)


def _check_names(exp_name: Any, options: Mapping[str, Any]) -> None:
    check_experiment_name(exp_name)
    own = {*inspect.signature(attribute).parameters} - {"options"}
    known = {*inspect.signature(TRAKer).parameters, *own}
    for name in options:
        if name not in known:
            raise InputTypeError(
                f"attribute has no argument {name!r}, nor has TRAKer, which further ones "
                f"are handed to.{meant(name, known)}"
            )


def _try_batches(
    model: nn.Module, checkpoint: Any, train: Any, targets: Any, settings: dict[str, Any]
) -> None:
    count_of("targets", targets)  # raises if there are none
    found = {"targets": targets}
    if not isinstance(train, DataLoader):  # else a store for a wrong number might stay
        found["train"] = train
    try_first_batches(model, state_of(checkpoint), found, settings)


def _listed(checkpoints: Any, model: nn.Module) -> list[Any]:
    if checkpoints is None:
        return [model]
    one = isinstance(checkpoints, Mapping | nn.Module)
    if one or not is_listed(checkpoints):
        raise InputTypeError(
            "checkpoints must be a list of state dicts, models, or functions that return "
            f"a state dict, got {type(checkpoints).__name__}. Put a single one into a "
            "list."
        )
    found = list(checkpoints)
    if not found:
        raise InputError(
            "checkpoints is empty: nothing says which weights are meant. Give at least "
            "one, or leave checkpoints out for the weights that the model has now."
        )
    return found


@contextmanager
def _restored(model: nn.Module) -> Generator[dict[str, Any]]:
    state = model.state_dict()
    before = _versioned(
        state,
        {
            name: value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)
            for name, value in state.items()
        },
    )
    modes = {module: module.training for module in model.modules()}
    try:
        yield before
    finally:
        model.load_state_dict(before)
        for module, training in modes.items():
            module.training = training


def _versioned(state: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    # with the versions that `load_state_dict` asks for, which a plain dict cannot hold
    made = OrderedDict(values)
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        vars(made)["_metadata"] = versions
    return made


def _apart(checkpoint: Any, model: nn.Module, before: Mapping[str, Any]) -> Any:
    # a state dict of the model itself changes as soon as other weights are loaded
    if checkpoint is model:
        return before
    own = {
        value.data_ptr(): name
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and is_plain(value) and value.numel()
    }

    def kept(value: Any) -> Any:
        if isinstance(value, Tensor) and not is_plain(value):
            return value.detach().clone()
        name = own.get(value.data_ptr()) if isinstance(value, Tensor) else None
        if name is None:
            return value
        same = before[name].shape == value.shape
        return before[name] if same else value.detach().clone()

    def apart(state: Mapping[str, Any]) -> Mapping[str, Any]:
        return _versioned(state, {name: kept(value) for name, value in state.items()})

    if isinstance(checkpoint, Mapping):
        return apart(checkpoint)
    return lambda: apart(state_of(checkpoint))


@dataclass(frozen=True)
class _Bar:
    states: int
    shown: bool

    def over(
        self, batches: Iterable[Any], number: int, what: str, count: int | None = None
    ) -> Iterator[Any]:
        which = f"checkpoint {number + 1} of {self.states}"
        options: dict[str, Any] = {"unit": " examples", "disable": not self.shown}
        with tqdm(total=count, desc=f"{which}, {what}", **options) as bar:
            for batch in batches:
                yield batch
                bar.update(size_of(batch))


class _Run:
    def __init__(
        self, traker: TRAKer, states: list[Any], bar: _Bar, first: Whitener | None
    ) -> None:
        self.traker = traker
        self.states = states
        self.bar = bar
        self.first = first  # has fitted the first checkpoint, perhaps
        traker.pipeline.whitener.telling = 0
        if first is not None:
            traker.pipeline.maker.computer.learn_from(first.maker.computer)

    def scores(self, train: Any, targets: Any, exp_name: str) -> NDArray[Any]:
        count = count_of("targets", targets)
        self.featurize(train)
        own = range(len(self.states))  # of a store that may hold more
        self.traker.finalize_features(model_ids=own)
        self.score(targets, exp_name, count)
        try:
            return self.traker.finalize_scores(exp_name, model_ids=own)
        except StoreNotWritableError:
            known = {found.name: found for found in self.traker.experiments()}[exp_name]
            if not known.scores_finalized or known.model_ids != tuple(own):
                raise
            return self.traker.scores(exp_name)

    def featurize(self, train: Any) -> None:
        count = self.traker.train_set_size
        for number, state in enumerate(self.states):
            self.traker.load_checkpoint(state_of(state), model_id=number)
            self._fit_whitening(train, number, count)
            # rows that are there are not made again: their examples are compared
            for batch, rows in self._numbered(train, number, "training examples", count):
                self.traker.featurize(batch=batch, inds=rows)

    def _fit_whitening(self, train: Any, number: int, count: int) -> None:
        if self.traker.whitening_is_fitted:
            return
        whitener = self.traker.pipeline.whitener
        try:
            if self.first is not None:
                whitener.adopt(self.first, number)
            if number not in whitener.sums:
                chosen = some_of(train, count, fitted(number))
                for batch in self.bar.over(chosen, number, "whitening"):
                    self.traker.fit_whitening(batch=batch)
        except PhaseError:  # the same call elsewhere was first, with the same sample?
            if not self.traker.whitening_is_fitted:
                raise
        whitener.settle(number)

    def score(self, targets: Any, exp_name: str, count: int) -> None:
        for number, state in enumerate(self.states):
            self.traker.start_scoring_checkpoint(exp_name, state_of(state), number, count)
            for batch, rows in self._numbered(targets, number, "targets", count):
                self.traker.score(batch=batch, inds=rows)

    def _numbered(
        self, batches: Iterable[Any], number: int, what: str, count: int
    ) -> Iterator[tuple[Any, range]]:
        start = 0
        for batch in self.bar.over(batches, number, what, count):
            stop = start + size_of(batch)
            yield batch, range(start, stop)
            start = stop
        if start < count:
            raise InputError(
                f"The loader of {what} gave {start} of the {count} that its data set has: "
                "its collate_fn drops some, or its sampler leaves them out. Rows are known "
                "by their place, so take such examples out of the data set instead."
            )
