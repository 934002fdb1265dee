"""Leaving out padding: shorter batches, and samples of similar length together."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import Batch, batch_size, leaves, select
from trak.gradient_computers.surroundings import undisturbed
from trak.modelout_functions import batch_output_function
from trak.precision import exact_float32

logger = logging.getLogger(__name__)

_SAVING = 0.2  # share of the tokens that a split must save
_FEWEST = 4  # samples of a bucket
_TRIED = 4  # samples of a bucket, both ways
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF = 0.05

_Structure = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]
"""Modules with their attributes and children."""


@dataclass(frozen=True)
class Trimmer:
    """Trims batches of tasks that say where their padding is, if the model ignores it.

    The first batch of every checkpoint that can be shortened is run both ways; if an
    output changes, nothing is trimmed for this checkpoint.

    Attributes:
        model: the model.
        task: the task; `padding_mask(model, batch)` gives `[b, s]`, 0 at padding, or None.
        ignored: checkpoint to whether its outputs are the same without padding.
    """

    model: nn.Module
    task: Any
    ignored: dict[int, bool]

    def buckets(self, batch: Batch, model_id: int) -> list[tuple[list[int], Batch]]:
        """Splits a batch by length.

        Args:
            batch: a normalized batch.
            model_id: the checkpoint.

        Returns:
            Positions in the batch, and these samples without columns that are padding in
            all of them. One bucket of all samples, in order, where nothing is gained.
        """
        everything = list(range(batch_size(batch)))
        mask = self._mask(batch)
        if mask is None:
            return [(everything, batch)]
        shortened = trim(batch, mask)
        groups = group(_lengths(mask))
        if shortened is batch and len(groups) == 1:
            return [(everything, batch)]
        found = [
            (rows, trim(select(batch, rows), mask[torch.as_tensor(rows, device="cpu")]))
            for rows in groups
        ]
        if model_id not in self.ignored:
            self.ignored[model_id] = self._same_outputs(batch, found)
        return found if self.ignored[model_id] else [(everything, batch)]

    def _mask(self, batch: Batch) -> Tensor | None:
        ask: Callable[..., Tensor | None] | None = getattr(self.task, "padding_mask", None)
        mask = ask(self.model, batch) if ask is not None else None
        if mask is None or batch_output_function(self.task) is None:
            return None
        mask = mask.cpu() != 0
        fits = mask.ndim == 2 and mask.any(1).all() and _one_sided(mask)
        parts = leaves(batch)
        shared = all(p.ndim == 1 or p.shape == mask.shape for p in parts)
        return mask if fits and shared else None

    @exact_float32()
    def _same_outputs(self, batch: Batch, found: list[tuple[list[int], Batch]]) -> bool:
        function = batch_output_function(self.task)
        assert function is not None  # noqa: S101 - asked for before
        worst, dtype = 0.0, torch.float64
        before = _structure(self.model)
        with undisturbed(self.model), torch.no_grad():
            for rows, piece in found:
                wanted = function(self.model, select(batch, rows[:_TRIED]))
                given = function(self.model, select(piece, slice(0, _TRIED)))
                change = (given - wanted).abs() / (1 + wanted.abs())
                worst, dtype = max(worst, float(change.max())), wanted.dtype
        if _put_back(before):
            logger.info("Padding is kept, since the model rebuilds itself without it.")
            return False
        halves = any(p.dtype.itemsize < 4 for p in self.model.parameters())
        tolerance = _HALF if halves else _TOLERANCES.get(dtype, _HALF)
        same = worst <= tolerance
        logger.info(
            "Padding is left out: outputs change by %.1g."
            if same
            else "Padding is kept, since the model's outputs depend on it (by %.1g).",
            worst,
        )
        return same


def _structure(model: nn.Module) -> _Structure:
    found = [(m, vars(m), vars(m).get("_modules")) for m in model.modules()]
    # those of scripted modules are no dictionaries, and stay as they are
    return [(m, {**own}, {**kids}) for m, own, kids in found if isinstance(kids, dict)]


def _put_back(before: _Structure) -> bool:
    # BigBird takes other attention layers for short inputs, and keeps them for long ones
    same = all(
        own is known
        for module, _, children in before
        for own, known in zip_longest(vars(module)["_modules"].values(), children.values())
    )
    if same:
        return False
    for module, attributes, children in before:
        own = vars(module)
        own.clear()
        own.update(attributes)
        own["_modules"].clear()
        own["_modules"].update(children)
    return True


def trim(batch: Batch, mask: Tensor) -> Batch:
    """Cuts off the columns that are padding in every sample.

    Args:
        batch: parts `[b]` or `[b, s]`.
        mask: `[b, s]`, False at padding.

    Returns:
        The batch itself where there are none.
    """
    used = mask.any(0).nonzero().flatten()
    first, last = int(used[0]), int(used[-1])
    if first == 0 and last == mask.shape[1] - 1:
        return batch
    if isinstance(batch, dict):
        return {name: _columns(part, first, last) for name, part in batch.items()}
    return tuple(_columns(part, first, last) for part in batch)


def group(lengths: list[int]) -> list[list[int]]:
    """Puts samples of similar length together, where that saves enough tokens.

    Args:
        lengths: of every sample.

    Returns:
        Positions, in order within each group.
    """
    order = sorted(range(len(lengths)), key=lambda j: -lengths[j])
    return [sorted(part) for part in _split(order, lengths)]


def _split(order: list[int], lengths: list[int]) -> list[list[int]]:
    # longest first; cut where the two halves have the fewest tokens
    now = len(order) * lengths[order[0]]
    cuts = range(_FEWEST, len(order) - _FEWEST + 1)
    tokens = {
        cut: cut * lengths[order[0]] + (len(order) - cut) * lengths[order[cut]]
        for cut in cuts
    }
    best = min(tokens, key=lambda cut: tokens[cut], default=None)
    if best is None or tokens[best] > (1 - _SAVING) * now:
        return [order]
    return [*_split(order[:best], lengths), *_split(order[best:], lengths)]


def _lengths(mask: Tensor) -> list[int]:
    # up to the last token, or from the first one where padding is on the left
    columns = torch.arange(mask.shape[1], device="cpu")
    last = torch.where(mask, columns, -1).amax(1) + 1
    first = torch.where(mask, columns, mask.shape[1]).amin(1)
    left = bool((first > 0).any())
    return (mask.shape[1] - first if left else last).tolist()


def _one_sided(mask: Tensor) -> bool:
    # tokens first and then padding, or the other way, in all samples alike
    steps = mask[:, 1:].int() - mask[:, :-1].int()
    return bool((steps <= 0).all() or (steps >= 0).all())


def _columns(part: Tensor, first: int, last: int) -> Tensor:
    # contiguous, as they came: models may flatten them by `view`
    return part if part.ndim == 1 else part[:, first : last + 1].contiguous()
