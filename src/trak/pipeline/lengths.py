"""Leaving out padding: shorter batches, and samples of similar length together."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import Batch, batch_size, leaves, select
from trak.gradient_computers.memory import is_out_of_memory
from trak.gradient_computers.plan import Anatomy
from trak.gradient_computers.surroundings import undisturbed
from trak.gradient_computers.whole import random_weights, summed
from trak.modelout_functions import batch_output_function
from trak.precision import exact_float32

logger = logging.getLogger(__name__)

_SAVING = 0.2  # share of the tokens that a split must save
_FEWEST = 4  # samples of a bucket
_TRIED = 4  # samples of a bucket, both ways
# of outputs; of a parameter's gradient, and of the largest one
_TOLERANCES = {torch.float64: (1e-9, 1e-8, 1e-12), torch.float32: (1e-4, 1e-3, 1e-5)}
_HALF = (0.05, 0.2, 1e-2)

_Structure = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]
"""Modules with their attributes and children."""


@dataclass(frozen=True)
class Ran:
    """What some samples gave.

    Attributes:
        outputs: `[b]`.
        gradients: of a weighted sum of the outputs, by name; None if they are not known.
    """

    outputs: Tensor
    gradients: dict[str, Tensor | None] | None


@dataclass
class Change:
    """How much outputs and gradients change, at most.

    Attributes:
        halves: whether the model is in half precision.
        outputs: the largest change of an output, relative to one more than itself.
        gradient: the largest change of a parameter's gradient, relative to itself.
        is_small: whether both may be rounding.
    """

    halves: bool
    outputs: float = 0.0
    gradient: float = 0.0
    is_small: bool = True

    def add(self, wanted: Ran, given: Ran) -> None:
        """Compares two runs of the same samples.

        Args:
            wanted: with padding.
            given: without.
        """
        usual = _TOLERANCES.get(wanted.outputs.dtype, _HALF)
        most, relative, floor = _HALF if self.halves else usual
        change = (given.outputs - wanted.outputs).abs() / (1 + wanted.outputs.abs())
        self.outputs = max(self.outputs, float(change.max()))
        self.is_small &= self.outputs <= most
        if wanted.gradients is None or given.gradients is None:
            return
        norms = {name: _norm(g) for name, g in wanted.gradients.items()}
        floor *= max(norms.values(), default=0.0)
        for name, norm in norms.items():
            error = _distance(wanted.gradients[name], given.gradients[name])
            self.gradient = max(self.gradient, error / (norm + floor + 1e-300))
            self.is_small &= error <= relative * norm + floor


@dataclass(frozen=True)
class Trimmer:
    """Trims batches of tasks that say where their padding is, if the model ignores it.

    The first batch of every checkpoint that can be shortened is run both ways, and so is
    every later one that is shorter or longer than those before, since some models work
    otherwise from some length on. If an output or a gradient changes, or the model fails,
    nothing is trimmed from then on.

    Attributes:
        model: the model.
        task: the task; `padding_mask(model, batch)` gives `[b, s]`, 0 at padding, or None.
        names: the parameters whose gradients must stay.
        ignored: checkpoint to the lengths between which nothing changes; None if nothing
            is trimmed.
    """

    model: nn.Module
    task: Any
    names: tuple[str, ...]
    ignored: dict[int, tuple[int, int] | None] = field(
        default_factory=dict[int, tuple[int, int] | None]
    )

    def buckets(self, batch: Batch, model_id: int) -> list[tuple[list[int], Batch]]:
        """Splits a batch by length.

        Args:
            batch: a normalized batch.
            model_id: the checkpoint.

        Returns:
            Positions in the batch, and these samples without columns that are padding in
            all of them. One bucket of all samples, in order, where nothing is gained.
        """
        whole = [([*range(batch_size(batch))], batch)]
        mask = self._mask(batch)
        if mask is None or self.ignored.get(model_id, ()) is None:
            return whole
        lengths = _lengths(mask)
        shortened = trim(batch, mask)
        groups = group(lengths)
        if shortened is batch and len(groups) == 1:
            return whole
        found = [
            (rows, trim(select(batch, rows), mask[torch.as_tensor(rows, device="cpu")]))
            for rows in groups
        ]
        widths = [p.shape[1] for _, b in [*whole, *found] for p in leaves(b) if p.ndim > 1]
        span = min(widths), max(widths)
        known = self.ignored.get(model_id)
        if known is None or span[0] < known[0] or known[1] < span[1]:
            same = self._same(batch, found, lengths, again=known is not None)
            span = min(span[0], *(known or span)), max(span[1], *(known or span))
            self.ignored[model_id] = span if same else None
        return found if self.ignored[model_id] else whole

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

    def _same(
        self,
        batch: Batch,
        found: list[tuple[list[int], Batch]],
        lengths: list[int],
        *,
        again: bool,
    ) -> bool:
        before = _structure(self.model)
        reason = None
        change = Change(any(p.dtype.itemsize < 4 for p in self.model.parameters()))
        with exact_float32(), undisturbed(self.model):
            for rows, piece in found:
                own = _extremes([lengths[j] for j in rows])
                wanted = self._run(select(batch, [rows[j] for j in own]))
                try:
                    given = self._run(select(piece, own))
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    reason = f"the model fails without it ({error})"
                    break
                change.add(wanted, given)
        if _put_back(before):
            reason = "the model rebuilds itself without it"
        elif reason is None and not change.is_small:
            reason = (
                "the model depends on it (outputs change by "
                f"{change.outputs:.1g}, gradients by {change.gradient:.1g})"
            )
        if reason is not None:
            logger.info("Padding is kept%s, since %s.", " from now on" * again, reason)
        elif not again:
            logger.info("Padding is left out: outputs change by %.1g.", change.outputs)
        return reason is None

    def _run(self, samples: Batch) -> Ran:
        function = batch_output_function(self.task)
        assert function is not None  # noqa: S101 - asked for before
        outputs: list[Tensor] = []

        def run() -> Tensor:
            outputs.append(function(self.model, samples))
            return outputs[-1]

        weights = random_weights(batch_size(samples))
        gradients = None
        try:
            anatomy = Anatomy(self.model, self.names)
            gradients = summed(anatomy, [*self.names], run, weights)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.info("Too little memory to see whether gradients depend on padding.")
            with torch.no_grad():
                run()
        return Ran(outputs[-1].detach(), gradients)


def _norm(gradient: Tensor | None) -> float:
    return 0.0 if gradient is None else float(gradient.to_dense().norm().double())


def _distance(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return max(_norm(one), _norm(other))
    return _norm(one.to_dense() - other.to_dense())


def _extremes(lengths: list[int]) -> list[int]:
    # the shortest, which lose most padding, and the longest, which lose all of it
    order = sorted(range(len(lengths)), key=lambda j: lengths[j])
    return sorted({*order[: _TRIED // 2], *order[-(_TRIED // 2) :]})


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
