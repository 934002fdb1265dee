"""Inner products of per-sample gradients of one parameter, for all pairs of samples.

With gradients `G = sum_s l_s r_s^T` and `G' = sum_t l'_t r'_t^T` of two samples,
`<G, G'> = sum_s sum_t (l_s . l'_t) (r_s . r'_t)`, so neither has to be formed. Where that
costs more than forming both, they are formed in slices of a few rows for all samples of
the two batches, and dropped. Everything is float64: the matrix of all products must stay
positive semidefinite to far below the smallest pivot that counts.
"""

import math

import torch
from torch import Tensor

from trak.blocks import Block, ConvolvedBlock, DenseBlock, FactoredBlock, IndexedBlock

CHUNK = 1 << 23
"""Numbers that exist at once beside the blocks themselves (64 MiB)."""

KeptBlock = DenseBlock | FactoredBlock | IndexedBlock


def products(one: KeptBlock, other: KeptBlock) -> Tensor:
    """`<G_i, G'_j>` for every sample `i` of one batch and `j` of another.

    Args:
        one: gradients of a parameter, `b` samples.
        other: gradients of the same parameter, `b'` samples, in any form.

    Returns:
        `[b, b']`, float64.
    """
    by_slices, by_positions = _costs(one, other)
    if by_slices <= by_positions:
        return _by_slices(one, other)
    assert not isinstance(one, DenseBlock)  # noqa: S101 - has no positions
    assert not isinstance(other, DenseBlock)  # noqa: S101
    return _by_positions(one, other)


def cost(one: KeptBlock, other: KeptBlock) -> float:
    """Multiplications of `products`.

    Args:
        one: gradients of a parameter.
        other: gradients of the same parameter.

    Returns:
        Their number, by the cheaper way.
    """
    return min(_costs(one, other))


def smaller(block: Block) -> KeptBlock:
    """The smaller of a block's forms: its factors, or the gradient multiplied out.

    Args:
        block: gradients of one parameter.

    Returns:
        The same gradients. What is multiplied out is float32 or float64.
    """
    if isinstance(block, DenseBlock):
        return block
    if numbers(block) >= math.prod(matrix_shape(block)):
        return multiplied_out(block)
    if isinstance(block, ConvolvedBlock):
        backprops, patches = block.factors()
        return FactoredBlock(block.name, patches, backprops)
    return block


def merged(blocks: list[KeptBlock]) -> list[KeptBlock]:
    """Gradients of a parameter that is used several times, in as few blocks as possible.

    Args:
        blocks: of one parameter and the same samples; their sum is its gradient.

    Returns:
        One block, or a factored and an indexed one.
    """
    if len(blocks) == 1:
        return blocks
    name = blocks[0].name
    layers = [block for block in blocks if isinstance(block, FactoredBlock)]
    tables = [block for block in blocks if isinstance(block, IndexedBlock)]
    found: list[KeptBlock] = []
    if layers:
        activations = torch.cat([block.activations for block in layers], dim=1)
        backprops = torch.cat([block.backprops for block in layers], dim=1)
        found.append(FactoredBlock(name, activations, backprops))
    if tables:
        indices = torch.cat([block.indices for block in tables], dim=1)
        backprops = torch.cat([block.backprops for block in tables], dim=1)
        found.append(IndexedBlock(name, indices, backprops, tables[0].num_rows))
    whole = [block.gradient for block in blocks if isinstance(block, DenseBlock)]
    size = math.prod(matrix_shape((found or blocks)[0]))
    if not whole and sum(numbers(block) for block in found) < size:
        return found
    whole += [multiplied_out(block).gradient for block in found]
    return [DenseBlock(name, torch.stack(whole).sum(dim=0))]


def numbers(block: Block) -> int:
    """How many numbers hold one sample's gradient.

    Args:
        block: gradients of one parameter.

    Returns:
        Their number, as if in factors; an index counts as two.
    """
    if isinstance(block, DenseBlock):
        return block.gradient.shape[1]
    if isinstance(block, IndexedBlock):
        _, positions, width = block.backprops.shape
        return positions * (width + 2)
    positions = math.prod(block.backprops.shape[2:])
    if isinstance(block, FactoredBlock):
        positions = block.backprops.shape[1]
    return positions * sum(matrix_shape(block))


def matrix_shape(block: Block) -> tuple[int, int]:
    """The shape of one sample's gradient, as a matrix.

    Args:
        block: gradients of one parameter.

    Returns:
        Rows and columns; a single column for what came multiplied out.
    """
    if isinstance(block, DenseBlock):
        return block.gradient.shape[1], 1
    if isinstance(block, IndexedBlock):
        return block.num_rows, block.backprops.shape[2]
    if isinstance(block, FactoredBlock):
        return block.backprops.shape[2], block.activations.shape[2]
    return block.backprops.shape[1], block.inputs.shape[1] * math.prod(block.kernel)


def multiplied_out(block: Block) -> DenseBlock:
    """The gradient itself, summed over positions in float32 or float64.

    Args:
        block: gradients of one parameter.

    Returns:
        The same gradients.
    """
    if isinstance(block, DenseBlock):
        return block
    back = _wide(block.backprops)
    if isinstance(block, FactoredBlock):
        return FactoredBlock(block.name, _wide(block.activations), back).dense()
    if isinstance(block, IndexedBlock):
        return IndexedBlock(block.name, block.indices, back, block.num_rows).dense()
    inputs, taps = _wide(block.inputs), (block.kernel, block.stride, block.dilation)
    return ConvolvedBlock(block.name, inputs, back, *taps).dense()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _costs(one: KeptBlock, other: KeptBlock) -> tuple[float, float]:
    # by slices and by positions
    blocks = (one, other)
    size = math.prod(matrix_shape(one))
    sizes = [len(_backprops(block)) for block in blocks]
    by_slices = float(size) * math.prod(sizes)
    by_positions = float(math.prod(sizes))
    for block, count in zip(blocks, sizes, strict=True):
        if isinstance(block, FactoredBlock):
            by_slices += float(size) * count * block.backprops.shape[1]
        by_positions *= 1 if isinstance(block, DenseBlock) else _positions(block)
    if any(isinstance(block, DenseBlock) for block in blocks):
        return by_slices, math.inf
    layers = [block for block in blocks if isinstance(block, FactoredBlock)]
    rows, columns = matrix_shape(one)
    return by_slices, by_positions * (columns + (rows if len(layers) == 2 else 1))


def _positions(block: FactoredBlock | IndexedBlock) -> int:
    return block.backprops.shape[1]


def _backprops(block: KeptBlock) -> Tensor:
    return block.gradient if isinstance(block, DenseBlock) else block.backprops


def _by_slices(one: KeptBlock, other: KeptBlock) -> Tensor:
    shapes = [matrix_shape(b) for b in (one, other) if not isinstance(b, DenseBlock)]
    rows, columns = shape = shapes[0] if shapes else matrix_shape(one)
    count, others = len(_backprops(one)), len(_backprops(other))
    total = torch.zeros(count, others, dtype=torch.float64, device=_backprops(one).device)
    step = max(1, CHUNK // max(1, columns * (count + others)))
    one, other = _doubled(one), _doubled(other)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        left = _rows(one, part, shape)
        right = left if other is one else _rows(other, part, shape)
        total.addmm_(left, right.T)
    return total


def _doubled(block: KeptBlock) -> KeptBlock:
    # what came multiplied out is converted slice by slice
    if isinstance(block, FactoredBlock):
        return FactoredBlock(
            block.name, block.activations.double(), block.backprops.double()
        )
    return block


def _rows(block: KeptBlock, part: slice, shape: tuple[int, int]) -> Tensor:
    # some rows of every sample's gradient, [b, rows * columns]
    if isinstance(block, DenseBlock):
        matrices = block.gradient.unflatten(1, shape)
        return matrices[:, part].flatten(1).double()
    if isinstance(block, FactoredBlock):
        return (block.backprops[:, :, part].mT @ block.activations).flatten(1)
    inside = (block.indices >= part.start) & (block.indices < part.stop)
    values = block.backprops.double() * inside.unsqueeze(-1)
    places = (block.indices - part.start).clamp(0, part.stop - part.start - 1)
    found = values.new_zeros(len(values), part.stop - part.start, shape[1])
    return found.scatter_add_(1, places.unsqueeze(-1).expand_as(values), values).flatten(1)


def _by_positions(
    one: FactoredBlock | IndexedBlock, other: FactoredBlock | IndexedBlock
) -> Tensor:
    count, others = len(one.backprops), len(other.backprops)
    total = torch.zeros(count, others, dtype=torch.float64, device=one.backprops.device)
    pairs = max(1, CHUNK // max(1, _positions(one) * _positions(other)))
    columns = min(others, pairs)
    rows = max(1, pairs // columns)
    for start in range(0, count, rows):
        for begin in range(0, others, columns):
            here, there = slice(start, start + rows), slice(begin, begin + columns)
            total[here, there] = _summed(_some(one, here), _some(other, there))
    return total


def _some(block: FactoredBlock | IndexedBlock, part: slice) -> FactoredBlock | IndexedBlock:
    backprops = block.backprops[part].double()
    if isinstance(block, IndexedBlock):
        return IndexedBlock(block.name, block.indices[part], backprops, block.num_rows)
    return FactoredBlock(block.name, block.activations[part].double(), backprops)


def _summed(
    one: FactoredBlock | IndexedBlock, other: FactoredBlock | IndexedBlock
) -> Tensor:
    each = _right(one).flatten(0, 1) @ _right(other).flatten(0, 1).T
    each *= _lefts(one, other)
    sizes = (len(one.backprops), _positions(one), len(other.backprops), _positions(other))
    return each.view(sizes).sum(dim=(1, 3))


def _right(block: FactoredBlock | IndexedBlock) -> Tensor:
    # a table's rows are what its backprops are added to
    return block.activations if isinstance(block, FactoredBlock) else block.backprops


def _lefts(
    one: FactoredBlock | IndexedBlock, other: FactoredBlock | IndexedBlock
) -> Tensor:
    # l_s . l'_t, [b s, b' t]; a table's l are unit vectors
    if isinstance(one, FactoredBlock):
        left = one.backprops.flatten(0, 1)
        if isinstance(other, FactoredBlock):
            return left @ other.backprops.flatten(0, 1).T
        return left[:, other.indices.flatten()]
    if isinstance(other, FactoredBlock):
        return other.backprops.flatten(0, 1)[:, one.indices.flatten()].T
    return one.indices.flatten()[:, None] == other.indices.flatten()[None, :]
