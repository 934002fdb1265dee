"""No projection: rows are the gradients themselves."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from trak.blocks import Block, Sink
from trak.projectors.abstract import AbstractProjector, ProjectionType
from trak.utils import vectorize
from trak.whitening import Whitening


class NoOpProjector(AbstractProjector):
    """Returns the gradients as they are; `k` is then the number of parameters.

    Args:
        grad_dim: number of parameters; not needed.
        proj_dim: 0, for "as wide as the gradient".
        seed: not used.
        proj_type: not used.
        device: where the rows should be.
    """

    def __init__(
        self,
        grad_dim: int = 0,
        proj_dim: int = 0,
        seed: int = 0,
        proj_type: str | ProjectionType = "na",
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)

    def project(self, grads: Tensor | Mapping[str, Tensor], model_id: int) -> Tensor:  # noqa: ARG002
        """Flattens the gradients and changes nothing else.

        Args:
            grads: `[b, p]`, or name to gradient `[b, ...]`.
            model_id: not used.

        Returns:
            `[b, p]`.
        """
        return vectorize(grads) if isinstance(grads, Mapping) else grads

    @contextmanager
    def gathering(
        self, out: Tensor, layout: Mapping[str, int], whitening: Whitening | None = None
    ) -> Generator[Sink]:
        """Puts the blocks of one whole batch into their places.

        Args:
            out: zeros, `[b, p]`; complete at the end.
            layout: name to number of scalars of every parameter, in order.
            whitening: is done to the gradients before.

        Yields:
            A function to hand to a gradient computer.
        """
        places = dict(zip(layout, out.split(list(layout.values()), dim=1), strict=True))

        def consume(block: Block) -> None:
            block = block if whitening is None else whitening.apply(block)
            gradient = block.dense().gradient.detach()
            places[block.name].add_(gradient.to(out.device, out.dtype))

        yield consume
