"""Linear, Bilinear and Hugging Face's Conv1D."""

from collections.abc import Iterator

from torch import nn

from trak.blocks import Block, DenseBlock, FactoredBlock
from trak.gradient_computers.rules.registry import LayerCall, positions, register


@register(nn.Linear)
def linear(call: LayerCall) -> Iterator[Block]:
    """`y = x W^T + b`: dW is the sum over positions of outer(backprop, activation).

    Args:
        call: the call.

    Yields:
        Blocks of weight and bias.
    """
    backprops = positions(call.backprops, call.num_samples)
    if "weight" in call.names:
        activations = positions(call.inputs[0], call.num_samples)
        yield FactoredBlock(call.names["weight"], activations, backprops)
    if "bias" in call.names:
        yield DenseBlock(call.names["bias"], backprops.sum(1))


@register("transformers.pytorch_utils.Conv1D")
def transposed_linear(call: LayerCall) -> Iterator[Block]:
    """`y = x W + b` with `W` `[i, o]`, as `transformers.pytorch_utils.Conv1D`.

    Args:
        call: the call.

    Yields:
        Blocks of weight and bias.
    """
    backprops = positions(call.backprops, call.num_samples)
    if "weight" in call.names:
        activations = positions(call.inputs[0], call.num_samples)
        yield FactoredBlock(call.names["weight"], backprops, activations)
    if "bias" in call.names:
        yield DenseBlock(call.names["bias"], backprops.sum(1))


@register(nn.Bilinear)
def bilinear(call: LayerCall) -> Iterator[Block]:
    """`y_o = x1^T W_o x2 + b_o`: the activation is the outer product of both inputs.

    Args:
        call: the call.

    Yields:
        Blocks of weight and bias.
    """
    backprops = positions(call.backprops, call.num_samples)
    if "weight" in call.names:
        first, second = (positions(x, call.num_samples) for x in call.inputs[:2])
        pairs = (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(start_dim=2)
        yield FactoredBlock(call.names["weight"], pairs, backprops)
    if "bias" in call.names:
        yield DenseBlock(call.names["bias"], backprops.sum(1))
