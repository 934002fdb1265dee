"""One build at a time in a folder, also after a process was killed."""

import fcntl
import os
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from trak.errors import BankBuildError, InputError

_TRIES = 1000  # another build may take the folder away between two steps


@contextmanager
def only_build(folder: Path) -> Generator[None]:
    """Keeps other builds out of a folder meanwhile.

    The operating system takes the lock back when the process ends, however it ends.

    Args:
        folder: of a bank's models, `work`; made if absent, and removed afterwards if
            nothing is left in it.

    Yields:
        Nothing.
    """
    path = folder / "lock"
    descriptor = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # what is not finished lies in it
            folder.rmdir()
        os.close(descriptor)


def _locked(path: Path) -> int:
    for _ in range(_TRIES):
        # a build that ends meanwhile takes the file and its folder away
        with suppress(FileNotFoundError), ExitStack() as stack:
            descriptor = _opened(path)
            stack.callback(os.close, descriptor)
            _lock(descriptor, path)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                stack.pop_all()
                return descriptor
    raise InputError(
        f"{path} cannot be made: is {path.parent}, or the file, a link to something that "
        "is gone? Remove it, or use another folder."
    )


def _opened(path: Path) -> int:
    try:
        with suppress(FileExistsError):
            path.parent.mkdir(parents=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(
            f"{path} cannot be made: {error}. A build needs a folder that it may write to."
        ) from error


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BankBuildError(
            f"Another build is running in {path.parent.parent} (a process holds the lock "
            f"{path}). Wait until it has ended: the same call then reads its bank, or goes "
            "on from its models. To build another bank meanwhile, use another folder."
        ) from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be locked: {error}. A build needs a file system with flock; "
            "build on a local disk, and copy the bank."
        ) from error
