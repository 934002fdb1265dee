"""The files of a bank. The normative text is docs/evaluation.md, "Format"."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import UNREADABLE, BankCorruptedError, InputError, InputTypeError
from trak.evaluation.banks import Bank
from trak.evaluation.described import as_json
from trak.evaluation.files import as_path, file_hash, replace_file
from trak.evaluation.hashes import hashes_of
from trak.evaluation.weights import WEIGHTS, load_checkpoints

_log = logging.getLogger(__name__)

VERSION = 1
MANIFEST = "bank.json"
TRUTH = "truth.npz"

_OWN = (
    "version",
    "name",
    "n",
    "targets",
    "subsets",
    "seeds",
    "subset_size",
    "seed_rule",
    "recipe",
    "data",
    "checkpoints",
    "checkpoint_hashes",
    "files",
)

_DTYPES = {
    "masks": ("uint8",),
    "outputs": ("float32", "float16"),
    "seeds": ("int64",),
    "examples": ("int64",),
    "n": ("int64",),
}


def save_bank(bank: Bank, folder: str | Path) -> None:
    """Writes a bank.

    Weights are not written. Those that lie in the folder already, as
    `checkpoints.safetensors`, become a part of the bank if they are its checkpoints.

    Args:
        bank: the bank.
        folder: created if absent; a bank in it is replaced.

    Raises:
        InputTypeError: if it is no bank.
    """
    given: Any = bank
    if not isinstance(given, Bank):
        raise InputTypeError(
            f"bank must be a Bank, as load_bank or build_bank gives it, got "
            f"{type(given).__name__}."
        )
    folder = prepared(folder, bank)
    manifest = _manifest(bank)
    as_json("recipe and notes", manifest)
    arrays: dict[str, Any] = {
        "masks": np.packbits(bank.masks, axis=1),
        "outputs": bank.outputs,
        "n": np.array(bank.n, dtype=np.int64),
    }
    optional = {"seeds": bank.seeds, "examples": bank.examples}
    arrays.update({name: value for name, value in optional.items() if value is not None})
    replace_file(folder / TRUTH, lambda file: np.savez_compressed(file, **arrays))
    present = [name for name in (TRUTH, WEIGHTS) if (folder / name).exists()]
    manifest["files"] = {name: file_hash(folder / name) for name in present}
    text = as_json("the manifest", manifest) + "\n"
    replace_file(folder / MANIFEST, lambda file: file.write(text.encode()))


def prepared(folder: str | Path, bank: Bank) -> Path:
    """Makes the folder of a bank that is to be written.

    Args:
        folder: created if absent.
        bank: the bank; its outputs do not matter.

    Returns:
        The folder.

    Raises:
        InputError: if it cannot be made, or holds the weights of other checkpoints.
    """
    folder = as_path("folder", folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder!s:.200} cannot be the folder of a bank: {error}."
        ) from error
    if (folder / WEIGHTS).exists():
        lying = hashes_of(load_checkpoints(folder))
        if lying != bank.checkpoints:
            raise InputError(
                f"{folder / WEIGHTS} holds {len(lying)} checkpoints, which are not the "
                f"{len(bank.checkpoints)} of the bank. Use another folder, or take them "
                "away."
            )
    return folder


def load_bank(folder: str | Path) -> Bank:
    """Reads a bank and checks its files.

    Args:
        folder: where it is.

    Returns:
        The bank. Its weights, if it has some, are read by `load_checkpoints`.

    Raises:
        BankCorruptedError: if a file is damaged, lost, or of another version.
    """
    folder = as_path("folder", folder)
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, files = manifest["version"], dict(manifest["files"])
    except UNREADABLE as error:
        raise BankCorruptedError(
            f"{path} describes no bank ({error!r}). A folder without it is no bank, or one "
            "whose build has not ended."
        ) from error
    if type(version) is not int or version != VERSION:
        raise BankCorruptedError(
            f"{path} is of version {version!r}, this reads {VERSION}. Use the version of "
            "this library that wrote it, or fetch or build the bank again."
        )
    _check_files(folder, files)
    try:
        return _bank(folder, manifest, has_weights=WEIGHTS in files)
    except (KeyError, TypeError, ValueError) as error:
        raise BankCorruptedError(f"{folder} contradicts itself: {error!r}.") from error


def _manifest(bank: Bank) -> dict[str, Any]:
    sizes = np.unique(bank.masks.sum(axis=1)).tolist()
    reserved = sorted(set(bank.notes) & set(_OWN))
    if reserved:
        raise InputError(f"notes may not be called {', '.join(reserved)}: these are taken.")
    return {
        "version": VERSION,
        "name": bank.name,
        "n": bank.n,
        "targets": bank.outputs.shape[2],
        "subsets": len(bank.masks),
        "seeds": bank.outputs.shape[1],
        "subset_size": sizes[0] if len(sizes) == 1 else None,
        "seed_rule": bank.seed_rule,
        "data": bank.data,
        "recipe": dict(bank.recipe),
        "checkpoints": len(bank.checkpoints),
        "checkpoint_hashes": list(bank.checkpoints),
        **bank.notes,
    }


def _check_files(folder: Path, files: dict[str, str]) -> None:
    if TRUTH not in files or set(files) - {TRUTH, WEIGHTS}:
        raise BankCorruptedError(
            f"{folder / MANIFEST} lists {sorted(map(str, files))}; it must list {TRUTH}, "
            f"and may list {WEIGHTS}."
        )
    for name, expected in files.items():
        path = folder / name
        try:
            state = (
                "" if file_hash(path) == expected else "is not the file that was written"
            )
        except FileNotFoundError:
            state = "is lost"
        except OSError as error:
            state = f"cannot be read ({error})"
        if state:
            raise BankCorruptedError(f"{path} {state}. Fetch or build the bank again.")


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as truth:
            found = {name: truth[name] for name in _DTYPES if name in truth}
    except Exception as error:  # whatever zip files and arrays raise where they are none
        raise BankCorruptedError(
            f"{path} is no archive of arrays ({error!r}). Fetch or build the bank again."
        ) from error
    for name, array in found.items():
        if array.dtype.name not in _DTYPES[name]:
            expected = " or ".join(_DTYPES[name])
            raise BankCorruptedError(
                f"{path}: {name} must be {expected}, got {array.dtype}. Write the bank "
                "again, by save_bank."
            )
    return found


def _bank(folder: Path, manifest: dict[str, Any], *, has_weights: bool) -> Bank:
    arrays = _arrays(folder / TRUTH)
    packed, outputs = arrays.pop("masks"), arrays.pop("outputs")
    masks = _masks(packed, manifest["n"], arrays.pop("n", None), folder)
    size = manifest.get("subset_size")
    held = masks.sum(axis=1)
    if size is not None and (type(size) is not int or (held != size).any()):
        raise ValueError(
            f"subsets hold {held.min()} to {held.max()} examples, bank.json says "
            f"subset_size = {size!r}"
        )
    expected = tuple(manifest[name] for name in ("subsets", "seeds", "targets"))
    if outputs.shape != expected:
        raise ValueError(f"outputs are {outputs.shape}, bank.json says {expected}")
    hashes = tuple(manifest.get("checkpoint_hashes", ()))
    if hashes and manifest.get("checkpoints") != len(hashes):
        raise ValueError(
            f"checkpoints is {manifest.get('checkpoints')!r}, with {len(hashes)} hashes"
        )
    if has_weights:
        lying = hashes_of(load_checkpoints(folder))
        if hashes and hashes != lying:
            raise ValueError("checkpoint_hashes are not those of the weights")
        hashes = lying
    return Bank(
        masks=masks,
        outputs=outputs,
        name=manifest["name"],
        seed_rule=manifest.get("seed_rule"),
        recipe=manifest["recipe"],
        data=manifest.get("data"),
        checkpoints=hashes,
        notes={name: value for name, value in manifest.items() if name not in _OWN},
        **arrays,
    )


def _masks(
    packed: NDArray[Any], n: Any, recorded: NDArray[Any] | None, folder: Path
) -> NDArray[np.bool_]:
    # the hash that bank.json has is of the packed masks, and not of its own n
    if type(n) is not int or packed.ndim != 2 or packed.shape[1] != -(-n // 8):
        raise ValueError(f"masks are packed as {packed.shape}, bank.json says n = {n!r}")
    if recorded is not None and (recorded.ndim or int(recorded) != n):
        raise ValueError(
            f"{TRUTH} was written for n = {recorded}, bank.json says n = {n}: put the "
            "number back, or fetch or build the bank again"
        )
    whole = np.unpackbits(packed, axis=1).astype(np.bool_)
    if whole[:, n:].any():
        raise ValueError(f"masks name examples beyond n = {n}")
    last = np.flatnonzero(whole.any(axis=0))[-1:]
    if recorded is None and len(last) and last[0] < n - 1:
        _log.warning(
            "%s: bank.json says n = %d, and no subset holds an example after number %d. If "
            "the training set has all %d of them, save_bank writes the bank with n beside "
            "its masks; else n is wrong.",
            folder,
            n,
            last[0],
            n,
        )
    return whole[:, :n]
