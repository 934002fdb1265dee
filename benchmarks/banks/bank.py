"""The file format of a bank: see README.md beside this file."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parent
VERSION = 1


class MissingDataError(FileNotFoundError):
    """A bank's data is not in the repository and was not fetched."""


@dataclass(frozen=True)
class Bank:
    """Outputs of retrained models.

    Attributes:
        masks: which examples each subset holds, bool `[subsets, n]`.
        outputs: the targets' outputs after training on a subset, `[subsets, seeds, m]`.
        checkpoints: models trained on everything, as they are stored: `Recipe.weights`
            makes state dicts of them.
        manifest: how the bank was made.
    """

    masks: NDArray[np.bool_]
    outputs: NDArray[np.floating[Any]]
    checkpoints: list[dict[str, Tensor]]
    manifest: dict[str, Any]


def save(bank: Bank, folder: Path) -> None:
    """Writes a bank.

    Args:
        bank: the bank.
        folder: created if absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    masks = np.packbits(bank.masks, axis=1)
    outputs = bank.outputs.astype(np.float16)
    np.savez_compressed(folder / "truth.npz", masks=masks, outputs=outputs)
    tensors = {
        f"{j}/{name}": value.contiguous()
        for j, state in enumerate(bank.checkpoints)
        for name, value in state.items()
    }
    save_file(tensors, folder / "checkpoints.safetensors")
    files = ("truth.npz", "checkpoints.safetensors")
    manifest = {
        "version": VERSION,
        **bank.manifest,
        "files": {name: _digest(folder / name) for name in files},
    }
    text = json.dumps(manifest, indent=1) + "\n"
    (folder / "bank.json").write_text(text, encoding="utf-8")


def load(name: str, folder: Path | None = None) -> Bank:
    """Reads a bank and checks its files.

    Args:
        name: the bank.
        folder: where it is; beside this file if None.

    Returns:
        The bank.

    Raises:
        ValueError: if a file is of another version, or not the one that was written.
    """
    folder = folder or FOLDER / name
    manifest = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
    if manifest["version"] != VERSION:
        raise ValueError(f"{folder}: version {manifest['version']}, expected {VERSION}.")
    for file, expected in manifest["files"].items():
        if _digest(folder / file) != expected:
            raise ValueError(f"{folder / file} is not the file that bank.json describes.")
    with np.load(folder / "truth.npz", allow_pickle=False) as truth:
        masks = np.unpackbits(truth["masks"], axis=1, count=manifest["n"]).astype(bool)
        outputs = truth["outputs"].astype(np.float32)
    states: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in load_file(folder / "checkpoints.safetensors").items():
        number, _, parameter = key.partition("/")
        states[int(number)][parameter] = value
    return Bank(masks, outputs, [states[j] for j in sorted(states)], manifest)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
