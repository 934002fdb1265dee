"""Reads safetensors files, for their hashes, without the package of that name.

The format: 8 bytes with the length of a JSON header, little-endian; the header, which gives
each tensor's dtype, shape and place; the tensors' bytes, little-endian, without gaps.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.errors import BankCorruptedError
from trak.evaluation.files import as_path

WEIGHTS = "checkpoints.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load_checkpoints(folder: str | Path) -> list[dict[str, Tensor]]:
    """Reads the weights that lie beside a bank, in `checkpoints.safetensors`.

    Args:
        folder: the bank's.

    Returns:
        State dicts, on the CPU.

    Raises:
        BankCorruptedError: if the file is absent or damaged.
    """
    path = as_path("folder", folder) / WEIGHTS
    if not path.exists():
        raise BankCorruptedError(f"{path} does not exist: this bank came without weights.")
    states: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in _read(path).items():
        number, separator, name = key.partition("/")
        if not separator or not number.isdecimal():
            raise BankCorruptedError(
                f"{path}: tensors are called 'checkpoint/name', such as '0/bias', got "
                f"{key!r}."
            )
        states[int(number)][name] = value
    return [states[j] for j in sorted(states)]


def _read(path: Path) -> dict[str, Tensor]:
    try:
        raw = np.fromfile(path, dtype=np.uint8)
        length = int.from_bytes(raw[:8].tobytes(), "little")
        header: dict[str, Any] = json.loads(raw[8 : 8 + length].tobytes())
        body = raw[8 + length :]
        header.pop("__metadata__", None)
        return {name: _tensor(entry, body) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise BankCorruptedError(f"{path} is no safetensors file ({error!r}).") from error


def _tensor(entry: dict[str, Any], body: NDArray[np.uint8]) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    first, end = entry["data_offsets"]
    expected = math.prod(shape) * dtype.itemsize
    if not 0 <= first <= end <= len(body) or end - first != expected:
        raise ValueError(f"{end - first} bytes from {first}, expected {expected}")
    if first == end:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.from_numpy(body[first:end].copy()).view(dtype).reshape(shape)
