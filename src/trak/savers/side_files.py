"""What a checkpoint's folder holds beside its rows: whitening, coverage and the like."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from trak.savers import moments
from trak.savers.abstract import AbstractSaver
from trak.savers.filesystem import create_json, read_object, replace_json
from trak.savers.gradient_files import GradientFiles
from trak.savers.sample_outputs import SampleOutputs
from trak.savers.wide_rows import WideRows

_TOLD_AGAIN = (
    "remove it and pass the training examples to featurize again, or make the call of "
    "attribute again: the first examples' outputs tell what it said, and no gradient is "
    "recomputed"
)
_FOR_INFORMATION = (
    "remove it: it is for information, and is written again with the next rows (only if it "
    'still lists parameters under "disproved", their rows may be wrong: remove its folder '
    "then and featurize again)"
)


class SideFiles(AbstractSaver):
    """The part of a store of files that knows them."""

    @abstractmethod
    def checkpoint_folder(self, model_id: int) -> Path:
        """Where a checkpoint's files lie.

        Args:
            model_id: the checkpoint.

        Returns:
            The folder.
        """

    def record_coverage(self, model_id: int, coverage: Mapping[str, Any]) -> None:
        """Writes `coverage.json` beside a checkpoint's rows, unless it says this already.

        Args:
            model_id: the checkpoint.
            coverage: numbers of scalars by way.
        """
        path = self.checkpoint_folder(model_id) / "coverage.json"
        if not path.exists() or read_object(path, _FOR_INFORMATION) != coverage:
            replace_json(path, dict(coverage))

    def coverage(self, model_id: int) -> Mapping[str, Any] | None:
        """Reads `coverage.json`.

        Args:
            model_id: the checkpoint.

        Returns:
            None if there is none.
        """
        path = self.checkpoint_folder(model_id) / "coverage.json"
        return read_object(path, _FOR_INFORMATION) if path.exists() else None

    def record_loss(self, model_id: int, record: Mapping[str, Any]) -> None:
        """Writes `loss.json` beside a checkpoint's rows, once; `seen` to another file.

        Args:
            model_id: the checkpoint.
            record: what was found.
        """
        folder = self.checkpoint_folder(model_id)
        if "logistic" in record:  # of several processes one wins
            create_json(folder / "loss.json", dict(record))
        else:
            replace_json(folder / "seen.json", dict(record))

    def loss_record(self, model_id: int) -> Mapping[str, Any] | None:
        """Reads `loss.json`, or what was seen before there is one.

        Args:
            model_id: the checkpoint.

        Returns:
            What was found; None if nothing was.
        """
        folder = self.checkpoint_folder(model_id)
        paths = [folder / "loss.json", folder / "seen.json"]
        found = (read_object(path, _TOLD_AGAIN) for path in paths if path.exists())
        return next(found, None)

    def add_moments(self, model_id: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes sums for whitening to a file of their own in `{id}/whitening`.

        Args:
            model_id: the checkpoint.
            arrays: the sums.
        """
        moments.add(self.checkpoint_folder(model_id), arrays)

    def settle_moments(self, model_id: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes sums to `{id}/whitening`, and `{id}/whitening.json` for them alone.

        Args:
            model_id: the checkpoint.
            arrays: the sums.
        """
        moments.settle(self.checkpoint_folder(model_id), arrays)

    def settled_moments(
        self, model_id: int, *, settle: bool, prefix: str = ""
    ) -> list[tuple[Path, dict[str, NDArray[Any]]]] | None:
        """Reads the sums that `{id}/whitening.json` names.

        Args:
            model_id: the checkpoint.
            settle: write that file if it is not there.
            prefix: read arrays only whose names begin so.

        Returns:
            As for `AbstractSaver`.
        """
        begun = bool(self.train_rows(model_id).refresh().any())  # first: rows come last
        where = self.checkpoint_folder(model_id)
        return moments.settled(where, settle=settle, begun=begun, prefix=prefix)

    def settled_basis(
        self, model_id: int, make: Callable[[], Mapping[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        """Reads `{id}/leading.npz`, and writes what `make` gives before the first row.

        Args:
            model_id: the checkpoint.
            make: chooses the coordinates, if there is no file yet.

        Returns:
            Name to array.
        """
        begun = bool(self.train_rows(model_id).done.any())
        return moments.settled_basis(self.checkpoint_folder(model_id), make, begun=begun)

    def gradient_files(self, model_id: int) -> GradientFiles:
        """Files of unprojected gradients in `{id}/kernel`.

        Args:
            model_id: the checkpoint.

        Returns:
            The files; none are made yet.
        """
        return GradientFiles(self.checkpoint_folder(model_id) / "kernel")

    def wide_rows(self, model_id: int) -> WideRows:
        """The files `{id}/wide.mmap` and `{id}/wide_numbers.mmap`.

        Args:
            model_id: the checkpoint.

        Returns:
            The files; none are made yet.
        """
        return WideRows(self.checkpoint_folder(model_id))

    def sample_outputs(self, model_id: int) -> SampleOutputs:
        """The file `{id}/outputs.mmap`.

        Args:
            model_id: the checkpoint.

        Returns:
            The file; it is not made yet.
        """
        return SampleOutputs(self.checkpoint_folder(model_id))
