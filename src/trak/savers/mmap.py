"""The store: one folder, readable with NumPy and a text editor. See FORMAT.md."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.encodings import encoding_of
from trak.errors import (
    ModelIDException,
    PhaseError,
    StoreCorruptedError,
    StoreMismatchError,
)
from trak.savers import factor_files
from trak.savers.filesystem import (
    create_json,
    made_folder,
    read_object,
    sync_directory,
)
from trak.savers.layout import StoreLayout, lowest_format, read_experiment
from trak.savers.leftovers import remove_leftovers
from trak.savers.locks import changing
from trak.savers.rows import RowGroup
from trak.savers.score_files import ScoreFiles
from trak.savers.side_files import SideFiles
from trak.savers.unused import discard_unused
from trak.savers.view import CurrentStore
from trak.settings import differences

logger = logging.getLogger(__name__)

_DERIVED = ("fingerprint:", "JL ", "train set size:")
"""Keys of `metadata.json` that repeat others, and say nothing where these differ."""


class MmapSaver(SideFiles):
    """The store on a local file system.

    Args:
        save_dir: the folder; created if absent.
        metadata: the run's settings; an existing store must have been written with the
            same.
        train_set_size: number of training examples, `n`.
        proj_dim: projection dimension, `k`.
        load_from_save_dir: list all checkpoints and experiments that are there, also
            those that other processes add later. If False, only those this object
            registers are listed; what is on disk is checked, continued and never
            overwritten all the same.
        logging_level: accepted as upstream's name.
        use_half_precision: store float16 rows where `metadata` does not name a
            precision.

    Raises:
        StoreMismatchError: if the folder holds a store of other settings.
    """

    def __init__(
        self,
        save_dir: str | Path,
        metadata: Mapping[str, Any],
        train_set_size: int,
        proj_dim: int,
        load_from_save_dir: bool = True,
        logging_level: int = logging.INFO,  # noqa: ARG002
        use_half_precision: bool = True,
    ) -> None:
        self.save_dir = made_folder(save_dir).resolve()
        self.metadata = dict(metadata)
        self.train_set_size = train_set_size
        self.proj_dim = proj_dim
        self.load_from_save_dir = load_from_save_dir
        default = "float16" if use_half_precision else "float32"
        encoding = encoding_of(self.metadata.get("precision", default))
        self.format = lowest_format(self.metadata, encoding)
        weighted = bool(self.metadata.get("sample_weights"))
        self._layout = StoreLayout(
            self.save_dir, train_set_size, proj_dim, encoding, weighted=weighted
        )
        self._scores = ScoreFiles(self._layout)
        self.model_ids: dict[int, dict[str, int]] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.current_store = CurrentStore(self)
        self._train: dict[int, RowGroup] = {}
        self._targets: dict[tuple[str, int], RowGroup] = {}
        self._tidied = False
        self._open()

    def _open(self) -> None:
        for name in ("", "scores", "experiments"):
            made_folder(self.save_dir / name)
        self._refuse_rows_of_unknown_settings()
        path = self.save_dir / "metadata.json"
        if not path.exists():  # a whole store may be read-only
            with changing(self.save_dir):
                made = create_json(path, {"format": self.format, **self.metadata})
            if made:
                logger.info("Created a store in %s.", self.save_dir)
        self.verify(self.metadata)
        self.refresh()
        finalized = [i for i, v in sorted(self.model_ids.items()) if v["is_finalized"]]
        logger.info(
            "%s holds checkpoints %s (finalized: %s) and experiments %s.",
            self.save_dir,
            sorted(self.model_ids),
            finalized,
            sorted(self.experiments),
        )

    def _refuse_rows_of_unknown_settings(self) -> None:
        known = self._checkpoints_on_disk()  # before metadata.json, which is written first
        path = self.save_dir / "metadata.json"
        if known and not path.exists():
            raise StoreCorruptedError(
                f"{path} is gone, so nobody knows with which settings the rows of "
                f"checkpoints {known} beside it were made. Restore it, remove the "
                "checkpoints' folders, or use another save_dir."
            )

    def _checkpoints_on_disk(self) -> list[int]:
        names = [path.parent.name for path in self.save_dir.glob("*/checkpoint.json")]
        return sorted(int(n) for n in names if n.isdecimal() and n == str(int(n)))

    def verify(self, metadata: Mapping[str, Any]) -> None:
        """Refuses to go on if the store was written with other settings.

        Args:
            metadata: the run's settings as they are now.

        Raises:
            StoreMismatchError: lists every setting that differs.
        """
        path = self.save_dir / "metadata.json"
        if not path.exists():
            raise StoreMismatchError(
                f"{path} is gone: the store was moved or removed during the run."
            )
        lines = differences({"format": self.format, **metadata}, read_object(path))
        if lines:
            lines = [line for line in lines if not line.startswith(_DERIVED)] or lines
            shown = "\n".join(f"  - {line}" for line in lines[:12])
            more = f"\n  ... and {len(lines) - 12} more" if len(lines) > 12 else ""
            raise StoreMismatchError(
                f"The store in {self.save_dir} was written with other settings, and its "
                "rows cannot be mixed with this run's:\n"
                f"{shown}{more}\nUse another save_dir, or the settings of the store."
            )

    def refresh(self, model_id: int | None = None) -> None:
        """Brings `model_ids` and `experiments` up to date with the disk.

        What other processes added since is listed too, with `load_from_save_dir`.

        Args:
            model_id: look at this checkpoint only.
        """
        if model_id is None and self.load_from_save_dir:
            for each in self._checkpoints_on_disk():
                self.model_ids.setdefault(each, {})
            for path in (self.save_dir / "experiments").glob("*.json"):
                self.experiments.setdefault(path.stem, {})
        if model_id is None:
            self._refresh_experiments()
        for each in self.model_ids if model_id is None else [model_id]:
            done = self.train_rows(each).refresh()
            folder = self._layout.checkpoint(each)
            self.model_ids[each] = {
                "is_featurized": int(done.all()),
                "is_finalized": int(factor_files.exists(folder)),
            }

    def _refresh_experiments(self) -> None:
        for name in self.experiments:
            path = self._layout.experiment(name)
            if path.exists():
                self.experiments[name] = read_experiment(path)

    def checkpoint_digest(self, model_id: int) -> str | None:
        """The content hash a checkpoint was registered with.

        Args:
            model_id: the checkpoint.

        Returns:
            The hash, or None if the id is new.
        """
        path = self._layout.checkpoint(model_id) / "checkpoint.json"
        return read_object(path, digest=str)["digest"] if path.exists() else None

    def register_model_id(self, model_id: int, digest: str) -> None:
        """Registers a checkpoint, or finds it registered with the same weights.

        Args:
            model_id: the checkpoint.
            digest: content hash of its weights.

        Raises:
            StoreMismatchError: if the id belongs to other weights.
            StoreCorruptedError: if there are rows of the id, of unknown weights.
        """
        folder = self._layout.checkpoint(model_id)
        has_rows = (folder / "grads.journal").exists()  # first: it is made after the digest
        if self.checkpoint_digest(model_id) is None:
            if has_rows:
                raise StoreCorruptedError(
                    f"{folder / 'checkpoint.json'} is gone, so nobody knows of which "
                    "weights the rows beside it are. Restore it, or remove the folder and "
                    "featurize again."
                )
            folder.mkdir(exist_ok=True)
            sync_directory(self.save_dir)
            create_json(folder / "checkpoint.json", {"digest": digest})
        found = self.checkpoint_digest(model_id)
        if found != digest:
            raise StoreMismatchError(
                f"model_id={model_id} in {self.save_dir} belongs to a checkpoint with "
                f"content hash {found}; the weights given now hash to {digest}. Rows of "
                "two checkpoints cannot be mixed: give the new checkpoint another "
                "model_id, or use another save_dir."
            )
        self.model_ids.setdefault(model_id, {})
        if not self._tidied:
            remove_leftovers(self.save_dir)
            self._tidied = True
        self.init_store(model_id)
        self.refresh()

    def checkpoint_folder(self, model_id: int) -> Path:
        """Where a checkpoint's files lie.

        Args:
            model_id: the checkpoint.

        Returns:
            `{id}` in the store's folder.
        """
        return self._layout.checkpoint(model_id)

    def init_store(self, model_id: int) -> None:
        """Creates a checkpoint's row files, or opens those that are there.

        Args:
            model_id: the checkpoint.
        """
        self.train_rows(model_id)
        self.load_current_store(model_id)

    def serialize_current_model_id_metadata(self, already_exists: bool = True) -> None:  # noqa: ARG002
        """Upstream's name for `refresh`: the journals hold this, and are always whole.

        Args:
            already_exists: accepted as upstream's name.
        """
        self.refresh()

    def train_rows(self, model_id: int) -> RowGroup:
        """Rows of the training examples: `grads`, `out_to_loss` and `examples`.

        Args:
            model_id: the checkpoint.

        Returns:
            Their arrays, `[n, k]`, `[n, 1]` and `[n, 1]`.
        """
        if model_id not in self._train:
            self._train[model_id] = self._layout.train_rows(model_id)
        return self._train[model_id]

    def save_factor(
        self, model_id: int, matrix: NDArray[np.float64], info: Mapping[str, Any]
    ) -> None:
        """Keeps the square matrix from which scores are solved.

        Args:
            model_id: the checkpoint.
            matrix: `[q, q]`.
            info: how it was made; arrays in it get files of their own.
        """
        factor_files.save(self._layout.checkpoint(model_id), matrix, info)
        self.refresh()

    def load_factor(self, model_id: int) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """What `save_factor` kept.

        Args:
            model_id: the checkpoint.

        Returns:
            The matrix `[q, q]` and how it was made.
        """
        return factor_files.load(self._layout.checkpoint(model_id))

    def del_grads(self, model_id: int, target: bool = False) -> None:
        """Keeps the rows: scores are computed from them, and nothing is kept twice.

        Args:
            model_id: the checkpoint.
            target: accepted as upstream's name.
        """
        logger.warning(
            "Nothing was deleted for model_id=%s (target=%s): this store keeps the "
            "projected gradients and no second array of features.",
            model_id,
            target,
        )

    def init_experiment(self, exp_name: str, num_targets: int, model_id: int) -> None:
        """Creates or opens an experiment for a checkpoint.

        Args:
            exp_name: the experiment.
            num_targets: how many targets it has.
            model_id: the checkpoint.

        Raises:
            StoreMismatchError: if the name is taken by one with other targets.
            ModelIDException: if the checkpoint is not in the store.
        """
        path = self._layout.experiment(exp_name)
        if self.checkpoint_digest(model_id) is None:
            raise ModelIDException(
                f"model_id={model_id} is not in {self.save_dir}, which holds "
                f"{sorted(self.model_ids)}. Featurize and finalize it before scoring."
            )
        content = {
            "num_targets": num_targets,
            "scores_path": f"scores/{exp_name}.mmap",
            "scores_finalized": 0,
        }
        found = num_targets
        if not self._is_scored(exp_name, num_targets, model_id):
            with changing(self.save_dir):
                if discard_unused(self._layout, exp_name, num_targets):
                    for key in [key for key in self._targets if key[0] == exp_name]:
                        del self._targets[key]
                create_json(path, content)
                found = read_experiment(path)["num_targets"]
                if found == num_targets:
                    self.target_rows(exp_name, model_id)
        if found != num_targets:
            raise StoreMismatchError(
                f"Experiment {exp_name!r} in {self.save_dir} has {found} targets; "
                f"num_targets={num_targets} was asked for. Use another exp_name."
            )
        self.model_ids.setdefault(model_id, {})
        self.experiments.setdefault(exp_name, {})
        self.refresh()
        self.load_current_store(model_id, exp_name)

    def _is_scored(self, exp_name: str, num_targets: int, model_id: int) -> bool:
        # so that nothing is written, which a store may not allow
        begun = self._layout.experiment(exp_name).exists()
        if not begun or not self.has_targets(exp_name, model_id):
            return False
        count = self.experiment(exp_name)["num_targets"]
        rows = self._layout.target_rows(exp_name, model_id, count)
        return count == num_targets and bool(rows.done.all())

    def target_rows(self, exp_name: str, model_id: int) -> RowGroup:
        """Rows of an experiment's targets: `grads` and `examples`.

        Args:
            exp_name: the experiment.
            model_id: the checkpoint.

        Returns:
            Their arrays, `[m, k]` and `[m, 1]`.
        """
        key = (exp_name, model_id)
        if key not in self._targets:
            num_targets = self.experiment(exp_name)["num_targets"]
            self._targets[key] = self._layout.target_rows(exp_name, model_id, num_targets)
        return self._targets[key]

    def has_targets(self, exp_name: str, model_id: int) -> bool:
        """Whether scoring was started for a checkpoint.

        Args:
            exp_name: the experiment.
            model_id: the checkpoint.

        Returns:
            True if it has target rows.
        """
        return self._layout.target_journal(exp_name, model_id).exists()

    def experiment(self, exp_name: str) -> dict[str, Any]:
        """What is recorded of an experiment.

        Args:
            exp_name: the experiment.

        Returns:
            Its record.

        Raises:
            PhaseError: if there is none of this name.
        """
        path = self._layout.experiment(exp_name)
        if not path.exists():
            names = sorted(p.stem for p in path.parent.glob("*.json"))
            raise PhaseError(
                f"There is no experiment {exp_name!r} in {self.save_dir}; it has "
                f"{names}. Call start_scoring_checkpoint and score first."
            )
        return read_experiment(path)

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
        return self.save_score_sets([(exp_name, None)], blocks, info)[0]

    def save_score_sets(
        self,
        sets: Sequence[tuple[str, str | None]],
        blocks: Iterable[tuple[int, NDArray[Any]]],
        info: Mapping[str, Any],
    ) -> list[NDArray[Any]]:
        """Writes several sets of scores in one pass, replacing earlier ones at the end.

        Args:
            sets: experiments, and for each the name of a further ridge, or None for the
                ridge of the run.
            blocks: first row and scores `[rows, m]` of consecutive stretches, with the
                sets' columns side by side.
            info: what the scores were made from.

        Returns:
            The scores of each set, `[n, m]`.
        """
        found = self._scores.write(
            [(name, ridge, self.experiment(name)) for name, ridge in sets], blocks, info
        )
        for name, _ in sets:
            self.experiments.setdefault(name, {})
        self.refresh()
        return found

    def load_scores(self, exp_name: str, ridge: str | None = None) -> NDArray[Any]:
        """An experiment's scores.

        Args:
            exp_name: the experiment.
            ridge: the name of a further ridge, or None for the ridge of the run.

        Returns:
            `[n, m]`, backed by the file; what a caller changes stays in memory.
        """
        self.experiment(exp_name)  # raises if there is none
        return self._scores.read(exp_name, ridge)

    def load_current_store(
        self,
        model_id: int,
        exp_name: str | None = None,
        exp_num_targets: int | None = -1,  # noqa: ARG002
    ) -> None:
        """Points `current_store` at a checkpoint and, if named, an experiment.

        Args:
            model_id: the checkpoint.
            exp_name: the experiment.
            exp_num_targets: accepted as upstream's name.
        """
        self.current_model_id = model_id
        if exp_name is not None:
            self.current_experiment_name = exp_name
