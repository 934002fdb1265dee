"""Files that are whole or absent, and their paths."""

import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from trak.errors import InputTypeError


def as_path(name: str, value: Any) -> Path:
    """Accepts a path.

    Args:
        name: the argument, for the message.
        value: what the user gave.

    Returns:
        The path.

    Raises:
        InputTypeError: if it is none.
    """
    if not isinstance(value, str | os.PathLike):
        raise InputTypeError(f"{name} must be a path, got {value!r:.80}.")
    return Path(value)


def replace_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file so that a reader or a crash sees the old one or the new one.

    Args:
        path: the file.
        write: writes its content.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
