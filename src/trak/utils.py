"""Helpers that third-party code imports from `trak.utils` under upstream's names.

`test_install`, which upstream keeps here too, is set by the package: it runs the whole
library, and this module lies below all of it.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from trak.errors import InputError


def parameters_to_vector(parameters: Iterable[Tensor]) -> Tensor:
    """Concatenates tensors, flattened in order.

    Args:
        parameters: tensors of any shape.

    Returns:
        One vector, `[p]`.
    """
    return torch.cat([parameter.reshape(-1) for parameter in parameters])


def get_num_params(model: nn.Module) -> int:
    """Counts a model's parameters, tied ones once.

    Args:
        model: any module.

    Returns:
        The number of scalars.
    """
    return sum(parameter.numel() for parameter in model.parameters())


def is_not_buffer(ind: int, params_dict: Mapping[int, str]) -> bool:
    """Whether a name is a parameter and not a BatchNorm statistic.

    Args:
        ind: key into `params_dict`.
        params_dict: names by index.

    Returns:
        False for running means, running variances and batch counters.
    """
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    return not any(word in params_dict[ind] for word in statistics)


def vectorize(
    g: Mapping[str, Tensor],
    arr: Tensor | None = None,
    device: str | torch.device | None = None,
) -> Tensor:
    """Flattens per-sample gradients into one row a sample.

    Args:
        g: name to gradient `[b, ...]`.
        arr: where to write, `[b, p]`; allocated if None.
        device: where to allocate; that of the gradients if None.

    Returns:
        The gradients side by side in the dict's order, `[b, p]`.

    Raises:
        InputError: if `g` is empty or its batch sizes differ.
    """
    sizes = {name: tuple(gradient.shape) for name, gradient in g.items()}
    if len({shape[:1] for shape in sizes.values()}) != 1:
        raise InputError(f"Expected gradients that share one batch axis, got {sizes}.")
    rows = [gradient.detach().reshape(gradient.shape[0], -1) for gradient in g.values()]
    if arr is None:
        return torch.cat([r.to(device) for r in rows] if device else rows, dim=1)
    start = 0
    for row in rows:
        arr[:, start : start + row.shape[1]] = row.to(arr.device)
        start += row.shape[1]
    return arr


def get_output_memory(
    features: Tensor, target_grads: Tensor, target_dtype: torch.dtype
) -> int:
    """Size of `features @ target_grads.T`.

    Args:
        features: `[n, k]`.
        target_grads: `[m, k]`.
        target_dtype: dtype of the product.

    Returns:
        Bytes.
    """
    return features.shape[0] * target_grads.shape[0] * target_dtype.itemsize


def get_free_memory(device: str | torch.device) -> int:
    """Memory that a tensor on `device` could still take.

    Args:
        device: a CUDA device.

    Returns:
        Bytes: what the driver reports free, plus what torch's cache holds unused.
    """
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached


def get_matrix_mult_standard(
    features: Tensor, target_grads: Tensor, target_dtype: torch.dtype
) -> Tensor:
    """Computes `features @ target_grads.T` at once.

    Args:
        features: `[n, k]`.
        target_grads: `[m, k]`.
        target_dtype: dtype of the result.

    Returns:
        `[n, m]` on the device of `features`.
    """
    return (features @ target_grads.t()).to(target_dtype)


def get_matrix_mult_blockwise(
    features: Tensor, target_grads: Tensor, target_dtype: torch.dtype, bs: int
) -> Tensor:
    """Computes `features @ target_grads.T` in row blocks, with the result in CPU memory.

    Args:
        features: `[n, k]`, on any device.
        target_grads: `[m, k]`, on any device.
        target_dtype: dtype of the result.
        bs: rows of `features` in a block.

    Returns:
        `[n, m]` on the CPU.
    """
    device = target_grads.device if target_grads.is_cuda else features.device
    targets = target_grads.to(device)
    shape = (features.shape[0], target_grads.shape[0])
    result = torch.empty(shape, dtype=target_dtype, device="cpu")
    for start in range(0, shape[0], bs):
        block = features[start : start + bs].to(device)
        result[start : start + bs] = block @ targets.t()
    return result


def get_matrix_mult(
    features: Tensor,
    target_grads: Tensor,
    target_dtype: torch.dtype | None = None,
    batch_size: int = 8096,
    use_blockwise: bool = False,
) -> Tensor:
    """Computes `features @ target_grads.T`, in blocks where it would not fit.

    Args:
        features: `[n, k]`.
        target_grads: `[m, k]`.
        target_dtype: dtype of the result; that of `features` if None.
        batch_size: rows in a block.
        use_blockwise: use blocks even where the result fits.

    Returns:
        `[n, m]`; on the CPU if it was computed in blocks.
    """
    dtype = features.dtype if target_dtype is None else target_dtype
    fits = not features.is_cuda or (
        get_output_memory(features, target_grads, dtype) < get_free_memory(features.device)
    )
    if fits and not use_blockwise:
        return get_matrix_mult_standard(features, target_grads, dtype)
    return get_matrix_mult_blockwise(features, target_grads, dtype, batch_size)


def get_parameter_chunk_sizes(model: nn.Module, batch_size: int) -> tuple[int, list[int]]:
    """Groups a model's parameters, in order, into chunks of bounded size.

    Args:
        model: any module.
        batch_size: samples projected at once; a chunk holds at most
            `(2**32 - 1) // batch_size` scalars, unless one parameter alone is larger.

    Returns:
        The bound, and the number of scalars in each chunk.
    """
    bound = int(np.iinfo(np.uint32).max) // batch_size
    chunks: list[int] = []
    for parameter in model.parameters():
        if chunks and chunks[-1] + parameter.numel() <= bound:
            chunks[-1] += parameter.numel()
        else:
            chunks.append(parameter.numel())
    return bound, chunks
