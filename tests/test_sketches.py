"""Compressions of the comparison benchmark keep inner products."""

import pytest
import torch
from benchmarks.sketches import (
    LEADING_GRAM,
    LEADING_KFAC,
    MIXED_GRAM,
    MIXED_KFAC,
    PREDICTED,
    RANDOM,
    Source,
    compress,
    leading_cost,
    predicted_variances,
    rotate,
)
from benchmarks.systems import Checkpoint
from torch import nn

from trak.gradient_computers import HookGradientComputer
from trak.modelout_functions import resolve_task
from trak.whitening import Moments

N, TARGETS = 12, 5


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    batch = torch.randn(N + TARGETS, 6), torch.randint(3, (N + TARGETS,))
    task = resolve_task("image_classification")
    computer = HookGradientComputer(model=model, task=task, device="cpu")
    computer.load_model_params(model)
    gradients = {
        name: g.detach().flatten(1)
        for name, g in computer.compute_per_sample_grad(batch).items()
    }
    moments = Moments()
    with moments.adding(N) as sink:
        computer.run(tuple(part[:N] for part in batch), sink, {})
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = Checkpoint(gradients, torch.rand(N + TARGETS), moments, shapes, N, 0)
    return Source(found, found.whitened(0.5), 0.5)


def test_rotation_keeps_inner_products_and_takes_correlation_away(source):
    turned = rotate(source.found, source.gradients)
    for name, rows in source.gradients.items():
        torch.testing.assert_close(turned[name] @ turned[name].T, rows @ rows.T)
    assert not torch.allclose(turned["0.weight"], source.gradients["0.weight"])


def test_all_coordinates_are_no_compression(source):
    rows = compress(source, LEADING_KFAC, source.width, 0)
    torch.testing.assert_close(
        (rows @ rows.T).double(), source.kernel, rtol=1e-4, atol=1e-5
    )


def test_leading_coordinates_have_the_most_variance(source):
    few = compress(source, LEADING_KFAC, 10, 0)
    rows = torch.cat(list(rotate(source.found, source.gradients).values()), dim=1)
    share = few[:N].square().sum() / rows[:N].square().sum()
    assert share > 1.5 * 10 / source.width


def test_variances_are_predicted_from_the_factors(source):
    # exact where activations and backprops are independent, as for one example, or where
    # they are averaged over one side: the sum over a layer
    found = source.found
    for strength in (0.0, 0.5):
        gradients = found.whitened(strength)
        rows = torch.cat(list(rotate(found, gradients).values()), dim=1)
        measured = rows[:N].square().mean(0).double()
        predicted = predicted_variances(found, gradients, strength)
        assert torch.corrcoef(torch.stack([predicted, measured]))[0, 1] > 0.8
        biases = slice(48, 56)  # of the first layer: their mean squares are kept
        torch.testing.assert_close(
            predicted[biases], measured[biases], rtol=1e-4, atol=1e-8
        )
    rows = compress(source, PREDICTED, source.width, 0)
    torch.testing.assert_close(
        (rows @ rows.T).double(), source.kernel, rtol=1e-4, atol=1e-5
    )


def test_leading_eigenvectors_of_the_gram_matrix_are_the_best_of_their_rank(source):
    rows = compress(source, LEADING_GRAM, 4, 0)[:N].double()
    values = torch.linalg.eigvalsh(source.kernel[:N, :N])
    left = torch.linalg.eigvalsh(source.kernel[:N, :N] - rows @ rows.T)
    torch.testing.assert_close(left.max(), values[-5], rtol=1e-4, atol=1e-6)
    assert compress(source, LEADING_GRAM, N, 0) is None


@pytest.mark.parametrize("kind", [*RANDOM, MIXED_KFAC, MIXED_GRAM])
def test_inner_products_are_right_on_average(source, kind):
    # the mean over 100 seeds strays by less than 7 standard errors except once in 10^8
    # (Student), for 17 * 17 entries
    drawn = []
    for seed in range(100):
        rows = compress(source, kind, 16, seed).double()
        drawn.append(rows @ rows.T)
    drawn = torch.stack(drawn)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert bool(((drawn.mean(0) - source.kernel).abs() < 7 * error + 1e-4).all())


def test_half_of_leading_columns_leaves_less_to_chance(source):
    def spread(kind):
        rows = [compress(source, kind, 16, seed).double() for seed in range(60)]
        return torch.stack([z @ z.T for z in rows]).var(0).sum()

    usual = spread("sparse")
    assert spread(MIXED_GRAM) < 0.5 * usual
    assert spread(MIXED_KFAC) < 0.8 * usual


def test_a_narrow_dense_projection_is_the_beginning_of_a_wide_one(source):
    wide = Source(source.found, source.gradients, 0.5, 32)
    for k in (8, 32):
        found = compress(wide, "rademacher", k, 3)
        torch.testing.assert_close(found, compress(source, "rademacher", k, 3))


def test_coordinates_cost_their_rectangle():
    shapes = {"weight": (4, 6), "bias": (4,)}
    chosen = torch.tensor([0, 2, 6 + 1, 24 + 3])  # rows 0 and 1, columns 0 to 2, one bias
    assert leading_cost(shapes, chosen, 5) == 2 * 5 * (2 * 4 + 3 * 6 + 2 * 3) + 1
