"""Is the loss weight Q that of a logistic loss of the model output?

For `log(1 + exp(-f))` it is `q = 1 / (1 + exp(f))`. Image and text classification have it
exactly; a mean over a text's words is another kind of number between 0 and 1. Where the
output is the logit of one of two classes, Q has the sign of the label: with `s = +-1`, the
loss is `log(1 + exp(-s f))` and Q is `s / (1 + exp(s f))`. That is the same training with
rows `s phi`, so that nothing but the sizes of Q counts for curvature and ridge.
"""

import torch
from torch import Tensor

FEWEST = 8
"""Examples that it can be told from."""
_TOLD = (1e-5, 1 - 1e-5)  # beyond, q is mostly rounding
_SAME, _SHARING = 1e-3, 4  # relative; examples that have each weight, on average
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
        loss: their Q, `[n]`; with signs where outputs are logits of one of two classes.

    Returns:
        None if too few examples are neither right nor wrong beyond rounding.
    """
    loss, outputs = loss.double().flatten(), outputs.double().flatten()
    if not bool((loss.abs() <= 1).all()):
        return False
    if bool((loss < 0).any()):
        signs = loss.sign()  # a task may have the other sign in Q, which flips all scores
        found = [_fits(outputs * s, loss.abs()) for s in (signs, -signs)]
        return True if True in found else found[0]
    return _fits(outputs, loss)


def weights_in(outputs: Tensor, loss: Tensor) -> list[float]:
    """Sample weights that loss weights seem to hold, as the exact derivative has them.

    Args:
        outputs: of the model, `[n]`.
        loss: their Q, `[n]`.

    Returns:
        The few different quotients of Q and a logistic loss's Q; nothing if they differ
        from example to example, or not at all.
    """
    loss, outputs = loss.double().flatten(), outputs.double().flatten()
    own = torch.sigmoid(-outputs)
    told = (own > _TOLD[0]) & outputs.isfinite() & (loss > 0)
    if not bool(told.all()) or len(own) < FEWEST:
        return []
    quotients = (loss / own).sort().values
    starts = torch.cat([quotients.new_zeros(1), quotients[:-1]]) * (1 + _SAME) < quotients
    found = [float(each) for each in quotients[starts]]
    return found if 1 < len(found) <= len(own) // _SHARING else []


def sizes(loss: Tensor, logistic: bool | None) -> Tensor:
    """Loss weights without their signs, where these only say which class is the right one.

    Args:
        loss: Q, `[n]` or `[n, 1]`.
        logistic: whether it is that of a logistic loss; None if unknown.

    Returns:
        `|Q|` of a logistic loss, at most 1; Q of others.
    """
    return loss.abs().clamp(max=1) if logistic else loss


def _fits(outputs: Tensor, loss: Tensor) -> bool | None:
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
