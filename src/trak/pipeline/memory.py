"""Going on with fewer samples at once where memory runs out."""

import gc
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from trak.batches import Batch, batch_size, select
from trak.errors import NotEnoughMemoryError
from trak.gradient_computers.memory import is_out_of_memory

logger = logging.getLogger(__name__)


class MicroBatches:
    """Hands batches on in pieces that fit into memory, and remembers their size.

    Attributes:
        limit: how many samples fitted when memory last ran out; None if it never did.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self._ran_out_at: int | None = None

    def rows(
        self, batch: Batch, work: Callable[[Batch, int], Tensor], most: Callable[[], int]
    ) -> Tensor:
        """Works through a batch of at least one sample.

        Args:
            batch: the batch.
            work: makes the rows of a piece of it that begins at a sample; is called anew,
                with fewer samples, where it runs out of memory, so it must start over.
            most: how many samples to hand over at once at most; asked before each piece.

        Returns:
            The rows of all pieces, in order.
        """
        total = batch_size(batch)
        parts: list[Tensor] = []
        start = 0
        while start < total:
            size = min(most(), self.limit or total, total - start)
            part = self._try(select(batch, slice(start, start + size)), start, work)
            if part is None:
                continue
            parts.append(part)
            start += size
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _try(
        self, piece: Batch, start: int, work: Callable[[Batch, int], Tensor]
    ) -> Tensor | None:
        size = batch_size(piece)
        try:
            rows = work(piece, start)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise NotEnoughMemoryError(
                    "The gradient of a single sample does not fit into memory. Select "
                    "fewer parameters with grad_wrt, shorten the samples, or use a device "
                    f"with more memory. The failure: {error}"
                ) from error
        else:
            self._tell()
            return rows
        # not in the except clause, which keeps what the failed attempt had made
        self._ran_out_at = self._ran_out_at or size
        self.limit = size // 2
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return None

    def _tell(self) -> None:
        if self._ran_out_at is not None:
            logger.warning(
                "Memory ran out with %d samples at once; going on with %d at once.",
                self._ran_out_at,
                self.limit,
            )
            self._ran_out_at = None
