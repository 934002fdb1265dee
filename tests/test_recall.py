"""What was found out about weights is not found out again, but compared again."""

import pytest
import torch
from tests import reference, runs
from torch import nn

from trak.gradient_computers import FunctionalGradientComputer, HookGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput

N = 24


class Counted(nn.Module):
    """Counts its forward passes, and sorts its samples inside if it is told to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)
        self.calls = 0
        self.sorts = False

    def forward(self, x):
        self.calls += 1
        order = x[:, 0].argsort() if self.sorts else torch.arange(len(x))
        y = self.head(torch.tanh(self.layer(x[order])))
        return y[order.argsort()]


def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (N,), generator=generator)


def computer_of(model, seen=()):
    computer = HookGradientComputer(model, ImageClassificationModelOutput())
    for digest in seen:
        load(computer, digest)
        calls(computer)
    return computer


def load(computer, digest):
    computer.load_model_params(computer.model)
    computer.recall(digest)


def calls(computer):
    before = computer.model.calls
    computer.compute_per_sample_grad(batch())
    return computer.model.calls - before


def is_exact(computer):
    expected = reference.gradient_rows(computer.model, batch())
    found = computer.compute_per_sample_grad(batch())
    for name, rows in found.items():
        torch.testing.assert_close(rows.flatten(1), expected[name])


def test_ways_of_weights_seen_before_are_not_looked_for_again():
    computer = computer_of(Counted().double())
    load(computer, "one")
    first = calls(computer)
    load(computer, "other")
    assert calls(computer) == first
    load(computer, "one")
    assert calls(computer) < first / 3
    assert computer.coverage().share == 1
    is_exact(computer)


def test_they_are_compared_again_with_the_next_batch():
    computer = computer_of(Counted().double(), ["one"])
    computer.model.sorts = True  # as no weights tell
    load(computer, "one")
    is_exact(computer)
    assert computer.disproved == {"layer.weight", "layer.bias", "head.weight", "head.bias"}


def test_what_was_disproved_stays_so():
    model = Counted().double()
    model.sorts = True
    computer = computer_of(model, ["one"])
    assert computer.disproved
    load(computer, "one")
    assert computer.disproved
    is_exact(computer)
    load(computer, "other")
    assert not computer.disproved


@pytest.mark.parametrize("what", ["layer", "parameter"])
def test_a_model_that_was_rebuilt_is_looked_at_anew(what):
    computer = computer_of(Counted().double(), ["one"])
    load(computer, "other")
    anew = calls(computer)
    model = computer.model
    if what == "layer":
        model.head = nn.Linear(5, 3).double()
    else:
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    load(computer, "one")
    assert calls(computer) == anew
    assert set(computer.known) == {"one"}  # nothing holds on to what was replaced
    is_exact(computer)


def test_one_computer_learns_from_another_of_the_same_model():
    model = Counted().double()
    first = computer_of(model, ["one"])
    second = computer_of(model)
    second.learn_from(first)
    second.learn_from(FunctionalGradientComputer(model, ImageClassificationModelOutput()))
    load(second, "other")
    anew = calls(second)
    load(second, "one")
    assert calls(second) < anew / 3
    is_exact(second)


def test_one_sample_is_compared_again_too():
    x, labels = batch()
    computer = computer_of(Counted().double())
    for digest in ("one", "one"):
        load(computer, digest)
        computer.model.calls = 0
        computer.compute_per_sample_grad((x[:1], labels[:1]))
    assert computer.model.calls == 3  # gradients, and both sides of the comparison


def test_the_one_call_looks_at_each_checkpoint_once(tmp_path, monkeypatch):
    found = []
    look = HookGradientComputer._exact_rows

    def counted(self, names, samples):
        found.append(names)
        return look(self, names, samples)

    monkeypatch.setattr(HookGradientComputer, "_exact_rows", counted)
    model = Counted().double()
    x, labels = batch()
    train = [(x.repeat(3, 1) + torch.arange(3 * N)[:, None] / 100, labels.repeat(3))]
    states = [
        {name: value.clone() for name, value in model.state_dict().items()},
        runs.other_weights(model),
    ]
    with_it = runs.trak.attribute(
        model,
        task="image_classification",
        train=train,
        targets=[batch()],
        checkpoints=states,
        save_dir=tmp_path,
        progress=False,
    )
    assert len(found) == len(states)
    assert with_it.shape == (3 * N, N)
