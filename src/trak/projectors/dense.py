"""Dense Rademacher and normal projections, generated in blocks of rows."""

from collections.abc import Mapping

import torch
from torch import Tensor

from trak.blocks import DenseBlock
from trak.errors import InputError
from trak.projectors import counter
from trak.projectors.abstract import BlockProjector, ProjectionType

_ENTRIES = {
    ProjectionType.rademacher: counter.rademacher,
    ProjectionType.normal: counter.normal,
}
_BLOCK_ENTRIES = 1 << 22
_CACHE_BYTES = 1 << 29


class BasicProjector(BlockProjector):
    """Dense projection with independent entries of mean 0 and variance 1.

    `E<P^T x, P^T y> = k <x, y>` and the variance of `<P^T x, P^T y> / k` is at most
    `(|x|^2 |y|^2 + <x, y>^2) / k`; Johnson-Lindenstrauss for both kinds of entries:
    Achlioptas 2003, "Database-friendly random projections", Theorem 1.1.

    Matrices up to 512 MiB are kept; larger ones are generated for every batch, for which
    `SparseProjector` is the better choice.

    Args:
        grad_dim: number of parameters `p`.
        proj_dim: projection dimension `k`.
        seed: seed of the entries.
        proj_type: `"rademacher"` or `"normal"`.
        device: where to project.
        block_size: accepted as upstream's name; entries do not depend on it, and blocks
            are sized by memory.
        dtype: accepted as upstream's name; arithmetic is float32, or float64 for float64
            gradients, since half precision overflows here.
        model_id: accepted as upstream's name; every call names its own checkpoint.
        layout: name to number of scalars of every parameter.
        max_batch_size: accepted as upstream's name; any batch size is right.

    Raises:
        InputError: if an argument cannot be used, or the layout is not `grad_dim` long.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device | None = None,
        block_size: int = 100,
        dtype: torch.dtype = torch.float32,
        model_id: int = 0,
        layout: Mapping[str, int] | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        try:
            self.proj_type = ProjectionType(proj_type)
            self._entries = _ENTRIES[self.proj_type]
        except (ValueError, KeyError):
            names = sorted(kind.value for kind in _ENTRIES)
            raise InputError(
                f"proj_type must be one of {names}, got {proj_type!r}. Other projections "
                "are classes of their own (trak.projectors)."
            ) from None
        super().__init__(grad_dim, proj_dim, seed, self.proj_type, device, layout)
        self.block_size = block_size
        self.dtype = dtype
        self.model_id = model_id
        self.max_batch_size = max_batch_size
        self._cache: dict[tuple[str, int], Tensor] = {}

    def matrix(self, name: str, num_rows: int, model_id: int) -> Tensor:
        """One parameter's projection matrix, written out: the definition.

        Args:
            name: the parameter's name.
            num_rows: number of scalars of the parameter, `p`.
            model_id: the checkpoint.

        Returns:
            `[p, k]`, float32.
        """
        return self._generate(name, (0, num_rows), model_id)

    def add(self, block: DenseBlock, out: Tensor, model_id: int) -> None:
        """Adds `block.gradient @ matrix(block.name, p, model_id)` to `out`.

        Args:
            block: per-sample gradients of one parameter, float32 or float64.
            out: `[b, k]`, float32 or float64.
            model_id: the checkpoint.
        """
        self._turn_to(model_id)
        num_rows = block.gradient.shape[1]
        step = max(1, _BLOCK_ENTRIES // self.proj_dim)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            matrix = self._cached(block.name, (start, stop), model_id)
            out += block.gradient[:, start:stop] @ matrix.to(out.dtype)

    def free_memory(self) -> None:
        """Drops the generated matrices."""
        self._cache.clear()

    def _generate(self, name: str, rows: tuple[int, int], model_id: int) -> Tensor:
        source = counter.stream(self.proj_type.value, self.seed, model_id, name)
        return self._entries(source, rows, self.proj_dim, self.device)

    def _cached(self, name: str, rows: tuple[int, int], model_id: int) -> Tensor:
        matrix = self._cache.get((name, rows[0]))
        if matrix is None or matrix.shape[0] != rows[1] - rows[0]:
            matrix = self._generate(name, rows, model_id)
            if self.grad_dim * self.proj_dim * matrix.element_size() <= _CACHE_BYTES:
                self._cache[name, rows[0]] = matrix
        return matrix


class BasicSingleBlockProjector(BasicProjector):
    """The same projection as `BasicProjector`, under upstream's other name.

    Upstream's two classes gave different matrices because theirs depended on the block
    size; entries here do not.
    """


class CudaProjector(BasicProjector):
    """The dense projection on a CUDA device, under upstream's name.

    Pure PyTorch: nothing to compile, any `proj_dim`, any batch size, and the entries of
    `BasicProjector`. Arguments as there.

    Raises:
        InputError: if the device is not a CUDA device that is present.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device | None = None,
        max_batch_size: int = 32,
        dtype: torch.dtype = torch.float32,
        layout: Mapping[str, int] | None = None,
    ) -> None:
        wanted = torch.device("cuda" if device is None else device)
        if wanted.type != "cuda" or not torch.cuda.is_available():
            raise InputError(
                f"CudaProjector needs a CUDA device; got device={str(wanted)!r} and "
                f"torch sees {torch.cuda.device_count()} of them here. Use "
                "BasicProjector or SparseProjector, which run anywhere and give the "
                "same numbers on every device."
            )
        super().__init__(
            grad_dim,
            proj_dim,
            seed,
            proj_type,
            wanted,
            dtype=dtype,
            layout=layout,
            max_batch_size=max_batch_size,
        )
