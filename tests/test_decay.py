"""How short a training was, told from the loss weights that it left."""

import pytest
import torch

from trak.score_computers import stationarity
from trak.score_computers.decay import Decay, decay_of
from trak.score_computers.pulls import Stationarity
from trak.score_computers.stationarity import LEAST, MOST, training_of

N, K = 400, 150


def fine_tuned(ridge, offsets=1.0, seed=0, wrong=0.0):
    """Logistic training from outputs that have nothing to do with the labels."""
    rng = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, K + 1, dtype=torch.float64) ** -0.6
    rows = torch.randn(N, K, generator=rng, dtype=torch.float64) * spectrum
    rows = rows + 0.5 * spectrum  # what raises one output raises most of them
    rows = rows / rows.square().sum(dim=1).mean().sqrt()
    rows[: int(wrong * N)] *= -1  # these have another label than they should
    began = offsets * torch.randn(N, generator=rng, dtype=torch.float64) - 1
    weights = torch.zeros(K, dtype=torch.float64)
    for _ in range(60):
        q = torch.sigmoid(-(began + rows @ weights))
        curved = rows.T @ (rows * (q * (1 - q))[:, None]) + ridge * torch.eye(K)
        weights = weights - torch.linalg.solve(curved, ridge * weights - rows.T @ q)
    return rows @ rows.T, torch.sigmoid(-(began + rows @ weights))


def ones(loss):
    return torch.ones_like(loss)


@pytest.mark.parametrize("offsets", [0.0, 1.0])
def test_the_ridge_is_found_again_wherever_outputs_began(offsets):
    found = []
    for ridge in (2.0, 16.0):
        kernel, q = fine_tuned(ridge, offsets)
        decay = decay_of(kernel, q, ones(q), 1.0)
        found.append(decay.ridge * float((q * (1 - q)).mean()))
        assert found[-1] == pytest.approx(ridge, rel=0.25)
        assert decay.clarity > 0.9
    assert found[1] / found[0] == pytest.approx(8, rel=0.2)


def test_what_counts_twice_stands_for_two():
    kernel, q = fine_tuned(2.0)
    doubled = torch.arange(N) % 3 == 0
    index = torch.cat([torch.arange(N), torch.arange(N)[doubled]])
    expected = decay_of(kernel[index][:, index], q[index], ones(q[index]), 1.0)
    found = decay_of(kernel, q, 1.0 + doubled.double(), 1.0)
    assert found == pytest.approx(expected, rel=0.13)  # two in a grid


def test_a_sample_stands_for_the_whole():
    kernel, q = fine_tuned(2.0)
    assert decay_of(kernel, q, ones(q), 0.25) == decay_of(4 * kernel, q, ones(q), 1.0)
    half = torch.arange(0, N, 2)
    found = decay_of(kernel[half][:, half], q[half], ones(q[half]), 0.5)
    whole = decay_of(kernel, q, ones(q), 1.0)
    assert found.ridge == pytest.approx(whole.ridge, rel=0.4)


@pytest.mark.parametrize("kind", ["equal", "none", "noise"])
def test_loss_weights_that_say_nothing(kind):
    kernel, _ = fine_tuned(2.0)
    rng = torch.Generator().manual_seed(1)
    chance = torch.rand(N, generator=rng, dtype=torch.float64) ** 8
    loss = {"equal": torch.full_like(chance, 0.4), "none": 0 * chance, "noise": chance}
    assert decay_of(kernel, loss[kind], ones(chance), 1.0).clarity == 0


def test_what_is_scattered_over_all_directions_tells_less():
    rng = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(N, N, generator=rng, dtype=torch.float64)).Q
    values = 30 / torch.arange(1, N + 1, dtype=torch.float64)
    kernel = basis * values @ basis.T
    left = 0.7 * basis @ ((basis.T @ torch.ones(N).double()) / (1 + values))
    noise = torch.randn(N, generator=rng, dtype=torch.float64)
    found = [decay_of(kernel, left + s * noise, ones(left), 1.0) for s in (0.0, 0.15)]
    assert found[0].clarity == 1
    assert found[1].clarity < 0.5
    assert [each.ridge for each in found] == pytest.approx([1.0, 1.0], rel=0.5)


def test_short_fine_tunings_are_told_from_what_is_left():
    kernel, q = fine_tuned(2.0)
    steep = float((q * (1 - q)).mean())
    assert training_of(kernel, kernel @ q, q).ridge / steep > 5 * LEAST
    # normalized batches keep loss weights large however long training was
    found = training_of(kernel, kernel @ q, q, normalized=True)
    assert found.ridge / steep < 2 * LEAST
    assert found.stopped is None
    kernel, q = fine_tuned(0.02)
    steep = float((q * (1 - q)).mean())
    assert training_of(kernel, kernel @ q, q).ridge / steep < 2 * LEAST


@pytest.mark.parametrize(("wrong", "times"), [(0.0, 1.0), (0.3, 1 / 2.5)])
def test_wrong_labels_take_longer(wrong, times, monkeypatch):
    left = 2.5
    kernel, q = fine_tuned(1.0, offsets=1.0 + wrong, wrong=wrong)
    sure = float((q > 0.9).double().mean()) / float(q.mean())
    assert sure > 0.2 if wrong else sure < 0.1
    monkeypatch.setattr(stationarity, "decay_of", lambda *_: Decay(left, 1.0))
    steep = float((q * (1 - q)).mean())

    def found():
        rest = Stationarity(0.0, LEAST / 4, 0.0)  # a long training
        return training_of(kernel, kernel @ q, q, logistic=True, known=rest).ridge / steep

    monkeypatch.setattr(stationarity, "GROWTH", (0.0, 1e-9))  # as with two classes
    assert found() == pytest.approx(left, rel=0.01)
    monkeypatch.setattr(stationarity, "GROWTH", (1.0, 2.0))
    assert found() == pytest.approx(left * times, rel=0.01)


@pytest.mark.parametrize(
    ("ridge", "wrong", "explained", "short"),
    [
        (0.5, 0.0, 0.9, False),
        (30.0, 0.0, 0.9, True),
        (30.0, 0.0, 1.0, False),
        (8.0, 0.4, 0.9, False),
    ],
)
def test_much_that_is_left_means_a_short_training(
    ridge, wrong, explained, short, monkeypatch
):
    # though it seems to have come to rest, unless labels are wrong
    kernel, q = fine_tuned(ridge, offsets=5 * wrong, wrong=wrong)
    assert (float(q.mean()) > 0.45) == (ridge > 1)
    steep = float((q * (1 - q)).mean())
    rest = Stationarity(0.0, 1.0, explained)
    monkeypatch.setattr(stationarity, "decay_of", lambda *_: Decay(4.0, 1.0))
    told = training_of(kernel, kernel @ q, q, logistic=True, known=rest).ridge / steep
    assert told == pytest.approx(4.0 if short else 1.0 / 2.5)


def test_how_much_examples_count_is_in_the_ridge():
    kernel, q = fine_tuned(2.0)
    plain = training_of(kernel, kernel @ q, q)
    for times in (1e-6, 3.0, 1e6):  # such as one over a class's size
        found = training_of(kernel, times * kernel @ q, q, counts=times * ones(q))
        assert found.ridge == pytest.approx(times * plain.ridge, rel=1e-6)
    assert decay_of(kernel, q, 0 * ones(q), 1.0).clarity == 0


def test_the_ridge_stays_in_bounds():
    kernel, q = fine_tuned(200.0)
    steep = float((q * (1 - q)).mean())
    assert training_of(kernel, kernel @ q, q).ridge / steep <= MOST


def test_trainings_at_rest_are_told_from_stationarity():
    kernel, q = fine_tuned(2.0, offsets=0.0)
    decay = decay_of(kernel, q, ones(q), 1.0)
    assert decay.ridge * float((q * (1 - q)).mean()) > 2.2
    assert decay.clarity > 0.9
    assert training_of(kernel, kernel @ q, q).ridge == pytest.approx(2.0 / 2.5, rel=1e-3)
