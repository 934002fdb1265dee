"""Files of sums for whitening: one of each process, and the list that rows depend on."""

import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import StoreCorruptedError
from trak.savers.filesystem import (
    create_json,
    link_new,
    read_json,
    sync_directory,
    temporary_path,
)

Arrays = dict[str, NDArray[Any]]


def add(checkpoint: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes sums to a file of their own.

    Args:
        checkpoint: the checkpoint's folder.
        arrays: the sums.
    """
    folder = checkpoint / "whitening"
    folder.mkdir(exist_ok=True)
    path = folder / f"{secrets.token_hex(8)}.npz"
    temporary = temporary_path(path)
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    link_new(temporary, path)
    temporary.unlink()
    sync_directory(checkpoint)


def settled(checkpoint: Path, *, settle: bool) -> list[tuple[Path, Arrays]] | None:
    """Reads the sums that a checkpoint's rows are whitened by.

    Args:
        checkpoint: the checkpoint's folder.
        settle: if nothing is settled yet, settle on all files that are there; of several
            processes one wins.

    Returns:
        Files and their arrays; None if nothing is settled.
    """
    listing, folder = checkpoint / "whitening.json", checkpoint / "whitening"
    if not listing.exists():
        names = sorted(p.name for p in folder.glob("[!.]*.npz"))
        if not (settle and names):
            return None
        create_json(listing, {"parts": names})
    paths = [folder / name for name in read_json(listing)["parts"]]
    return [(path, _read(path)) for path in paths]


def _read(path: Path) -> Arrays:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise StoreCorruptedError(
            f"{path} is lost or damaged ({error}), and rows were whitened by it. Restore "
            "it, or delete the checkpoint's folder and featurize again."
        ) from error
