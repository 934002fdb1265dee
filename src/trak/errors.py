"""Every exception the library raises on purpose.

Each also derives from the built-in that describes it, so that `except ValueError`
written for another library keeps working. A message says what was expected, what was
found, where, and what to do.
"""

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

UNREADABLE = (
    OSError,
    EOFError,
    LookupError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy and JSON raise where bytes are not what they are read as."""


def not_of_the_file(error: BaseException, path: Path) -> bool:
    """Whether memory is short for what a file really holds.

    Args:
        error: was raised while reading it.
        path: the file, whose arrays are not compressed.

    Returns:
        False for other errors, and where more was asked for than the file has bytes: then
        the header of an array is damaged.
    """
    shape, dtype = getattr(error, "shape", None), getattr(error, "dtype", None)
    if not isinstance(error, MemoryError):
        return False
    asked = 0 if shape is None or dtype is None else math.prod(shape) * dtype.itemsize
    return asked <= path.stat().st_size


class AttributionError(Exception):
    """Base of all errors raised by this library."""


class InputError(AttributionError, ValueError):
    """An argument or a batch that cannot be used."""


class InputTypeError(AttributionError, TypeError):
    """An argument or a batch of the wrong type."""


class PhaseError(AttributionError, RuntimeError):
    """A method called before the step it depends on."""


class ModelIDException(PhaseError):  # noqa: N818 - upstream's name, users catch it
    """A checkpoint that is unknown or not ready for what was asked of it."""


class StoreMismatchError(AttributionError, ValueError):
    """Settings, weights or examples differ from those a store was written with."""


class StoreCorruptedError(AttributionError, RuntimeError):
    """A file of the store is damaged: the message names it and the place."""


class StoreNotWritableError(AttributionError, PermissionError):
    """A store may be read but not written."""


class BankMismatchError(AttributionError, ValueError):
    """A bank was made from other data or checkpoints, or by another recipe."""


class BankCorruptedError(AttributionError, RuntimeError):
    """A file of a bank is damaged or lost: the message names it."""


class BankBuildError(AttributionError, RuntimeError):
    """A bank could not be built, or another build runs; what was trained is kept."""


class NumericalError(AttributionError, ArithmeticError):
    """A number that is not finite, or a matrix that cannot be inverted."""


class UnsupportedModuleError(AttributionError, NotImplementedError):
    """A layer or model that a gradient computer cannot follow."""


class NotEnoughMemoryError(AttributionError, MemoryError):
    """A single sample, or one number for each example, does not fit into memory."""
