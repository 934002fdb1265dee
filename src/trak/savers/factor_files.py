"""The square matrix that scores are solved with, and the record that vouches for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import ModelIDException, StoreCorruptedError
from trak.savers.arrays import RowFile, new_array
from trak.savers.filesystem import read_json, replace_json, sync_directory


def save(folder: Path, matrix: NDArray[np.float64], info: Mapping[str, Any]) -> None:
    """Replaces a checkpoint's matrix; the record goes first and comes last.

    Args:
        folder: the checkpoint's.
        matrix: `[q, q]`.
        info: how it was made.
    """
    (folder / "factor.json").unlink(missing_ok=True)
    sync_directory(folder)
    shape = (matrix.shape[0], matrix.shape[1])
    with new_array(folder / "factor.npy", shape, np.float64) as file:
        file.write(np.arange(len(matrix)), matrix)
    replace_json(folder / "factor.json", {**info, "shape": shape})


def load(folder: Path) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """What `save` kept.

    Args:
        folder: the checkpoint's.

    Returns:
        The matrix `[q, q]` and how it was made.

    Raises:
        ModelIDException: if there is none.
        StoreCorruptedError: if the matrix is gone.
    """
    if not (folder / "factor.json").exists():
        raise ModelIDException(
            f"model_id={folder.name} in {folder.parent} is not finalized. Call "
            "finalize_features() first."
        )
    info = read_json(folder / "factor.json")
    path = folder / "factor.npy"
    if not path.exists():
        raise StoreCorruptedError(
            f"{path} is gone. Remove {folder / 'factor.json'} and call "
            "finalize_features() again; no gradient is recomputed."
        )
    return RowFile(path, tuple(info["shape"]), np.float64).read(), info
