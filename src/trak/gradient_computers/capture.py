"""Watching layers during one forward and one backward pass, and leaving no trace.

A forward hook puts a tensor hook on the layer's output and keeps the layer's input in
its closure. (`register_full_backward_hook` with one slot a module is wrong for modules
that run twice and for in-place activations.) The weights are frozen meanwhile, so that
the backward pass forms activation gradients only.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trak.errors import UnsupportedModuleError

Listener = Callable[[str, tuple[Any, ...], Tensor], None]


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Generator[None]:
    """Runs a block with parameters that ask for no gradient, and restores them.

    Args:
        parameters: the parameters.

    Yields:
        Nothing.
    """
    asking = [p for p in parameters if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


class Capture:
    """One forward and backward pass over watched layers.

    Args:
        layers: name to layer.
        listener: called in the backward pass with a layer's name, its inputs and the
            gradient at its output; once for every time the layer ran.
        num_samples: `b`.
        keep_copies: copy the inputs, for models that change them in place.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        listener: Listener,
        num_samples: int,
        *,
        keep_copies: bool = False,
    ) -> None:
        self._layers = layers
        self._listener = listener
        self._num_samples = num_samples
        self._keep_copies = keep_copies
        self._roots: list[Tensor] = []

    @contextmanager
    def watching(self) -> Generator[None]:
        """Attaches the hooks, and removes them whatever happens.

        Yields:
            Nothing.
        """
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                handle = layer.register_forward_hook(self._hook(name))
                stack.callback(handle.remove)
            yield

    def backward(self, outputs: Tensor) -> None:
        """Sends one backward pass through everything that was watched.

        Args:
            outputs: one model output a sample, `[b]`.
        """
        if self._roots:
            torch.autograd.grad(outputs.sum(), self._roots, allow_unused=True)
        self._roots.clear()

    def _hook(self, name: str) -> Callable[..., Tensor | None]:
        def after_forward(
            layer: nn.Module, inputs: tuple[Any, ...], output: Any
        ) -> Tensor | None:
            del layer
            if not isinstance(output, Tensor) or not torch.is_grad_enabled():
                return None
            rooted = output
            if output.shape[:1] == (1,) and self._num_samples > 1:
                # what the batch shares, such as position embeddings, is given out once a
                # sample, so that its gradient is not summed over the batch
                rooted = output = output.expand(self._num_samples, *output.shape[1:])
            if not output.requires_grad:
                # where the graph begins: a leaf, and a copy that may be changed in place
                root = output.detach().requires_grad_()
                self._roots.append(root)
                rooted = root.clone()
            kept = tuple(self._keep(x) for x in inputs)
            versions = [x._version if isinstance(x, Tensor) else 0 for x in kept]  # noqa: SLF001

            def at_output(gradient: Tensor) -> None:
                now = [x._version if isinstance(x, Tensor) else 0 for x in kept]  # noqa: SLF001
                if now != versions:
                    raise InputChangedError(name)
                self._listener(name, kept, gradient)

            rooted.register_hook(at_output)
            return rooted

        return after_forward

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.clone() if self._keep_copies else value


class InputChangedError(UnsupportedModuleError):
    """A layer's input was changed in place after the layer had read it.

    Args:
        name: the layer.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The input of layer {name!r} was changed in place after the layer had read it."
        )
