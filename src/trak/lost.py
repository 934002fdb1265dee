"""Files of a store that go away while a run has it open, or may not be written."""

import errno
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from trak.errors import StoreCorruptedError, StoreNotWritableError

_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_S = TypeVar("_S")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def tells_of_files(
    method: Callable[Concatenate[_S, _P], _R],
) -> Callable[Concatenate[_S, _P], _R]:
    """Turns errors of the file system about the store into ones that say what to do.

    Args:
        method: of an object with a `saver`.

    Returns:
        The method. It raises `StoreCorruptedError` where a file of the store is gone, and
        `StoreNotWritableError` where one may not be written or read; errors about other
        files stay as they are.
    """

    @wraps(method)
    def guarded(self: _S, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return method(self, *args, **kwargs)
        except OSError as error:
            saver: Any = getattr(self, "saver", None)
            folder = getattr(saver, "save_dir", None)
            if folder is None or error.filename is None:
                raise
            path = Path(str(error.filename)).absolute()
            if not path.is_relative_to(folder):
                raise
            if isinstance(error, FileNotFoundError):
                raise _lost(path, Path(folder)) from error
            if error.errno in _REFUSED:
                raise _refused(path, Path(folder), error) from error
            raise

    return guarded


def _refused(path: Path, folder: Path, error: OSError) -> StoreNotWritableError:
    return StoreNotWritableError(
        f"{path} cannot be opened or made ({error.strerror}). To add to the store in "
        f"{folder}, its folders and files must be writable; or copy it and use the copy as "
        "save_dir. What is finished can be read without: by a TRAKer's top_scores, "
        "scores(method=...) and self_influence, or by numpy.load from scores/."
    )


def _lost(path: Path, folder: Path) -> StoreCorruptedError:
    folders = [folder / part for part in reversed(path.relative_to(folder).parents)]
    gone = next((each for each in folders if not each.exists()), path)
    if gone == folder:
        return StoreCorruptedError(
            f"The store in {folder} is gone: it was moved or removed during the run. Put "
            "it back and repeat the call, or make a new TRAKer and start over."
        )
    return StoreCorruptedError(
        f"{gone} is gone: it was moved or removed during the run. Put it back and repeat "
        f"the call, or make a new TRAKer with save_dir={str(folder)!r} and run all steps "
        "again: what is whole is not computed anew, and what cannot be mended is named."
    )
