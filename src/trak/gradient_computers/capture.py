"""What one forward pass leaves behind for its backward pass.

A tensor hook on an output gets the gradient there; the inputs are kept in its closure.
(`register_full_backward_hook` with one slot a module is wrong for modules that run twice
and for in-place activations.) Weights are frozen meanwhile, so that the backward pass
forms activation gradients only.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trak.errors import UnsupportedModuleError

HALVES = frozenset({torch.float16, torch.bfloat16})
Listener = Callable[[tuple[Any, ...], Tensor], None]


@contextmanager
def asking(
    parameters: Iterable[nn.Parameter], chosen: Collection[nn.Parameter] = ()
) -> Generator[None]:
    """Runs a block in which only some parameters ask for a gradient.

    Args:
        parameters: the parameters; every one gets its flag back at the end.
        chosen: those that ask for a gradient.

    Yields:
        Nothing.
    """
    wanted = {id(p) for p in chosen}
    changed = [p for p in parameters if p.requires_grad != (id(p) in wanted)]
    try:
        for parameter in changed:
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(id(parameter) not in wanted)


class Tape:
    """Where the graph begins, and who listens to which gradient.

    Args:
        keep_copies: copy the inputs, for models that change them in place.

    Attributes:
        met_halves: whether an output was in half precision, as under autocast.
    """

    def __init__(self, *, keep_copies: bool = False) -> None:
        self.met_halves = False
        self._keep_copies = keep_copies
        self._roots: list[Tensor] = []

    def tap(
        self, where: str, output: Tensor, inputs: tuple[Any, ...], listener: Listener
    ) -> Tensor:
        """Listens to the gradient at an output.

        Args:
            where: what computed it, for messages.
            output: the output.
            inputs: what it was computed from.
            listener: called in the backward pass with the inputs, detached, and the
                gradient; once for every call of this method that a gradient reaches.

        Returns:
            What must be handed on in the output's place.
        """
        self.met_halves |= output.dtype in HALVES
        if not output.requires_grad:
            # where the graph begins: a leaf, and a copy that may be changed in place
            root = output.detach().requires_grad_()
            self._roots.append(root)
            output = root.clone()
        kept = [self._keep(x) for x in inputs]
        versions = _versions(kept)

        def at_output(gradient: Tensor) -> None:
            if _versions(kept) != versions:
                raise InputChangedError(where)
            values = tuple(kept)
            kept.clear()  # the graph keeps this function until the whole pass is over
            listener(values, gradient)

        output.register_hook(at_output)
        return output

    def leaf(self, value: Tensor, listener: Callable[[Tensor], None]) -> Tensor:
        """Makes a leaf of the graph and listens to its gradient.

        Args:
            value: its value; may be an expanded view.
            listener: called with the whole gradient.

        Returns:
            The leaf.
        """
        leaf = value.detach().requires_grad_()
        self._roots.append(leaf)
        leaf.register_hook(listener)
        return leaf

    def backward(
        self, outputs: Tensor, also: Sequence[Tensor] = ()
    ) -> tuple[Tensor | None, ...]:
        """Sends one backward pass through everything that was taped.

        Args:
            outputs: one model output a sample, `[b]`.
            also: further leaves.

        Returns:
            The gradients of the further leaves; None for those not reached.
        """
        wanted = [*self._roots, *also]
        self._roots.clear()
        if not wanted or not outputs.requires_grad:
            return (None,) * len(also)
        found = torch.autograd.grad(outputs.sum(), wanted, allow_unused=True)
        return found[len(wanted) - len(also) :]

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        return value.clone() if self._keep_copies else value


def _versions(values: Sequence[Any]) -> list[int]:
    return [x._version if isinstance(x, Tensor) else 0 for x in values]  # noqa: SLF001


class InputChangedError(UnsupportedModuleError):
    """A layer's input was changed in place after the layer had read it.

    Args:
        name: the layer.
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The input of layer {name!r} was changed in place after the layer had read it."
        )
