"""Parameters that are handed to functions instead of being used by their own layer.

`torch.nn.MultiheadAttention` hands its projections to
`torch.nn.functional.multi_head_attention_forward`, and never calls its output layer; models
write `F.linear(x, self.weight)`. A `TorchFunctionMode` sees such calls.
"""

import types
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from trak.blocks import Block, DenseBlock, FactoredBlock, IndexedBlock
from trak.gradient_computers.capture import Tape
from trak.gradient_computers.forwards import another_forward
from trak.gradient_computers.lengths import Ledger
from trak.gradient_computers.plan import Anatomy, Plan, Samples


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a parameter.

    Attributes:
        name: the parameter.
        start: the first row.
        behind: number of rows behind the last one.
    """

    name: str
    start: int
    behind: int

    def padded(self, backprops: Tensor) -> Tensor:
        """Fills up the rows that a call did not use.

        Args:
            backprops: `[..., rows of the part]`.

        Returns:
            `[..., rows of the parameter]`.
        """
        if not self.start and not self.behind:
            return backprops
        return functional.pad(backprops, (self.start, self.behind))


class FunctionWatch(TorchFunctionMode):
    """Sees planned parameters in `linear`, `embedding`, `layer_norm`, `expand`, `repeat`.

    Args:
        anatomy: the model's parameters.
        plan: name to way of the parameters to watch.
        num_samples: `b`.
        tape: taps the outputs.
        emit: consumes blocks.
        refused: takes the names of parameters that met shapes without a sample axis.
        ledger: judges shapes.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        plan: Plan,
        num_samples: int,
        tape: Tape,
        emit: Callable[[Block], None],
        refused: set[str],
        ledger: Ledger,
    ) -> None:
        super().__init__()
        self._anatomy = anatomy
        self._plan = plan
        self._num_samples = num_samples
        self._tape = tape
        self._emit = emit
        self._refused = refused
        self._ledger = ledger
        self._attending: list[int] = []  # batch lengths inside multi-head attention

    @contextmanager
    def watching(self) -> Generator[None]:
        """Is active within attention modules if these own all, else everywhere.

        Yields:
            Nothing.
        """
        owners = [
            owner
            for owner in self._anatomy.model.modules()
            if isinstance(owner, nn.MultiheadAttention)
        ]
        inside = {
            self._anatomy.names.get(id(p)) for owner in owners for p in owner.parameters()
        }
        if not set(self._plan) <= inside:
            with self:
                yield
            return
        with ExitStack() as stack:
            for owner in owners:
                stack.enter_context(self._around(owner))
            yield

    @contextmanager
    def _around(self, owner: nn.Module) -> Generator[None]:
        forward = owner.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        with another_forward(owner, watched):
            yield

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called by torch for every operation within.

        Args:
            func: the operation.
            types: not needed.
            args: its arguments.
            kwargs: its named arguments.

        Returns:
            What the operation returns, tapped.
        """
        del types
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            query = args[0] if args else kwargs["query"]
            self._attending.append(query.shape[1] if query.ndim == 3 else 1)
            try:
                with self:
                    return _without_dispatch(func)(*args, **kwargs)
            finally:
                self._attending.pop()
        result = func(*args, **kwargs)
        see = self._watcher(func)
        if see is None or not isinstance(result, Tensor) or not torch.is_grad_enabled():
            return result
        named = {**kwargs}
        if "input" in named:  # the first argument of all functions that are watched
            args = (named.pop("input"), *args)
        return see(result, *args, **named)

    def _watcher(self, func: Any) -> Callable[..., Tensor] | None:
        if func is functional.linear:
            return self._linear
        if func is functional.embedding:
            return self._embedding
        if func is functional.layer_norm:
            return self._layer_norm
        return self._given_out if func in {Tensor.expand, Tensor.repeat} else None

    def _linear(
        self, result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        of_weight, of_bias = self._part(weight), self._part(bias)
        if of_weight is None and of_bias is None:
            return result
        samples, length = self._samples(of_weight, of_bias)
        if not self._fit(result, samples, length, of_weight, of_bias):
            self._refuse(of_weight, of_bias)
            return result

        def at_output(kept: tuple[Any, ...], gradient: Tensor) -> None:
            backprops = self._by_sample(gradient, samples, length)
            if of_weight is not None and of_weight.name not in self._refused:
                dtype = weight.dtype
                inputs = self._by_sample(kept[0], samples, length).to(dtype)
                rows = of_weight.padded(backprops.to(dtype))
                self._emit(FactoredBlock(of_weight.name, inputs, rows))
            if of_bias is not None and of_bias.name not in self._refused:
                sums = of_bias.padded(backprops.sum(1))
                self._emit(DenseBlock(of_bias.name, sums.to(weight.dtype)))

        return self._tape.tap("linear", result, (x,), at_output)

    def _embedding(
        self,
        result: Tensor,
        tokens: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        *others: Any,
        **named: Any,
    ) -> Tensor:
        del others, named
        part = self._part(weight)
        if part is None:
            return result
        samples, length = self._samples(part)
        if part.start or part.behind or not self._fit(result, samples, length, part):
            self._refuse(part)
            return result
        skipped = padding_idx

        def at_output(kept: tuple[Any, ...], gradient: Tensor) -> None:
            if part.name in self._refused:
                return
            backprops = self._by_sample(gradient, samples, length).to(weight.dtype)
            rows = self._by_sample(kept[0].unsqueeze(-1), samples, length).squeeze(-1)
            if skipped is not None:
                padding = skipped if skipped >= 0 else skipped + len(weight)
                backprops = backprops * (rows != padding).unsqueeze(-1)
            self._emit(IndexedBlock(part.name, rows, backprops, len(weight)))

        return self._tape.tap("embedding", result, (tokens,), at_output)

    def _layer_norm(
        self,
        result: Tensor,
        x: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        of_weight, of_bias = self._part(weight), self._part(bias)
        if of_weight is None and of_bias is None:
            return result
        samples, length = self._samples(of_weight, of_bias)
        fits = self._fit(result, samples, length, of_weight, of_bias)
        if not fits or len(normalized_shape) != 1:
            self._refuse(of_weight, of_bias)
            return result

        def at_output(kept: tuple[Any, ...], gradient: Tensor) -> None:
            normal = functional.layer_norm(kept[0], normalized_shape, eps=eps)
            for part, values in ((of_weight, gradient * normal), (of_bias, gradient)):
                if part is not None and part.name not in self._refused:
                    sums = self._by_sample(values, samples, length).sum(1)
                    dtype = self._anatomy.parameters[part.name].dtype
                    self._emit(DenseBlock(part.name, part.padded(sums).to(dtype)))

        return self._tape.tap("layer_norm", result, (x,), at_output)

    def _given_out(
        self, result: Tensor, value: Tensor, *sizes: Any, **named: Any
    ) -> Tensor:
        # the model itself gives a parameter out, once a sample
        del sizes, named
        part = self._part(value)
        if part is None:
            return result
        samples, length = self._samples(part)
        whole = not part.start and not part.behind
        count = self._num_samples if length is None else length
        if (
            not whole
            or not self._fit(result, samples, length, part)
            or result.numel() != count * value.numel()
        ):
            self._refuse(part)
            return result

        def at_output(kept: tuple[Any, ...], gradient: Tensor) -> None:
            del kept
            if part.name in self._refused:
                return
            flat = gradient if length is None else gradient.movedim(1, 0)
            rows = flat.reshape(self._num_samples, -1, value.numel()).sum(1)
            self._emit(DenseBlock(part.name, rows.to(value.dtype)))

        return self._tape.tap("expand", result, (), at_output)

    def _part(self, tensor: Any) -> Part | None:
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) in self._anatomy.names:
            name = self._anatomy.names[id(tensor)]
            return Part(name, 0, 0) if name in self._plan else None
        base = tensor._base  # noqa: SLF001 - what a slice was cut from
        name = None if base is None else self._anatomy.names.get(id(base))
        if name is None or name not in self._plan:
            return None
        whole = self._anatomy.parameters[name]
        offset = tensor.storage_offset() - whole.storage_offset()
        same = tensor.shape[1:] == whole.shape[1:] and tensor.stride() == whole.stride()
        if not same or not tensor.ndim or offset % whole.stride(0):
            return None
        start = int(offset // whole.stride(0))
        return Part(name, start, len(whole) - start - len(tensor))

    def _samples(self, *parts: Part | None) -> tuple[Samples, int | None]:
        # where samples are, and the batch length inside attention
        name = next(part.name for part in parts if part is not None)
        length = self._attending[-1] if self._attending else None
        return self._plan[name].samples, length

    def _fit(
        self, result: Tensor, samples: Samples, length: int | None, *parts: Part | None
    ) -> bool:
        axis = 1 if samples == "second" and length is None else 0
        first, second, *_ = (*result.shape[:-1], 0, 0)
        if length is not None:  # [l, length, d] or [l * length, d]
            first = length
        fits = True
        for part in parts:  # each is noted
            if part is not None:
                place = f"function of {part.name}"
                fits &= self._ledger.note(place, (first, second), axis)
        return fits

    def _by_sample(self, tensor: Tensor, samples: Samples, length: int | None) -> Tensor:
        if length is not None:
            tensor = tensor.reshape(-1, length, tensor.shape[-1]).transpose(0, 1)
        elif samples == "second":
            tensor = tensor.transpose(0, 1)
        return tensor.reshape(self._num_samples, -1, tensor.shape[-1])

    def _refuse(self, *parts: Part | None) -> None:
        self._refused.update(part.name for part in parts if part is not None)


def _never(tensors: Any) -> bool:
    del tensors
    return False


@cache
def _without_dispatch(func: Any) -> Callable[..., Any]:
    """A copy of a Python function of torch that runs its body under the mode.

    The original would hand itself to the mode again, without end.

    Args:
        func: the function.

    Returns:
        The copy.
    """
    scope = {**func.__globals__, "has_torch_function": _never}
    copy = types.FunctionType(
        func.__code__, scope, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
