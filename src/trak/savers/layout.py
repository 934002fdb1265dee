"""Where things lie in a store, and in which dtype. The normative text is FORMAT.md."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trak.encodings import RowEncoding
from trak.errors import InputError, StoreMismatchError
from trak.savers.filesystem import read_object
from trak.savers.rows import RowGroup

LONGEST_NAME = 255 - len("..") - len(".mmap") - 2 * len(".0123456789abcdef")
"""Bytes of an experiment's name: file systems take 255, of temporary names, too."""


class StoreLayout:
    """Paths, dtypes and row groups of a store.

    Args:
        save_dir: the store's folder.
        num_rows: number of training examples, `n`.
        width: projection dimension, `k`.
        encoding: how projected gradients are written.
        weighted: training examples have sample weights.
    """

    def __init__(
        self,
        save_dir: Path,
        num_rows: int,
        width: int,
        encoding: RowEncoding,
        *,
        weighted: bool = False,
    ) -> None:
        self.save_dir = save_dir
        self.num_rows = num_rows
        self.width = width
        self.encoding = encoding
        self.weighted = weighted
        # Q lies in (0, 1] and reaches below float16's range for confident models
        wide = np.float64 if encoding.name == "float64" else np.float32
        self.q_dtype = self.score_dtype = np.dtype(wide)

    def checkpoint(self, model_id: int) -> Path:
        """A checkpoint's folder.

        Args:
            model_id: the checkpoint.

        Returns:
            Its path.
        """
        return self.save_dir / str(model_id)

    def experiment(self, exp_name: Any) -> Path:
        """An experiment's record.

        Args:
            exp_name: the experiment.

        Returns:
            Its path, if the name can be a file name.
        """
        check_experiment_name(exp_name)
        return self.save_dir / "experiments" / f"{exp_name}.json"

    def train_rows(self, model_id: int) -> RowGroup:
        """Creates or opens a checkpoint's rows.

        Args:
            model_id: the checkpoint.

        Returns:
            `grads` `[n, k]`, `out_to_loss` `[n, 1]` and `examples` `[n, 1]`; and, if
            rows have scales, `scales` `[n, 1]`, and, if examples have weights,
            `sample_weights` `[n, 1]`.
        """
        folder = self.checkpoint(model_id)
        self._refuse_other_writers(folder)
        arrays = {
            **self._grads(folder, ""),
            "out_to_loss": (folder / "out_to_loss.mmap", 1, self.q_dtype),
            "examples": (folder / "examples.mmap", 1, np.int64),
        }
        if self.weighted:
            path = folder / "sample_weights.mmap"
            arrays["sample_weights"] = (path, 1, self.q_dtype)
        journal = folder / "grads.journal"
        return RowGroup(journal, self.num_rows, arrays, self.encoding)

    def target_journal(self, exp_name: str, model_id: int) -> Path:
        """The journal of an experiment's targets.

        Args:
            exp_name: the experiment.
            model_id: the checkpoint.

        Returns:
            Its path.
        """
        return self.checkpoint(model_id) / f"{exp_name}_grads.journal"

    def target_files(self, exp_name: str, model_id: int) -> list[Path]:
        """The row files of an experiment, whether or not they exist.

        Args:
            exp_name: the experiment.
            model_id: the checkpoint.

        Returns:
            Their paths.
        """
        folder = self.checkpoint(model_id)
        names = ("grads", "scales", "examples")
        return [folder / f"{exp_name}_{name}.mmap" for name in names]

    def target_rows(self, exp_name: str, model_id: int, num_targets: int) -> RowGroup:
        """Creates or opens an experiment's rows.

        Args:
            exp_name: the experiment.
            model_id: the checkpoint.
            num_targets: how many targets it has, `m`.

        Returns:
            `grads` `[m, k]` and `examples` `[m, 1]`; and, if rows have scales, `scales`
            `[m, 1]`.
        """
        folder = self.checkpoint(model_id)
        self._refuse_other_writers(folder)
        arrays = {
            **self._grads(folder, f"{exp_name}_"),
            "examples": (folder / f"{exp_name}_examples.mmap", 1, np.int64),
        }
        journal = self.target_journal(exp_name, model_id)
        remedy = f"Remove it and {journal}, and score these targets again."
        return RowGroup(journal, num_targets, arrays, self.encoding, remedy)

    def _grads(self, folder: Path, prefix: str) -> dict[str, tuple[Path, int, Any]]:
        arrays: dict[str, tuple[Path, int, Any]] = {
            "grads": (folder / f"{prefix}grads.mmap", self.width, self.encoding.file)
        }
        if self.encoding.scaled:
            arrays["scales"] = (folder / f"{prefix}scales.mmap", 1, np.dtype("<f4"))
        return arrays

    def _refuse_other_writers(self, folder: Path) -> None:
        others = sorted(
            path.name
            for path in folder.glob("*.journal")
            if re.search(r"\.w\d+\.journal$", path.name)
        )
        if others:
            raise StoreMismatchError(
                f"{folder} holds rows of further writers ({others[0]}), which this "
                "version cannot read; the rows it would see are not all there are."
            )


def check_experiment_name(exp_name: Any) -> None:
    """Refuses what cannot be part of a file's name.

    Args:
        exp_name: the experiment.

    Raises:
        InputError: if the name cannot be a file name.
    """
    if not isinstance(exp_name, str) or not re.fullmatch(
        r"[\w\-+=@,()\[\] ][\w\-+=@,.()\[\] ]*", exp_name
    ):
        raise InputError(
            "exp_name becomes a file name: use a string of letters, digits, '_', '-' "
            f"and '.', without leading '.'; got {exp_name!r}."
        )
    if (size := len(exp_name.encode())) > LONGEST_NAME:
        raise InputError(
            f"exp_name becomes part of file names and may have {LONGEST_NAME} bytes; this "
            f"one has {size} ({exp_name[:40]!r}...). Use a shorter one."
        )


def read_experiment(path: Path) -> dict[str, Any]:
    """Reads an experiment's record.

    Args:
        path: as `StoreLayout.experiment` gives it.

    Returns:
        The record.
    """
    return read_object(
        path,
        "remove it, and start scoring and finalize the scores again, or make the call of "
        "attribute again (rows of targets are kept, and no gradient is recomputed)",
        num_targets=int,
        scores_path=str,
        scores_finalized=int,
    )


def lowest_format(metadata: Mapping[str, Any], encoding: RowEncoding) -> int:
    """The oldest version of the format that a store fits into.

    Args:
        metadata: the run's settings.
        encoding: how projected gradients are written.

    Returns:
        Its number.
    """
    if metadata.get("sample_weights"):
        return 4
    projection: Mapping[str, Any] = metadata.get("projection", {})
    if projection.get("kind") in {"kernel", "leading"}:
        return 3
    return 1 if encoding.plain else 2
