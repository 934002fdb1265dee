"""A model in evaluation mode for a while."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Runs a block with the model in evaluation mode, and restores every module's mode.

    What the block computes may be differentiated later, also where the caller is under
    `torch.inference_mode()`, whose tensors may not.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for module in training:
            module.training = True
