"""What scores are computed from: a checkpoint's rows, targets and Q, out of the store."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.encodings import EncodedRows, RowSource
from trak.savers import AbstractSaver, Rows
from trak.score_computers.loss_power import WAY, Path, powered
from trak.score_computers.losses import Losses, losses_of
from trak.score_computers.stream import decoded


def row_source(rows: Rows) -> RowSource:
    """Projected gradients of a store, unread if the store can.

    Args:
        rows: the store's rows.

    Returns:
        `[rows, k]`.
    """
    encoded = getattr(rows, "encoded", None)
    if encoded is None:
        return torch.from_numpy(rows.array("grads"))
    found: EncodedRows = encoded()
    return found


def placed(rows: RowSource, device: torch.device) -> RowSource:
    """The same rows where they are to be computed with.

    Args:
        rows: `[n, k]`; those in a file travel block by block later.
        device: where to.

    Returns:
        `[n, k]`.
    """
    if isinstance(rows, EncodedRows) or device.type == "cpu":
        return rows
    return rows.to(device)


def phi_of(saver: AbstractSaver, model_id: int, device: torch.device) -> RowSource:
    """The rows of a checkpoint's training examples.

    Args:
        saver: the store.
        model_id: the checkpoint.
        device: where they are to be computed with.

    Returns:
        Phi, `[n, k]`.
    """
    return placed(row_source(saver.train_rows(model_id)), device)


def targets_of(saver: AbstractSaver, exp_name: str, model_id: int) -> Tensor:
    """The rows of an experiment's targets, in memory.

    Args:
        saver: the store.
        exp_name: the experiment.
        model_id: the checkpoint.

    Returns:
        `[m, k]`, float64.
    """
    return decoded(row_source(saver.target_rows(exp_name, model_id)), torch.float64)


def counts_of(saver: AbstractSaver, model_id: int) -> NDArray[Any] | None:
    """How much a checkpoint's training examples count in its training.

    Args:
        saver: the store.
        model_id: the checkpoint.

    Returns:
        `[n, 1]`; None if the task does not say, so that all count once.
    """
    if not saver.metadata.get("sample_weights"):
        return None
    return saver.train_rows(model_id).array("sample_weights")


def loss_sizes(
    saver: AbstractSaver, model_id: int, made: Mapping[str, Any] | None = None
) -> Losses:
    """What the curvature of a checkpoint's training examples is told from.

    Args:
        saver: the store.
        model_id: the checkpoint.
        made: how its factor was made, or is to be: `logistic` says whether the loss is;
            what was found of this checkpoint, if it does not.

    Returns:
        Q without the signs that it may have if the loss is logistic.
    """
    loss = saver.train_rows(model_id).array("out_to_loss")
    known = made if made and "logistic" in made else saver.loss_record(model_id)
    logistic = (known or {}).get("logistic")
    return losses_of(loss, counts_of(saver, model_id)).sized(logistic)


def score_weights(
    saver: AbstractSaver, model_id: int, made: Mapping[str, Any]
) -> NDArray[np.floating]:
    """What scores of a checkpoint's training examples are multiplied by.

    Args:
        saver: the store.
        model_id: the checkpoint.
        made: how its factor was made.

    Returns:
        Q, `[n, 1]`; to the power that was chosen, if one was, with its share of the way.
    """
    loss = saver.train_rows(model_id).array("out_to_loss")
    power, way = made.get("power", 1.0), made.get(WAY)
    if power == 1 and way is None:
        return loss
    sizes = loss_sizes(saver, model_id, made)
    losses = losses_of(loss, counts_of(saver, model_id))
    path = None if way is None else Path(torch.from_numpy(way), made["path"])
    return powered(losses, sizes, power, path).numpy()
