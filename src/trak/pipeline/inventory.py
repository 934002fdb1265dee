"""What a store holds, for people to read."""

from dataclasses import dataclass

import numpy as np

from trak.savers import AbstractSaver


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a store holds of a checkpoint.

    Attributes:
        model_id: its id.
        digest: content hash of its weights.
        num_featurized: rows that exist.
        is_featurized: whether all rows exist.
        is_finalized: whether it can be scored.
    """

    model_id: int
    digest: str
    num_featurized: int
    is_featurized: bool
    is_finalized: bool


@dataclass(frozen=True, kw_only=True)
class ExperimentInfo:
    """What a store holds of an experiment.

    Attributes:
        name: its name.
        num_targets: how many targets it has.
        num_scored: targets that exist, by checkpoint.
        scores_finalized: whether scores can be read.
        model_ids: the checkpoints the scores are the mean of.
    """

    name: str
    num_targets: int
    num_scored: dict[int, int]
    scores_finalized: bool
    model_ids: tuple[int, ...]


def list_checkpoints(saver: AbstractSaver) -> list[CheckpointInfo]:
    """Lists the checkpoints of a store.

    Args:
        saver: the store.

    Returns:
        One entry a checkpoint, by id.
    """
    saver.refresh()
    return [
        CheckpointInfo(
            model_id=model_id,
            digest=saver.checkpoint_digest(model_id) or "",
            num_featurized=int(np.sum(saver.train_rows(model_id).done)),
            is_featurized=bool(state["is_featurized"]),
            is_finalized=bool(state["is_finalized"]),
        )
        for model_id, state in sorted(saver.model_ids.items())
    ]


def list_experiments(saver: AbstractSaver) -> list[ExperimentInfo]:
    """Lists the experiments of a store.

    Args:
        saver: the store.

    Returns:
        One entry an experiment, by name.
    """
    saver.refresh()
    return [
        ExperimentInfo(
            name=name,
            num_targets=record["num_targets"],
            num_scored={
                model_id: int(np.sum(saver.target_rows(name, model_id).refresh()))
                for model_id in sorted(saver.model_ids)
                if saver.has_targets(name, model_id)
            },
            scores_finalized=bool(record["scores_finalized"]),
            model_ids=tuple(record.get("model_ids", ())),
        )
        for name, record in sorted(saver.experiments.items())
    ]
