"""Rows of random models that do what no rule expects, against one sample at a time."""

import pytest
import torch
from tests import nets, reference

from trak.gradient_computers import HookGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput


def wrong(seed):
    """Batches with other rows than the reference's, and whether a later one told so."""
    model, batches = nets.make(seed)
    computer = HookGradientComputer(model, ImageClassificationModelOutput())
    found = []
    for number, batch in enumerate(batches):
        rows = computer.compute_per_sample_grad(batch)
        expected = reference.gradient_rows(model, batch)
        if not all(
            torch.allclose(rows[name].flatten(1), expected[name], rtol=1e-7, atol=1e-9)
            for name in rows
        ):
            found.append(number)
    return found, bool(computer.disproved)


@pytest.mark.parametrize("seed", range(60))
def test_rows_are_those_of_one_sample_at_a_time(seed):
    batches, told = wrong(seed)
    assert not batches or told


@pytest.mark.slow
def test_rows_of_many_more():
    silent = [
        seed for seed in range(60, 1000) if (found := wrong(seed))[0] and not found[1]
    ]
    assert not silent
