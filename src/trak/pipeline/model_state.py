"""Loading weights without half-loading them, and noticing when they change."""

from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from trak.digests import checksum, is_plain, state_digest
from trak.errors import InputError, InputTypeError, PhaseError

_COMPILED = "_orig_mod."
_COPIED = 1 << 16  # bytes of a buffer


def validate_state(model: nn.Module, checkpoint: Any) -> str:
    """Checks that a state dict fits a model, as `check_state`, and hashes it.

    Args:
        model: the model.
        checkpoint: its state dict to be.

    Returns:
        The content hash of the weights.
    """
    check_state(model, checkpoint)
    return state_digest(checkpoint, like=model.state_dict())


def check_state(model: nn.Module, checkpoint: Any) -> None:
    """Checks that a state dict fits a model, before anything is touched.

    Args:
        model: the model.
        checkpoint: its state dict to be.

    Raises:
        InputTypeError: if it is no state dict.
        InputError: lists missing, unexpected and unusable entries.
    """
    if not isinstance(checkpoint, Mapping):
        raise InputTypeError(
            "checkpoint must be a state dict (model.state_dict(), or one read from a "
            f"file), got {type(checkpoint).__name__}."
        )
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own if name not in checkpoint]
    problems += [f"not in the model: {name}" for name in checkpoint if name not in own]
    for name, value in checkpoint.items():
        problem = _misfit(value, own[name]) if name in own else None
        problems += [f"{name}: {problem}"] if problem else []
    problems = problems or _untied(own, checkpoint)
    if problems:
        shown = "\n".join(f"  - {line}" for line in problems[:10])
        raise InputError(
            f"The checkpoint does not fit the model ({len(problems)} differences):\n"
            f"{shown}\n{_hint(own, checkpoint)}Nothing was loaded."
        )


def _hint(own: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> str:
    compiled = {name.replace(_COMPILED, "") for name in own if _COMPILED in name}
    if compiled & {*checkpoint}:
        return (
            "The model is one that torch.compile made, and the checkpoint is of the model "
            "before: pass that (model._orig_mod). "
        )
    if {str(n).replace(_COMPILED, "") for n in checkpoint if _COMPILED in str(n)} & {*own}:
        return (
            "The checkpoint is of a model that torch.compile made: take "
            f"{_COMPILED!r} out of its names (name.replace({_COMPILED!r}, '')). "
        )
    return _hint_of_entries({*own}, checkpoint) or _hint_of_names({*own}, checkpoint)


def _hint_of_entries(own: set[str], checkpoint: Mapping[Any, Any]) -> str:
    for name, value in checkpoint.items():
        if isinstance(value, Mapping) and own & {*value}:
            return (
                f"Its entry {name!r} holds weights by the model's names: pass "
                f"checkpoint[{name!r}]. "
            )
        if isinstance(value, Mapping) and (
            prefix := _prefix(own, {n for n in value if isinstance(n, str)})
        ):
            return (
                f"Its entry {name!r} holds weights by the model's names with {prefix!r} "
                f"before them: pass {{name.removeprefix({prefix!r}): value for name, value "
                f"in checkpoint[{name!r}].items()}}. "
            )
    return ""


def _hint_of_names(own: set[str], checkpoint: Mapping[Any, Any]) -> str:
    names = {name for name in checkpoint if isinstance(name, str)}
    if prefix := _prefix(own, names):
        return (
            f"Its names begin with {prefix!r}, as those of a model inside another do "
            "(DistributedDataParallel, a trainer's module): pass {name.removeprefix("
            f"{prefix!r}): value for name, value in checkpoint.items()}}. "
        )
    if prefix := _prefix_of_a_part(own, names):
        return (
            f"It holds a part of the model's weights, with {prefix!r} before their names: "
            f"take that off (name.removeprefix({prefix!r})), load them into the model with "
            "load_state_dict(part, strict=False), and pass a copy of all, "
            "copy.deepcopy(model.state_dict()). "
        )
    if prefix := _prefix(names, own):
        return (
            f"The model's names begin with {prefix!r} and the checkpoint's do not: pass "
            "the module that the checkpoint was saved from as the model, or put "
            f"{prefix!r} before its names. "
        )
    if names and names < own | {name.replace(".default.", ".") for name in own}:
        return (
            "It holds a part of the model's weights, as files of adapters and of models "
            "with tied weights do: load it into the model as usual "
            "(peft.set_peft_model_state_dict, or load_state_dict(part, strict=False)), and "
            "pass a copy of all, copy.deepcopy(model.state_dict()). "
        )
    return ""


def _prefix(names: set[str], longer: set[str]) -> str:
    # what all of them would have to begin with to be among the others
    one = max(names, key=len, default="")
    found = {name.removesuffix(one) for name in longer if name.endswith(f".{one}")}
    fits = (p for p in sorted(found) if {f"{p}{name}" for name in names} <= longer)
    return next(fits, "")


def _prefix_of_a_part(own: set[str], names: set[str]) -> str:
    # what all names begin with, where the rest of each is one of the model's
    one = max(names, key=len, default="")
    found = {one.removesuffix(name) for name in own if one.endswith(f".{name}")}
    fits = (p for p in sorted(found) if {f"{p}{name}" for name in own} > names)
    return next(fits, "")


def _misfit(value: Any, own: Any) -> str | None:
    if not isinstance(own, Tensor):
        return None
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}, the model has a tensor"
    if value.shape != own.shape:
        return f"shape {tuple(value.shape)}, the model has {tuple(own.shape)}"
    return "on the meta device, so that it holds no numbers" if value.is_meta else None


def _untied(own: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> list[str]:
    # names of one tensor of the model, of which the last one loaded would win
    first: dict[Any, str] = {}
    problems: list[str] = []
    for name, value in own.items():
        if not isinstance(value, Tensor) or not is_plain(value) or not value.numel():
            continue
        place = value.data_ptr(), value.shape, value.stride(), value.dtype
        other = first.setdefault(place, name)
        if other != name and _differ(checkpoint[other], checkpoint[name], value):
            problems.append(
                f"{name}: other numbers than {other}, with which the model shares them"
            )
    return problems


def _differ(one: Tensor, other: Tensor, like: Tensor) -> bool:
    if not is_plain(one) or not is_plain(other):
        return False
    wide = torch.float64 if like.is_floating_point() else like.dtype
    pair = (value.detach().to(like).to(wide) for value in (one, other))
    return not torch.allclose(*pair, rtol=0, atol=0, equal_nan=True)


class WeightWatch:
    """Remembers the weights to notice when they change.

    Other tensors in their place, in-place changes by torch's version counters, and, since
    fused optimizers and `parameter.data` go round these, a checksum of the numbers. Small
    buffers may be written or replaced, as rotary embeddings do in every forward pass, as
    long as their numbers stay.

    Args:
        model: the model, just loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors = _tensors(model)
        self._versions = [_version(t) for t in self._tensors]
        self._checksum = checksum(self._tensors)
        buffers = range(len(list(model.parameters())), len(self._tensors))
        self._copies = {
            j: self._tensors[j].clone()
            for j in buffers
            if is_plain(self._tensors[j]) and self._tensors[j].nbytes <= _COPIED
        }

    def check(self) -> None:
        """Refuses to go on with other weights than those that were loaded.

        Raises:
            PhaseError: if a parameter or buffer was changed or replaced.
        """
        found = _tensors(self._model)
        same = len(found) == len(self._tensors) and all(map(self._stayed, count(), found))
        if not same or not torch.equal(checksum(found), self._checksum):
            raise PhaseError(self._complaint(found))

    def _stayed(self, place: int, tensor: Tensor) -> bool:
        if tensor is self._tensors[place] and _version(tensor) == self._versions[place]:
            return True
        copy = self._copies.get(place)
        return (
            copy is not None
            and (tensor.dtype, tensor.device) == (copy.dtype, copy.device)
            and torch.equal(tensor, copy)
        )

    def _complaint(self, found: list[Tensor]) -> str:
        parameters = len(list(self._model.parameters()))
        at = range(parameters, len(found))
        if len(found) == len(self._tensors) and not self._differs(found, range(parameters)):
            names = [name for name, _ in self._model.named_buffers()]
            changed = [names[j - parameters] for j in at if self._differs(found, [j])]
            return (
                f"The model's buffers {changed[:3]} changed after its weights were loaded: "
                "its forward pass writes to them, or somebody else does. Then an example "
                "may have other gradients each time. Keep what a forward pass counts or "
                "caches in plain attributes, or take such layers out."
            )
        return (
            "The model's weights changed after they were loaded (a training step, "
            "or load_state_dict?), so their gradients do not belong to this "
            "checkpoint. Call load_checkpoint or start_scoring_checkpoint again."
        )

    def _differs(self, found: list[Tensor], places: Iterable[int]) -> bool:
        return any(
            not self._stayed(j, found[j])
            or not torch.equal(checksum([found[j]])[0], self._checksum[j])
            for j in places
        )


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _version(tensor: Tensor) -> int:
    # inference tensors, which a buffer may be, count no versions
    return -1 if tensor.is_inference() else tensor._version  # noqa: SLF001
