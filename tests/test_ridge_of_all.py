"""The ridge that a part of the training set tells, carried on to all of it."""

from dataclasses import replace

import pytest
import torch
from tests.test_linearized_training import logistic
from tests.test_unwhitened import unwhitened

from trak.score_computers import auto_ridge
from trak.score_computers.auto_ridge import best_ridge, choice, ridge_of_all
from trak.score_computers.ridge_sample import (
    Situation,
    sampled,
    stationarity_of_all,
)
from trak.score_computers.stationarity import training_of


def part(n=160, share=1.0):
    """A sample that is a share of a training set, and a training."""
    rows, q = logistic(n=n)
    sample = sampled(rows, Situation(loss=q))
    training = training_of(sample.kernel, sample.pull, sample.loss)
    return of_share(sample, share), training


def of_share(sample, share):
    return replace(sample, share=share)


def by_size(power):
    """In the place of `best_ridge`: a power of the number of examples."""

    def found(sample, training, games=None):
        del games
        assert len(training.kernel) == len(sample.kernel) == len(sample.pull)
        return 100.0 * len(sample.loss) ** power

    return found


@pytest.mark.parametrize(
    ("share", "power", "expected"),
    [
        (0.8, -1.0, (1 / 0.8) ** -0.75),
        (0.5, -1.0, 2**-0.75),
        (0.01, -1.0, 2**-0.75),  # no further than twice as many
        (0.5, -2.0, 2**-1.75),
        (0.5, -0.2, 1.0),  # by chance
        (0.5, 1.0, 1.0),
        (0.95, -2.0, 1.0),  # as good as all
    ],
)
def test_it_is_carried_on_by_what_halves_say(share, power, expected, monkeypatch):
    sample, training = part(share=share)
    monkeypatch.setattr(auto_ridge, "best_ridge", by_size(power))
    whole = 100.0 * 160**power
    assert ridge_of_all(sample, training) / whole == pytest.approx(expected)


def test_all_examples_need_no_carrying_on(monkeypatch):
    sample, training = part()
    expected = best_ridge(sample, training)
    sizes, real = [], best_ridge

    def spy(given, *args):
        sizes.append((len(given.loss), given.share))
        return real(given, *args)

    monkeypatch.setattr(auto_ridge, "best_ridge", spy)
    assert ridge_of_all(sample, training) == pytest.approx(expected)
    ridge_of_all(of_share(sample, 0.5), training)
    assert sizes == [(160, 1.0), (160, 0.5), (80, 0.25), (80, 0.25)]


def test_halves_are_the_sample_and_its_training():
    sample, training = part()
    places = torch.arange(3, 150, 7)
    some, its = sample.of(places), training.of(places)
    torch.testing.assert_close(some.kernel, sample.kernel[places][:, places])
    torch.testing.assert_close(its.kernel, training.kernel[places][:, places])
    for name in ("pull", "loss", "counts", "roots", "signs"):
        torch.testing.assert_close(
            getattr(some, name), getattr(sample, name)[places], msg=name
        )
    assert some.share == pytest.approx(len(places) / 160)
    assert its.ridge == training.ridge


def test_few_examples_are_not_halved(monkeypatch):
    sample, training = part(n=70, share=0.5)
    monkeypatch.setattr(auto_ridge, "best_ridge", by_size(-1.0))
    assert ridge_of_all(sample, training) == pytest.approx(100 / 70)


@pytest.mark.parametrize(
    ("strength", "count", "expected"),
    [
        (0.0, 450, [(0, 32)]),
        (0.4, 450, [(0, 16), (1, 16)]),
        (0.4, 700, [(0, 8), (1, 8)]),
        (0.4, 250, [(0, 32), (1, 32)]),
    ],
)
def test_whitened_rows_divide_the_examples_twice(strength, count, expected, monkeypatch):
    rows, q = logistic(n=count)
    games, real = [], auto_ridge.retrained

    def spy(*args, seed, subsets, **options):
        games.append((seed, subsets))
        return real(*args, seed=seed, subsets=subsets, **options)

    monkeypatch.setattr(auto_ridge, "retrained", spy)
    known = [unwhitened(rows, q, 100)] if strength else ()
    options = {"strength": strength, "unwhitened": known}
    choice(rows, Situation(loss=q, **options))
    assert games == expected


def test_rows_that_overflow_without_whitening_say_nothing():
    rows, q = logistic(n=100)
    known = [unwhitened(rows[:50], q[:50], 50)]
    now = Situation(
        loss=q,
        logistic=True,
        strength=0.4,
        unwhitened=known,
        plain=lambda given: given * float("inf"),
    )
    assert stationarity_of_all(rows, now) is None
    assert choice(rows, now).multiple > 0
