"""What the pipeline asks of a store."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trak.errors import PhaseError
from trak.savers.gradient_files import GradientFiles
from trak.savers.sample_outputs import SampleOutputs
from trak.savers.wide_rows import WideRows


class Rows(Protocol):
    """Rows of several arrays that exist together or not at all."""

    @property
    def done(self) -> NDArray[np.bool_]:
        """True for every row that exists."""
        ...

    def refresh(self) -> NDArray[np.bool_]:
        """Reads what other processes have written since."""
        ...

    def commit(self, rows: NDArray[np.int64], values: Mapping[str, NDArray[Any]]) -> None:
        """Writes rows of every array; they exist when this returns."""
        ...

    def array(self, name: str) -> NDArray[Any]:
        """One array, `[rows, columns]`.

        A store that can also stream its rows of `grads` has a method `encoded` that
        returns `trak.encodings.EncodedRows`; without it they are taken from here.
        """
        ...


class AbstractSaver(ABC):
    """A store of projected gradients, factors and scores.

    Attributes:
        save_dir: the store's folder.
        metadata: what the store is compared by: the run's settings.
        model_ids: id to `{"is_featurized": 0 or 1, "is_finalized": 0 or 1}`.
        experiments: name to `{"num_targets", "scores_path", "scores_finalized", ...}`.
        current_model_id: the checkpoint that `current_store` shows.
        current_experiment_name: the experiment that `current_store` shows.
        current_store: arrays by upstream's names, read when they are asked for.
        features: computes "features" of a checkpoint; set by the pipeline.
    """

    save_dir: Path
    metadata: Mapping[str, Any]
    model_ids: dict[int, dict[str, int]]
    experiments: dict[str, dict[str, Any]]
    current_model_id: int | None = None
    current_experiment_name: str | None = None
    current_store: Mapping[str, Any]
    features: Callable[[int], NDArray[Any]] | None = None

    @abstractmethod
    def verify(self, metadata: Mapping[str, Any]) -> None:
        """Refuses to go on if the store was written with other settings.

        Args:
            metadata: the run's settings as they are now.
        """

    @abstractmethod
    def refresh(self, model_id: int | None = None) -> None:
        """Brings `model_ids` and `experiments` up to date with the disk.

        Args:
            model_id: look at this checkpoint only.
        """

    @abstractmethod
    def checkpoint_digest(self, model_id: int) -> str | None:
        """The content hash a checkpoint was registered with.

        Args:
            model_id: the checkpoint.

        Returns:
            The hash, or None if the id is new.
        """

    @abstractmethod
    def register_model_id(self, model_id: int, digest: str) -> None:
        """Registers a checkpoint, or finds it registered with the same weights.

        Args:
            model_id: the checkpoint.
            digest: content hash of its weights.
        """

    def record_coverage(  # noqa: B027 - savers may do without
        self, model_id: int, coverage: Mapping[str, Any]
    ) -> None:
        """Keeps how a checkpoint's gradients were computed, if the saver can.

        Args:
            model_id: the checkpoint.
            coverage: numbers of scalars by way, as `Coverage.describe` gives them.
        """

    def coverage(self, model_id: int) -> Mapping[str, Any] | None:
        """What `record_coverage` kept.

        Args:
            model_id: the checkpoint.

        Returns:
            None if there is nothing.
        """
        del model_id
        return None

    def add_moments(self, model_id: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Keeps one process's sums for whitening.

        Args:
            model_id: the checkpoint.
            arrays: the sums.

        Raises:
            PhaseError: if the saver has no place for them.
        """
        del model_id, arrays
        raise PhaseError(
            f"{type(self).__name__} does not define add_moments and settled_moments, so "
            "it cannot keep what whitening needs. Leave whitening out, or use MmapSaver."
        )

    def settle_moments(self, model_id: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Settles on one process's sums, where each process adds up the whole sample.

        Args:
            model_id: the checkpoint.
            arrays: the sums; dropped if others are settled on.
        """
        self.add_moments(model_id, arrays)
        self.settled_moments(model_id, settle=True)

    def settled_basis(
        self, model_id: int, make: Callable[[], Mapping[str, NDArray[Any]]]
    ) -> dict[str, NDArray[Any]]:
        """The leading coordinates that a checkpoint's rows hold.

        Args:
            model_id: the checkpoint.
            make: chooses them, if none are kept; of several processes one wins. What is
                kept is returned.

        Raises:
            PhaseError: if the saver has no place for them.
        """
        del model_id, make
        raise PhaseError(
            f"{type(self).__name__} does not define settled_basis, so it cannot keep what "
            "projector='leading' needs. Name another projector, or use MmapSaver."
        )

    def settled_moments(
        self, model_id: int, *, settle: bool, prefix: str = ""
    ) -> list[tuple[Path, dict[str, NDArray[Any]]]] | None:
        """The sums that a checkpoint's rows are whitened by.

        Args:
            model_id: the checkpoint.
            settle: if nothing is settled yet, settle on all sums that are there.
            prefix: read arrays only whose names begin so.

        Returns:
            Every process's sums, with the files that they are in; None if nothing is
            settled, and no sums are there or `settle` is False.
        """
        del model_id, settle, prefix
        return None

    def gradient_files(self, model_id: int) -> GradientFiles:
        """Where a checkpoint's unprojected gradients are kept, for the exact kernel.

        Args:
            model_id: the checkpoint.

        Raises:
            PhaseError: if the saver has no place for them.
        """
        del model_id
        raise PhaseError(
            f"{type(self).__name__} does not define gradient_files, so it cannot keep what "
            "the exact kernel needs. Use MmapSaver, NoOpProjector or a projection."
        )

    def record_loss(  # noqa: B027 - savers may do without
        self, model_id: int, record: Mapping[str, Any]
    ) -> None:
        """Keeps what was found of a checkpoint's loss, if the saver can.

        Args:
            model_id: the checkpoint.
            record: `logistic`, whether it is a logistic loss of the model output; before
                that is known `seen`, pairs of outputs and loss weights.
        """

    def loss_record(self, model_id: int) -> Mapping[str, Any] | None:
        """What `record_loss` kept.

        Args:
            model_id: the checkpoint.

        Returns:
            The record; None if there is none.
        """
        del model_id
        return None

    def wide_rows(self, model_id: int) -> WideRows | None:
        """Where wider rows of some examples are kept, for the automatic ridge.

        Args:
            model_id: the checkpoint.

        Returns:
            None if the saver has no place for them: the ridge is then told from the
            stored rows alone.
        """
        del model_id
        return None

    def sample_outputs(self, model_id: int) -> SampleOutputs | None:
        """Where model outputs of some examples are kept, for the automatic ridge.

        Args:
            model_id: the checkpoint.

        Returns:
            None if the saver has no place for them: the ridge of a squared loss is then a
            constant.
        """
        del model_id
        return None

    @abstractmethod
    def experiment(self, exp_name: str) -> dict[str, Any]:
        """What is recorded of an experiment.

        Args:
            exp_name: the experiment.

        Returns:
            Its record.
        """

    @abstractmethod
    def init_experiment(self, exp_name: str, num_targets: int, model_id: int) -> None:
        """Creates or opens an experiment for a checkpoint.

        Args:
            exp_name: the experiment.
            num_targets: how many targets it has.
            model_id: the checkpoint.
        """

    @abstractmethod
    def load_current_store(
        self,
        model_id: int,
        exp_name: str | None = None,
        exp_num_targets: int | None = -1,
    ) -> None:
        """Points `current_store` at a checkpoint and, if named, an experiment.

        Args:
            model_id: the checkpoint.
            exp_name: the experiment.
            exp_num_targets: accepted as upstream's name.
        """

    @abstractmethod
    def train_rows(self, model_id: int) -> Rows:
        """Rows of the training examples: `grads`, `out_to_loss` and `examples`.

        Args:
            model_id: the checkpoint.

        Returns:
            Their arrays.
        """

    @abstractmethod
    def target_rows(self, exp_name: str, model_id: int) -> Rows:
        """Rows of an experiment's targets: `grads` and `examples`.

        Args:
            exp_name: the experiment.
            model_id: the checkpoint.

        Returns:
            Their arrays.
        """

    @abstractmethod
    def has_targets(self, exp_name: str, model_id: int) -> bool:
        """Whether scoring was started for a checkpoint.

        Args:
            exp_name: the experiment.
            model_id: the checkpoint.

        Returns:
            True if it has target rows.
        """

    @abstractmethod
    def save_factor(
        self, model_id: int, matrix: NDArray[np.float64], info: Mapping[str, Any]
    ) -> None:
        """Keeps the square matrix from which scores are solved.

        Args:
            model_id: the checkpoint.
            matrix: `[q, q]`.
            info: how it was made: JSON values, and arrays `[n, 1]`, float64, which belong
                to the matrix and must come back with it.
        """

    @abstractmethod
    def load_factor(self, model_id: int) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """What `save_factor` kept.

        Args:
            model_id: the checkpoint.

        Returns:
            The matrix `[q, q]` and how it was made, arrays included.
        """

    @abstractmethod
    def save_scores(
        self,
        exp_name: str,
        blocks: Iterable[tuple[int, NDArray[Any]]],
        info: Mapping[str, Any],
    ) -> NDArray[Any]:
        """Writes an experiment's scores, replacing earlier ones at the end.

        Args:
            exp_name: the experiment.
            blocks: first row and scores `[rows, m]` of consecutive stretches.
            info: what the scores were made from.

        Returns:
            The scores, `[n, m]`.
        """

    def save_score_sets(
        self,
        sets: Sequence[tuple[str, str | None]],
        blocks: Iterable[tuple[int, NDArray[Any]]],
        info: Mapping[str, Any],
    ) -> list[NDArray[Any]]:
        """Writes several sets of scores in one pass; a saver need not be able to.

        Args:
            sets: experiments, and for each the name of a further ridge, or None for the
                ridge of the run.
            blocks: first row and scores `[rows, m]` of consecutive stretches, with the
                sets' columns side by side. A block may be overwritten when two more have
                been given out.
            info: what the scores were made from.

        Returns:
            The scores of each set, `[n, m]`.

        Raises:
            PhaseError: if there are several.
        """
        if len(sets) == 1 and sets[0][1] is None:
            copies = ((start, block.copy()) for start, block in blocks)
            return [self.save_scores(sets[0][0], copies, info)]
        raise PhaseError(
            f"{type(self).__name__} writes one experiment at one ridge at a time; "
            f"{list(sets)} were asked for. Call finalize_scores for each, pass top_k, or "
            "use MmapSaver."
        )

    @abstractmethod
    def load_scores(self, exp_name: str) -> NDArray[Any]:
        """An experiment's scores.

        Args:
            exp_name: the experiment.

        Returns:
            `[n, m]`.
        """
