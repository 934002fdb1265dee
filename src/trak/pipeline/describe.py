"""A run in words: its settings, the store's metadata, ids and rows in messages."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from trak.arguments import as_integer, is_listed
from trak.errors import InputError, InputTypeError
from trak.modelout_functions import describe_task
from trak.modelout_functions.abstract import sample_weights_function
from trak.projectors import AbstractProjector, BlockProjector, KernelProjector
from trak.settings import RunSettings
from trak.whitening.whitening import DAMPING


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
    """Accepts integers of any library as checkpoint ids.

    Args:
        model_id: what the user gave.

    Returns:
        A Python integer.
    """
    return as_integer("model_id", model_id, least=0)


def as_model_ids(model_ids: Any) -> list[int]:
    """Accepts an iterable of checkpoint ids.

    Args:
        model_ids: what the user gave.

    Returns:
        Python integers.

    Raises:
        InputTypeError: if it is no iterable.
        InputError: if an id is there twice, since a mean would count it twice.
    """
    if not is_listed(model_ids):
        raise InputTypeError(f"model_ids must be a list such as [0, 1], got {model_ids!r}.")
    found = [as_model_id(i) for i in model_ids]
    twice = sorted(i for i, count in Counter(found).items() if count > 1)
    if twice:
        raise InputError(
            f"model_ids lists {twice} more than once. Each checkpoint counts once in the "
            "mean: list it once."
        )
    return found


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
    whitening: float,
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
        whitening: strength; 0 for none.

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
        sample_weights=sample_weights_function(task) is not None,
        whitening={"strength": whitening, "damping": DAMPING} if whitening else None,
    )


def _describe_projector(projector: AbstractProjector) -> Mapping[str, Any]:
    if isinstance(projector, BlockProjector | KernelProjector):
        return projector.settings()
    kind = getattr(projector.proj_type, "value", projector.proj_type)
    name = type(projector).__qualname__
    return {"kind": str(kind), "class": name, "seed": int(projector.seed)}
