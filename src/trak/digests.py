"""Content hashes of weights and examples: the store's eyes for mix-ups."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from trak.batches import Batch, batch_size, leaves

_COLUMNS = 256
_WORD = 8
_SMALL = 1 << 16  # bytes
_PER_CHANNEL = {torch.per_channel_affine, torch.per_channel_affine_float_qparams}
_UNKNOWN_TO_NUMPY = {
    getattr(torch, name) for name in dir(torch) if name.startswith(("float8", "float4"))
}


def state_digest(state: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> str:
    """Hashes a state dict by content.

    Args:
        state: names to tensors; other values enter by their `repr`.
        like: the state dict of the model that will load it. Tensors are first cast to
            its dtypes, so that a float32 file and the bfloat16 model that loaded it
            count as the same weights.

    Returns:
        32 hexadecimal digits, independent of the order of the names and of devices.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name]
        if not isinstance(value, Tensor):
            hasher.update(f"{name}={value!r};".encode())
            continue
        reference = None if like is None else like.get(name)
        if isinstance(reference, Tensor):
            value = value.to(reference.dtype)
        hasher.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        hasher.update(_as_numpy(value).data)  # pyright: ignore[reportArgumentType]
    return hasher.hexdigest()


def example_digests(batch: Batch) -> NDArray[np.int64]:
    """Hashes each sample of a batch, to notice when row `i` is another example.

    Trailing zeros of token-like parts (integers, one axis) are left out, so that the
    same text padded with zeros to another length counts as the same example.

    Args:
        batch: a normalized batch.

    Returns:
        One number a sample, `[b]`, never 0.
    """
    hashers = [hashlib.blake2b(digest_size=8) for _ in range(batch_size(batch))]
    for part in leaves(batch):
        strip = part.ndim == 2 and not part.is_floating_point()
        header = f"{part.dtype}:{'*' if strip else tuple(part.shape[1:])};".encode()
        rows = _as_numpy(part)
        lengths = _without_trailing_zeros(rows) if strip else None
        for j, (hasher, row) in enumerate(zip(hashers, rows, strict=True)):
            hasher.update(header)
            hasher.update((row if lengths is None else row[: lengths[j]]).tobytes())
    digests = [int.from_bytes(h.digest(), "little", signed=True) for h in hashers]
    return np.asarray([digest or 1 for digest in digests], dtype=np.int64)


def _without_trailing_zeros(rows: NDArray[Any]) -> list[int]:
    if not rows.shape[1]:
        return [0] * len(rows)
    used = rows != 0
    lengths = rows.shape[1] - used[:, ::-1].argmax(axis=1)
    return np.where(used.any(axis=1), lengths, 0).tolist()


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """Sums tensors' bits, to notice changes at the speed of reading them once.

    Not a hash: 256 sums of 64-bit words a tensor, modulo 2^64. A model has hundreds of
    tensors, most of them small, and on a GPU each call costs more than its arithmetic; so
    small ones of one size are summed together.

    Args:
        tensors: of any dtype, on any devices.

    Returns:
        One row a tensor, `[tensors, 256]`, on the CPU.
    """
    if not tensors:
        return torch.zeros(0, _COLUMNS, dtype=torch.int64, device="cpu")
    groups: dict[object, list[int]] = {}
    for number, tensor in enumerate(tensors):
        size = tensor.numel() * tensor.element_size()
        alone = size > _SMALL or not is_plain(tensor)
        key = number if alone else (tensor.device, size)
        groups.setdefault(key, []).append(number)
    sums = [_sums([_bytes(tensors[j]) for j in group]) for group in groups.values()]
    if len({part.device for part in sums}) > 1:
        sums = [part.cpu() for part in sums]
    order = torch.tensor([j for group in groups.values() for j in group], device="cpu")
    return torch.cat(sums).cpu()[order.argsort()]


def _parts(tensor: Tensor) -> list[Tensor]:
    # what a tensor that is not plain consists of
    if tensor.is_quantized:
        if tensor.qscheme() in _PER_CHANNEL:
            scales = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
        else:
            both = [tensor.q_scale(), tensor.q_zero_point()]
            scales = [torch.tensor(both, dtype=torch.float64, device="cpu")]
        return [tensor.int_repr(), *scales]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in {torch.sparse_csr, torch.sparse_bsr}:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in {torch.sparse_csc, torch.sparse_bsc}:
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but its numbers.

    Args:
        tensor: any.

    Returns:
        False for sparse and quantized ones.
    """
    return tensor.layout is torch.strided and not tensor.is_quantized


def _bytes(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if not is_plain(tensor):
        return torch.cat([_bytes(part.to(tensor.device)) for part in _parts(tensor)])
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _sums(parts: list[Tensor]) -> Tensor:
    # of parts of one length, [parts, 256]
    if len(parts) == 1:
        return _column_sums(parts[0])[None]
    data = torch.stack(parts)
    lacking = -data.shape[1] % (_COLUMNS * _WORD) if data.shape[1] else _COLUMNS * _WORD
    words = functional.pad(data, (0, lacking)).view(torch.int64)
    return words.unflatten(1, (-1, _COLUMNS)).sum(1)


def _column_sums(data: Tensor) -> Tensor:
    if data.storage_offset() % _WORD:
        data = data.clone()  # a part of a larger tensor, not aligned to words
    words = data[: len(data) // _WORD * _WORD].view(torch.int64)
    square = words[: len(words) // _COLUMNS * _COLUMNS].reshape(-1, _COLUMNS)
    if square.is_cpu:  # NumPy's sum of integers is several times as fast
        sums = torch.from_numpy(np.add.reduce(square.numpy(), axis=0))
    else:
        sums = square.sum(dim=0)
    tail, rest = words[square.numel() :], data[words.numel() * _WORD :]
    for part in (tail, rest):
        if len(part):  # an empty addition costs a kernel launch all the same
            sums[: len(part)] += part
    return sums


def _as_numpy(value: Tensor) -> NDArray[Any]:
    if not is_plain(value):
        value = _bytes(value)
    value = value.detach().cpu().resolve_conj().contiguous()
    if value.dtype is torch.bfloat16:
        value = value.view(torch.int16)
    elif value.dtype in _UNKNOWN_TO_NUMPY:
        value = value.view(torch.uint8)
    return np.ascontiguousarray(value.numpy())
