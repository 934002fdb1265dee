"""Ground truth that other projects publish, as banks."""

from pathlib import Path
from typing import Any

import numpy as np

from trak.arguments import as_integer
from trak.errors import UNREADABLE, InputError
from trak.evaluation.arrays import (
    Booleans,
    as_floats,
    as_masks,
    as_outputs,
    as_single,
    check_length,
)
from trak.evaluation.banks import Bank
from trak.evaluation.files import as_path
from trak.evaluation.indices import masks_from_indices


def read_trak_bank(
    masks: str | Path, margins: str | Path, *, seeds: int = 1, name: str = ""
) -> Bank:
    """Reads the masks and margins of the reference implementation's CIFAR examples.

    They are `.npy` files: `mask.npy` `[models, n]` with 0 and 1, and `val_margins.npy`
    `[models, m]` with the correct class's margin of each validation image. Where each mask
    was trained on several times, its models follow each other.

    Args:
        masks: the file of the masks: one row a model, or one row a subset.
        margins: the file of the margins.
        seeds: models a mask.
        name: what to call the bank.

    Returns:
        The bank, without hashes: these files have none.

    Raises:
        InputError: if a file is no such array, the numbers of rows do not fit, the rows of
            one subset differ, or those of two subsets are equal: models of one mask that
            count as independent subsets make intervals too narrow.
    """
    repeats = as_integer("seeds", seeds, least=1)
    rows = as_masks("masks", _load("masks", masks), axes=("model", "training example"))
    values = as_floats("margins", _load("margins", margins), axes=("model", "target"))
    if len(values) % repeats:
        raise InputError(f"{len(values)} rows of margins are not {repeats} a subset.")
    subsets = len(values) // repeats
    if len(rows) == len(values):
        grouped = rows.reshape(subsets, repeats, -1)
        if (grouped != grouped[:, :1]).any():
            raise InputError(
                f"Rows of masks must be equal in groups of seeds={repeats} that follow "
                "each other: they are not."
            )
        rows = grouped[:, 0]
    check_length(len(rows), subsets, "The rows of masks", "margins")
    _refuse_equal(rows, repeats)
    outputs = as_single("margins", values).reshape(subsets, repeats, -1)
    return Bank(masks=rows, outputs=outputs, name=name)


def bank_from_indices(outputs: Any, indices: Any, n: int, *, name: str = "") -> Bank:
    """A bank of lists of training examples, as dattri and quanda keep their subsets.

    dattri's ground truth is the pair `(target_values, indices)`, tensors `[subsets, m]` and
    `[subsets, subset size]`, where target values are minus the loss, positive is better:
    pass both. Older versions of dattri did not flip the sign; then pass `-target_values`.

    Args:
        outputs: `[subsets, m]` or `[subsets, seeds, m]`, model outputs: larger is better.
        indices: for each subset the training examples it holds, rows of the scores.
        n: number of training examples.
        name: what to call the bank.

    Returns:
        The bank, without hashes.
    """
    masks = masks_from_indices(indices, as_integer("n", n, least=1))
    values = as_single("outputs", as_outputs("outputs", outputs, "subset"))
    return Bank(masks=masks, outputs=values, name=name)


def _refuse_equal(masks: Booleans, repeats: int) -> None:
    packed = np.packbits(masks, axis=1)
    _, first, which = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    earlier = first[which.reshape(-1)]  # NumPy 2.0 gives it further axes
    again = np.flatnonzero(earlier < np.arange(len(masks)))
    if len(again):
        raise InputError(
            f"Subsets {earlier[again[0]]} and {again[0]} have the same mask, with "
            f"seeds={repeats} models each. Models of one mask are no further subsets: say "
            "in seeds how many models each mask has, and let their rows follow each other."
        )


def _load(name: str, file: str | Path) -> Any:
    path = as_path(name, file)
    if not path.is_file():
        raise InputError(f"{name} must be the path of a .npy file, and {path} is none.")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except UNREADABLE as error:
        raise InputError(
            f"{path} is no .npy file of numbers ({error}). Files of torch.save have to be "
            "read by torch.load(path, weights_only=True), which you do, and their tensors "
            "given to bank_from_indices."
        ) from error
