"""Tasks: which scalar of a model's behaviour is attributed.

`f(z; theta)` is the model output whose gradients are taken, `Q` the derivative of the
loss by it (Park et al. 2023, Sec. 2 and 3).
"""

from typing import Any

from trak.modelout_functions.abstract import (
    AbstractModelOutput,
    batch_output_function,
    describe_task,
    output_function,
)
from trak.modelout_functions.abstract import resolve_task as _resolve_task
from trak.modelout_functions.clip import CLIPModelOutput
from trak.modelout_functions.image import (
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
)
from trak.modelout_functions.text import TextClassificationModelOutput

TASK_TO_MODELOUT: dict[str, type[AbstractModelOutput]] = {
    "image_classification": ImageClassificationModelOutput,
    "clip": CLIPModelOutput,
    "text_classification": TextClassificationModelOutput,
    "iterative_image_classification": IterativeImageClassificationModelOutput,
}


def resolve_task(task: Any) -> Any:
    """Turns a task's name or class into an instance.

    Args:
        task: an instance, a class without required arguments, or one of the names in
            `TASK_TO_MODELOUT`.

    Returns:
        An instance with `get_output` and `get_out_to_loss_grad`.
    """
    return _resolve_task(task, TASK_TO_MODELOUT)


__all__ = [
    "TASK_TO_MODELOUT",
    "AbstractModelOutput",
    "CLIPModelOutput",
    "ImageClassificationModelOutput",
    "IterativeImageClassificationModelOutput",
    "TextClassificationModelOutput",
    "batch_output_function",
    "describe_task",
    "output_function",
    "resolve_task",
]
