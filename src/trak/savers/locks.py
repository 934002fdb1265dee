"""A lock on a store, held while files that belong together are exchanged or read."""

import errno
import fcntl
import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def changing(store: Path) -> Generator[None]:
    """Keeps others out of what is exchanged; to be held for moments, and never twice.

    Without effect on a file system that has no locks.

    Args:
        store: the store's folder.

    Yields:
        Nothing.
    """
    descriptor = os.open(store / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def reading(store: Path) -> Generator[None]:
    """Waits for those who exchange files; writes nothing, so a store may be read-only.

    Args:
        store: the store's folder.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        with suppress(FileNotFoundError, PermissionError):  # nobody has exchanged any
            descriptor = os.open(store / "lock", os.O_RDONLY)
            stack.callback(os.close, descriptor)
            _lock(descriptor, fcntl.LOCK_SH)
        yield


def _lock(descriptor: int, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
