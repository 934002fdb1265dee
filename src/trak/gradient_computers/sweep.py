"""One forward and one backward pass over a batch, by a plan."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trak.blocks import Block, DenseBlock, Sink
from trak.errors import InputError, UnsupportedModuleError
from trak.gradient_computers.capture import Tape, asking
from trak.gradient_computers.functions import FunctionWatch
from trak.gradient_computers.lengths import Ledger, Shapes
from trak.gradient_computers.plan import Anatomy, Layer, Placement, Plan, Samples
from trak.gradient_computers.rules import LayerCall
from trak.precision import without_autocast


class Sweep:
    """Emits blocks for the parameters that a plan takes from layers, functions, leaves.

    Args:
        anatomy: the model's parameters.
        plan: name to way; names that are left out, or exact, are not emitted.
        num_samples: `b`.
        sink: consumes the blocks.
        keep_copies: copy layer inputs, for models that change them in place.
        strict: a rule that emits nothing for a wanted parameter is an error.
        alone: the lengths that one sample gives, to hold the batch's against.

    Attributes:
        refused: parameters whose layers met shapes that the plan does not cover; nothing
            was emitted for them.
        used: parameters that were not seen so far and have a gradient in this batch.
        balanced: parameters that were not seen so far and that the outputs depend on, whose
            samples' gradients add up to zero.
        in_backward: whether the forward pass went through, so that the sink may have
            received blocks.
        tape: what the forward pass left.
        ledger: the lengths of layer outputs.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        plan: Plan,
        num_samples: int,
        sink: Sink,
        *,
        keep_copies: bool = False,
        strict: bool = True,
        alone: Shapes | None = None,
    ) -> None:
        self._anatomy = anatomy
        self._plan = plan
        self._num_samples = num_samples
        self._sink = sink
        self._strict = strict
        self.tape = Tape(keep_copies=keep_copies)
        self.ledger = Ledger(num_samples, alone)
        self.refused: set[str] = set()
        self.used: set[str] = set()
        self.balanced: set[str] = set()
        self.in_backward = False

    def run(self, outputs: Callable[[], Tensor]) -> Tensor:
        """Runs the passes.

        Args:
            outputs: runs the model, `[b]`.

        Returns:
            The outputs, detached.
        """
        parameters = self._anatomy.parameters
        unseen = [n for n, way in self._plan.items() if way.kind == "unseen"]
        watched = [parameters[name] for name in unseen]
        with self._watching(watched) as stack:
            result = outputs()
            _check_outputs(result, self._num_samples)
            self.in_backward = True
            # rules and the sink compute in the parameters' dtype
            stack.enter_context(without_autocast())
            totals = self.tape.backward(result, watched)
        for name, total in zip(unseen, totals, strict=True):
            if total is not None:
                (self.used if bool(total.any()) else self.balanced).add(name)
        return result.detach()

    def look(self, outputs: Callable[[], Tensor]) -> Ledger:
        """Runs the forward pass only.

        Args:
            outputs: runs the model, `[b]`.

        Returns:
            The lengths of layer outputs.
        """
        with self._watching([]):
            outputs()
        return self.ledger

    @contextmanager
    def _watching(self, watched: list[nn.Parameter]) -> Generator[ExitStack]:
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(asking(self._anatomy.model.parameters(), watched))
            stack.enter_context(self._layers())
            stack.enter_context(self._leaves())
            stack.enter_context(self._functions())
            yield stack

    @contextmanager
    def _layers(self) -> Generator[None]:
        with ExitStack() as stack:
            for path, layer in self._anatomy.layers.items():
                wanted: dict[Samples, dict[str, str]] = defaultdict(dict)
                for key, name in layer.names.items():
                    way = self._plan.get(name)
                    if way is not None and way.kind == "layer":
                        wanted[way.samples][key] = name
                for samples, names in wanted.items():
                    hook = self._hook(path, layer, samples, names)
                    handle = layer.module.register_forward_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
            yield

    def _hook(
        self, path: str, layer: Layer, samples: Samples, names: dict[str, str]
    ) -> Callable[..., Tensor | None]:
        def after_forward(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            output = self._given_out(path, output, samples)
            if output is None:
                self.refused.update(names.values())
                return None
            inputs = _positional(module, args, kwargs)

            def at_output(kept: tuple[Any, ...], gradient: Tensor) -> None:
                self._by_rule(layer, samples, names, kept, gradient)

            return self.tape.tap(path, output, inputs, at_output)

        return after_forward

    def _given_out(self, path: str, output: Any, samples: Samples) -> Tensor | None:
        # with a sample axis if the batch shares it, so that gradients are not summed over
        # the batch; None if it has another shape than expected
        if not isinstance(output, Tensor):
            return None
        if samples == "added":
            return output.unsqueeze(0).expand(self._num_samples, *output.shape)
        shared = samples == "shared" and output.shape[:1] == (1,)
        axis = 1 if samples == "second" else 0
        if not self.ledger.fits(path, output, axis, shared=shared):
            return None
        return output.expand(self._num_samples, *output.shape[1:]) if shared else output

    def _by_rule(
        self,
        layer: Layer,
        samples: Samples,
        names: dict[str, str],
        inputs: tuple[Any, ...],
        backprops: Tensor,
    ) -> None:
        wanted = {key: name for key, name in names.items() if name not in self.refused}
        if not wanted:
            return
        dtype = self._anatomy.parameters[next(iter(wanted.values()))].dtype
        with torch.no_grad():
            inputs = tuple(
                _in_dtype(_by_sample(x, samples, self._num_samples), dtype) for x in inputs
            )
            if samples == "second":
                backprops = backprops.transpose(0, 1)
            backprops = _in_dtype(backprops, dtype)
            call = LayerCall(layer.module, inputs, backprops, wanted, self._num_samples)
            missing = set(wanted.values())
            for block in layer.rule(call):
                missing.discard(block.name)
                self._sink(block)
        if missing and self._strict:
            raise UnsupportedModuleError(
                f"The rule for {type(layer.module).__name__} emitted no block for "
                f"{sorted(missing)}, which it did on the first samples. A rule yields a "
                "block for each of call.names, or for none of them ever."
            )

    @contextmanager
    def _leaves(self) -> Generator[None]:
        with ExitStack() as stack:
            for name, way in self._plan.items():
                if way.kind == "leaf" and way.placement is not None:
                    leaf = self._leaf(name, way.placement)
                    stack.enter_context(shadowed(self._anatomy.places[name], leaf))
            yield

    def _leaf(self, name: str, placement: Placement) -> Tensor:
        def at_leaf(gradient: Tensor) -> None:
            rows = gradient.movedim(placement.axis, 0).reshape(self._num_samples, -1)
            self._emit(DenseBlock(name, rows))

        value = placement.expand(self._anatomy.parameters[name].detach(), self._num_samples)
        return self.tape.leaf(value, at_leaf)

    @contextmanager
    def _functions(self) -> Generator[None]:
        wanted = {n: way for n, way in self._plan.items() if way.kind == "function"}
        if not wanted:
            yield
            return
        watch = FunctionWatch(
            self._anatomy,
            wanted,
            self._num_samples,
            self.tape,
            self._emit,
            self.refused,
            self.ledger,
        )
        with watch.watching():
            yield

    def _emit(self, block: Block) -> None:
        with torch.no_grad():
            self._sink(block)


@contextmanager
def shadowed(places: list[tuple[nn.Module, str]], value: Tensor) -> Generator[None]:
    """Lets modules see another tensor in a parameter's place.

    An attribute of the instance hides the parameter, which `nn.Module.__getattr__` is only
    asked for where there is none.

    Args:
        places: (module, own name).
        value: the tensor.

    Yields:
        Nothing.
    """
    done: list[tuple[nn.Module, str]] = []
    try:
        for module, key in places:
            module.__dict__[key] = value
            done.append((module, key))
        yield
    finally:
        for module, key in done:
            module.__dict__.pop(key, None)


def _check_outputs(outputs: Any, num_samples: int) -> None:
    if not isinstance(outputs, Tensor) or outputs.shape != (num_samples,):
        shape = getattr(outputs, "shape", type(outputs).__name__)
        raise InputError(
            "get_batch_output must return one number a sample, "
            f"[{num_samples}]; got {shape if isinstance(shape, str) else tuple(shape)}."
        )


def _positional(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    if not kwargs:
        return args
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args


def _by_sample(value: Any, samples: Samples, num_samples: int) -> Any:
    # a layer's input with the sample axis in front
    if not isinstance(value, Tensor) or not value.ndim or samples == "first":
        return value
    if samples == "second":
        return value.transpose(0, 1) if value.ndim > 1 else value
    if samples == "added":
        return value.unsqueeze(0).expand(num_samples, *value.shape)
    return value.expand(num_samples, *value.shape[1:]) if len(value) == 1 else value


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    # autocast computes in another than the parameter's
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(dtype)
