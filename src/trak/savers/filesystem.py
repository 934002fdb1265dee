"""Small files that are either whole or absent, and directories that stay written."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from trak.errors import InputError, InputTypeError, StoreCorruptedError

REMEDY = "remove the folder it describes and featurize again"


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable.

    Args:
        path: the directory.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader or a crash sees the old file or the new one.

    Args:
        path: the file.
        value: JSON values.
    """
    temporary = _temporary_json(path, value)
    temporary.replace(path)
    sync_directory(path.parent)


def create_json(path: Path, value: Any) -> bool:
    """Writes JSON unless the file is there already; of several processes one wins.

    Args:
        path: the file.
        value: JSON values.

    Returns:
        Whether this call created the file.
    """
    temporary = _temporary_json(path, value)
    try:
        return link_new(temporary, path)
    finally:
        temporary.unlink()


def link_new(temporary: Path, path: Path) -> bool:
    """Gives a finished file its name, unless the name is taken.

    Args:
        temporary: the finished file, on the same file system.
        path: its name.

    Returns:
        Whether the name was free.
    """
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    sync_directory(path.parent)
    return True


def read_json(path: Path, remedy: str = REMEDY) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        remedy: what to do if it is damaged, the end of a sentence.

    Returns:
        Its value.

    Raises:
        StoreCorruptedError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreCorruptedError(
            f"{path} is not a JSON file ({error}). This library replaces such files as "
            f"a whole, so something else damaged it: restore it, or {remedy}."
        ) from error


def read_object(path: Path, remedy: str = REMEDY, **entries: type) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: the file.
        remedy: what to do if it is damaged, the end of a sentence.
        entries: names of what it must hold, and their types.

    Returns:
        Its value.

    Raises:
        StoreCorruptedError: if it is something else.
    """
    found = read_json(path, remedy)
    if not isinstance(found, dict):
        raise StoreCorruptedError(
            f"{path} should hold a JSON object, and holds {found!r:.80}. Restore it, or "
            f"{remedy}."
        )
    for name, kind in entries.items():
        if not isinstance(found.get(name), kind):
            raise StoreCorruptedError(
                f"{path} should hold {name!r}, of the type {kind.__name__}, and holds "
                f"{found.get(name)!r:.80} there. Restore it, or {remedy}."
            )
    return found


def temporary_path(path: Path) -> Path:
    """A new, empty file beside `path`.

    Args:
        path: the file that will be replaced.

    Returns:
        Where to write first.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.touch(exist_ok=False)  # not mkstemp: the file keeps the umask's mode
    return temporary


def _temporary_json(path: Path, value: Any) -> Path:
    temporary = temporary_path(path)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def made_folder(path: Any) -> Path:
    """Makes a folder, and those above it, where they are not there.

    Args:
        path: what the user gave.

    Returns:
        The folder.

    Raises:
        InputTypeError: if it is no path.
        InputError: if it cannot be one.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputTypeError(f"save_dir must be the path of a folder, got {path!r}.")
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"save_dir={str(path)!r} cannot be a folder: {error}. Use a path where a "
            "folder is, or may be made."
        ) from error
    return folder
