"""Is the loss weight Q that of a logistic loss of the model output?

For `log(1 + exp(-f))` it is `q = 1 / (1 + exp(f))`. Image and text classification have it
exactly; a mean over a text's words is another kind of number between 0 and 1.
"""

import torch
from torch import Tensor

FEWEST = 8
"""Examples that it can be told from."""
_TOLD = (1e-5, 1 - 1e-5)  # beyond, q is mostly rounding
_OTHER = 0.1  # share of the log-odds' standard deviation that a line may leave


def log_odds(loss: Tensor, least: float = _TOLD[0], most: float = _TOLD[1]) -> Tensor:
    """The outputs that loss weights stand for if the loss is logistic.

    Args:
        loss: Q, `[n]`, 0 to 1.
        least: smaller ones are taken for this.
        most: larger ones are taken for this.

    Returns:
        `log((1 - q) / q)`, `[n]`.
    """
    bounded = loss.clamp(least, most)
    return torch.log1p(-bounded) - bounded.log()


def is_logistic(outputs: Tensor, loss: Tensor) -> bool | None:
    """Whether outputs are those that loss weights stand for, up to a scale and a constant.

    Args:
        outputs: of the model, `[n]`.
        loss: their Q, `[n]`.

    Returns:
        None if too few examples are neither right nor wrong beyond rounding.
    """
    loss, outputs = loss.double().flatten(), outputs.double().flatten()
    if not bool(((loss >= 0) & (loss <= 1)).all()):
        return False
    told = (loss > _TOLD[0]) & (loss < _TOLD[1]) & outputs.isfinite()
    if int(told.sum()) < FEWEST:
        return None
    expected, found = log_odds(loss[told]), outputs[told]
    if bool((expected - found).abs().max() < _OTHER):
        return True
    apart, along = expected - expected.mean(), found - found.mean()
    slope = (apart @ along) / (along @ along).clamp(min=torch.finfo(along.dtype).tiny)
    left = (apart - slope * along).norm()
    return bool(slope > 0) and bool(left <= _OTHER * apart.norm())
