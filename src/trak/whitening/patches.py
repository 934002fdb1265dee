"""Second moments of the patches that a convolution sees, most of which are never cut out.

Two taps of a kernel that lie `d` rows apart see the same products of an image's rows
wherever they are, but for the rows at its edges. So along the first axis of space the
products of rows are added up once for every distance, instead of once for every pair of
taps, and edges are added or left out.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from trak.blocks import ConvolvedBlock

_POOLS: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


def slides(block: ConvolvedBlock) -> bool:
    """Whether a kernel's taps see the same rows of an image in turn.

    Args:
        block: gradients of a convolution.

    Returns:
        False if `sliding_moment` does not apply: there is one tap along the first axis of
        space, rows are skipped, or there are too few of them.
    """
    reach = (block.kernel[0] - 1) * block.dilation[0]
    return block.stride[0] == 1 and 0 < reach < block.backprops.shape[2]


def occupied(block: ConvolvedBlock) -> Tensor:
    """At which positions the kernel sees anything but zeros.

    Args:
        block: gradients of a convolution.

    Returns:
        `[b, *positions]`, bool.
    """
    inputs = (block.inputs != 0).any(dim=1, keepdim=True).float()
    pool = _POOLS[len(block.kernel)](
        block.kernel, stride=block.stride, dilation=block.dilation
    )
    space = tuple(slice(size) for size in block.backprops.shape[2:])
    return pool(inputs)[(slice(None), 0, *space)] > 0


def moment_of_patches(block: ConvolvedBlock, dtype: torch.dtype) -> Tensor:
    """The sum of `r r^T` over all positions of all samples, `r` the patches.

    Args:
        block: gradients of a convolution.
        dtype: of the sum.

    Returns:
        `[c * kernel, c * kernel]`, like `R^T R` with the patches of `block.factors()`.
    """
    width = block.inputs.shape[1] * math.prod(block.kernel)
    seen = block.taps().movedim(0, 1 + len(block.kernel)).reshape(width, -1).to(dtype)
    return seen @ seen.T


def sliding_moment(block: ConvolvedBlock, dtype: torch.dtype) -> Tensor:
    """The same as `moment_of_patches`, most of which are never cut out.

    Args:
        block: gradients of a convolution that `slides`.
        dtype: of the sum.

    Returns:
        `[c * kernel, c * kernel]`, like `R^T R` with the patches of `block.factors()`.
    """
    taps, step, height = block.kernel[0], block.dilation[0], block.backprops.shape[2]
    rows = _rows(block).to(dtype)
    channels, width = block.inputs.shape[1], rows.shape[-1]
    shape = (channels, width // channels) * 2
    found = rows.new_empty(channels, taps, shape[1], channels, taps, shape[1])
    for apart in range(taps):
        last = taps - 1 - apart

        def between(first: int, stop: int, shift: int = apart * step) -> Tensor:
            upper = rows[first:stop].reshape(-1, width)
            return upper.T @ rows[first + shift : stop + shift].reshape(-1, width)

        total = between(last * step, height)
        for tap in range(last, -1, -1):  # moves the window up by a step
            if tap < last:
                total = total + between(tap * step, (tap + 1) * step)
            edge = total
            if tap:
                edge = edge + between(height, height + tap * step)
            found[:, tap, :, :, tap + apart] = edge.view(shape)
            found[:, tap + apart, :, :, tap] = edge.T.reshape(shape)
    return found.view(taps * width, taps * width)


def _rows(block: ConvolvedBlock) -> Tensor:
    # what a row of the kernel sees along a row of the image, [rows, b, positions, c * taps]
    width = block.inputs.shape[1] * math.prod(block.kernel[1:])
    return block.windows(first=1).transpose(0, 1).reshape(block.inputs.shape[2], -1, width)
