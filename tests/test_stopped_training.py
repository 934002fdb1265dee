"""Linearized models that are trained by a flow, which is stopped where the real one was."""

import numpy as np
import pytest
import torch

from trak.score_computers import auto_ridge, stationarity
from trak.score_computers.auto_ridge import best_ridge
from trak.score_computers.flow import Stopped, stopped
from trak.score_computers.pulls import Stationarity
from trak.score_computers.retraining import retrained
from trak.score_computers.ridge_sample import Sample
from trak.score_computers.stationarity import growth_share, margins, training_of

DECAY = torch.logspace(0, -2, 60, dtype=torch.float64)


def examples(n=200, k=60, seed=0, common=0.3):
    """Rows that should be positive, in units of their mean squared norm."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=rng, dtype=torch.float64) * DECAY[:k]
    rows = rows + common * torch.randn(k, generator=rng).double() * DECAY[:k]
    return rows / rows.square().sum(1).mean().sqrt()


def flowed(rows, time, counts=None, steps=1200, begin=0.0):
    """The weights of a logistic regression after a flow, by Euler's rule."""
    lots = torch.Generator().manual_seed(9)
    w = begin * torch.randn(rows.shape[1], generator=lots, dtype=torch.float64)
    counts = torch.ones(len(rows), dtype=torch.float64) if counts is None else counts
    for _ in range(steps):
        w = w + time / steps * rows.T @ (counts * torch.sigmoid(-rows @ w))
    return w


def sample_of(rows, q, share=1.0):
    """A sample as the automatic ridge takes it."""
    kernel, even = rows @ rows.T, torch.ones(len(rows), dtype=torch.float64)
    return Sample(kernel, kernel @ q / share, q, even, even, even, share, False)


@pytest.mark.parametrize("time", [0.5, 5.0, 60.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_second_half_of_the_models_is_stopped(time, weighted):
    rows = examples(80)
    counts = torch.linspace(0.5, 1.5, 80, dtype=torch.float64) if weighted else None
    found = retrained(
        rows @ rows.T, 0.7, counts=counts, subsets=8, stopped=Stopped(time, 0.6)
    )
    alone = retrained(rows @ rows.T, 0.7, counts=counts, subsets=8)
    assert (found.flowed, found.weight) == (4, 0.6)
    assert torch.equal(found.masks, alone.masks)
    torch.testing.assert_close(found.outputs[:4], alone.outputs[:4], rtol=1e-4, atol=1e-4)
    for mask, outputs in zip(found.masks[4:], found.outputs[4:], strict=True):
        half = found.train[mask.bool()]
        own = None if counts is None else counts[half]
        expected = rows[found.held] @ flowed(rows[half], time, own)
        assert float((outputs - expected).norm() / expected.norm()) < 0.06


def test_none_is_stopped_where_that_does_not_count():
    rows = examples(80)
    found = retrained(rows @ rows.T, 0.7, stopped=Stopped(5.0, 0.0))
    assert torch.equal(found.outputs, retrained(rows @ rows.T, 0.7).outputs)


def test_models_agree_among_those_that_were_trained_alike():
    rows = examples(80)
    found = retrained(rows @ rows.T, 0.7, subsets=8, stopped=Stopped(5.0, 0.6))
    rng = torch.Generator().manual_seed(1)
    predicted = torch.randn(found.outputs.shape, generator=rng, dtype=torch.float64)
    means = [
        np.mean([
            np.corrcoef(predicted[part, j], found.outputs[part, j])[0, 1]
            for j in range(len(found.held))
        ])
        for part in (slice(4), slice(4, 8))
    ]
    expected = 0.4 * means[0] + 0.6 * means[1]
    assert float(found.agreement(predicted)) == pytest.approx(expected)


@pytest.mark.parametrize("time", [0.5, 3.0, 60.0])
def test_when_a_training_was_stopped_is_told_from_loss_weights(time):
    rows = examples()
    q = torch.sigmoid(-rows @ flowed(rows, time))
    even = torch.ones(len(rows), dtype=torch.float64)
    found = stopped(rows @ rows.T, q, even, 1.0)
    assert found.time == pytest.approx(time, rel=0.15)
    assert found.weight == 1
    assert stopped(rows @ rows.T, q, even, 0.25).time == pytest.approx(found.time / 4)
    double = stopped(rows @ rows.T, q, 2 * even, 1.0)
    assert double.time == pytest.approx(found.time / 2, rel=0.1)


def test_loss_weights_that_no_flow_leaves_say_nothing():
    rows = examples()
    rng = torch.Generator().manual_seed(0)
    q = torch.rand(len(rows), generator=rng, dtype=torch.float64)
    assert stopped(rows @ rows.T, q, torch.ones_like(q), 1.0).weight == 0


def trained(rows, q, growing=1.0, explained=0.5):
    kernel = rows @ rows.T
    rest = Stationarity(growing, 0.5, explained)
    return training_of(kernel, kernel @ q, q, logistic=True, known=rest).stopped


def test_it_counts_only_where_the_length_of_training_kept_outputs_small(monkeypatch):
    rows = examples(common=1.0)
    q = torch.sigmoid(-rows @ flowed(rows, 5.0))
    assert float(q.mean()) < 0.3
    usual = trained(rows, q)
    assert usual is not None
    assert usual.weight == pytest.approx(0.6)
    assert trained(rows, q, growing=20.0) is None
    assert trained(rows, q, explained=0.95) is None
    begun = torch.sigmoid(-rows @ flowed(rows, 0.002))
    assert float(begun.mean()) > 0.4
    assert trained(rows, begun) is None
    mixed = rows.clone()
    mixed[:10] *= -1  # whose labels are wrong
    wrong = torch.sigmoid(-mixed @ flowed(mixed, 5.0))
    assert float((wrong > 0.9).double().mean()) > 0.2 * float(wrong.mean())
    assert float(wrong.mean()) < 0.3
    two = trained(mixed, wrong)  # growth is much of it, as with two classes
    assert two is not None
    assert two.weight == pytest.approx(0.6)
    monkeypatch.setattr(stationarity, "GROWTH", (1.0, 2.0))
    assert trained(mixed, wrong) is None
    kernel = rows @ rows.T
    assert training_of(kernel, kernel @ q, q, logistic=False).stopped is None


@pytest.mark.parametrize(
    ("growing", "explained", "all_of_it", "held"),
    [
        (8.0, 0.1, False, True),
        (8.0, 0.1, True, False),
        (20.0, 0.1, True, True),  # more than any training would
        (8.0, 0.9, True, True),  # at rest
    ],
)
def test_growth_is_held_where_that_is_beyond_doubt(
    growing, explained, all_of_it, held, monkeypatch
):
    rows = examples(common=1.0)
    q = torch.sigmoid(-rows @ flowed(rows, 5.0))
    kernel, rest = rows @ rows.T, Stationarity(growing, 0.75, explained)
    share = growth_share(kernel, margins(q))
    limits = (share / 3, share / 2) if all_of_it else (2 * share, 3 * share)
    monkeypatch.setattr(stationarity, "NEARLY_ALL", limits)
    found = training_of(kernel, kernel @ q, q, logistic=True, known=rest)
    assert found.stiffness > 3 if held else found.stiffness < 0.5


def share_of_best(sample, training, rows, outputs, masks, targets, chosen=None):
    """LDS at the chosen ridge and at the best one, of models that were really retrained."""
    reached = {}
    chosen = best_ridge(sample, training) if chosen is None else chosen
    for ridge in [*np.logspace(-2, 3, 26), chosen]:
        system = rows.T @ rows + ridge * torch.eye(rows.shape[1])
        scores = sample.loss[:, None] * (rows @ torch.linalg.solve(system, targets.T))
        sums = masks @ scores
        reached[ridge] = np.mean([
            np.corrcoef(sums[:, j], outputs[:, j])[0, 1] for j in range(len(targets))
        ])
    *sweep, own = reached.values()
    return own / max(sweep)


@pytest.mark.parametrize(("common", "time"), [(0.3, 1.0), (0.2, 4.0), (0.1, 16.0)])
def test_the_ridge_suits_fine_tunings_that_were_stopped_early(common, time):
    every = examples(200, common=common)
    rows, targets = every[:160], every[160:]
    rng = torch.Generator().manual_seed(2)
    masks = torch.zeros(64, len(rows), dtype=torch.float64)
    for mask in masks:
        mask[torch.randperm(len(rows), generator=rng)[:80]] = 1
    outputs = torch.stack([
        targets @ flowed(rows[m.bool()], time, begin=0.3) for m in masks
    ])
    q = torch.sigmoid(-rows @ flowed(rows, time, begin=0.3))
    sample = sample_of(rows, q)
    rest = Stationarity(1.0, 0.75, 0.4)  # as where outputs did not begin at zero
    training = training_of(sample.kernel, sample.pull, q, logistic=True, known=rest)
    assert training.stopped is not None
    assert share_of_best(sample, training, rows, outputs, masks, targets) > 0.97
    games = auto_ridge._games(sample, training)
    assert all((len(each.masks), each.flowed) == (32, 16) for each in games)
