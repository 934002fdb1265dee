"""Gradients of some samples in their smaller form, as arrays that a file can hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.blocks import Block, DenseBlock, FactoredBlock, IndexedBlock
from trak.projectors.pairs import KeptBlock, cost, merged, products, smaller
from trak.whitening import Whitening

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Part:
    """Gradients of samples whose layers have the same numbers of positions.

    Attributes:
        rows: the samples' row numbers, `[b]`.
        arrays: for each parameter `{name}` with a gradient `gradient/{name}` (`[b, p]`),
            `left/{name}` and `right/{name}` (`[b, s, o]` and `[b, s, i]`), or
            `indices/{name}`, `entries/{name}` and `table/{name}` (`[b, s]`, `[b, s, o]`
            and the table's rows `[]`); bfloat16 as its bits, uint16.
    """

    rows: NDArray[np.int64]
    arrays: Arrays

    def names(self) -> set[str]:
        """The parameters with a gradient.

        Returns:
            Their names.
        """
        return {key.partition("/")[2] for key in self.arrays}

    def blocks(self, name: str, device: torch.device) -> list[KeptBlock]:
        """One parameter's gradients.

        Args:
            name: the parameter.
            device: where to.

        Returns:
            Blocks whose sum they are.
        """
        found: list[KeptBlock] = []

        def read(kind: str) -> Tensor:
            return _tensor(self.arrays[f"{kind}/{name}"]).to(device)

        if f"gradient/{name}" in self.arrays:
            found.append(DenseBlock(name, read("gradient")))
        if f"left/{name}" in self.arrays:
            found.append(FactoredBlock(name, read("right"), read("left")))
        if f"entries/{name}" in self.arrays:
            num_rows = int(self.arrays[f"table/{name}"])
            found.append(IndexedBlock(name, read("indices"), read("entries"), num_rows))
        return found

    def size(self) -> int:
        """Bytes that grow with the number of samples.

        Returns:
            Those of all arrays, without the tables' sizes.
        """
        each = (array.nbytes for array in self.arrays.values() if array.ndim)
        return self.rows.nbytes + sum(each)


class Collector:
    """A consumer of one piece's blocks, which keeps them.

    Args:
        whitening: is done to the gradients; None for nothing.
    """

    def __init__(self, whitening: Whitening | None) -> None:
        self._whitening = whitening
        self._blocks: dict[str, list[KeptBlock]] = {}
        self._largest: Tensor | None = None

    def __call__(self, block: Block) -> None:
        """Keeps a block in the smaller of its forms, in the computer's own memory.

        Args:
            block: gradients of one parameter.
        """
        kept = smaller(_detached(block))
        if self._whitening is not None:
            kept = smaller(self._whitening.apply(kept))
        for tensor in _floats(kept):
            if tensor.numel():
                largest = tensor.abs().flatten(1).amax(dim=1).to("cpu", torch.float64)
                known = self._largest
                self._largest = largest if known is None else known + largest
        self._blocks.setdefault(block.name, []).append(_copied(kept))

    def largest(self, num_samples: int) -> Tensor:
        """A number for each sample that is finite if its gradient is.

        Args:
            num_samples: `b`.

        Returns:
            `[b]`, float64.
        """
        if self._largest is None:
            return torch.zeros(num_samples, dtype=torch.float64, device="cpu")
        return self._largest

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What was kept, as `Part` has it.

        Returns:
            Name to array.
        """
        found: dict[str, NDArray[Any]] = {}
        for name, blocks in self._blocks.items():
            for block in merged(blocks):
                if isinstance(block, DenseBlock):
                    found[f"gradient/{name}"] = _array(block.gradient)
                elif isinstance(block, FactoredBlock):
                    found[f"left/{name}"] = _array(block.backprops)
                    found[f"right/{name}"] = _array(block.activations)
                else:
                    found[f"indices/{name}"] = _array(block.indices)
                    found[f"entries/{name}"] = _array(block.backprops)
                    found[f"table/{name}"] = np.array(block.num_rows)
        return found


def kernel(one: Part, other: Part, device: torch.device) -> Tensor:
    """Inner products of all gradients, one parameter at a time.

    Args:
        one: `b` samples.
        other: `b'` samples.
        device: where to compute.

    Returns:
        `[b, b']`, float64.
    """
    total = torch.zeros(len(one.rows), len(other.rows), dtype=torch.float64, device=device)
    for name in sorted(one.names() & other.names()):
        blocks = one.blocks(name, device)
        others = blocks if other is one else other.blocks(name, device)
        for block in blocks:
            for another in others:
                total += products(block, another)
    return total


def kernel_products(one: Part, other: Part) -> float:
    """Multiplications of `kernel`.

    Args:
        one: some samples.
        other: others.

    Returns:
        Their number.
    """
    cpu = torch.device("cpu")
    return sum(
        cost(block, another)
        for name in one.names() & other.names()
        for block in one.blocks(name, cpu)
        for another in other.blocks(name, cpu)
    )


def _detached(block: Block) -> Block:
    if isinstance(block, DenseBlock):
        return DenseBlock(block.name, block.gradient.detach())
    return block


def _floats(block: KeptBlock) -> list[Tensor]:
    if isinstance(block, DenseBlock):
        return [block.gradient]
    if isinstance(block, FactoredBlock):
        return [block.activations, block.backprops]
    return [block.backprops]


def _copied(block: KeptBlock) -> KeptBlock:
    # what a layer read or was given may be part of something larger, or change later
    name = block.name
    if isinstance(block, DenseBlock):
        return DenseBlock(name, _copy(block.gradient))
    back = _copy(block.backprops)
    if isinstance(block, FactoredBlock):
        return FactoredBlock(name, _copy(block.activations), back)
    return IndexedBlock(name, _copy(block.indices), back, block.num_rows)


def _copy(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(
        tensor.detach()
    )


def _array(tensor: Tensor) -> NDArray[Any]:
    if tensor.dtype is torch.bfloat16:  # NumPy has none: its bits
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def _tensor(array: NDArray[Any]) -> Tensor:
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
