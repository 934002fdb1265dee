"""Checkpoints of a fine-tuned model, as differences from the pretrained weights.

A weight that was not trained is left out. Any other is the pretrained one plus a whole
number between -127 and 127 times a scale for each of its rows, so a checkpoint takes one
byte a trained parameter. A bank's checkpoints are the rounded models themselves: nothing
in it was computed with others.
"""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]
SCALE = "/scale"
_LARGEST = 127


def shrink(state: State, pretrained: State | None) -> State:
    """What is stored of a checkpoint.

    Args:
        state: its weights.
        pretrained: the weights that training began with; None for models from scratch.

    Returns:
        int8 numbers by the weight's name and their scales by the name with `SCALE`; the
        state as it is without pretrained weights.
    """
    if pretrained is None:
        return state
    found = {}
    for name, value in state.items():
        change = value - pretrained[name]
        if not change.any():
            continue
        rows = change.flatten(1) if change.ndim > 1 else change[None]
        scale = rows.abs().amax(1, keepdim=True) / _LARGEST
        rounded = (rows / scale.clamp(min=1e-30)).round().to(torch.int8)
        found |= {name: rounded.view_as(change), name + SCALE: scale[:, 0]}
    return found


def restore(stored: State, pretrained: State | None) -> State:
    """The weights of a stored checkpoint.

    Args:
        stored: as `shrink` gives it.
        pretrained: as for `shrink`.

    Returns:
        All weights by name.
    """
    if pretrained is None:
        return stored
    state = dict(pretrained)
    for name in stored:
        if name.endswith(SCALE):
            continue
        scale = stored[name + SCALE]
        change = stored[name].to(scale.dtype)
        rows = change.flatten(1) if change.ndim > 1 else change[None]
        state[name] = pretrained[name] + (rows * scale[:, None]).view_as(change)
    return state
