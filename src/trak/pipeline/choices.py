"""What the facade's arguments stand for."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trak.arguments import Ridge, as_flag
from trak.encodings import encoding_of
from trak.errors import InputError, InputTypeError
from trak.gradient_computers import (
    AbstractGradientComputer,
    HookGradientComputer,
    embedding_tables,
)
from trak.pipeline.checks import describe
from trak.projectors import LeadingProjector
from trak.score_computers import AbstractScoreComputer, RidgeScoreComputer
from trak.score_computers.loss_power import as_power


def storage_dtype(
    parameters: Iterable[Tensor],
    use_half_precision: bool,
    row_dtype: str | torch.dtype | None = None,
) -> torch.dtype:
    """The dtype in which rows are stored.

    Args:
        parameters: the selected parameters.
        use_half_precision: the user's wish.
        row_dtype: the user's explicit wish: a name in `trak.encodings.ENCODINGS`, or the
            dtype of that name.

    Returns:
        `row_dtype` if given. Else float16 if half precision is wished for, float64 for
        float64 models, and float32 for others.
    """
    if row_dtype is not None:
        return encoding_of(row_dtype).raw
    if use_half_precision:
        return torch.float16
    if any(p.dtype is torch.float64 for p in parameters):
        return torch.float64
    return torch.float32


def float_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of numbers that are no longer, or not yet, rows of the store.

    Args:
        dtype: dtype of the stored rows.

    Returns:
        The same; float32 for int8.
    """
    return dtype if dtype.is_floating_point else torch.float32


def usual_projector(
    projector: Any, gradient_computer: AbstractGradientComputer, *, whitened: bool
) -> str | None:
    """What no projector stands for, where something is projected.

    Args:
        projector: the user's wish.
        gradient_computer: the run's.
        whitened: whether the run whitens.

    Returns:
        `"leading"` for whitened runs whose gradients come in factors; else None, for the
        cheapest.

    Raises:
        InputError: if leading coordinates are wished for and nothing is whitened.
    """
    if not whitened:
        if projector == "leading" or isinstance(projector, LeadingProjector):
            raise InputError(
                "projector='leading' keeps coordinates that whitening finds. Make the "
                "TRAKer with whitening='auto' or a number above 0, or name another "
                "projector."
            )
        return None
    return "leading" if isinstance(gradient_computer, HookGradientComputer) else None


def tables_of(model: nn.Module, gradient_computer: AbstractGradientComputer) -> set[str]:
    """Which gradients come as entries of a few rows of a table.

    Args:
        model: the model.
        gradient_computer: the run's.

    Returns:
        Names of embedding tables; none where gradients are computed as a whole.
    """
    if not isinstance(gradient_computer, HookGradientComputer):
        return set()
    return embedding_tables(model)


def make_scorer(
    scorer: type[AbstractScoreComputer] | AbstractScoreComputer | None,
    dtype: torch.dtype,
    device: torch.device,
    logging_level: int,
    lambda_reg: Ridge,
    *,
    curvature: bool = False,
    loss_power: float | str = 1.0,
) -> AbstractScoreComputer:
    """The score computer that the facade's arguments stand for.

    Args:
        scorer: an instance, a class, or None for `RidgeScoreComputer`.
        dtype: dtype of the stored rows.
        device: where to compute.
        logging_level: handed to the class.
        lambda_reg: the ridge; None lets `RidgeScoreComputer` choose, and is 0 elsewhere.
        curvature: weigh rows by the loss's curvature.
        loss_power: exponent of loss weights; `"auto"` is 1 where it cannot be chosen.

    Returns:
        An instance.

    Raises:
        InputError: if an instance and settings are given.
        InputTypeError: if it is no score computer, or `curvature` not True or False.
    """
    curvature, power = as_flag("curvature", curvature), as_power(loss_power)
    if isinstance(scorer, AbstractScoreComputer):
        if lambda_reg is not None or curvature or power not in {None, 1}:
            raise InputError(
                "score_computer is an instance with settings of its own; leave lambda_reg, "
                "curvature and loss_power out, or pass the class."
            )
        return scorer
    cls: Any = RidgeScoreComputer if scorer is None else scorer
    if not _is_score_computer(cls):
        raise InputTypeError(
            "score_computer must be a class derived from "
            "trak.score_computers.AbstractScoreComputer, an instance of one, or None, got "
            f"{describe(cls)}."
        )
    if not issubclass(cls, RidgeScoreComputer) and lambda_reg is None:
        lambda_reg = 0.0
    extra: dict[str, Any] = {}
    if issubclass(cls, RidgeScoreComputer):
        extra |= {"curvature": True} if curvature else {}
        extra |= {"loss_power": loss_power} if power != 1 else {}
    elif curvature or power not in {None, 1}:
        raise InputError(
            f"{cls.__name__} does not weigh rows. Use curvature=False and loss_power=1."
        )
    return cls(
        dtype=float_dtype(dtype),
        device=device,
        logging_level=logging_level,
        lambda_reg=lambda_reg,
        **extra,
    )


def _is_score_computer(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, AbstractScoreComputer)
