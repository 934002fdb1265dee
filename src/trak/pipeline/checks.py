"""The facade's arguments that are no numbers: what each of them may be."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trak.arguments import is_listed
from trak.errors import InputError, InputTypeError, UnsupportedModuleError

_METHODS = {
    "gradient_computer": ("compute_per_sample_grad", "compute_loss_grad"),
    "saver": ("train_rows", "target_rows"),
}
_BASES = {
    "gradient_computer": "trak.gradient_computers.AbstractGradientComputer",
    "saver": "trak.savers.AbstractSaver",
}


def check_model(model: Any) -> None:
    """Refuses what gradients cannot be taken of.

    Args:
        model: the model to be.

    Raises:
        InputTypeError: if it is no module.
        InputError: if a parameter or buffer cannot take the weights of a checkpoint.
        UnsupportedModuleError: if a forward pass changes weights.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"model must be a torch.nn.Module, got {describe(model)}. Build the model "
            "and pass it; load_checkpoint loads weights into it."
        )
    if isinstance(model, nn.DataParallel):
        raise InputTypeError(
            "model is an nn.DataParallel, which per-sample gradients cannot be taken "
            "through. Pass model.module."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputTypeError(
            f"model is a torch.jit module ({type(model).__name__}), which cannot be "
            "watched while it runs. Pass the module that it was made from, or a module "
            "that holds this one, torch.nn.Sequential(model), and checkpoints of that."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        problem = _unusable(tensor)
        if problem:
            raise InputError(f"{name!r} of the model {problem}")
    for name, module in model.named_modules():
        limit = getattr(module, "max_norm", None)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and limit is not None:
            raise UnsupportedModuleError(
                f"{name!r} is an {type(module).__name__} with max_norm={limit}, whose "
                "forward pass shortens rows of its weight in place: a checkpoint would no "
                "longer have the weights that it is known by. For the same outputs without "
                "it, load each checkpoint, shorten all rows once, and take its state dict "
                "then: torch.nn.functional.embedding(torch.arange(len(layer.weight)), "
                "layer.weight, max_norm=layer.max_norm, norm_type=layer.norm_type). After "
                "the last one set layer.max_norm = None."
            )


def check_parts(gradient_computer: Any, projector: Any, saver: Any) -> None:
    """Refuses an instance where a class is needed, and the other way round.

    Args:
        gradient_computer: a class, or another callable that makes one, or None.
        projector: an instance, a name, or None.
        saver: a class, or another callable that makes one, or None.

    Raises:
        InputTypeError: names the argument.
    """
    made = {"gradient_computer": gradient_computer, "saver": saver}
    for name, value in made.items():
        if value is not None and not callable(value):
            raise InputTypeError(
                f"{name} must be a class, which TRAKer makes an instance of, got "
                f"{describe(value)}."
            )
        lacking = [m for m in _METHODS[name] if not hasattr(value, m)]
        if isinstance(value, type) and lacking:
            raise InputTypeError(
                f"{name} must be a class with the methods {', '.join(_METHODS[name])}; "
                f"{describe(value)} lacks {', '.join(lacking)}. Derive it from "
                f"{_BASES[name]}."
            )
    usable = callable(getattr(projector, "project", None))
    is_class = isinstance(projector, type)
    if (
        projector is not None
        and not isinstance(projector, str)
        and (is_class or not usable)
    ):
        raise InputTypeError(
            "projector must be an instance, a name such as 'sparse', or None, got "
            f"{describe(projector)}."
        )


def as_folder(save_dir: Any) -> Path:
    """Accepts a path.

    Args:
        save_dir: what the user gave.

    Returns:
        The absolute path.

    Raises:
        InputTypeError: if it is no path.
    """
    try:
        return Path(save_dir).resolve()
    except TypeError:
        raise InputTypeError(
            f"save_dir must be a path, got {describe(save_dir)}."
        ) from None


def as_names(grad_wrt: Any) -> list[str] | None:
    """Accepts names of parameters.

    Args:
        grad_wrt: one name, an iterable of names (a generator may be used up), or None.

    Returns:
        The names, or None.

    Raises:
        InputTypeError: if there is anything else among them.
    """
    if grad_wrt is None:
        return None
    if isinstance(grad_wrt, str):
        return [grad_wrt]
    names = list(grad_wrt) if is_listed(grad_wrt) else [grad_wrt]
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise InputTypeError(
            "grad_wrt must list names as in model.named_parameters(), got "
            f"{describe(wrong[0])}."
        )
    return names


def describe(value: Any) -> str:
    """What something is, for messages.

    Args:
        value: anything.

    Returns:
        The text itself for strings and numbers, else which class it is (of).
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, str | bool | int | float):
        return repr(value)
    return f"an instance of {type(value).__name__}"


def _unusable(tensor: Tensor) -> str | None:
    if is_lazy(tensor):
        return "has no shape yet. Run the model on a batch before you pass it."
    if tensor.is_meta:
        return (
            "is on the meta device, which holds no numbers: weights loaded into it would "
            "be lost. Build the model on a real device (model.to_empty(device='cpu'))."
        )
    if tensor.is_inference():
        return (
            "was made under torch.inference_mode(), so that no weights can be loaded into "
            "it. Build the model outside of it."
        )
    return None
