"""Loss weights Q to a power, against the formula written out."""

import numpy as np
import pytest
import torch
from tests import cases, runs

from trak import TRAKer
from trak.errors import InputError
from trak.score_computers import BasicScoreComputer, RidgeScoreComputer
from trak.score_computers.auto_ridge import Choice
from trak.score_computers.loss_power import Ending, as_power, power_of, powered
from trak.score_computers.losses import Losses, losses_of

N, M = 60, 6


@pytest.fixture(scope="module")
def world():
    model, train, targets = runs.data("mlp", N, M)
    return model, train, targets, cases.checkpoints("mlp", 3)


def run(world, folder, **options):
    model, train, targets, states = world
    traker = runs.make_traker(model, N, folder, lambda_reg="2x", **options)
    return traker, runs.whole_run(traker, train, targets, states)


def factors(traker, power):
    # what scores at power 1 are multiplied by, from the stored Q
    weights = [np.array(traker.saver.train_rows(i).array("out_to_loss")) for i in range(3)]
    powers = [q**power * (q.sum() / (q**power).sum()) for q in weights]
    return np.mean(powers, axis=0) / np.mean(weights, axis=0)


@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("power", [0.5, 0.0])
def test_scores_are_multiplied_by_q_to_the_power(power, curvature, world, tmp_path):
    plain, before = run(world, tmp_path / "a", curvature=curvature)
    traker, found = run(world, tmp_path / "b", curvature=curvature, loss_power=power)
    expected = np.array(before) * factors(plain, power)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(found, before, rtol=0.05)
    np.testing.assert_allclose(
        traker.scores("exp", with_error=True).scores, found, rtol=1e-5
    )
    best = traker.top_scores("exp", 3)
    np.testing.assert_allclose(best.scores, np.sort(found, axis=0)[::-1][:3].T, rtol=1e-5)
    swept = traker.sweep(["exp"], ["2x"])["exp", "2x"]
    np.testing.assert_allclose(swept, found, rtol=1e-5)


def test_self_influence_has_it_and_named_methods_have_not(world, tmp_path):
    plain, _ = run(world, tmp_path / "a")
    traker, _ = run(world, tmp_path / "b", loss_power=0.5)
    expected = plain.self_influence() * factors(plain, 0.5)[:, 0]
    np.testing.assert_allclose(traker.self_influence(), expected, rtol=1e-5)
    for method in ("dot", "tracin", "relatif"):
        np.testing.assert_allclose(
            traker.scores("exp", method=method),
            plain.scores("exp", method=method),
            rtol=1e-5,
        )


def test_another_power_is_finalized_anew(world, tmp_path):
    model, train, targets, states = world
    _, half = run(world, tmp_path / "a", loss_power=0.5)
    half = np.array(half)
    other = runs.make_traker(model, N, tmp_path / "a", lambda_reg="2x")
    assert not other.score_computer.matches(other.saver.load_factor(0)[1])
    found = np.array(runs.whole_run(other, train, targets, states))
    np.testing.assert_allclose(half, found * factors(other, 0.5), rtol=1e-5)
    assert "loss_power" not in other.saver.load_factor(0)[1]


def test_the_automatic_one_is_of_all_checkpoints_and_noted_down(world, tmp_path):
    traker, found = run(world, tmp_path / "a", loss_power="auto")
    infos = [traker.saver.load_factor(i)[1] for i in range(3)]
    (power,) = {info.get("power", 1.0) for info in infos}
    assert {info["loss_power"] for info in infos} == {None}
    assert len({info.get("path", 0.0) for info in infos}) == 1  # tests/test_path.py
    assert 0 <= power <= 1
    assert np.isfinite(found).all()


def test_residuals_stay_as_they_are():
    loss = torch.tensor([[-2.0], [0.5], [3.0]], dtype=torch.float64)
    losses = losses_of(loss)
    assert torch.equal(powered(losses, losses.sized(logistic=False), 0.5), loss)


def test_signs_and_how_much_examples_count_stay():
    own = torch.tensor([[-0.25], [0.04], [0.0]], dtype=torch.float64)
    counts = torch.tensor([[2.0], [1.0], [3.0]], dtype=torch.float64)
    losses = Losses(own, counts)
    found = powered(losses, losses.sized(logistic=True), 0.5)
    expected = torch.tensor([[-1.0], [0.2], [0.0]], dtype=torch.float64) * (0.54 / 1.2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("share", "at_rest", "explained", "time", "expected"),
    [
        (0.02, 0.0, 0.3, 8.0, 0.5),
        (0.02, 0.3, 0.95, 8.0, 0.75),  # at rest against a decay
        (0.02, 0.05, 0.95, 8.0, 0.625),
        (0.02, 0.3, 0.875, 8.0, 0.625),
        (0.02, -0.2, 0.95, 8.0, 0.5),
        (0.3, 0.3, 0.95, 8.0, 0.5),  # two classes forget nothing
        (0.095, 0.3, 0.95, 8.0, 0.625),
        (0.02, 0.0, 0.3, 0.06, 0.0),  # a training so short that Q is what it began as
        (0.02, 0.0, 0.3, 0.0, 0.0),
        (0.02, 0.0, 0.3, 2**-2.5, 0.25),
        (0.02, 0.3, 0.95, 0.01, 0.0),
        (0.02, 0.3, 0.95, None, 1.0),  # batch normalization
    ],
)
def test_the_power_depends_on_how_training_went(share, at_rest, explained, time, expected):
    found = power_of(Ending(share, at_rest, explained, time))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), "half", None, True])
def test_powers_that_there_are_not(value, world, tmp_path):
    with pytest.raises(InputError, match="loss_power"):
        as_power(value)
    with pytest.raises(InputError, match="loss_power"):
        runs.make_traker(world[0], N, tmp_path, loss_power=value)


def test_score_computers_that_know_none(world, tmp_path):
    options = {"score_computer": BasicScoreComputer}
    with pytest.raises(InputError, match="loss_power=1"):
        runs.make_traker(world[0], N, tmp_path, loss_power=0.5, **options)
    with pytest.raises(InputError, match="loss_power"):
        runs.make_traker(
            world[0], N, tmp_path, loss_power=0.5, score_computer=RidgeScoreComputer()
        )
    traker = runs.make_traker(world[0], N, tmp_path, loss_power="auto", **options)
    assert isinstance(traker, TRAKer)


def test_what_was_chosen_is_logged(world, tmp_path, caplog):
    run(world, tmp_path, loss_power="auto")
    assert caplog.text.count("loss weights Q to the power of") == 1


def test_checkpoints_share_the_median_also_after_an_interruption(
    world, tmp_path, monkeypatch
):
    choices = iter([Choice(2.0, 0.5, 0.5), Choice(2.0, 0.9, 1.0), Choice(2.0, 0.6, 0.25)])
    monkeypatch.setattr(RidgeScoreComputer, "choose", lambda *_: next(choices))
    traker, _ = run(world, tmp_path, loss_power="auto")
    for factor in tmp_path.glob("2/factor.*"):
        factor.unlink()
    again = runs.make_traker(world[0], N, tmp_path, lambda_reg="2x", loss_power="auto")
    again.finalize_features()
    for number, store in ((2, again), (0, traker)):
        found = store.saver.load_factor(number)[1]
        assert (found["power"], found["path"]) == (0.6, 0.5)
