"""Settings of the whole suite."""

import pytest
import torch
from tests import cases, runs

# two test processes share two cores, and the tests' tensors are tiny
torch.set_num_threads(1)


@pytest.fixture
def world():
    """A model, 60 training examples, 6 targets and three checkpoints."""
    model, train, targets = runs.data("mlp", 60, 6)
    return model, train, targets, cases.checkpoints("mlp", 3)


@pytest.fixture
def learned(world):
    """The same, with labels that the first checkpoint is sure about."""
    model, train, targets, states = world
    states = [{k: 6 * v for k, v in state.items()} for state in states]
    model.load_state_dict(states[0])
    with torch.no_grad():
        found = [(x, model(x).argmax(1)) for x, _ in (train, targets)]
    return model, *found, states


@pytest.fixture
def setting(tmp_path):
    """Model, training batch, targets, and a maker of TRAKers over one store."""
    model, train, targets = runs.data("mlp", 20, 5)

    def make(**options):
        return runs.make_traker(model, 20, tmp_path, **options)

    return model, train, targets, make
