"""Subsampled randomised Hadamard transform."""

from collections.abc import Mapping

import torch
from torch import Tensor

from trak.blocks import DenseBlock
from trak.errors import InputError
from trak.projectors import counter
from trak.projectors.abstract import BlockProjector, ProjectionType

_LONGEST = 1 << 14


class HadamardProjector(BlockProjector):
    """Random signs, a Walsh-Hadamard transform, and `k` of its entries at random.

    Entry (row `j`, column `c`) is `s_j (-1)^popcount(j & t_c)` with random signs `s_j` and
    places `t_c` drawn without replacement: mean 0, variance 1, so that
    `E<P^T x, P^T y> = k <x, y>`. Ailon and Chazelle 2006, "Approximate nearest neighbors
    and the fast Johnson-Lindenstrauss transform", Sec. 2; subsampling: Tropp 2011,
    "Improved analysis of the subsampled randomized Hadamard transform", Sec. 1.2.

    Parameters are cut into blocks of at most 2^14 entries (more where `k` is), each padded
    to a power of two that is at least `k`, with signs and places of its own. A block of
    `d` entries costs about `4 d^1.5` multiplications whatever `k` is.

    Args:
        grad_dim: number of parameters `p`.
        proj_dim: projection dimension `k`.
        seed: seed of the entries.
        proj_type: `"hadamard"`.
        device: where to project.
        layout: name to number of scalars of every parameter.

    Raises:
        InputError: if an argument cannot be used, or the layout is not `grad_dim` long.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int = 0,
        proj_type: str | ProjectionType = ProjectionType.hadamard,
        device: str | torch.device | None = None,
        layout: Mapping[str, int] | None = None,
    ) -> None:
        if proj_type != ProjectionType.hadamard:
            raise InputError(f"proj_type must be 'hadamard' here, got {proj_type!r}.")
        super().__init__(grad_dim, proj_dim, seed, ProjectionType.hadamard, device, layout)
        self._block = max(_LONGEST, _power_of_two(self.proj_dim))
        self._cache: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def matrix(self, name: str, num_rows: int, model_id: int) -> Tensor:
        """One parameter's projection matrix, written out: the definition.

        Args:
            name: the parameter's name.
            num_rows: number of scalars of the parameter, `p`.
            model_id: the checkpoint.

        Returns:
            `[p, k]`, float32.
        """
        self._turn_to(model_id)
        parts = []
        for start in range(0, num_rows, self._block):
            signs, places = self._numbers(name, start, num_rows)
            rows = torch.arange(min(self._block, num_rows - start), device=self.device)
            common = rows[:, None] & places[None, :]
            for shift in (16, 8, 4, 2, 1):
                common = common ^ (common >> shift)
            parts.append((1 - 2 * (common & 1)) * signs[: len(rows), None])
        return torch.cat(parts)

    def add(self, block: DenseBlock, out: Tensor, model_id: int) -> None:
        """Adds `block.gradient @ matrix(block.name, p, model_id)` to `out`.

        Args:
            block: per-sample gradients of one parameter, float32 or float64.
            out: `[b, k]`, float32 or float64.
            model_id: the checkpoint.
        """
        self._turn_to(model_id)
        num_rows = block.gradient.shape[1]
        for start in range(0, num_rows, self._block):
            signs, places = self._numbers(block.name, start, num_rows)
            piece = block.gradient[:, start : start + self._block].to(out.dtype)
            padded = out.new_zeros(len(piece), len(signs))
            padded[:, : piece.shape[1]] = piece * signs[: piece.shape[1]]
            out += _transform(padded)[:, places]

    def free_memory(self) -> None:
        """Drops the generated signs and places."""
        self._cache.clear()

    def _numbers(self, name: str, start: int, num_rows: int) -> tuple[Tensor, Tensor]:
        # signs [d] and places [k] of the block that begins at row `start`
        key = (name, start)
        if key not in self._cache:
            size = min(self._block, num_rows - start)
            padded = _power_of_two(max(size, self.proj_dim))
            model_id = self._cached_model_id or 0
            source = counter.stream("hadamard-signs", self.seed, model_id, name)
            rows = (start, start + padded)
            signs = counter.hashes(source, rows, 0, 2, self.device)[1]
            source = counter.stream(
                "hadamard-places", self.seed, model_id, f"{start} {name}"
            )
            places = counter.sample(source, padded, self.proj_dim, self.device)
            self._cache[key] = signs, places
        return self._cache[key]


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _hadamard(size: int, like: Tensor) -> Tensor:
    matrix = like.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([
            torch.cat([matrix, matrix], 1),
            torch.cat([matrix, -matrix], 1),
        ])
    return matrix


def _transform(rows: Tensor) -> Tensor:
    # the Walsh-Hadamard transform of each row: H_(ab) x = H_a X H_b for x as matrix X
    bits = rows.shape[1].bit_length() - 1
    left, right = 1 << (bits // 2), 1 << (bits - bits // 2)
    matrices = rows.unflatten(1, (left, right))
    transformed = _hadamard(left, rows) @ matrices @ _hadamard(right, rows)
    return transformed.flatten(start_dim=1)
