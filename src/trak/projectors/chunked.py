"""A projection put together from one projector for each chunk of the gradient."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trak.errors import InputError
from trak.projectors.abstract import AbstractProjector
from trak.utils import vectorize


class ChunkedCudaProjector(AbstractProjector):
    """Projects each chunk of the gradient with its own projector and adds the results.

    Upstream needed this where its kernel could not take a whole gradient. The projectors
    here can; the class stays for scripts that build it. Give every chunk another seed.

    Args:
        projector_per_chunk: one projector a chunk, all with the same `proj_dim`.
        max_chunk_size: accepted as upstream's name.
        params_per_chunk: scalars in each chunk, in the order of the parameters; chunks
            need not end where a parameter ends.
        feat_bs: accepted as upstream's name; any batch size is right.
        device: where the result should be.
        dtype: accepted as upstream's name.

    Raises:
        InputError: if the lists do not match, or `proj_dim`s or chunk sizes differ.
    """

    def __init__(
        self,
        projector_per_chunk: Sequence[AbstractProjector],
        max_chunk_size: int,
        params_per_chunk: Sequence[int],
        feat_bs: int,
        device: str | torch.device,
        dtype: torch.dtype,
    ) -> None:
        sizes = [int(size) for size in params_per_chunk]
        dims = {projector.proj_dim for projector in projector_per_chunk}
        if not sizes or len(sizes) != len(projector_per_chunk) or len(dims) != 1:
            raise InputError(
                "Expected one projector a chunk, all of one proj_dim; got "
                f"{len(projector_per_chunk)} projectors with proj_dim {sorted(dims)} "
                f"for {len(sizes)} chunks."
            )
        first = projector_per_chunk[0]
        super().__init__(sum(sizes), first.proj_dim, first.seed, first.proj_type, device)
        self.projector_per_chunk = list(projector_per_chunk)
        self.max_chunk_size = max_chunk_size
        self.params_per_chunk = sizes
        self.feat_bs = feat_bs
        self.dtype = dtype

    def project(self, grads: Tensor | Mapping[str, Tensor], model_id: int) -> Tensor:
        """Projects chunk by chunk.

        Args:
            grads: `[b, p]`, or name to gradient `[b, ...]`.
            model_id: the checkpoint.

        Returns:
            `[b, k]`.

        Raises:
            InputError: if the gradient is not as wide as the chunks together.
        """
        rows = vectorize(grads) if isinstance(grads, Mapping) else grads
        if rows.shape[1] != self.grad_dim:
            raise InputError(
                f"The chunks hold {self.grad_dim} scalars together, the gradient "
                f"{rows.shape[1]}."
            )
        pieces = rows.split(self.params_per_chunk, dim=1)
        pairs = zip(self.projector_per_chunk, pieces, strict=True)
        parts = [projector.project(piece, model_id) for projector, piece in pairs]
        return torch.stack(parts).sum(dim=0).to(self.device)

    def free_memory(self) -> None:
        """Drops what the chunks' projectors can compute again."""
        for projector in self.projector_per_chunk:
            projector.free_memory()
