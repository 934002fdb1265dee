"""The gradient computer that `gradient_computer=None` stands for."""

import logging
from typing import Any

from trak.gradient_computers.abstract import AbstractGradientComputer
from trak.gradient_computers.functional import FunctionalGradientComputer
from trak.gradient_computers.hooks import HookGradientComputer
from trak.modelout_functions import batch_output_function

logger = logging.getLogger(__name__)


def choose_computer(task: Any) -> type[AbstractGradientComputer]:
    """The fastest gradient computer that a task allows.

    Args:
        task: an instance.

    Returns:
        `HookGradientComputer` if the task has a batched output, else
        `FunctionalGradientComputer`; a log line says when and why.
    """
    if batch_output_function(task) is not None:
        return HookGradientComputer
    logger.info(
        "Computing gradients one sample at a time, which is slower than in batches: %s "
        "has a get_output for one sample and no get_batch_output(model, batch) beside it.",
        type(task).__name__,
    )
    return FunctionalGradientComputer
