"""Parts of the exact kernel: products of gradients in any form, and its factor."""

import numpy as np
import pytest
import torch

from trak.blocks import ConvolvedBlock, DenseBlock, FactoredBlock, IndexedBlock
from trak.projectors import pairs
from trak.projectors.cholesky import forward, lower_factor
from trak.projectors.kept import Collector, Part

FORMS = ["dense", "layer", "long", "table", "convolved"]


def block(form, size, dtype=torch.float64, seed=0):
    """Gradients of a 12 x 8 matrix."""
    torch.manual_seed(seed + size)
    if form == "dense":
        return DenseBlock("w", torch.randn(size, 96, dtype=dtype))
    if form == "table":
        indices = torch.randint(0, 12, (size, 5))
        return IndexedBlock("w", indices, torch.randn(size, 5, 8, dtype=dtype), 12)
    if form == "convolved":
        x, back = (torch.randn(size, *shape, dtype=dtype) for shape in ((4, 5), (12, 2)))
        return ConvolvedBlock("w", x, back, (2,), (2,), (1,))
    positions = 3 if form == "layer" else 40
    factors = (torch.randn(size, positions, width, dtype=dtype) for width in (8, 12))
    return FactoredBlock("w", *factors)


@pytest.mark.parametrize("chunk", [7, pairs.CHUNK])
@pytest.mark.parametrize("one", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_products_of_all_forms(one, other, chunk, monkeypatch):
    monkeypatch.setattr(pairs, "CHUNK", chunk)
    first, second = block(one, 4), block(other, 6, seed=9)
    expected = first.dense().gradient @ second.dense().gradient.T
    forms = [pairs.smaller(first), pairs.smaller(second)]
    torch.testing.assert_close(pairs.products(*forms), expected)
    torch.testing.assert_close(pairs._by_slices(*forms), expected)
    if not any(isinstance(f, DenseBlock) for f in forms):
        torch.testing.assert_close(pairs._by_positions(*forms), expected)
    assert pairs.cost(*forms) <= 1e4


@pytest.mark.parametrize(
    "forms", [["layer", "layer"], ["layer", "table"], ["table", "dense"]]
)
def test_parameters_that_are_used_several_times(forms):
    blocks = [pairs.smaller(block(form, 4, seed=j)) for j, form in enumerate(forms)]
    found = pairs.merged(blocks)
    total = sum(b.dense().gradient for b in found)
    torch.testing.assert_close(total, sum(b.dense().gradient for b in blocks))
    assert sum(pairs.numbers(b) for b in found) <= 96
    assert len(found) == 1


def test_the_smaller_form_is_kept():
    kinds = {form: type(pairs.smaller(block(form, 2))) for form in FORMS}
    assert kinds == {
        "dense": DenseBlock,
        "layer": FactoredBlock,
        "long": DenseBlock,
        "table": IndexedBlock,
        "convolved": FactoredBlock,
    }


def test_bfloat16_gradients_keep_their_bits():
    collector = Collector(None)
    given = block("layer", 3, torch.bfloat16)
    collector(given)
    arrays = collector.arrays()
    assert arrays["left/w"].dtype == np.uint16
    (found,) = Part(np.arange(3), arrays).blocks("w", torch.device("cpu"))
    assert torch.equal(found.backprops, given.backprops)
    assert torch.equal(found.activations, given.activations)
    # a sum over positions is float32
    assert pairs.smaller(block("long", 3, torch.bfloat16)).gradient.dtype is torch.float32


def test_a_growing_factor():
    torch.manual_seed(0)
    g = torch.randn(9, 30, dtype=torch.float64)
    g[4], g[7] = 0, g[1] - 2 * g[3]
    k = g @ g.T
    lower = lower_factor(k, k.diagonal(), 1e-13)
    torch.testing.assert_close(lower @ lower.T, k)
    assert lower[4].abs().sum() == lower[:, 4].abs().sum() == lower[:, 7].abs().sum() == 0
    strips = [lower[:3, :3], lower[3:5, :5], lower[5:, :]]
    right = k @ torch.randn(9, 2, dtype=torch.float64)
    solved = forward(strips, right)
    torch.testing.assert_close(lower @ solved, right)
    assert not solved[[4, 7]].any()
