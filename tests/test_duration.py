"""How long a training lasted, and the ridge that is held near what this leads to."""

import math
from dataclasses import replace

import pytest
import torch
from tests import cases, runs
from tests.test_stopped_training import examples, flowed, sample_of, share_of_best
from torch import nn

from trak.gradient_computers.surroundings import normalizes_batches
from trak.score_computers import auto_ridge
from trak.score_computers.auto_ridge import best_ridge, bounded
from trak.score_computers.duration import as_networks, lasted
from trak.score_computers.retraining import trained_by_flow
from trak.score_computers.stationarity import growth_share, margins, training_of


def left_of(rows, time, begun=0.0):
    """Loss weights after a flow from equal outputs, by Euler's rule in float64."""
    kernel, added = rows @ rows.T, torch.zeros(len(rows), dtype=torch.float64)
    for _ in range(3000):
        added = added + time / 3000 * torch.sigmoid(-begun - kernel @ added)
    return torch.sigmoid(-begun - kernel @ added)


@pytest.mark.parametrize("time", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("begun", [0.0, -math.log(9.0)])
def test_how_long_a_flow_lasted_is_told_from_loss_weights(time, begun):
    rows = examples()
    kernel, even = rows @ rows.T, torch.ones(len(rows), dtype=torch.float64)
    q = left_of(rows, time, begun)
    found = lasted(kernel, q, even, 1.0)
    assert found == pytest.approx(time, rel=0.15)
    assert lasted(kernel, q, even, 0.25) == pytest.approx(found / 4)
    assert lasted(kernel, q, 2 * even, 1.0) == pytest.approx(found)


def test_some_loss_weights_tell_no_time():
    rows = examples()
    kernel, even = rows @ rows.T, torch.ones(len(rows), dtype=torch.float64)
    assert lasted(kernel, 0.3 * even, even, 1.0) is None
    assert lasted(kernel, 1 - left_of(rows, 0.001), even, 1.0) is None
    assert lasted(kernel, left_of(rows, 0.001), even, 1.0) is not None


@pytest.mark.parametrize("time", [0.5, 5.0, 60.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_models_of_halves_are_trained_by_flow_alone(time, weighted):
    rows = examples(80)
    counts = torch.linspace(0.5, 1.5, 80) if weighted else torch.ones(80)
    counts = counts.double()
    found = trained_by_flow(rows @ rows.T, time, counts, seed=3, subsets=6)
    assert found.masks.shape == (6, 60)
    for mask, outputs in zip(found.masks, found.outputs, strict=True):
        half = found.train[mask.bool()]
        expected = rows[found.held] @ flowed(rows[half], time, counts[half])
        assert float((outputs - expected).norm() / expected.norm()) < 0.06


@pytest.mark.parametrize(
    ("time", "longer"),
    [(0.0, 2**-3.1), (1.0, 1.6373), (64.0, 128.18)],
)
def test_networks_take_longer(time, longer):
    kernel, outputs = torch.eye(3).double(), torch.ones(3).double()
    found, same = as_networks(time, kernel, outputs, 0.04)
    assert found == pytest.approx(longer, rel=1e-3)
    assert torch.equal(same, kernel)


@pytest.mark.parametrize(
    ("time", "growth", "stiffness"),
    [
        (0.1, 0.5, 1.0),  # so short that the network is still linear
        (1e6, 0.02, 1.0),
        (1e6, 0.08, 0.5**0.5),
        (1e6, 0.9, 0.2**0.5),
        (8 - 2**-3.5, 0.08, 0.5**0.25),
        (1e6, 0.0, 1.0),
    ],
)
def test_growth_is_easier_for_them(time, growth, stiffness):
    rows = examples(40)
    kernel, outputs = rows @ rows.T, torch.linspace(1, 2, 40).double()
    _, found = as_networks(time, kernel, outputs, growth)
    torch.testing.assert_close(found @ outputs, kernel @ outputs / stiffness)
    along = kernel @ outputs
    across = torch.linalg.qr(torch.stack([outputs, *torch.eye(40)[:5].double()], 1))[0]
    other = across[:, 1] - outputs * (along @ across[:, 1]) / (along @ outputs)
    torch.testing.assert_close(found @ other, kernel @ other)


def played(rows, time):
    q = left_of(rows, time)
    sample = sample_of(rows, q)
    return sample, training_of(sample.kernel, sample.pull, q, logistic=True)


def test_a_ridge_is_held_near_that_of_the_flow(caplog):
    caplog.set_level("INFO")
    sample, training = played(examples(common=0.6), 2.0)
    found = [bounded(ridge, sample, training) for ridge in (1e-4, 1e4)]
    assert found[1] == pytest.approx(18 * found[0])
    assert caplog.text.count("as long as loss weights say") == 2
    middle = 2 * found[0]
    assert bounded(middle, sample, training) == middle
    assert caplog.text.count("as long as loss weights say") == 2
    longer = replace(training, time=20 * training.time)
    assert bounded(1e-4, sample, longer) > 2 * found[0]
    outputs = margins(sample.loss)
    time, kernel = as_networks(
        training.time, sample.kernel, outputs, growth_share(sample.kernel, outputs)
    )
    games = [trained_by_flow(kernel, time, sample.counts, seed) for seed in range(3)]
    expected = best_ridge(sample, training, games) / 6
    assert found[0] == pytest.approx(expected)


def test_other_losses_and_normalized_batches_tell_no_time():
    sample, training = played(examples(), 2.0)
    assert training.time is not None
    arguments = sample.kernel, sample.pull, sample.loss
    normalized = training_of(*arguments, logistic=True, normalized=True)
    for other in (normalized, training_of(*arguments, logistic=False)):
        assert other.time is None
        assert bounded(1e-4, sample, other) == 1e-4


def test_the_ridge_suits_trainings_that_have_hardly_begun():
    every = examples(240, common=1.0)
    rows, targets = every[:200], every[200:]
    rng = torch.Generator().manual_seed(2)
    masks = torch.zeros(64, len(rows), dtype=torch.float64)
    for mask in masks:
        mask[torch.randperm(len(rows), generator=rng)[:100]] = 1
    outputs = torch.stack([targets @ flowed(rows[m.bool()], 0.05) for m in masks])
    q = torch.sigmoid(-rows @ flowed(rows, 0.05))
    sample = sample_of(rows, q)
    training = training_of(sample.kernel, sample.pull, q, logistic=True)
    judges = (rows, outputs, masks, targets)
    low = bounded(1e-3, sample, training)
    assert share_of_best(sample, training, *judges, chosen=low) > 0.95
    assert share_of_best(sample, training, *judges, chosen=1e-3) < 0.6


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))


@pytest.mark.parametrize(
    ("layer", "does"),
    [
        (nn.BatchNorm1d(3), True),
        (nn.SyncBatchNorm(3), True),
        (nn.BatchNorm2d(3, track_running_stats=False), True),
        (Running(), True),
        (nn.LayerNorm(3), False),
        (nn.GroupNorm(1, 3), False),
    ],
)
def test_models_that_normalize_batches(layer, does):
    assert normalizes_batches(nn.Sequential(nn.Linear(3, 3), layer)) == does


@pytest.mark.parametrize(("kind", "does"), [("mlp", False), ("cnn", True)])
def test_the_automatic_ridge_knows_it(kind, does, tmp_path, monkeypatch):
    seen, real = [], auto_ridge.training_of

    def spy(*arguments, **options):
        seen.append(options["normalized"])
        return real(*arguments, **options)

    monkeypatch.setattr(auto_ridge, "training_of", spy)
    model, train, targets = runs.data(kind, 60, 5)
    traker = runs.make_traker(model, 60, tmp_path, lambda_reg="auto")
    states = cases.checkpoints(kind, 1)
    runs.whole_run(traker, train, targets, states)
    assert seen
    assert set(seen) == {does}
