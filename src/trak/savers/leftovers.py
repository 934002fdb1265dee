"""Temporary files of processes that were killed."""

import re
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

AGE = 24 * 60 * 60
"""Seconds without a change after which a temporary file is nobody's."""
_NAME = re.compile(r"\..+\.[0-9a-f]{16}")
_WHERE = (
    ".*",
    "[0-9]*/.*",
    "[0-9]*/whitening/.*",
    "[0-9]*/kernel/.*",
    "experiments/.*",
    "scores/.*",
    "scores/ridge=*/.*",
)


def remove_leftovers(store: Path) -> None:
    """Removes temporary files that nobody has written to for a day.

    Args:
        store: the store's folder.
    """
    before = time.time() - AGE
    for path in chain.from_iterable(store.glob(pattern) for pattern in _WHERE):
        if _NAME.fullmatch(path.name):
            with suppress(OSError):  # gone, a folder, or not ours to remove
                if path.stat().st_mtime < before:
                    path.unlink()
