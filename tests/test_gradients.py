"""Gradient computers against the oracle."""

import logging
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tests import cases, reference, runs
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from trak.errors import InputError, UnsupportedModuleError
from trak.gradient_computers import (
    AbstractGradientComputer,
    FunctionalGradientComputer,
    IterativeGradientComputer,
)
from trak.modelout_functions import (
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
)
from trak.projectors import NoOpProjector

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def collect(computer: AbstractGradientComputer, batch, names, model):
    sizes = {n: p.numel() for n, p in model.named_parameters() if n in names}
    blocks = {}
    computer.run(batch, lambda block: blocks.update({block.name: block.gradient}), sizes)
    return blocks


def assert_equal(found, expected, dtype):
    assert list(found) == list(expected)
    scale = max(float(rows.abs().max()) for rows in expected.values())
    for name, rows in expected.items():
        assert found[name].dtype is dtype
        error = float((found[name].double() - rows).abs().max()) if rows.numel() else 0.0
        assert error <= TOLERANCE[dtype] * scale, name


def flops(computer, batch):
    computer.compute_per_sample_grad(batch)  # the first batch of a shape is looked at
    with FlopCounterMode(display=False) as counter:
        computer.compute_per_sample_grad(batch)
    return counter.get_total_flops()


def functional(model, grad_wrt=None, task=None):
    task = task or ImageClassificationModelOutput()
    return FunctionalGradientComputer(model=model, task=task, grad_wrt=grad_wrt)


def iterative(model, grad_wrt=None):
    task = IterativeImageClassificationModelOutput()
    return IterativeGradientComputer(model=model, task=task, grad_wrt=grad_wrt)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("name", cases.NAMES)
@pytest.mark.parametrize("make", [functional, iterative])
def test_gradients_equal_the_oracle(make, name, size, dtype):
    model, batch = cases.make(name, size, dtype)
    expected = reference.gradient_rows(model, batch)
    assert_equal(collect(make(model), batch, expected, model), expected, dtype)


@pytest.mark.parametrize("name", cases.NAMES)
def test_one_backward_pass_a_sample_equals_vmap(name):
    model, batch = cases.make(name, 5)
    computer = functional(model)
    with_vmap = computer.compute_per_sample_grad(batch)
    computer._without_vmap = True
    without = computer.compute_per_sample_grad(batch)
    assert list(with_vmap) == list(without)
    for key, rows in with_vmap.items():
        torch.testing.assert_close(without[key], rows, rtol=1e-10, atol=1e-10)


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x) if bool(x.sum() > 0) else self.layer(-x)


def test_data_dependent_models_fall_back_with_one_log_line(caplog):
    model = DataDependent().double()
    batch = (torch.randn(6, 6, dtype=torch.float64), torch.randint(0, 3, (6,)))
    computer = functional(model)
    with caplog.at_level(logging.INFO, "trak"):
        found = collect(computer, batch, {"layer.weight", "layer.bias"}, model)
        collect(computer, batch, {"layer.weight", "layer.bias"}, model)
    assert_equal(found, reference.gradient_rows(model, batch), torch.float64)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "vmap" in lines[0]
    assert "data-dependent" in lines[0]


def test_errors_that_have_nothing_to_do_with_vmap_are_not_swallowed():
    model, (inputs, labels) = cases.make("mlp", 3)
    computer = functional(model)
    with pytest.raises(RuntimeError, match="size"):
        computer.compute_per_sample_grad((inputs[:, :2], labels))
    assert not computer._without_vmap


@pytest.mark.parametrize("make", [functional, iterative])
def test_selection_happens_before_anything_is_computed(make):
    model, batch = cases.make("mlp", 4)
    names = ["3.weight", "3.bias"]
    found = collect(make(model, names), batch, names, model)
    assert_equal(found, reference.gradient_rows(model, batch, names), torch.float64)
    assert flops(make(model, names), batch) < 0.6 * flops(make(model), batch)


@pytest.mark.parametrize("make", [functional, iterative])
def test_frozen_parameters_are_left_out_unless_named(make):
    model, batch = cases.make("mlp", 4)
    model[0].requires_grad_(False)
    found = collect(make(model), batch, {"3.weight", "3.bias"}, model)
    assert list(found) == ["3.weight", "3.bias"]
    named = collect(make(model, ["0.bias"]), batch, {"0.bias"}, model)
    assert not model[0].bias.requires_grad
    model[0].requires_grad_(True)
    expected = reference.gradient_rows(model, batch, ["0.bias"])
    assert_equal(named, expected, torch.float64)


def test_naming_every_parameter_selects_frozen_ones_too(tmp_path):
    model, train, targets = runs.data("mlp", 12, 3)
    states = cases.checkpoints("mlp", 1)

    def found(folder, **options):
        options = {"projector": NoOpProjector(), **options}
        traker = runs.make_traker(model, 12, tmp_path / folder, **options)
        return np.array(runs.whole_run(traker, train, targets, states))

    expected = found("all")
    model[0].requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    np.testing.assert_allclose(found("named", grad_wrt=names), expected, rtol=1e-9)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_grad_wrt_may_be_a_generator_and_keeps_the_models_order():
    model, _ = cases.make("mlp", 1)
    computer = functional(model, (name for name in ["3.bias", "0.weight"]))
    assert computer.selected == ("0.weight", "3.bias")


@pytest.mark.parametrize("grad_wrt", [["3.wieght"], []])
def test_wrong_selections_are_refused(grad_wrt):
    model, _ = cases.make("mlp", 1)
    with pytest.raises(InputError, match="grad_wrt"):
        functional(model, grad_wrt)


class Spectral(nn.Module):
    """A filter in the frequency domain, with a complex weight."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.head = nn.Linear(6, 3).double()

    def forward(self, x):
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6))


def test_complex_parameters_are_refused_unless_they_are_left_out(tmp_path):
    _, train, targets = runs.data("mlp", 12, 3)
    model, options = Spectral(), {"projector": NoOpProjector()}
    states = [{name: value.clone() for name, value in model.state_dict().items()}]
    with pytest.raises(InputError, match=r"'filter' has the dtype torch.complex128"):
        runs.make_traker(model, 12, tmp_path, **options)
    names = ["head.weight", "head.bias"]
    traker = runs.make_traker(model, 12, tmp_path, grad_wrt=names, **options)
    found = runs.whole_run(traker, train, targets, states)
    rows = runs.oracle(model, train, targets, states, None, names)
    np.testing.assert_allclose(found, reference.trak_scores(rows), rtol=1e-9)


def test_a_model_without_trainable_parameters_is_refused():
    model, _ = cases.make("mlp", 1)
    model.requires_grad_(False)
    with pytest.raises(InputError, match="requires a gradient"):
        functional(model)


@pytest.mark.parametrize("make", [functional, iterative])
def test_gradients_do_not_depend_on_the_callers_grad_mode(make):
    model, batch = cases.make("mlp", 3)
    expected = reference.gradient_rows(model, batch)
    with torch.no_grad():
        found = collect(make(model), batch, expected, model)
    assert_equal(found, expected, torch.float64)


def test_the_model_is_left_as_it_was():
    model, batch = cases.make("cnn", 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    flags = [p.requires_grad for p in model.parameters()]
    for make in (functional, iterative):
        make(model).compute_per_sample_grad(batch)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())


class Checkpointed(nn.Sequential):
    """Its first layer runs under reentrant checkpointing, if it is asked to."""

    reentrant = False

    def forward(self, x):
        if not self.reentrant:
            return super().forward(x)
        asked = x.clone().requires_grad_()
        return self[1](checkpoint(self[0], asked, use_reentrant=True))


def test_the_iterative_computer_takes_the_models_that_the_others_take():
    torch.manual_seed(0)
    batch = torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 3
    model = Checkpointed(nn.Linear(6, 6), nn.Linear(6, 3)).double()
    tokens = torch.randint(0, 9, (5, 2)), batch[1]
    table = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 3)).double()
    wanted = [reference.gradient_rows(model, batch), reference.gradient_rows(table, tokens)]
    model.reentrant = table[0].sparse = True
    for each, examples, expected in zip(
        (model, table), (batch, tokens), wanted, strict=True
    ):
        found = iterative(each).compute_per_sample_grad(examples)
        torch.testing.assert_close(found, torch.cat([*expected.values()], dim=1))
    mixing = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), *model).double()
    with pytest.raises(UnsupportedModuleError, match="no running statistics"):
        iterative(mixing).compute_per_sample_grad(batch)
    with pytest.raises(UnsupportedModuleError, match="no running statistics"):
        iterative(mixing).compute_loss_grad(batch)


class Force(nn.Module):
    """Its features are the gradient of an energy by the inputs."""

    def __init__(self):
        super().__init__()
        self.energy, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.enabling = nullcontext

    def forward(self, x):
        with self.enabling():
            x = x.clone().requires_grad_()
            energy = torch.tanh(self.energy(x)).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.head(force)


@pytest.mark.parametrize("kind", [None, functional, iterative])
def test_models_that_take_gradients_themselves(kind, tmp_path):
    torch.manual_seed(0)
    model, options = Force().double(), {}
    if kind is not None:
        made = kind(model)
        options = {"gradient_computer": type(made), "task": made.modelout_fn}
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 3
    train, targets = (x[:15], y[:15]), (x[15:], y[15:])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    traker = runs.make_traker(model, 15, tmp_path, **options)
    scores = runs.whole_run(traker, train, targets, [state])
    model.enabling = torch.enable_grad  # the oracle's Q is computed without gradients
    rows = runs.oracle(model, train, targets, [state], traker.projector)
    np.testing.assert_allclose(scores, reference.trak_scores(rows), rtol=1e-8)
