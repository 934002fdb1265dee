"""What a task computes from a checkpoint's weights, before gradients are taken."""

from typing import Any

from torch import nn

from trak.digests import state_digest
from trak.modes import evaluation_mode


def prepare_task(task: Any, model: nn.Module, digest: str | None = None) -> None:
    """Lets a task follow the weights; one whose state belongs to others raises.

    Args:
        task: the task; one without `prepare_checkpoint` and `check_ready` holds nothing.
        model: the model, with the weights at hand.
        digest: their content hash; computed if it is not given.
    """
    prepare = getattr(task, "prepare_checkpoint", None)
    check_ready = getattr(task, "check_ready", None)
    if prepare is None and check_ready is None:
        return
    known = state_digest(model.state_dict()) if digest is None else digest
    if prepare is not None:
        with evaluation_mode(model):
            prepare(model, known)
    if check_ready is not None:
        check_ready(known)
