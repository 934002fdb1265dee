"""`saver.current_store`: the arrays by upstream's names, read when asked for."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trak.errors import PhaseError
from trak.savers.abstract import AbstractSaver

_TRAIN = ("grads", "out_to_loss", "features", "is_featurized")


class CurrentStore(Mapping[str, Any]):
    """Arrays of the store's current checkpoint and experiment.

    Keys: `grads` `[n, k]`, `out_to_loss` `[n, 1]`, `is_featurized` `[n, 1]`, `features`
    `[n, k]` (computed, kept in memory and never on disk), and, for every experiment
    `E` that was started for the checkpoint, `E_grads` `[m, k]` and `E_scores` `[n, m]`.

    Args:
        saver: the store.
    """

    def __init__(self, saver: AbstractSaver) -> None:
        self._saver = saver

    def __getitem__(self, key: str) -> Any:
        saver = self._saver
        model_id = saver.current_model_id
        if model_id is None:
            if key in _TRAIN:
                return None
            raise KeyError(key)
        if key == "features":
            if saver.features is None:
                raise PhaseError("Features are computed by a TRAKer; this store has none.")
            return saver.features(model_id)
        if key == "is_featurized":
            return saver.train_rows(model_id).done.astype(np.int32)[:, None]
        if key in _TRAIN:
            return saver.train_rows(model_id).array(key)
        name, _, kind = key.rpartition("_")
        if kind == "grads" and name in saver.experiments:
            return saver.target_rows(name, model_id).array("grads")
        if kind == "scores" and name in saver.experiments:
            return saver.load_scores(name)
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        yield from _TRAIN
        model_id = self._saver.current_model_id
        for name, record in self._saver.experiments.items():
            if model_id is not None and self._saver.has_targets(name, model_id):
                yield f"{name}_grads"
            if record.get("scores_finalized"):
                yield f"{name}_scores"

    def __len__(self) -> int:
        return sum(1 for _ in self)
