"""What every projector offers, and the part that consumes gradient blocks."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from trak.arguments import MOST, as_integer
from trak.blocks import Block, DenseBlock, Sink
from trak.errors import InputError
from trak.projectors import counter
from trak.utils import vectorize
from trak.whitening import Whitening


class ProjectionType(str, Enum):
    """Distribution of a projection's entries."""

    normal = "normal"
    rademacher = "rademacher"
    sparse = "sparse"
    factored = "factored"
    hadamard = "hadamard"
    masked = "masked"
    leading = "leading"


def resolve_device(device: str | torch.device | None) -> torch.device:
    """CUDA where it is present and nothing was asked for, else the CPU.

    Args:
        device: what the user asked for.

    Returns:
        The device.

    Raises:
        InputError: if there is no such device, or it was asked for and is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise InputError(
            f"device must be one of torch's, such as 'cpu', 'cuda' or 'cuda:1', got "
            f"{device!r}. Leave it out for CUDA where present, else the CPU."
        ) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device='cuda' was asked for, but this machine has no CUDA device that "
            "torch can see. Use device='cpu', or leave device out."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device='{device}' was asked for, but torch sees {torch.cuda.device_count()} "
            "CUDA devices, numbered from 0."
        )
    return device


class AbstractProjector(ABC):
    """Maps per-sample gradients `[b, p]` to `[b, k]`.

    A subclass of one's own needs `project` only.

    Attributes:
        grad_dim: number of parameters `p`.
        proj_dim: projection dimension `k`; 0 means "as wide as the gradient".
        seed: seed of the random entries.
        proj_type: distribution of the entries.
        device: where to project.
    """

    @abstractmethod
    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device | None,
    ) -> None:
        self.grad_dim = grad_dim
        self.proj_dim = proj_dim
        self.seed = as_integer("seed", seed)
        self.proj_type = proj_type
        self.device = resolve_device(device)

    @abstractmethod
    def project(self, grads: Tensor | Mapping[str, Tensor], model_id: int) -> Tensor:
        """Projects a batch of gradients.

        Args:
            grads: `[b, p]`, or name to gradient `[b, ...]`.
            model_id: the checkpoint, which chooses the random matrix.

        Returns:
            `[b, k]`.
        """

    @property
    def random_dim(self) -> int:
        """Columns whose entries are random, `k`; 0 where nothing is left to chance."""
        return self.proj_dim

    def free_memory(self) -> None:  # noqa: B027 - nothing to drop unless overridden
        """Drops what can be computed again."""


class BlockProjector(AbstractProjector):
    """A projection whose entries are a function of their place.

    Entry (row, column) of a parameter's matrix depends on the seed, the checkpoint, the
    parameter's name, the row and the column, and on nothing else. Entries have mean 0
    and variance 1, so that `E<P^T x, P^T y> = k <x, y>` (unscaled, as upstream).

    Attributes:
        layout: name to number of scalars of every parameter, in order. Without a layout
            the gradient is one nameless parameter.
        forms_gradients: whether a layer's gradient is multiplied out on the way.

    Raises:
        InputError: if an argument cannot be used, or the layout is not `grad_dim` long.
    """

    forms_gradients = True

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device | None,
        layout: Mapping[str, int] | None = None,
    ) -> None:
        proj_dim = as_integer("proj_dim", proj_dim, least=1, most=MOST)
        if layout is not None and sum(layout.values()) != grad_dim:
            total = sum(layout.values())
            raise InputError(
                f"layout must hold as many scalars as grad_dim={grad_dim}, got {total}."
            )
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)
        self.layout = None if layout is None else dict(layout)
        self._cached_model_id: int | None = None

    @abstractmethod
    def matrix(self, name: str, num_rows: int, model_id: int) -> Tensor:
        """One parameter's projection matrix, written out: the definition.

        Args:
            name: the parameter's name.
            num_rows: number of scalars of the parameter, `p`.
            model_id: the checkpoint.

        Returns:
            `[p, k]`, float32.
        """

    @abstractmethod
    def add(self, block: DenseBlock, out: Tensor, model_id: int) -> None:
        """Adds `block.gradient @ matrix(block.name, p, model_id)` to `out`.

        Args:
            block: per-sample gradients of one parameter, float32 or float64.
            out: `[b, k]`, float32 or float64.
            model_id: the checkpoint.
        """

    def settings(self) -> dict[str, Any]:
        """What the entries depend on, for the store's fingerprint.

        Returns:
            JSON values.
        """
        return {
            "kind": ProjectionType(self.proj_type).value,
            "proj_dim": self.proj_dim,
            "seed": int(self.seed),
            "generator": counter.VERSION,
            "by_name": self.layout is not None,
        }

    def sink(self, out: Tensor, model_id: int) -> Sink:
        """A consumer of blocks that adds each block's projection to `out`.

        Args:
            out: `[b, k]`, zeros to begin with.
            model_id: the checkpoint.

        Returns:
            A function to hand to a gradient computer.
        """

        def consume(block: Block) -> None:
            gradient = block.dense().gradient.detach().to(out.device, out.dtype)
            self.add(DenseBlock(block.name, gradient), out, model_id)

        return consume

    @contextmanager
    def gathering(
        self, out: Tensor, model_id: int, whitening: Whitening | None = None
    ) -> Generator[Sink]:
        """Like `sink`, for the blocks of one whole batch; `out` is complete at the end.

        Args:
            out: `[b, k]`, to which the projection is added.
            model_id: the checkpoint.
            whitening: is done to the gradients before.

        Yields:
            A function to hand to a gradient computer.
        """
        consume = self.sink(out, model_id)
        yield consume if whitening is None else lambda b: consume(whitening.apply(b))

    def project(self, grads: Tensor | Mapping[str, Tensor], model_id: int) -> Tensor:
        """Projects a batch of gradients.

        Args:
            grads: `[b, p]`, or name to gradient `[b, ...]`.
            model_id: the checkpoint, which chooses the random matrix.

        Returns:
            `[b, k]`; float64 for float64 gradients, else float32.

        Raises:
            InputError: if the gradient is not `grad_dim` wide.
        """
        blocks = list(self._blocks(grads))
        width = sum(block.gradient.shape[1] for block in blocks)
        if width != self.grad_dim:
            raise InputError(
                f"The projector was made for gradients of width {self.grad_dim}, "
                f"got {width}. Make one with grad_dim={width}."
            )
        double = any(block.gradient.dtype is torch.float64 for block in blocks)
        out = torch.zeros(
            (blocks[0].gradient.shape[0], self.proj_dim),
            dtype=torch.float64 if double else torch.float32,
            device=self.device,
        )
        with self.gathering(out, model_id) as sink:
            for block in blocks:
                sink(block)
        return out

    def _turn_to(self, model_id: int) -> None:
        # what was generated belongs to one checkpoint
        if model_id != self._cached_model_id:
            self.free_memory()
            self._cached_model_id = model_id

    def _blocks(self, grads: Tensor | Mapping[str, Tensor]) -> Iterable[DenseBlock]:
        if isinstance(grads, Mapping):
            if self.layout is None:
                yield DenseBlock("", vectorize(grads))
                return
            for name, gradient in grads.items():
                yield DenseBlock(name, gradient.reshape(len(gradient), -1))
        elif self.layout is None or grads.shape[1] != self.grad_dim:
            yield DenseBlock("", grads)
        else:
            pieces = grads.split(list(self.layout.values()), dim=1)
            for name, piece in zip(self.layout, pieces, strict=True):
                yield DenseBlock(name, piece)
