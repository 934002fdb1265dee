"""Adds up what whitening needs, settles on it, and hands it to the maker of rows."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.arguments import as_number
from trak.batches import Batch
from trak.errors import InputError, PhaseError
from trak.pipeline.project import RowMaker
from trak.precision import full_precision
from trak.projectors import AbstractProjector, LeadingProjector, NoOpProjector
from trak.savers import AbstractSaver
from trak.score_computers.unwhitened import PREFIX, Chosen, Unwhitened
from trak.whitening import Moments, Whitening
from trak.whitening.whitening import DAMPING, STRENGTH

logger = logging.getLogger(__name__)

_REMEMBERED = 1 << 28  # bytes of sums, whose eigenvectors fill memory, too


def as_strength(whitening: float | str | None) -> float:
    """Accepts a strength of whitening.

    Args:
        whitening: a number from 0 to 1, `"auto"`, or None for none.

    Returns:
        The strength; 0 for none.

    Raises:
        InputError: if it is something else.
    """
    if whitening is None:
        return 0.0
    if isinstance(whitening, str) and whitening == "auto":
        return STRENGTH
    if (
        isinstance(whitening, str)
        or (found := as_number("whitening", whitening, zero=True)) > 1
    ):
        raise InputError(
            f"whitening must be a number from 0 to 1, 'auto' or None, got {whitening!r}."
        )
    return found


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A whitening that was made before it was settled what to whiten by, and how much.

    Attributes:
        sums: that it is of, as arrays.
        whitening: of any strength, with eigenvectors.
    """

    sums: dict[str, NDArray[Any]]
    whitening: Whitening

    def is_of(self, sums: Moments) -> bool:
        """Whether the same eigenvectors would be found in these.

        Args:
            sums: over examples.

        Returns:
            True for equal numbers.
        """
        others = sums.arrays()
        return self.sums.keys() == others.keys() and all(
            np.array_equal(array, others[name]) for name, array in self.sums.items()
        )


@dataclass(kw_only=True)
class Whitener:
    """Whitening of one run's checkpoints.

    Attributes:
        maker: adds up, and whitens.
        saver: keeps the sums.
        shapes: name to shape of the selected parameters.
        strength: 0 for none.
        dtype: of the multiplications.
        sketch: makes rows that are not whitened, for the ridge.
        sums: checkpoint to what was added up here and not saved yet.
        chosen: checkpoint to examples seen here whose rows are kept.
        foreseen: checkpoint to a whitening that was made ahead, and the sums it is of.
        telling: the checkpoint that the ridge is told from, if that is known. Of others no
            examples are kept without whitening, where it can be taken off their rows.
    """

    maker: RowMaker
    saver: AbstractSaver
    shapes: Mapping[str, Sequence[int]]
    strength: float
    dtype: torch.dtype
    sketch: AbstractProjector
    sums: dict[int, Moments] = field(default_factory=dict[int, Moments])
    chosen: dict[int, Chosen] = field(default_factory=dict[int, Chosen])
    foreseen: dict[int, "Foreseen"] = field(default_factory=dict[int, "Foreseen"])
    telling: int | None = None

    def fit(self, batch: Batch, model_id: int) -> None:
        """Adds a batch to a checkpoint's sums.

        Args:
            batch: a normalized batch.
            model_id: the checkpoint, whose weights are loaded.

        Raises:
            InputError: if the run does not whiten.
            PhaseError: if rows of the checkpoint were whitened already.
        """
        if not self.strength:
            raise InputError(
                "This run does not whiten, so there is nothing to fit. Make the TRAKer "
                "with whitening='auto' or a number above 0, or leave fit_whitening out."
            )
        if self.fitted(model_id):
            raise PhaseError(
                f"Rows of model_id={model_id} are whitened by what was fitted before, so "
                "nothing can be added. Featurize on, or use another save_dir."
            )
        kept = self.telling in {None, model_id} or not self._takes_off
        sketch = self.sketch if kept else None
        found, rows = self.maker.moments_and_rows(batch, model_id, sketch)
        found.refuse_nonfinite()
        self.sums.setdefault(model_id, Moments()).merge(found)
        if kept and len(rows):
            chosen = self.chosen.setdefault(model_id, Chosen())
            chosen.add(*self.maker.parted(rows))

    def look_on(self, batch: Batch, model_id: int) -> None:
        """Adds a batch to what pulls at the examples that are kept without whitening.

        Args:
            batch: a normalized batch that the checkpoint's whitening is not fitted to.
            model_id: the checkpoint, whose whitening is fitted to others.
        """
        rows, weights = self.maker.rows_by(self.sketch, batch, model_id)
        if weights is not None:
            self.chosen[model_id].add_to_sum(rows, weights)

    def save(self, model_id: int) -> None:
        """Writes what this process added up, for others to add to theirs.

        Args:
            model_id: the checkpoint.

        Raises:
            PhaseError: if rows were whitened without them already.
        """
        found, chosen = self.sums.pop(model_id, None), self.chosen.pop(model_id, None)
        if found is not None and found.count:
            if self.fitted(model_id):
                raise PhaseError(
                    f"Rows of model_id={model_id} are whitened by what other processes "
                    f"fitted, so what this one fitted ({found.count} examples) comes too "
                    "late and is dropped. Call save_whitening() in all of them before the "
                    "first featurizes; go on without these, or use another save_dir."
                )
            self.saver.add_moments(model_id, _arrays(found, chosen))

    def settle(self, model_id: int) -> None:
        """Settles on what this process added up, unless another was first.

        Args:
            model_id: the checkpoint, of which each process added up the same examples.
        """
        found, chosen = self.sums.pop(model_id, None), self.chosen.pop(model_id, None)
        if found is not None and found.count and not self.fitted(model_id):
            self.saver.settle_moments(model_id, _arrays(found, chosen))

    def adopt(self, other: "Whitener", model_id: int) -> None:
        """Takes over what another added up of the same checkpoint.

        Args:
            other: of a run with the same settings, but perhaps another strength.
            model_id: the checkpoint.
        """
        if model_id in other.sums:
            self.sums[model_id] = other.sums.pop(model_id)
        if model_id in other.chosen:
            self.chosen[model_id] = other.chosen.pop(model_id)
        if model_id in other.foreseen and self.dtype is other.dtype:
            self.foreseen[model_id] = other.foreseen.pop(model_id)

    def foresee(self, model_id: int, strength: float) -> Whitening:
        """The whitening by what was added up here, which may become the checkpoint's.

        Args:
            model_id: the checkpoint.
            strength: alpha.

        Returns:
            The whitening, with eigenvectors.
        """
        sums, known = self.sums[model_id], self.foreseen.get(model_id)
        if known is not None and known.is_of(sums):
            return known.whitening.at(strength)
        made = self.made(sums, strength, in_bases=True)
        if _size(sums) <= _REMEMBERED:
            self.foreseen[model_id] = Foreseen(sums.arrays(), made)
        return made.at(strength)

    def forget_large(self, model_id: int) -> None:
        """Forgets a checkpoint whose sums fill memory; it can be fitted again.

        Args:
            model_id: the checkpoint.
        """
        if model_id in self.sums and _size(self.sums[model_id]) > _REMEMBERED:
            del self.sums[model_id]
            self.chosen.pop(model_id, None)

    def conclude(self, model_id: int) -> None:
        """Lets go of what only further batches would need.

        Args:
            model_id: the checkpoint, to which nothing is added from now on.
        """
        if model_id in self.chosen:
            self.chosen[model_id].conclude()

    def seen(self, model_id: int) -> Unwhitened | None:
        """Unwhitened examples of what was added up here and not saved yet.

        Args:
            model_id: the checkpoint.

        Returns:
            These; None if there are none.
        """
        chosen = self.chosen.get(model_id)
        return chosen.found() if chosen is not None else None

    def fitted(self, model_id: int) -> bool:
        """Whether the checkpoint's sums are settled.

        Args:
            model_id: the checkpoint.

        Returns:
            True if nothing is to be fitted, also where the run does not whiten.
        """
        if not self.strength:
            return True
        # without reading the sums, which are large
        known = self.saver.settled_moments(model_id, settle=False, prefix="format")
        return known is not None

    def unwhitened(self, model_id: int) -> list[Unwhitened]:
        """Examples that every process kept as they are without whitening.

        Args:
            model_id: the checkpoint.

        Returns:
            Those of each process; nothing if the run does not whiten.
        """
        if not self.strength:
            return []
        settled = self.saver.settled_moments
        parts = settled(model_id, settle=False, prefix=PREFIX) or []
        found = (Unwhitened.of_arrays(arrays, path) for path, arrays in parts)
        return [examples for examples in found if examples is not None]

    def plain(self, model_id: int) -> Callable[[Tensor], Tensor] | None:
        """What takes the whitening off a checkpoint's rows again.

        Args:
            model_id: the checkpoint, which has rows.

        Returns:
            A function of rows `[m, k]`, whose inner products are then those of gradients
            (or of the coordinates of these that are kept); None where there is none: the
            run does not whiten, or its rows are projected otherwise.
        """
        projector = self.maker.projector
        if not self.strength or not self._takes_off:
            return None
        if isinstance(projector, LeadingProjector):
            basis = self.saver.settled_basis
            scales = cache(lambda: projector.scales(basis(model_id, dict)))
            return lambda rows: rows / scales().to(rows)
        back = cache(lambda: self.made(self._total(model_id), -self.strength))
        return lambda rows: back().rows(rows, self.maker.layout)

    @property
    def _takes_off(self) -> bool:
        # whether rows are gradients, or coordinates of these
        projector = self.maker.projector
        return isinstance(projector, LeadingProjector) or type(projector) is NoOpProjector

    @full_precision()
    def prepare(self, model_id: int) -> None:
        """Makes the checkpoint's whitening, before its rows are made.

        Args:
            model_id: the checkpoint.

        Raises:
            PhaseError: if nothing was fitted.
        """
        if not self.strength or model_id in self.maker.whitenings:
            return
        self.save(model_id)
        if self.saver.settled_moments(model_id, settle=True, prefix="format") is None:
            raise PhaseError(
                f"This run whitens with strength {self.strength}, but nothing was fitted "
                f"for model_id={model_id}. Between load_checkpoint and featurize call "
                "fit_whitening(batch=batch) for every batch of the training set, or of a "
                "sample of it."
            )
        projector, known = self.maker.projector, self.foreseen.pop(model_id, None)
        if not isinstance(projector, LeadingProjector):
            self.maker.whiten(model_id, self._settled(model_id, None))
            return
        basis = self.saver.settled_basis(
            model_id, lambda: projector.basis(self._settled(model_id, known))
        )
        self.maker.keep(model_id, basis)

    def _total(self, model_id: int) -> Moments:
        total = Moments()
        for path, arrays in self.saver.settled_moments(model_id, settle=False) or ():
            total.merge(Moments.of_arrays(arrays, path))
        return total

    def _settled(self, model_id: int, known: Foreseen | None) -> Whitening:
        total = self._total(model_id)
        logger.info(
            "Features of model_id=%d are whitened with strength %g by %d examples.",
            model_id,
            self.strength,
            total.count,
        )
        if known is not None and known.is_of(total):
            return known.whitening.at(self.strength)
        return self.made(total, self.strength)

    @full_precision()
    def made(self, sums: Moments, strength: float, *, in_bases: bool = False) -> Whitening:
        """The whitening by some sums.

        Args:
            sums: over examples.
            strength: alpha.
            in_bases: keep eigenvectors, whether the projector needs them or not.

        Returns:
            The whitening, with what the projector needs of it.
        """
        bases = in_bases or isinstance(self.maker.projector, LeadingProjector)
        return Whitening(sums, self.shapes, strength, DAMPING, self.dtype, in_bases=bases)


def _size(sums: Moments) -> int:
    return sum(array.nbytes for array in sums.arrays().values())


def _arrays(sums: Moments, chosen: Chosen | None) -> dict[str, NDArray[Any]]:
    examples = chosen.found() if chosen is not None else None
    return sums.arrays() | (examples.arrays() if examples is not None else {})
