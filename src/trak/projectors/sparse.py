"""Sparse Johnson-Lindenstrauss projection: a few nonzeros for every parameter."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trak.arguments import as_integer
from trak.blocks import DenseBlock
from trak.errors import InputError
from trak.projectors import counter
from trak.projectors.abstract import BlockProjector, ProjectionType
from trak.projectors.scatter import scatter

_GROUP = 64
_SCAN_FROM = 1 << 16
_SPARSE_BELOW = 0.5
_BLOCK_ROWS = 1 << 22
_CACHE_BYTES = 1 << 30


class SparseProjector(BlockProjector):
    """Each row of the matrix has `nonzeros` nonzero entries.

    The `k` columns are cut into `nonzeros` parts of near-equal width `w` and every row
    has one entry of value +-sqrt(w) in each part, in a uniformly drawn column: the
    block construction of Kane and Nelson 2014, "Sparser Johnson-Lindenstrauss
    transforms", Sec. 1.1 (with one nonzero, the CountSketch of Charikar, Chen and
    Farach-Colton 2002). Scaled so that entries have variance 1 and
    `E<P^T x, P^T y> = k <x, y>`, like the dense kinds; with one nonzero the variance of
    `<P^T x, P^T y> / k` is
    `(|x|^2 |y|^2 + <x, y>^2 - 2 sum_j x_j^2 y_j^2) / k`.

    A projection costs `nonzeros` additions a parameter and sample, whatever `k` is, and
    stretches of the gradient that are zero for the whole batch (rows of an embedding
    that no token used) are skipped.

    Args:
        grad_dim: number of parameters `p`.
        proj_dim: projection dimension `k`.
        seed: seed of the entries.
        proj_type: `"sparse"`.
        device: where to project.
        nonzeros: nonzeros of a row, at most `proj_dim`.
        layout: name to number of scalars of every parameter.

    Raises:
        InputError: if an argument cannot be used, or the layout is not `grad_dim` long.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int = 0,
        proj_type: str | ProjectionType = ProjectionType.sparse,
        device: str | torch.device | None = None,
        nonzeros: int = 1,
        layout: Mapping[str, int] | None = None,
    ) -> None:
        if proj_type != ProjectionType.sparse:
            raise InputError(f"proj_type must be 'sparse' here, got {proj_type!r}.")
        super().__init__(grad_dim, proj_dim, seed, ProjectionType.sparse, device, layout)
        self.nonzeros = as_integer("nonzeros", nonzeros, least=1)
        if self.nonzeros > self.proj_dim:
            raise InputError(
                f"nonzeros must be at most proj_dim={self.proj_dim}, got {nonzeros}: each "
                "nonzero of a row is in columns of its own."
            )
        self._cache: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def settings(self) -> dict[str, Any]:
        """What the entries depend on, for the store's fingerprint.

        Returns:
            JSON values.
        """
        return {**super().settings(), "nonzeros": self.nonzeros}

    def matrix(self, name: str, num_rows: int, model_id: int) -> Tensor:
        """One parameter's projection matrix, written out: the definition.

        Args:
            name: the parameter's name.
            num_rows: number of scalars of the parameter, `p`.
            model_id: the checkpoint.

        Returns:
            `[p, k]`, float32.
        """
        columns, values = self._generate(name, (0, num_rows), model_id)
        matrix = torch.zeros(num_rows, self.proj_dim, device=values.device)
        return matrix.scatter_(1, columns.t(), values.t())

    def add(self, block: DenseBlock, out: Tensor, model_id: int) -> None:
        """Adds `block.gradient @ matrix(block.name, p, model_id)` to `out`.

        Args:
            block: per-sample gradients of one parameter, float32 or float64.
            out: `[b, k]`, float32 or float64.
            model_id: the checkpoint.
        """
        self._turn_to(model_id)
        num_rows = block.gradient.shape[1]
        for start in range(0, num_rows, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, num_rows)
            columns, values = self._cached(block.name, (start, stop), model_id)
            gradient = block.gradient[:, start:stop]
            nonzero = _nonzero_columns(gradient)
            if nonzero is not None:
                gradient = gradient[:, nonzero]
                columns, values = columns[:, nonzero], values[:, nonzero]
            for column, value in zip(columns, values, strict=True):
                scatter(gradient * value.to(out.dtype), column, out)

    def free_memory(self) -> None:
        """Drops the generated columns and values."""
        self._cache.clear()

    def _generate(
        self, name: str, rows: tuple[int, int], model_id: int
    ) -> tuple[Tensor, Tensor]:
        # columns and values of the nonzeros, each [nonzeros, rows]
        source = counter.stream("sparse", self.seed, model_id, name)
        edges = [part * self.proj_dim // self.nonzeros for part in range(self.nonzeros)]
        edges.append(self.proj_dim)
        device = self.device
        shape = (self.nonzeros, rows[1] - rows[0])
        columns = torch.empty(shape, dtype=torch.int64, device=device)
        values = torch.empty(shape, dtype=torch.float32, device=device)
        for part in range(self.nonzeros):
            width = edges[part + 1] - edges[part]
            hashed, sign = counter.hashes(source, rows, part, width, device)
            columns[part] = hashed + edges[part]
            values[part] = sign * width**0.5
        return columns, values

    def _cached(
        self, name: str, rows: tuple[int, int], model_id: int
    ) -> tuple[Tensor, Tensor]:
        pair = self._cache.get((name, rows[0]))
        if pair is None or pair[0].shape[1] != rows[1] - rows[0]:
            pair = self._generate(name, rows, model_id)
            if self.grad_dim * self.nonzeros * 12 <= _CACHE_BYTES:
                self._cache[name, rows[0]] = pair
        return pair


def _nonzero_columns(gradient: Tensor) -> Tensor | None:
    # columns of the groups that are not zero everywhere, if that leaves few
    num_samples, width = gradient.shape
    if width < _SCAN_FROM:
        return None
    whole = width - width % _GROUP
    groups = gradient[:, :whole].unflatten(1, (-1, _GROUP))
    # extremes of the contiguous axis: comparing every entry is ten times slower
    used = ((groups.amax(dim=2) != 0) | (groups.amin(dim=2) != 0)).any(dim=0)
    if num_samples == 0 or used.float().mean() > _SPARSE_BELOW:
        return None
    within = torch.arange(_GROUP, device=gradient.device)
    starts = used.nonzero() * _GROUP
    rest = torch.arange(whole, width, device=gradient.device)
    return torch.cat([(starts + within).flatten(), rest])
