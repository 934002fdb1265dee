"""Embedding tables."""

from collections.abc import Iterator

from torch import nn

from trak.blocks import Block, IndexedBlock
from trak.gradient_computers.rules.registry import LayerCall, positions, register


@register(nn.Embedding)
def embedding(call: LayerCall) -> Iterator[Block]:
    """Each token's output gradient is added to its row; padding rows get none.

    Args:
        call: the call.

    Yields:
        The block of the table.
    """
    layer, tokens = call.layer, call.inputs[0]
    if tokens.ndim < 2 and len(tokens) != call.num_samples:
        return  # positions without a sample axis: whose they are cannot be told
    if len(tokens) == 1:  # positions that the batch shares
        tokens = tokens.expand(call.num_samples, *tokens.shape[1:])
    tokens = tokens.reshape(call.num_samples, -1)
    backprops = positions(call.backprops, call.num_samples)
    if layer.padding_idx is not None:
        backprops = backprops * (tokens != layer.padding_idx).unsqueeze(-1)
    if "weight" in call.names:
        yield IndexedBlock(call.names["weight"], tokens, backprops, layer.num_embeddings)
