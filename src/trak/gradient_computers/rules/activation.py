"""Activations with parameters."""

from collections.abc import Iterator

from torch import nn

from trak.blocks import Block, DenseBlock
from trak.gradient_computers.rules.registry import LayerCall, register


@register(nn.PReLU)
def prelu(call: LayerCall) -> Iterator[Block]:
    """`y = x` above zero and `a x` below, with one `a` or one a channel.

    Args:
        call: the call.

    Yields:
        The block of the slope.
    """
    x = call.inputs[0]
    slopes = call.backprops * x.clamp(max=0)
    flat = slopes.reshape(call.num_samples, slopes.shape[1] if x.ndim > 1 else 1, -1)
    per_channel = flat.sum(2)
    if call.layer.num_parameters == 1:
        per_channel = per_channel.sum(1, keepdim=True)
    yield DenseBlock(call.names["weight"], per_channel)
