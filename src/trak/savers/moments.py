"""Files of sums for whitening: one of each process, and the list that rows depend on."""

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import UNREADABLE, StoreCorruptedError, not_of_the_file
from trak.savers.arrays import room_for
from trak.savers.filesystem import (
    create_json,
    link_new,
    read_object,
    sync_directory,
    temporary_path,
)

Arrays = dict[str, NDArray[Any]]


def add(checkpoint: Path, arrays: Mapping[str, NDArray[Any]]) -> str:
    """Writes sums to a file of their own.

    Args:
        checkpoint: the checkpoint's folder.
        arrays: the sums.

    Returns:
        The file's name.
    """
    folder = checkpoint / "whitening"
    folder.mkdir(exist_ok=True)
    name = f"{secrets.token_hex(8)}.npz"
    _write(folder / name, arrays)
    sync_directory(checkpoint)
    return name


def settle(checkpoint: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Settles on these sums alone; of several processes one wins.

    Args:
        checkpoint: the checkpoint's folder.
        arrays: the sums.
    """
    name = add(checkpoint, arrays)
    if not create_json(checkpoint / "whitening.json", {"parts": [name]}):
        (checkpoint / "whitening" / name).unlink()


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
    checkpoint: Path, *, settle: bool, begun: bool, prefix: str = ""
) -> list[tuple[Path, Arrays]] | None:
    """Reads the sums that a checkpoint's rows are whitened by.

    Args:
        checkpoint: the checkpoint's folder.
        settle: if nothing is settled yet, settle on all files that are there; of several
            processes one wins.
        begun: whether there are rows already.
        prefix: read arrays only whose names begin so.

    Returns:
        Files and their arrays; None if nothing is settled.

    Raises:
        StoreCorruptedError: if there are rows and the list is not there, or is damaged.
    """
    listing, folder = checkpoint / "whitening.json", checkpoint / "whitening"
    if not listing.exists():
        if begun:
            raise StoreCorruptedError(
                f"{listing} is lost, and it names the sums that rows are whitened by. "
                "Restore it, or delete the checkpoint's folder and featurize again."
            )
        names = sorted(p.name for p in folder.glob("[!.]*.npz"))
        if not (settle and names):
            return None
        create_json(listing, {"parts": names})
    names = read_object(listing, parts=list)["parts"]
    paths = [folder / str(name) for name in names]
    return [(path, _read(path, prefix)) for path in paths]


def _write(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    temporary = temporary_path(path)
    try:
        size = sum(array.nbytes for array in arrays.values())
        with room_for(path, size), temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        link_new(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, prefix: str = "") -> Arrays:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name.startswith(prefix)}
    except (*UNREADABLE, MemoryError) as error:
        if not_of_the_file(error, path):
            raise
        raise StoreCorruptedError(
            f"{path} is lost or damaged ({error}), and rows depend on it. Restore "
            "it, or delete the checkpoint's folder and featurize again."
        ) from error
