"""The store: rows that survive a crash, and the truth about which of them exist.

The files and what they mean are specified in FORMAT.md beside this module.
"""

from trak.errors import ModelIDException
from trak.savers.abstract import AbstractSaver, Rows
from trak.savers.mmap import MmapSaver
from trak.savers.rows import RowGroup
from trak.savers.view import CurrentStore

__all__ = [
    "AbstractSaver",
    "CurrentStore",
    "MmapSaver",
    "ModelIDException",
    "RowGroup",
    "Rows",
]
