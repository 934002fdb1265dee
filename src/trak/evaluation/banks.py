"""Ground-truth banks: what retraining says, and what it was retrained from."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.arguments import is_listed
from trak.errors import BankMismatchError, InputError, InputTypeError
from trak.evaluation.arrays import (
    Booleans,
    as_masks,
    as_outputs,
    as_single,
    check_length,
)
from trak.evaluation.conversion import as_numpy
from trak.evaluation.described import as_text, check_described
from trak.evaluation.hashes import (
    data_hash,
    hashes_of,
    stored_checkpoints,
    stored_examples,
    stored_hash,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Bank:
    """Outputs of models that were trained on subsets.

    Attributes:
        masks: which training examples each subset holds, bool `[subsets, n]`.
        outputs: the targets' model outputs after training on a subset, float32
            `[subsets, seeds, m]`; `[subsets, m]` is accepted and means one seed.
        name: what it is called.
        seeds: seed that each model was trained with, `[subsets, seeds]`, or None.
        seed_rule: how these follow from subset and repetition, in words.
        recipe: how models were trained: what JSON can hold.
        data: hash of the training set and targets (`data_hash`), or None.
        examples: content hash of each training example (`example_hashes`), `[n]`, or None.
        checkpoints: content hashes of models that were trained on everything, as a
            `TRAKer`'s store records them; those whose scores the bank is for. State dicts
            are accepted and hashed.
        notes: further entries of `bank.json`.
    """

    masks: Booleans
    outputs: NDArray[np.float32]
    name: str = ""
    seeds: NDArray[np.int64] | None = None
    seed_rule: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    data: str | None = None
    examples: NDArray[np.int64] | None = None
    checkpoints: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        as_text("name", self.name)
        if self.seed_rule is not None:
            as_text("seed_rule", self.seed_rule)
        check_described(self.recipe, self.data, self.notes)
        masks = as_masks("masks", self.masks, axes=("subset", "training example"))
        outputs = as_outputs("outputs", self.outputs, "subset")
        check_length(len(outputs), len(masks), "The subsets of outputs", "masks")
        given: dict[str, Any] = {
            "masks": masks.copy(),
            "outputs": as_single("outputs", outputs),
            "checkpoints": hashes_of(self.checkpoints),
        }
        if self.seeds is not None:
            given["seeds"] = _integers("seeds", self.seeds, outputs.shape[:2])
        if self.examples is not None:
            given["examples"] = _integers("examples", self.examples, masks.shape[1:])
        for name, value in given.items():
            object.__setattr__(self, name, value)

    @property
    def n(self) -> int:
        """Number of training examples."""
        return self.masks.shape[1]

    def check(
        self,
        scored: Any = None,
        *,
        checkpoints: Iterable[Mapping[str, Any] | str] | None = None,
        data: Any = None,
    ) -> None:
        """Refuses scores that are about other weights or data than the bank.

        Args:
            scored: the `TRAKer` that made the scores, or its store's folder: its
                checkpoints must be among the bank's, and its training examples the same,
                which is warned of where the bank or the store does not know them.
            checkpoints: state dicts, or hashes, that scores were made from.
            data: what `data_hash` makes of the data, or the list of its arguments.

        A difference is a `BankMismatchError`.

        Raises:
            InputError: if nothing was given, or the bank does not record what is compared.
            InputTypeError: if the data are of another kind.
        """
        if scored is None and checkpoints is None and data is None:
            raise InputError("Nothing to check: give a TRAKer, checkpoints= or data=.")
        if scored is not None:
            folders = stored_checkpoints(scored)
            found = {f"model_id={k}": stored_hash(path) for k, path in folders.items()}
            self._check_checkpoints(found)
            for path in folders.values():
                self._check_examples(path)
        if checkpoints is not None:
            hashes = hashes_of(checkpoints)
            self._check_checkpoints({f"number {j}": h for j, h in enumerate(hashes)})
        if data is not None:
            if not (isinstance(data, str) or is_listed(data)):
                raise InputTypeError(
                    "data must be what data_hash gave, or the list of its arguments, got "
                    f"{type(data).__name__}."
                )
            self._check_data(data if isinstance(data, str) else data_hash(*data))

    def _check_checkpoints(self, found: Mapping[str, str]) -> None:
        if not self.checkpoints:
            raise InputError(
                f"Bank {self.name!r} records no checkpoints, so nobody can tell whether "
                "scores are of its models. Make it with checkpoints=."
            )
        others = {name: h for name, h in found.items() if h not in self.checkpoints}
        if others or not found:
            shown = ", ".join(f"{name} ({h})" for name, h in list(others.items())[:5])
            raise BankMismatchError(
                f"Scores of {len(others)} checkpoints that are none of the "
                f"{len(self.checkpoints)} of bank {self.name!r}: {shown or 'none given'}. "
                "The bank tells nothing about other models: featurize its own, or build a "
                "bank with the recipe of these."
            )

    def _check_examples(self, folder: Path) -> None:
        known = stored_examples(folder)
        if known is None:
            _log.warning("%s holds no examples yet, so none was compared.", folder)
            return
        if len(known) != self.n:
            raise BankMismatchError(
                f"{folder} is about {len(known)} training examples, bank {self.name!r} "
                f"about {self.n}."
            )
        if self.examples is None:
            _log.warning(
                "Bank %r records no training examples, so nobody compared them with those "
                "of %s. Make it with examples=example_hashes(...), or give data=.",
                self.name,
                folder,
            )
            return
        unknown = int(((known == 0) | (self.examples == 0)).sum())
        if unknown:
            _log.warning(
                "%d of %d training examples of %s were not compared: nothing is known of "
                "them here or in the bank.",
                unknown,
                self.n,
                folder,
            )
        other = np.flatnonzero(
            (known != 0) & (self.examples != 0) & (known != self.examples)
        )
        if len(other):
            raise BankMismatchError(
                f"{len(other)} training examples of {folder} are others than those of bank "
                f"{self.name!r}, the first at row {other[0]}. Featurize the bank's data in "
                "the bank's order."
            )

    def _check_data(self, found: str) -> None:
        if self.data is None:
            raise InputError(f"Bank {self.name!r} records no hash of its data.")
        if found != self.data:
            raise BankMismatchError(
                f"Bank {self.name!r} was made from data with the hash {self.data}; that of "
                f"the data given is {found}. The arrays must be those, in that order."
            )


def _integers(name: str, value: Any, shape: tuple[int, ...]) -> NDArray[np.int64]:
    found = as_numpy(name, value)
    if found.dtype.kind not in "iu" or found.shape != shape:
        raise InputError(
            f"{name} must be integers of shape {shape}, got {found.dtype} of shape "
            f"{found.shape}."
        )
    return found.astype(np.int64)
