"""Content hashes that tell whether a bank and scores are about the same thing."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.nn import Module

from trak.arguments import is_listed
from trak.batches import normalize
from trak.digests import example_digests, state_digest
from trak.errors import (
    UNREADABLE,
    InputError,
    InputTypeError,
    StoreCorruptedError,
    not_of_the_file,
)
from trak.evaluation.conversion import as_numpy


def data_hash(*parts: Any) -> str:
    """Hashes a data set, or what else outputs follow from.

    Args:
        parts: arrays and tensors, such as training inputs, training labels, targets'
            inputs and targets' labels. Their bytes count, in C order and one after the
            other; shapes and dtypes do not.

    Returns:
        The SHA-256, 64 hexadecimal digits.

    Raises:
        InputTypeError: if a part is no array of numbers.
    """
    digest = hashlib.sha256()
    for part in parts:
        found = as_numpy("data", part, bits=True)
        if found.dtype.kind not in "biufc":
            raise InputTypeError(
                f"data_hash takes arrays of numbers, got {type(part).__name__} of dtype "
                f"{found.dtype}. Texts have to be encoded first."
            )
        digest.update(found.tobytes())
    return digest.hexdigest()


def example_hashes(batch: Any) -> NDArray[np.int64]:
    """Hashes each training example as a `TRAKer` does.

    Args:
        batch: examples in the form and dtype in which `TRAKer.featurize` gets them.

    Returns:
        One number an example, `[n]`.
    """
    return example_digests(normalize(batch))


def checkpoint_hash(checkpoint: Any) -> str:
    """Hashes weights as a `TRAKer`'s store does.

    Args:
        checkpoint: a state dict, in the dtypes of the model that is attributed; or such a
            hash, which is checked for its form.

    Returns:
        32 hexadecimal digits.

    Raises:
        InputError: if a hash does not look like one.
        InputTypeError: if it is something else.
    """
    if not isinstance(checkpoint, str | Mapping):
        raise InputTypeError(
            "A checkpoint is a state dict, or its content hash, got "
            f"{type(checkpoint).__name__}. Of a model, give model.state_dict()."
        )
    if not isinstance(checkpoint, str):
        return state_digest(checkpoint)
    if not re.fullmatch(r"[0-9a-f]{32}", checkpoint):
        raise InputError(
            "A checkpoint is a state dict, or its content hash of 32 hexadecimal digits "
            f"(trak.digests.state_digest), got {checkpoint!r}."
        )
    return checkpoint


def stored_checkpoints(store: Any) -> dict[int, Path]:
    """The checkpoints of a store.

    Args:
        store: a `TRAKer`, or the folder it writes to.

    Returns:
        The folder of each checkpoint, by its id.

    Raises:
        InputError: if there are none.
        InputTypeError: if it is something else.
    """
    path = getattr(store, "save_dir", store)
    if not isinstance(path, str | os.PathLike):
        raise InputTypeError(
            "scored must be the TRAKer that made the scores, or its store's folder, got "
            f"{type(store).__name__}. Weights are given as checkpoints=."
        )
    folder = Path(path)
    found = {
        int(path.parent.name): path.parent
        for path in sorted(folder.glob("*/checkpoint.json"))
        if path.parent.name.isdecimal()
    }
    if not found:
        raise InputError(
            f"{folder} holds no checkpoints. Give a TRAKer that has loaded some, the "
            "folder of its store, or the state dicts themselves as checkpoints=."
        )
    return found


def stored_hash(folder: Path) -> str:
    """The content hash of a store's checkpoint.

    Args:
        folder: the checkpoint's.

    Returns:
        32 hexadecimal digits.

    Raises:
        StoreCorruptedError: if the file is damaged.
    """
    path = folder / "checkpoint.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["digest"])
    except UNREADABLE as error:
        raise StoreCorruptedError(
            f"{path} does not say which weights it is about ({error!r}). Remove its folder "
            "and featurize again."
        ) from error


def stored_examples(folder: Path) -> NDArray[np.int64] | None:
    """The content hashes of the training examples that a store has rows of.

    Args:
        folder: a checkpoint's.

    Returns:
        `[n]`, 0 where unknown; None if nothing was featurized.

    Raises:
        MemoryError: if there is none for them.
        StoreCorruptedError: if the file is damaged.
    """
    path = folder / "examples.mmap"
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:  # a .npy file, whatever it is called
            return np.lib.format.read_array(file, allow_pickle=False)[:, 0]
    except (*UNREADABLE, MemoryError) as error:
        if not_of_the_file(error, path):
            raise
        raise StoreCorruptedError(
            f"{path} is no array of examples' hashes any more. Remove its folder and "
            "featurize again."
        ) from error


def hashes_of(checkpoints: Any) -> tuple[str, ...]:
    """Hashes several checkpoints.

    Args:
        checkpoints: state dicts or hashes.

    Returns:
        Their hashes.

    Raises:
        InputTypeError: if a single one was given, or something else.
    """
    single = isinstance(checkpoints, str | Mapping | Module)
    if single or not is_listed(checkpoints):
        raise InputTypeError(
            "checkpoints must be a list of state dicts or hashes, got "
            f"{type(checkpoints).__name__}. Put a single one into a list."
        )
    return tuple(checkpoint_hash(checkpoint) for checkpoint in checkpoints)
