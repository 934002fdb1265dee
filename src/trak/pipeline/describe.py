"""A run in words: its settings, the store's metadata, ids and rows in messages."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trak.errors import InputError
from trak.modelout_functions import describe_task
from trak.projectors import AbstractProjector, BlockProjector
from trak.settings import RunSettings


def store_metadata(settings: RunSettings) -> dict[str, Any]:
    """What a store is compared by, with upstream's names beside ours.

    Args:
        settings: the run's settings.

    Returns:
        JSON values.
    """
    described = settings.describe()
    return {
        "JL dimension": described["projection"]["proj_dim"],
        "JL matrix type": described["projection"]["kind"],
        "train set size": settings.train_set_size,
        "fingerprint": settings.fingerprint(),
        **described,
    }


def as_model_id(model_id: Any) -> int:
    """Accepts Python and NumPy integers as checkpoint ids.

    Args:
        model_id: what the user gave.

    Returns:
        A Python integer.

    Raises:
        InputError: if it is no integer, or negative.
    """
    if isinstance(model_id, bool) or not isinstance(model_id, int | np.integer):
        raise InputError(
            f"model_id must be an integer, got {model_id!r}. Number the checkpoints "
            "0, 1, 2, ..."
        )
    if model_id < 0:
        raise InputError(f"model_id must be at least 0, got {model_id}.")
    return int(model_id)


def describe_rows(rows: NDArray[np.int64], limit: int = 8) -> str:
    """Names rows, shortly.

    Args:
        rows: row numbers.
        limit: how many to name.

    Returns:
        Text such as `3, 4, 5, ... and 12 more`.
    """
    shown = ", ".join(str(row) for row in rows[:limit])
    return shown if len(rows) <= limit else f"{shown}, ... and {len(rows) - limit} more"


def describe_run(
    *,
    model: nn.Module,
    task: Any,
    layout: Iterable[str],
    projector: AbstractProjector,
    proj_dim: int,
    train_set_size: int,
    dtype: torch.dtype,
) -> RunSettings:
    """Collects a run's settings.

    Args:
        model: the model.
        task: the task.
        layout: names of the selected parameters, in order.
        projector: the projector.
        proj_dim: width of its rows, `k`.
        train_set_size: `n`.
        dtype: dtype of the stored rows.

    Returns:
        The settings.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    return RunSettings(
        train_set_size=train_set_size,
        architecture={name: tuple(tensor.shape) for name, tensor in tensors},
        grad_wrt=tuple(layout),
        projection={**_describe_projector(projector), "proj_dim": proj_dim},
        precision=str(dtype).removeprefix("torch."),
        task=describe_task(task),
    )


def _describe_projector(projector: AbstractProjector) -> Mapping[str, Any]:
    if isinstance(projector, BlockProjector):
        return projector.settings()
    kind = getattr(projector.proj_type, "value", projector.proj_type)
    name = type(projector).__qualname__
    return {"kind": str(kind), "class": name, "seed": int(projector.seed)}
