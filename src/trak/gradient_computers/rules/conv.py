"""Convolutions and transposed convolutions in one to three dimensions."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trak.blocks import Block, DenseBlock, FactoredBlock
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
    backprops = call.backprops.flatten(start_dim=2).transpose(1, 2)  # [b, s, o]
    if "weight" in call.names:
        sizes = call.backprops.shape[2:]
        patches = unfold(_padded(layer, call.inputs[0]), layer, sizes)  # [b, s, c, *k]
        yield from _grouped(call.names["weight"], patches, backprops, layer.groups)
    if "bias" in call.names:
        yield DenseBlock(call.names["bias"], backprops.sum(1))


@register(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def conv_transpose(call: LayerCall) -> Iterator[Block]:
    """The adjoint of a convolution: input and output gradient change places.

    Args:
        call: the call.

    Yields:
        Blocks of weight and bias.
    """
    layer, inputs = call.layer, call.inputs[0]
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
        patches = unfold(padded, layer, inputs.shape[2:])
        activations = inputs.flatten(start_dim=2).transpose(1, 2)  # [b, s, i]
        yield from _grouped(call.names["weight"], patches, activations, layer.groups)
    if "bias" in call.names:
        yield DenseBlock(call.names["bias"], call.backprops.flatten(start_dim=2).sum(2))


def unfold(padded: Tensor, layer: Any, sizes: torch.Size) -> Tensor:
    """Cuts the patches that a convolution sees.

    Args:
        padded: the padded input, `[b, c, *space]`.
        layer: has `stride`, `dilation` and `kernel_size`.
        sizes: number of patches along each axis of space.

    Returns:
        `[b, s, c, *kernel]`.
    """
    dims = len(sizes)
    patches = padded
    for axis, size in enumerate(sizes):
        steps = torch.arange(size, device=padded.device) * layer.stride[axis]
        taps = torch.arange(layer.kernel_size[axis], device=padded.device)
        index = steps[:, None] + taps * layer.dilation[axis]  # [size, kernel]
        at = 2 + 2 * axis
        patches = patches.index_select(at, index.flatten()).unflatten(at, index.shape)
    space = [2 + 2 * axis for axis in range(dims)]
    kernel = [3 + 2 * axis for axis in range(dims)]
    patches = patches.permute(0, *space, 1, *kernel)
    return patches.flatten(start_dim=1, end_dim=dims)


def _padded(layer: Any, inputs: Tensor) -> Tensor:
    pads = layer._reversed_padding_repeated_twice  # noqa: SLF001 - also resolves "same"
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(inputs, pads, mode=mode)


def _grouped(name: str, patches: Tensor, outputs: Tensor, groups: int) -> Iterator[Block]:
    if groups == 1:
        yield FactoredBlock(name, patches.flatten(start_dim=2), outputs)
        return
    grouped = patches.unflatten(2, (groups, -1)).flatten(start_dim=3)  # [b, s, g, c*k]
    channels = outputs.unflatten(2, (groups, -1))  # [b, s, g, o]
    gradient = torch.einsum("bsgo,bsgi->bgoi", channels, grouped)
    yield DenseBlock(name, gradient.flatten(start_dim=1))
