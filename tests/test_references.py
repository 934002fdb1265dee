"""Gradients that are easily lost: by a second reference, or in a batch's sum."""

from functools import partial

import pytest
import torch
from tests import reference, runs
from torch import nn
from torch.nn import functional

from trak.gradient_computers import FunctionalGradientComputer, HookGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import NoOpProjector

KINDS = [HookGradientComputer, FunctionalGradientComputer]


class Listed(nn.Module):
    """Reads its registered matrices from a list of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.matrices = [nn.Parameter(torch.randn(5, 5)) for _ in range(2)]
        for number, matrix in enumerate(self.matrices):
            self.register_parameter(f"matrix{number}", matrix)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for matrix in self.matrices:
            x = torch.tanh(x @ matrix)
        return self.head(x)


class Partial(nn.Module):
    """Its output layer holds the first layer's weight, beside that layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 3)
        self.middle = nn.Linear(3, 6)
        self.out = partial(functional.linear, weight=self.first.weight)

    def forward(self, x):
        return self.out(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def batch_of(size):
    x = torch.randn(size, 6, dtype=torch.float64)
    return x, torch.arange(size) % 3


def equal(computer, model, batch):
    found = computer.compute_per_sample_grad(batch)
    for name, expected in reference.gradient_rows(model, batch).items():
        torch.testing.assert_close(found[name].flatten(1), expected, msg=name)


@pytest.mark.parametrize("build", [Listed, Partial])
@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_the_model_knows_by_another_reference(kind, build):
    torch.manual_seed(0)
    model = build().double()
    computer = kind(model, ImageClassificationModelOutput())
    flags = [p.requires_grad_(number != 1) for number, p in enumerate(model.parameters())]
    computer = kind(model, ImageClassificationModelOutput(), grad_wrt=computer.selected)
    for size in (4, 1, 5):
        model.requires_grad_()
        expected = reference.gradient_rows(model, batch := batch_of(size))
        for number, parameter in enumerate(flags):
            parameter.requires_grad_(number != 1)
        found = computer.compute_per_sample_grad(batch)
        for name, rows in expected.items():
            torch.testing.assert_close(found[name].flatten(1), rows, msg=name)
        assert [p.requires_grad for p in flags] == [n != 1 for n in range(len(flags))]


def test_a_second_reference_in_a_whole_run(tmp_path):
    torch.manual_seed(0)
    model, other = Listed().double(), Listed().double()
    states = [
        {name: value.clone() for name, value in own.state_dict().items()}
        for own in (model, other)
    ]
    train, targets = batch_of(10), batch_of(4)
    traker = runs.make_traker(model, 10, tmp_path, projector=NoOpProjector())
    scores = runs.whole_run(traker, train, targets, states)
    known = runs.oracle(model, train, targets, states, None)
    expected = torch.from_numpy(reference.trak_scores(known))
    torch.testing.assert_close(torch.from_numpy(scores), expected, check_dtype=False)


class Heads(nn.Module):
    """A head of two classes for each of two kinds of examples."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(2))

    def forward(self, x):
        h = torch.tanh(self.body(x))
        outputs = torch.stack([head(h) for head in self.heads], 1)
        return outputs[torch.arange(len(x)), (x[:, 0] > 0).long()]


def test_a_gradient_first_met_where_it_cancels_in_the_batch():
    torch.manual_seed(0)
    model = Heads().double()
    x = torch.randn(12, 6, dtype=torch.float64)
    x[:, 0] = x[:, 0].abs() * torch.tensor([-1.0] * 4 + [1.0] * 8)
    labels = torch.arange(12) % 2
    computer = HookGradientComputer(model, ImageClassificationModelOutput())
    for rows in (slice(0, 4), slice(4, 8), slice(6, 12), slice(0, 12)):
        equal(computer, model, (x[rows], labels[rows]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_of_three_names_keeps_its_parameters(kind):
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer, nn.Linear(6, 3))
    model = model.double().eval()
    before = list(model.parameters())
    for size in (5, 1, 3):
        computer = kind(model, ImageClassificationModelOutput())
        equal(computer, model, batch := batch_of(size))
        computer.compute_loss_grad(batch)
        computer.compute_outputs(batch, 2)
        assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
        assert all(p.requires_grad for p in model.parameters())
