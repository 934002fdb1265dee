"""The one call: scores of targets from a model, its training data and its checkpoints."""

import json
import logging
import math
import tempfile
from collections.abc import (
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from tqdm import tqdm

from trak.batches import batch_size, normalize
from trak.errors import InputError, InputTypeError
from trak.gradient_computers import select_parameters
from trak.pipeline import as_names
from trak.projectors import KernelProjector, NoOpProjector
from trak.strength import choose_strength, sampled, state_of
from trak.traker import TRAKer

logger = logging.getLogger(__name__)

FITTED = 1024
"""Examples that whitening is fitted to, spread over the training set."""
EXACT_UP_TO = 256 << 20
"""Bytes of unprojected rows of one checkpoint that nobody minds."""


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
    lambda_reg: float | str | None = "auto",
    proj_dim: int | str = "auto",
    progress: bool = True,
    **options: Any,
) -> NDArray[Any]:
    """Which training examples made a model predict these targets?

    TRAK with the settings that were best against retraining (docs/whitening.md); `TRAKer`
    does the same step by step, with plain TRAK as its default. The model has its weights
    and mode back afterwards. Everything is kept in `save_dir`: a call that was interrupted
    goes on where it stopped, and one with another `exp_name` adds targets.

    Args:
        model: the model, on the device where it is to run.
        task: what is attributed, as for `TRAKer`.
        train: batches of the training set in a fixed order: a `DataLoader` that does not
            shuffle, or a list.
        targets: batches of the examples whose predictions are to be explained.
        checkpoints: state dicts, models, or functions that return a state dict, best of
            independent trainings; the model as it is if None.
        save_dir: the store's folder.
        exp_name: name of this set of targets.
        whitening: 0 to 1; `"auto"` chooses by how well checkpoints agree.
        curvature: weigh training examples by the curvature of their loss.
        lambda_reg: the ridge, as for `TRAKer`.
        proj_dim: as for `TRAKer`; `"auto"` does not project up to 256 MiB of rows.
        progress: show progress bars.
        options: further arguments of `TRAKer`.

    Returns:
        Scores, `[n, m]`, positive where adding the training example raises the target's
        model output.
    """
    examples, aims = _batches("train", train), _batches("targets", targets)
    settings: dict[str, Any] = {
        "task": task,
        "train_set_size": _count("training examples", examples),
        "proj_dim": proj_dim,
        "lambda_reg": lambda_reg,
        "curvature": curvature,
        **options,
    }
    settings |= _projection(model, settings)
    with _restored(model) as before:
        states = [_apart(c, model, before) for c in checkpoints or [model]]
        if isinstance(whitening, str) and whitening == "auto":
            whitening = _strength(model, states, examples, Path(save_dir), settings)
        traker = TRAKer(model, save_dir=save_dir, whitening=whitening, **settings)
        return _Run(traker, states, progress).scores(examples, aims, exp_name)


@contextmanager
def _restored(model: nn.Module) -> Generator[dict[str, Any]]:
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    modes = {module: module.training for module in model.modules()}
    try:
        yield before
    finally:
        model.load_state_dict(before)
        for module, training in modes.items():
            module.training = training


def _apart(checkpoint: Any, model: nn.Module, before: Mapping[str, Any]) -> Any:
    # a state dict of the model itself changes as soon as other weights are loaded
    if checkpoint is model:
        return before
    if not isinstance(checkpoint, Mapping):
        return checkpoint
    own = {value.data_ptr() for value in model.state_dict().values() if value.numel()}
    tensors = [value for value in checkpoint.values() if isinstance(value, Tensor)]
    if not any(value.data_ptr() in own for value in tensors):
        return checkpoint
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in checkpoint.items()
    }


class _Run:
    def __init__(self, traker: TRAKer, states: list[Any], progress: bool) -> None:
        self.traker = traker
        self.states = states
        self.progress = progress

    def scores(self, train: Any, targets: Any, exp_name: str) -> NDArray[Any]:
        count = _count("targets", targets)
        self.featurize(train)
        self.traker.finalize_features()
        self.score(targets, exp_name, count)
        return self.traker.finalize_scores(exp_name)

    def featurize(self, train: Any) -> None:
        count = self.traker.train_set_size
        for number, state in enumerate(self.states):
            self.traker.load_checkpoint(state_of(state), model_id=number)
            if self.traker.saver.model_ids[number]["is_featurized"]:
                continue
            if not self.traker.whitening_is_fitted:
                wanted = max(1, round(len(train) * min(1, FITTED / count)))
                spread = {j * len(train) // wanted for j in range(wanted)}
                chosen = (b for j, b in enumerate(train) if j in spread)
                for batch in self._bar(chosen, number, "whitening", None):
                    self.traker.fit_whitening(batch=batch)
            for batch, rows in self._numbered(train, number, "training examples", count):
                self.traker.featurize(batch=batch, inds=rows)

    def score(self, targets: Any, exp_name: str, count: int) -> None:
        for number, state in enumerate(self.states):
            self.traker.start_scoring_checkpoint(exp_name, state_of(state), number, count)
            for batch, rows in self._numbered(targets, number, "targets", count):
                self.traker.score(batch=batch, inds=rows)

    def _numbered(
        self, batches: Iterable[Any], number: int, what: str, count: int
    ) -> Iterator[tuple[Any, range]]:
        start = 0
        for batch in self._bar(batches, number, what, count):
            stop = start + _size(batch)
            yield batch, range(start, stop)
            start = stop

    def _bar(
        self, batches: Iterable[Any], number: int, what: str, count: int | None
    ) -> Iterator[Any]:
        which = f"checkpoint {number + 1} of {len(self.states)}"
        options: dict[str, Any] = {"unit": " examples", "disable": not self.progress}
        with tqdm(total=count, desc=f"{which}, {what}", **options) as bar:
            for batch in batches:
                yield batch
                bar.update(_size(batch))


def _batches(name: str, batches: Any) -> Any:
    if isinstance(batches, DataLoader):
        inner = getattr(batches.batch_sampler, "sampler", None)
        ordered = all(isinstance(s, SequentialSampler) for s in (batches.sampler, inner))
        if not ordered or getattr(batches.batch_sampler, "drop_last", True):
            raise InputError(
                f"{name} must give every example in the same order each time, so that row "
                "i is example i: make its DataLoader with a batch size, shuffle=False and "
                "drop_last=False."
            )
        return batches
    if isinstance(batches, Iterator):
        raise InputError(
            f"{name} is iterated over several times, and {type(batches).__name__} only "
            "once. Give a DataLoader, or a list of batches."
        )
    if not isinstance(batches, Collection) or isinstance(batches, Mapping | str):
        raise InputTypeError(
            f"{name} must be a DataLoader or a list of batches, got "
            f"{type(batches).__name__}."
        )
    return batches


def _size(batch: Any) -> int:
    return batch_size(normalize(batch))


def _count(what: str, batches: Any) -> int:
    if isinstance(batches, DataLoader):
        count = len(batches.dataset)  # pyright: ignore[reportArgumentType]
    else:
        count = sum(_size(batch) for batch in batches)
    if not count:
        raise InputError(f"Nothing to attribute: there are no {what}.")
    return count


def _projection(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    # no projection where rows are few; as coarse as other rows, since nothing is lost by it
    if settings["proj_dim"] != "auto" or settings.get("projector") is not None:
        return {}
    chosen = select_parameters(model, as_names(settings.get("grad_wrt")))
    width = sum(p.numel() for p in chosen.values())
    few = 2 * settings["train_set_size"] * width <= EXACT_UP_TO
    return {"projector": NoOpProjector()} if few else {}


def _strength(
    model: nn.Module,
    states: list[Any],
    train: Any,
    folder: Path,
    settings: Mapping[str, Any],
) -> float:
    known = folder / "metadata.json"
    if known.exists():  # a call that goes on must not choose anew
        found = json.loads(known.read_text("utf-8")).get("whitening")
        return float(found["strength"]) if found else 0.0
    count = settings["train_set_size"]
    batches = sampled(train, len(train), math.ceil(count / len(train)))
    with tempfile.TemporaryDirectory() as trial:
        traker = TRAKer(model, save_dir=trial, whitening="auto", **settings)
        if isinstance(traker.projector, KernelProjector):  # agreement is told by a sketch
            sketched: dict[str, Any] = {**settings, "proj_dim": "auto", "projector": None}
            folder = Path(trial) / "sketch"
            traker = TRAKer(model, save_dir=folder, whitening="auto", **sketched)
        curvature = bool(settings["curvature"])
        return choose_strength(traker.pipeline, states, batches, curvature=curvature)
