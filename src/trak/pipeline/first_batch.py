"""One batch through the model, before hours of work that end with it."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from trak.batches import batch_size, normalize
from trak.errors import AttributionError, InputError
from trak.gradient_computers import AbstractGradientComputer, select_parameters
from trak.gradient_computers.memory import is_out_of_memory
from trak.modelout_functions import resolve_task
from trak.modes import evaluation_mode
from trak.pipeline.assembly import make_computer
from trak.pipeline.checks import as_names, check_model, check_parts
from trak.pipeline.model_state import check_state
from trak.pipeline.task_state import prepare_task
from trak.projectors import resolve_device


def try_first_batches(
    model: nn.Module,
    state: Mapping[str, Any],
    batches: Mapping[str, Iterable[Any]],
    settings: Mapping[str, Any],
) -> None:
    """Computes model outputs, without gradients; `InputError` if that fails.

    Args:
        model: the model; it ends up with other weights.
        state: the weights of a checkpoint.
        batches: argument of the user to its batches; the first one with examples is taken.
        settings: arguments of `TRAKer`, of which those that outputs depend on are used.
    """
    check_model(model)
    given = settings.get("gradient_computer")
    check_parts(given, settings.get("projector"), settings.get("saver"))
    check_state(model, state)
    parts: Any = SimpleNamespace(
        model=model,
        task=resolve_task(settings["task"]),
        dtype=torch.float32,
        device=resolve_device(settings.get("device")),
    )
    chosen = select_parameters(model, as_names(settings.get("grad_wrt")))
    computer = make_computer(given, parts, dict(chosen))
    model.load_state_dict(state)
    prepare_task(parts.task, model)
    with evaluation_mode(model):
        computer.load_model_params(model)
        for name, some in batches.items():
            _try_first(computer, name, some)


def _try_first(
    computer: AbstractGradientComputer, name: str, batches: Iterable[Any]
) -> None:
    device = next(computer.model.parameters()).device
    each = (normalize(batch, device) for batch in batches)
    batch = next(batch for batch in each if batch_size(batch))
    try:
        computer.compute_outputs(batch, batch_size(batch))
    except Exception as error:
        if is_out_of_memory(error):  # the run goes on with fewer samples at once
            return
        if isinstance(error, AttributionError) and not isinstance(
            error, ValueError | TypeError
        ):
            raise  # a task that is not ready, or a layer that cannot be followed
        raise InputError(
            f"The model's outputs for the first batch of {name} cannot be computed: "
            f"{type(error).__name__}: {str(error).rstrip('. ')}. Nothing was stored. Each "
            f"batch of {name} must be as the model and the task take it; if this is one "
            f"batch, put it into a list: {name}=[batch]."
        ) from error
