"""Sketches of gradients: linear, of the same norm, and the same for every block."""

import math

import pytest
import torch

from trak.blocks import ConvolvedBlock, DenseBlock, FactoredBlock, IndexedBlock
from trak.gradient_computers.sketch import Sketcher

SHAPES = {
    "w": (600, 500),
    "t": (700, 400),
    "c": (512, 60, 3, 3),
    "small": (30, 20),
    "b": (9,),
}


def blocks():
    torch.manual_seed(0)
    yield FactoredBlock("w", torch.randn(2, 3, 500), torch.randn(2, 3, 600))
    yield IndexedBlock("t", torch.randint(0, 700, (2, 5)), torch.randn(2, 5, 400), 700)
    images, seen = torch.randn(2, 60, 5, 5), torch.randn(2, 512, 3, 3)
    yield ConvolvedBlock("c", images, seen, (3, 3), (1, 1), (1, 1))
    yield DenseBlock("small", torch.randn(2, 600))
    yield DenseBlock("b", torch.randn(2, 9))


@pytest.mark.parametrize("block", list(blocks()), ids=lambda b: b.name)
def test_a_block_and_its_dense_form_have_one_sketch_of_about_their_norm(block):
    sketch = Sketcher(SHAPES)
    dense = block.dense()
    found = sketch(block)
    torch.testing.assert_close(found, sketch(dense), rtol=1e-4, atol=1e-2)
    assert found.shape[1] <= dense.gradient.shape[1]
    ratio = found.norm(dim=1) / dense.gradient.norm(dim=1)
    assert ((ratio > 0.4) & (ratio < 1.8)).all()


def test_large_gradients_become_small_and_stay_visible():
    sketch = Sketcher(SHAPES)
    rows = torch.zeros(2, 600, 500)
    rows[0, 3, 4] = 1
    rows[1, 5, 6] = torch.nan
    found = sketch(DenseBlock("w", rows.flatten(1)))
    assert found.shape == (2, 8 * 500)
    assert found[0].any()
    assert not torch.isfinite(found[1]).all()


def test_numbers_of_sketches_are_counted():
    sketch = Sketcher(SHAPES)
    blocks = [
        DenseBlock(name, torch.randn(2, math.prod(shape))) for name, shape in SHAPES.items()
    ]
    assert sketch.numbers == sum(sketch(block).shape[1] for block in blocks)
