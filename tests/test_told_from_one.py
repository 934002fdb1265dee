"""With whitening one checkpoint tells the ridge; others are fitted to fewer examples."""

from dataclasses import replace

import pytest
import torch
from tests import cases, runs
from tests.test_auto_ridge import chosen
from tests.test_growth import situation, whitened
from tests.test_unwhitened import unwhitened
from tests.test_whitening import fit

import trak
from trak import preparation, strength
from trak.pipeline import finalizing
from trak.projectors import NoOpProjector
from trak.score_computers import RidgeScoreComputer
from trak.score_computers.auto_ridge import BY_STRENGTH, choice
from trak.score_computers.curvature import roots, weighted
from trak.score_computers.ridge_sample import sampled

N, M = 90, 6


@pytest.fixture
def asked(monkeypatch):
    """Situations that a ridge is told from."""
    seen, real = [], RidgeScoreComputer.choose

    def choose(self, rows, situation):
        seen.append(situation)
        return real(self, rows, situation)

    monkeypatch.setattr(RidgeScoreComputer, "choose", choose)
    return seen


@pytest.fixture
def finalizing_it(monkeypatch):
    """What each checkpoint has when it is finalized: examples kept, and fitted to."""
    seen, real = {}, trak.TRAKer.finalize_features

    def finalize(self, *args, **options):
        for number in range(3):
            kept = self.pipeline.whitener.unwhitened(number)
            parts = self.saver.settled_moments(number, settle=False)
            fitted = sum(int(arrays["count"]) for _, arrays in parts)
            seen[number] = sum(len(each.loss) for each in kept), fitted
        return real(self, *args, **options)

    monkeypatch.setattr(trak.TRAKer, "finalize_features", finalize)
    monkeypatch.setattr(strength, "_is_useful", lambda *_: True)
    return seen


def attributed(folder, **options):
    model, train, targets = runs.data("mlp", N, M)
    world = model, train, targets, cases.checkpoints("mlp", 3)
    return runs.one_call(world, folder, **({"whitening": 0.5} | options))


def test_the_first_checkpoint_tells_the_ridge_of_all(asked, tmp_path):
    attributed(tmp_path)
    assert len(asked) == 1
    assert [len(each.loss) for each in asked[0].unwhitened] == [N]


def test_of_plain_rows_every_checkpoint_is_asked(asked, tmp_path):
    attributed(tmp_path, whitening=None)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((50, 50, 50), [0]), ((50, 80, 80), [1]), ((0, 0, 0), [0, 1, 2]), ((0, 50, 0), [1])],
)
def test_the_one_is_asked_of_which_most_is_known(sizes, expected):
    rows, q, scales, _ = whitened()
    situations = {
        number: situation(
            q, scales, [unwhitened(rows[:size], q[:size], 50)] if size else []
        )
        for number, size in enumerate(sizes)
    }
    assert finalizing._asked(situations) == expected


def test_one_whose_loss_weights_are_all_zero_tells_nothing():
    rows, q, scales, known = whitened()
    blind = [replace(known[0], loss=torch.zeros_like(known[0].loss))]
    situations = {0: situation(q, scales, blind), 1: situation(q, scales, known)}
    assert finalizing._asked(situations) == [1]


@pytest.mark.parametrize("whitening", [0.5, "auto"])
def test_others_are_fitted_to_fewer_and_keep_none(
    whitening, finalizing_it, tmp_path, monkeypatch
):
    monkeypatch.setattr(preparation, "FITTED", 54)
    monkeypatch.setattr(preparation, "_FITTED_LATER", 36)
    attributed(tmp_path, whitening=whitening)  # fitted by the run, or by the trial before
    assert finalizing_it == {0: (54, 54), 1: (0, 36), 2: (0, 36)}


def test_where_whitening_cannot_be_taken_off_all_keep_some(finalizing_it, tmp_path):
    attributed(tmp_path, projector="sparse", proj_dim=64)
    assert finalizing_it == dict.fromkeys(range(3), (N, N))


@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_without_kept_examples_rows_tell_the_ridge(curvature, signed):
    rows, q, scales, _ = whitened(n=120)
    every = torch.ones(120)
    signs = torch.where(torch.arange(120) % 3 == 0, -1.0, 1.0) if signed else every
    factor = roots(q) if curvature else torch.ones(120, 1, dtype=torch.float64)
    given = rows * scales * signs[:, None] * factor.reshape(-1, 1)
    found = choice(given, situation(q * signs, scales, [], curvature=curvature))
    plain = weighted(rows, roots(q)) if curvature else rows
    expected = chosen(plain, loss=q, curvature=curvature, logistic=True)
    assert found.multiple == pytest.approx((1 + BY_STRENGTH * 0.4) * expected, rel=0.35)
    known = sampled(given, situation(q * signs, scales, [], curvature=curvature))
    unit = rows.square().sum(1).mean()
    torch.testing.assert_close(known.kernel, rows @ rows.T / unit, rtol=1e-4, atol=1e-5)
    pull = rows @ (rows.T @ q) / unit
    torch.testing.assert_close(known.pull, pull, rtol=1e-4, atol=1e-4)


def test_other_checkpoints_can_be_finalized_alone(asked, tmp_path):
    model, train, _ = runs.data("mlp", N, M)
    options = {"whitening": 0.5, "projector": NoOpProjector(), "curvature": True}
    traker = runs.make_traker(model, N, tmp_path / "steps", **options)
    traker.pipeline.whitener.telling = 0
    for number, state in enumerate(cases.checkpoints("mlp", 2)):
        fit(traker, train, state, number)
        traker.featurize(batch=train, num_samples=N)
    traker.finalize_features(model_ids=[1])
    (one,) = asked
    assert one.unwhitened == []
    found = traker.saver.load_factor(1)[1]["auto"]
    alone = runs.make_traker(
        model, N, tmp_path / "plain", projector=NoOpProjector(), curvature=True
    )
    runs.featurize(alone, train, cases.checkpoints("mlp", 2)[1], 1)
    alone.finalize_features(model_ids=[1])
    plain = alone.saver.load_factor(1)[1]["auto"]
    assert found == pytest.approx((1 + BY_STRENGTH * 0.5) * plain, rel=0.35)


def test_rows_that_overflow_without_whitening_tell_no_ridge():
    rows, q, scales, _ = whitened(n=60)
    found = sampled(rows, situation(q, scales * 1e-200, []))
    assert found is None
