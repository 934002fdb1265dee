"""The square matrix that scores are solved with, and the record that vouches for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import ModelIDException, StoreCorruptedError
from trak.savers.arrays import RowFile, new_array
from trak.savers.filesystem import read_object, replace_json, sync_directory
from trak.savers.locks import changing, reading

_ARRAYS = "arrays"


def save(folder: Path, matrix: NDArray[np.float64], info: Mapping[str, Any]) -> None:
    """Replaces a checkpoint's matrix; the record goes first and comes last.

    Args:
        folder: the checkpoint's.
        matrix: `[q, q]`.
        info: how it was made; arrays in it, `[n, 1]`, get files of their own.
    """
    arrays = {name: each for name, each in info.items() if isinstance(each, np.ndarray)}
    plain = {name: each for name, each in info.items() if name not in arrays}
    shape = (matrix.shape[0], matrix.shape[1])
    with changing(folder.parent):
        (folder / "factor.json").unlink(missing_ok=True)
        sync_directory(folder)
        with new_array(folder / "factor.npy", shape, np.float64) as file:
            file.write(np.arange(len(matrix)), matrix)
        for name, each in arrays.items():
            with new_array(folder / f"{name}.npy", each.shape, np.float64) as file:
                file.write(np.arange(len(each)), each)
        sizes = {name: len(each) for name, each in arrays.items()}
        arrayed = {_ARRAYS: sizes} if sizes else {}
        replace_json(folder / "factor.json", {**plain, **arrayed, "shape": shape})


def exists(folder: Path) -> bool:
    """Whether there is a matrix, also while another process replaces it.

    Args:
        folder: the checkpoint's.

    Returns:
        True if the record that vouches for it is there.
    """
    with reading(folder.parent):
        return (folder / "factor.json").exists()


def load(folder: Path) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """What `save` kept.

    Args:
        folder: the checkpoint's.

    Returns:
        The matrix `[q, q]` and how it was made.
    """
    with reading(folder.parent):
        return _load(folder)


def _load(folder: Path) -> tuple[NDArray[np.float64], dict[str, Any]]:
    if not (folder / "factor.json").exists():
        raise ModelIDException(
            f"model_id={folder.name} in {folder.parent} is not finalized. Call "
            "finalize_features() first."
        )
    record = folder / "factor.json"
    again = (
        "and call finalize_features() again, or make the call of attribute again; no "
        "gradient is recomputed"
    )
    info = read_object(record, f"remove it {again}", shape=list)
    remedy = f"Remove {record} {again}."
    shape, sizes = info["shape"], info.pop(_ARRAYS, {})
    if len(shape) != 2 or not all(isinstance(size, int) for size in shape):
        raise StoreCorruptedError(f"{record} has no shape [q, q] but {shape!r}. {remedy}")
    if not isinstance(sizes, dict) or not all(isinstance(n, int) for n in sizes.values()):
        raise StoreCorruptedError(f"{record} has arrays of sizes {sizes!r}. {remedy}")
    matrix = _array(folder / "factor.npy", (shape[0], shape[1]), remedy)
    arrays = {
        name: np.array(_array(folder / f"{name}.npy", (size, 1), remedy))
        for name, size in sizes.items()
    }
    return matrix, {**info, **arrays}


def _array(path: Path, shape: tuple[int, int], remedy: str) -> NDArray[np.float64]:
    if not path.exists():
        raise StoreCorruptedError(f"{path} is gone. {remedy}")
    return RowFile(path, shape, np.float64, remedy).read()
