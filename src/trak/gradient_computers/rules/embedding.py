"""Embedding tables, and bags of their rows."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trak.blocks import Block, IndexedBlock
from trak.gradient_computers.rules.registry import LayerCall, positions, register


def embedding_tables(model: nn.Module) -> set[str]:
    """The parameters of which a sample uses a few rows.

    Args:
        model: the model.

    Returns:
        Names of the weights of embeddings that no layer of another kind shares.
    """
    elsewhere = {
        id(parameter)
        for layer in model.modules()
        if not isinstance(layer, nn.Embedding | nn.EmbeddingBag)
        for parameter in layer.parameters(recurse=False)
    }
    return {name for name, p in model.named_parameters() if id(p) not in elsewhere}


@register(nn.Embedding)
def embedding(call: LayerCall) -> Iterator[Block]:
    """Each token's output gradient is added to its row; padding rows get none.

    Args:
        call: the call.

    Yields:
        The block of the table.
    """
    layer = call.layer
    tokens = call.inputs[0].reshape(call.num_samples, -1)
    backprops = positions(call.backprops, call.num_samples)
    if layer.padding_idx is not None:
        backprops = backprops * (tokens != layer.padding_idx).unsqueeze(-1)
    if "weight" in call.names:
        yield IndexedBlock(
            call.names["weight"], tokens.long(), backprops, layer.num_embeddings
        )


@register(nn.EmbeddingBag)
def embedding_bag(call: LayerCall) -> Iterator[Block]:
    """A bag's output gradient goes to its rows: whole, as a mean, or to the largest entry.

    Args:
        call: the call.

    Yields:
        The block of the table.
    """
    layer = call.layer
    tokens, real, weights = _bags(layer, *call.inputs)  # [bags, s]
    backprops = call.backprops.unsqueeze(1)  # [bags, 1, o]
    if layer.mode == "max":
        values = layer.weight.detach()[tokens].masked_fill(~real.unsqueeze(-1), -torch.inf)
        largest = values.argmax(1, keepdim=True)
        place = torch.arange(tokens.shape[1], device=tokens.device)[:, None]
        backprops = backprops * ((largest == place) & real.unsqueeze(-1))
    else:
        share = real.to(backprops)
        if layer.mode == "mean":
            share = share / share.sum(1, keepdim=True).clamp(min=1)
        if weights is not None:
            share = share * weights
        backprops = backprops * share.unsqueeze(-1)
    if "weight" in call.names:
        rows = tokens.reshape(call.num_samples, -1).long()
        backprops = positions(backprops, call.num_samples)
        yield IndexedBlock(call.names["weight"], rows, backprops, layer.num_embeddings)


def _bags(
    layer: Any,
    tokens: Tensor,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    # one bag a row, filled up to the longest; which entries count; their weights
    if tokens.ndim == 1:
        assert offsets is not None  # noqa: S101 - the layer would have refused it
        starts = offsets[:-1] if layer.include_last_offset else offsets
        ends = torch.cat([starts[1:], starts.new_tensor([len(tokens)])])
        if layer.include_last_offset:
            ends = offsets[1:]
        lengths = (ends - starts).clamp(min=0)
        longest = max(int(lengths.max()), 1)
        step = torch.arange(longest, device=tokens.device)
        real = step < lengths[:, None]
        index = (starts[:, None] + step).clamp(max=len(tokens) - 1)
        tokens = tokens[index]
        weights = None if weights is None else weights[index]
    else:
        real = torch.ones_like(tokens, dtype=torch.bool)
    if layer.padding_idx is not None:
        real = real & (tokens != layer.padding_idx)
    return tokens, real, weights
