"""What is covered, what is not, and what cannot be: numbers, log lines and errors."""

import json
import logging

import pytest
import torch
from tests import cases, reference, runs
from tests.test_hook_parameters import Free, Routed
from tests.test_hooks import images
from torch import nn

from trak.errors import (
    InputError,
    NumericalError,
    PhaseError,
    UnsupportedModuleError,
)
from trak.gradient_computers import FunctionalGradientComputer, HookGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput

LABELS = torch.tensor([0, 2, 1, 1])
KINDS = [HookGradientComputer, FunctionalGradientComputer]


def make(model, **options):
    return HookGradientComputer(model, ImageClassificationModelOutput(), **options)


def uncovered():
    model = Free((4, 4), lambda x, p: x @ (p * p).t()).double()
    model(images(5, 4))
    return model


def test_coverage_in_numbers():
    model, batch = uncovered(), (images(5, 4), LABELS)
    computer = make(model)
    with pytest.raises(PhaseError, match="first batch"):
        computer.coverage()
    computer.compute_per_sample_grad(batch)
    total = sum(p.numel() for p in model.parameters())
    found = computer.coverage()
    assert found.describe() == {
        "by_rules": total - 16,
        "exactly": 16,
        "unsupported": 0,
        "share_by_rules": (total - 16) / total,
    }
    assert found.share == (total - 16) / total
    computer.load_model_params(model)
    with pytest.raises(PhaseError):
        computer.coverage()


@pytest.mark.parametrize("kind", KINDS)
def test_the_store_says_how_its_rows_were_computed(kind, tmp_path):
    model, batch = uncovered(), (images(5, 4), LABELS)
    traker = runs.make_traker(model, 4, tmp_path, gradient_computer=kind)
    traker.load_checkpoint(model.state_dict(), model_id=3)
    path = tmp_path / "3" / "coverage.json"
    assert not path.exists()
    traker.featurize(batch, num_samples=4)
    total = sum(p.numel() for p in model.parameters())
    found = json.loads(path.read_text(encoding="utf-8"))
    by_rules = total - 16 if kind is HookGradientComputer else 0
    assert found["by_rules"] == by_rules
    assert found["exactly"] == total - by_rules
    assert found["unsupported"] == 0
    assert found["share_by_rules"] == pytest.approx(by_rules / total)


def test_the_share_is_said_once(caplog):
    computer, batch = make(uncovered()), (images(5, 4), LABELS)
    with caplog.at_level(logging.INFO, "trak"):
        for size in (4, 4, 1, 4):
            computer.compute_per_sample_grad([part[:size] for part in batch])
    lines = [r.getMessage() for r in caplog.records if "layer rules" in r.getMessage()]
    assert len(lines) == 1
    assert "'free'" in lines[0]


def test_without_a_fallback_uncovered_parameters_are_an_error():
    model, batch = uncovered(), (images(5, 4), LABELS)
    computer = make(model, fallback=False)
    for _ in range(2):
        with pytest.raises(
            UnsupportedModuleError, match=r"'free' of Free.*grad_wrt.*regis"
        ):
            computer.compute_per_sample_grad(batch)
    others = [n for n, _ in model.named_parameters() if n != "free"]
    found = make(model, fallback=False, grad_wrt=others).compute_per_sample_grad(batch)
    for name, rows in reference.gradient_rows(model, batch, others).items():
        torch.testing.assert_close(found[name].flatten(1), rows)


def test_without_a_fallback_unreached_layers_are_fine_until_they_are_reached():
    x = torch.randn(6, 4, dtype=torch.float64)
    x[:, 0] = torch.tensor([-1, -1, -1, 1, -1, -1])
    labels = torch.arange(6) % 3
    computer = make(Routed().double(), fallback=False)
    found = computer.compute_per_sample_grad((x[:3], labels[:3]))
    assert not found["rare.weight"].any()
    with pytest.raises(UnsupportedModuleError, match=r"'rare.weight' of Linear"):
        computer.compute_per_sample_grad((x, labels))


class Untraceable(nn.Module):
    """Leaves autograd's sight with one of its weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.layer(x * torch.from_numpy(self.scale.numpy()))


def test_what_nothing_can_compute_is_an_error_that_names_it():
    model, batch = Untraceable().double(), (images(6), LABELS)
    computer = make(model)
    with pytest.raises(
        UnsupportedModuleError, match=r"'scale' of Untraceable\. .*grad_wrt.*register"
    ):
        computer.compute_per_sample_grad(batch)
    assert computer.coverage().names_unsupported == ("scale",)
    names = ["layer.weight", "layer.bias"]
    found = make(model, grad_wrt=names).compute_per_sample_grad(batch)
    model.scale.requires_grad_(False)
    for name, rows in reference.gradient_rows(model, batch, names).items():
        torch.testing.assert_close(found[name].flatten(1), rows)


class Cube(torch.autograd.Function):
    """Written the old way, so torch.func.vmap refuses it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class Cubed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(Cube.apply(self.first(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_functions_of_ones_own_without_vmap(kind):
    model, batch = Cubed().double(), (images(6), LABELS)
    computer = kind(model, ImageClassificationModelOutput())
    found = computer.compute_per_sample_grad(batch)
    for name, rows in reference.gradient_rows(model, batch).items():
        torch.testing.assert_close(found[name].flatten(1), rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0, 3])
def test_gradients_that_are_not_finite_are_named(kind, bad, tmp_path):
    model, train, _ = runs.data("mlp", 8, 1)
    traker = runs.make_traker(model, 8, tmp_path, gradient_computer=kind)
    train[0][bad, 2] = torch.nan
    traker.gradient_computer.compute_loss_grad = lambda batch: torch.ones(
        len(batch[0]), 1, dtype=torch.float64
    )
    traker.load_checkpoint(model.state_dict(), model_id=5)
    with pytest.raises(NumericalError, match=rf"sample {bad} .*model_id=5.*'\d\.\w+'"):
        traker.featurize(train, num_samples=8)
    good = [part[4:] for part in train]
    traker.featurize(good, inds=[4, 5, 6, 7])  # and nothing wrong was learnt
    rows = reference.projected_rows(
        reference.gradient_rows(model, good), traker.projector, 5
    )
    found = torch.from_numpy(traker.saver.train_rows(5).array("grads"))[4:]
    torch.testing.assert_close(found, rows, rtol=1e-8, atol=1e-10)
    if kind is HookGradientComputer:
        assert traker.gradient_computer.coverage().share == 1


def test_a_plan_that_could_not_be_checked_is_not_kept():
    model = uncovered()
    batch = (images(5, 4), LABELS)
    computer = make(model)
    real, computer._ways.find = computer._ways.find, None
    with pytest.raises(TypeError):
        computer.compute_per_sample_grad(batch)
    computer._ways.find = real
    found = computer.compute_per_sample_grad(batch)
    for name, rows in reference.gradient_rows(model, batch).items():
        torch.testing.assert_close(found[name].flatten(1), rows)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_have_no_rows(kind, tmp_path):
    model, train, _ = runs.data("cnn", 8, 1)
    computer = kind(model, ImageClassificationModelOutput())
    empty = [part[:0] for part in train]
    found = computer.compute_per_sample_grad(empty)
    assert {n: tuple(rows.shape) for n, rows in found.items()} == {
        n: (0, *p.shape) for n, p in model.named_parameters()
    }
    traker = runs.make_traker(model, 8, tmp_path, gradient_computer=kind)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize(empty, num_samples=0)
    traker.featurize(train, num_samples=8)
    assert traker.saver.train_rows(0).done.all()


@pytest.mark.parametrize("kind", KINDS)
def test_single_samples_in_half_precision(kind):
    model, batch = cases.make("cnn", 1, torch.bfloat16)
    found = kind(model, ImageClassificationModelOutput()).compute_per_sample_grad(batch)
    double = (batch[0].double(), batch[1])
    expected = reference.gradient_rows(model.double(), double)
    scale = max(float(rows.norm()) for rows in expected.values())
    for name, rows in expected.items():
        error = (found[name].double().flatten(1) - rows).norm()
        assert error <= 0.1 * rows.norm() + 0.02 * scale


def test_a_task_with_another_number_of_outputs_is_refused():
    class Task(ImageClassificationModelOutput):
        def get_batch_output(self, model, batch):
            return super().get_batch_output(model, batch).sum()

    model, batch = cases.make("mlp", 4)
    with pytest.raises(InputError, match=r"one number a sample, \[1\]; got \(\)"):
        HookGradientComputer(model, Task()).compute_per_sample_grad(batch)
