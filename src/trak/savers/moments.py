"""Files of sums for whitening: one of each process, and the list that rows depend on."""

import os
import secrets
import zipfile
from collections.abc import Callable, Mapping
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
    _write(folder / f"{secrets.token_hex(8)}.npz", arrays)
    sync_directory(checkpoint)


def settled_basis(
    checkpoint: Path, make: Callable[[], Mapping[str, NDArray[Any]]], *, begun: bool
) -> Arrays:
    """Reads the coordinates that rows hold; writes them before if they are not there.

    Args:
        checkpoint: the checkpoint's folder.
        make: chooses them; of several processes one wins.
        begun: whether there are rows already.

    Returns:
        Name to array.

    Raises:
        StoreCorruptedError: if there are rows and the file is not there, or is damaged.
    """
    path = checkpoint / "leading.npz"
    if not path.exists():
        if begun:
            raise StoreCorruptedError(
                f"{path} is lost, and rows hold the coordinates that it names. Restore it, "
                "or delete the checkpoint's folder and featurize again."
            )
        _write(path, make())
    return _read(path)


def settled(
    checkpoint: Path, *, settle: bool, prefix: str = ""
) -> list[tuple[Path, Arrays]] | None:
    """Reads the sums that a checkpoint's rows are whitened by.

    Args:
        checkpoint: the checkpoint's folder.
        settle: if nothing is settled yet, settle on all files that are there; of several
            processes one wins.
        prefix: read arrays only whose names begin so.

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
    return [(path, _read(path, prefix)) for path in paths]


def _write(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    temporary = temporary_path(path)
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    link_new(temporary, path)
    temporary.unlink()


def _read(path: Path, prefix: str = "") -> Arrays:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name.startswith(prefix)}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise StoreCorruptedError(
            f"{path} is lost or damaged ({error}), and rows depend on it. Restore "
            "it, or delete the checkpoint's folder and featurize again."
        ) from error
