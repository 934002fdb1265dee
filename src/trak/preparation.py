"""What the one call finds out before its run: how much to whiten, and how wide rows are.

The first checkpoint is tried out in a folder of its own. What was fitted there is handed
on, so that the run need not fit it again.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trak.arguments import as_ridge
from trak.gradient_computers import select_parameters
from trak.loaders import rest_of, some_of
from trak.pipeline import Whitener, as_strength
from trak.projectors import KernelProjector, NoOpProjector
from trak.projectors.dimension import EXACT
from trak.strength import (
    SAMPLE,
    begun_with,
    choose_strength,
    fit_first,
    known_strength,
)
from trak.traker import TRAKer
from trak.width import WHOLE, known_width, width_of

FITTED, _FITTED_LATER = 768, 512
"""Examples that whitening is fitted to, spread over the training set: of the first
checkpoint, of which the ridge is told, too, and of each other."""
EXACT_UP_TO = 256 << 20
"""Bytes of unprojected rows of one checkpoint that nobody minds; of float32 ones, whose
gradients may be tiny, or else of float16 ones."""

Settings = dict[str, Any]
Shown = Callable[[Iterable[Any], int, str], Iterator[Any]]


def whole_rows(model: nn.Module, settings: Mapping[str, Any]) -> Settings:
    """What to change in the settings of a run so that gradients are not projected.

    Args:
        model: the model.
        settings: of a `TRAKer`.

    Returns:
        Other settings; none where rows would be too many, or somebody said what they are
        to be.
    """
    free = _says(settings["proj_dim"], "auto") and settings.get("projector") is None
    if not free or 2 * _numbers(model, settings) > EXACT_UP_TO:
        return {}
    precise = {} if _dtype_is_said(settings) else _precision(_numbers(model, settings))
    return {"projector": NoOpProjector(), **precise}


def fitted(number: int) -> int:
    """How many examples a checkpoint's whitening is fitted to.

    Args:
        number: of the checkpoint.

    Returns:
        As many as the training set has, at most.
    """
    return _FITTED_LATER if number else FITTED


@dataclass
class Preparation:
    """Settings that are found out.

    Attributes:
        model: the model.
        states: its checkpoints, as `state_of` takes them.
        train: batches of training examples, as `ordered` gives them.
        folder: the store's.
        settings: of the run; those that are found out are added.
        shown: goes over batches of a checkpoint and shows how far it is.
        given: further options of the call, as they were given.
        fitted: who has fitted the first checkpoints, if anybody has.
    """

    model: nn.Module
    states: list[Any]
    train: Any
    folder: Path
    settings: Settings
    shown: Shown
    given: Settings
    fitted: Whitener | None = None

    def choose(self, whitening: float | str | None, *, narrow: bool) -> None:
        """Chooses strength and width, or takes those that the store was begun with.

        Args:
            whitening: 0 to 1, None, or `"auto"`.
            narrow: coordinates may be left out.
        """
        if isinstance(whitening, str) and whitening == "auto":
            whitening = self._strength()
        strength = as_strength(whitening)
        many = narrow and _numbers(self.model, self.settings) > WHOLE
        width = self._width(strength) if many and strength else None
        if width is not None:
            self.settings |= {"projector": "leading", "proj_dim": width}
            if not _dtype_is_said(self.given):
                self.settings |= self._dtype(width)
        self.settings["whitening"] = whitening

    def _strength(self) -> float:
        known = known_strength(self.folder)
        if known is not None:  # a call that goes on must not choose anew
            return known
        settings, count = dict(self.settings), self.settings["train_set_size"]
        exact = _says(settings["proj_dim"], EXACT)
        if exact:  # the trial's folder may have less room
            settings |= {"proj_dim": "auto"}
            settings |= whole_rows(self.model, settings)
        with tempfile.TemporaryDirectory() as trial:
            traker = TRAKer(self.model, save_dir=trial, whitening="auto", **settings)
            if isinstance(traker.projector, KernelProjector):  # a sketch tells agreement
                exact = True
                settings |= {"proj_dim": "auto", "projector": None}
                beside = Path(trial) / "sketch"
                traker = TRAKer(self.model, save_dir=beside, whitening="auto", **settings)
            traker.pipeline.whitener.telling = 0
            strength = choose_strength(
                traker.pipeline,
                self.states,
                list(some_of(self.train, count, SAMPLE)),
                self._sample,
                count,
                others=self._others(),
                curvature=bool(settings["curvature"]),
            )
        self.fitted = None if exact else traker.pipeline.whitener
        return strength

    def _width(self, strength: float) -> int | None:
        known = begun_with(self.folder)
        if known is not None:
            return known_width(known)
        if self.fitted is None or 0 not in self.fitted.sums:
            self.fitted = self._fit(strength)
        count, checkpoints = self.settings["train_set_size"], len(self.states)
        return width_of(self.fitted, strength, count, checkpoints)

    def _dtype(self, width: int) -> Settings:
        known = begun_with(self.folder)
        if known is not None:
            return {"row_dtype": known["precision"]} if "precision" in known else {}
        numbers = self.settings["train_set_size"] * width
        automatic = as_ridge(self.settings["lambda_reg"]) is None
        if automatic and numbers > WHOLE:  # such a ridge hides what rows round
            return {"row_dtype": "bfloat16"}
        return _precision(numbers)

    def _fit(self, strength: float) -> Whitener:
        with tempfile.TemporaryDirectory() as trial:
            own: Settings = {**self.settings, "whitening": strength}
            traker = TRAKer(self.model, save_dir=trial, **own)
            fit_first(traker.pipeline, self.states[0], self._sample(0))
        return traker.pipeline.whitener

    def _others(self) -> Iterator[Any]:
        # what whitening of the first checkpoint is not fitted to
        rest = rest_of(self.train, self.settings["train_set_size"], FITTED)
        return self.shown(rest, 0, "growth of outputs")

    def _sample(self, number: int) -> Iterator[Any]:
        count = self.settings["train_set_size"]
        chosen = some_of(self.train, count, fitted(number))
        return self.shown(chosen, number, "whitening")


def _numbers(model: nn.Module, settings: Mapping[str, Any]) -> int:
    # in all unprojected rows
    chosen = select_parameters(model, settings["grad_wrt"])
    return settings["train_set_size"] * sum(p.numel() for p in chosen.values())


def _precision(numbers: int) -> Settings:
    return {"row_dtype": "float32"} if 4 * numbers <= EXACT_UP_TO else {}


def _dtype_is_said(settings: Mapping[str, Any]) -> bool:
    return bool({"row_dtype", "use_half_precision"} & set(settings))


def _says(proj_dim: Any, word: str) -> bool:
    return isinstance(proj_dim, str) and proj_dim == word  # arrays are compared by entries
