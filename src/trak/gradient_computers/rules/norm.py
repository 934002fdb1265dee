"""Normalisation layers: the scale's gradient is the normalised input times backprop."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from trak.blocks import Block, DenseBlock
from trak.gradient_computers.rules.registry import LayerCall, register


@register(nn.LayerNorm)
def layer_norm(call: LayerCall) -> Iterator[Block]:
    """Layer normalisation over the last axes.

    Args:
        call: the call.

    Yields:
        Blocks of weight and bias.
    """
    layer, x = call.layer, call.inputs[0]
    normal = nn.functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    yield from _last_axes(call, normal, len(layer.normalized_shape))


@register(nn.RMSNorm)
def rms_norm(call: LayerCall) -> Iterator[Block]:
    """Root-mean-square normalisation over the last axes.

    Args:
        call: the call.

    Yields:
        The block of the weight.
    """
    layer, x = call.layer, call.inputs[0]
    normal = nn.functional.rms_norm(x, layer.normalized_shape, eps=layer.eps)
    yield from _last_axes(call, normal, len(layer.normalized_shape))


@register(nn.GroupNorm)
def group_norm(call: LayerCall) -> Iterator[Block]:
    """Normalisation over groups of channels.

    Args:
        call: the call.

    Yields:
        Blocks of weight and bias.
    """
    layer = call.layer
    yield from _channels(
        call, nn.functional.group_norm(call.inputs[0], layer.num_groups, eps=layer.eps)
    )


@register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(call: LayerCall) -> Iterator[Block]:
    """Normalisation of each channel of each sample, by its own or by running statistics.

    Args:
        call: the call.

    Yields:
        Blocks of weight and bias.
    """
    layer, x = call.layer, call.inputs[0]
    if layer.track_running_stats:
        yield from _channels(call, _by_running_statistics(layer, x))
    else:
        yield from _channels(call, nn.functional.instance_norm(x, eps=layer.eps))


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(call: LayerCall) -> Iterator[Block]:
    """Batch normalisation in evaluation mode, by running statistics.

    Args:
        call: the call.

    Yields:
        Blocks of weight and bias; none without running statistics, since samples of a
        batch then depend on each other.
    """
    if call.layer.running_mean is not None:
        yield from _channels(call, _by_running_statistics(call.layer, call.inputs[0]))


def _by_running_statistics(layer: Any, x: Tensor) -> Tensor:
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    scale = (layer.running_var + layer.eps).rsqrt()
    return (x - layer.running_mean.view(shape)) * scale.view(shape)


def _last_axes(call: LayerCall, normal: Tensor, axes: int) -> Iterator[Block]:
    # `normal` is overwritten
    backprops = call.backprops
    width = normal.shape[normal.ndim - axes :].numel()
    if "bias" in call.names:
        yield DenseBlock(call.names["bias"], _summed(call, backprops, width))
    if "weight" in call.names:
        yield DenseBlock(call.names["weight"], _summed(call, normal.mul_(backprops), width))


def _summed(call: LayerCall, values: Tensor, width: int) -> Tensor:
    return values.reshape(call.num_samples, -1, width).sum(1)


def _channels(call: LayerCall, normal: Tensor) -> Iterator[Block]:
    # `normal` is overwritten
    flat = (*normal.shape[:2], -1)
    if "bias" in call.names:
        yield DenseBlock(call.names["bias"], call.backprops.reshape(flat).sum(2))
    if "weight" in call.names:
        values = normal.mul_(call.backprops)
        yield DenseBlock(call.names["weight"], values.reshape(flat).sum(2))
