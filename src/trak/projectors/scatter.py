"""Adding columns up by a bucket number each."""

import torch
from torch import Tensor


def scatter(values: Tensor, buckets: Tensor, out: Tensor) -> None:
    """Adds `values[:, j]` to `out[:, buckets[j]]`.

    Args:
        values: `[b, q]`.
        buckets: int64, `[q]`, in `[0, k)`.
        out: `[b, k]`, of the same dtype.
    """
    if out.is_cuda:
        out.index_add_(1, buckets, values)
        return
    # ten times faster than index_add_ on the CPU
    for j, sample in enumerate(values):
        out[j] += torch.bincount(buckets, weights=sample, minlength=out.shape[1])
