"""Convolutions and transposed convolutions in one to three dimensions."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from trak.blocks import Block, ConvolvedBlock, DenseBlock
from trak.gradient_computers.rules.registry import LayerCall, register


@register(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def conv(call: LayerCall) -> Iterator[Block]:
    """A convolution is a linear layer over patches; its positions are the output pixels.

    Args:
        call: the call.

    Yields:
        Blocks of weight and bias.
    """
    layer = call.layer
    if not _has_batch(call):
        return
    if "weight" in call.names:
        padded = _padded(layer, call.inputs[0])
        yield _block(call.names["weight"], layer, padded, call.backprops)
    if "bias" in call.names:
        yield DenseBlock(call.names["bias"], call.backprops.flatten(start_dim=2).sum(2))


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_transpose(call: LayerCall) -> Iterator[Block]:
    """The adjoint of a convolution: input and output gradient change places.

    Args:
        call: the call.

    Yields:
        Blocks of weight and bias.
    """
    layer, inputs = call.layer, call.inputs[0]
    if not _has_batch(call):
        return
    if "weight" in call.names:
        pads = [p for p in reversed(layer.padding) for _ in range(2)]
        padded = nn.functional.pad(call.backprops, pads)
        needed = [
            (size - 1) * stride + dilation * (kernel - 1) + 1
            for size, stride, dilation, kernel in zip(
                inputs.shape[2:],
                layer.stride,
                layer.dilation,
                layer.kernel_size,
                strict=True,
            )
        ]
        short = [max(0, n - s) for n, s in zip(needed, padded.shape[2:], strict=True)]
        padded = nn.functional.pad(padded, [p for s in reversed(short) for p in (0, s)])
        yield _block(call.names["weight"], layer, padded, inputs)
    if "bias" in call.names:
        yield DenseBlock(call.names["bias"], call.backprops.flatten(start_dim=2).sum(2))


def _has_batch(call: LayerCall) -> bool:
    # torch's convolutions also take one sample alone
    return call.backprops.ndim == len(call.layer.kernel_size) + 2


def _padded(layer: Any, inputs: Tensor) -> Tensor:
    pads = layer._reversed_padding_repeated_twice  # noqa: SLF001 - also resolves "same"
    if not any(pads):
        return inputs
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(inputs, pads, mode=mode)


def _block(name: str, layer: Any, padded: Tensor, outputs: Tensor) -> Block:
    steps = (layer.kernel_size, layer.stride, layer.dilation)
    if layer.groups == 1:
        return ConvolvedBlock(name, padded, outputs, *steps)
    # groups are worked through as if they were samples
    inputs = padded.unflatten(1, (layer.groups, -1)).flatten(end_dim=1)
    channels = outputs.unflatten(1, (layer.groups, -1)).flatten(end_dim=1)
    gradient = ConvolvedBlock(name, inputs, channels, *steps).dense().gradient
    return DenseBlock(name, gradient.reshape(len(padded), -1))
