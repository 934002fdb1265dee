"""How much is whitened when nobody says."""

import json
import logging

import numpy as np
import pytest
import torch
from tests import reference, runs

from trak import TRAKer
from trak.pipeline import model_state
from trak.pipeline.whiten import Whitener
from trak.score_computers import stationarity
from trak.score_computers.decay import Decay
from trak.score_computers.stationarity import growth_stiffness
from trak.strength import choose_strength

N = 60
TASK = "image_classification"


def chosen(traker, states, batches):
    return choose_strength(traker.pipeline, states, batches, lambda _: batches, N)


@pytest.fixture
def stiff(monkeypatch):
    """Growth of outputs is like other changes."""
    monkeypatch.setattr("trak.strength.freedom", lambda *_, **__: 1.0)


@pytest.mark.parametrize("checkpoints", [1, 3])
def test_little_is_whitened_where_growth_is_free(
    checkpoints, learned, tmp_path, monkeypatch
):
    batches = runs.split(learned[1], 9)
    traker = TRAKer(learned[0], TASK, N, tmp_path, whitening=0.5)
    states = learned[-1][:checkpoints]
    for free, expected in ((0.2, 0.08), (0.45, 0.18), (0.7, 0.28), (1.0, 0.4)):
        monkeypatch.setattr("trak.strength.freedom", lambda *_, free=free, **__: free)
        found = chosen(traker, states, batches)
        if checkpoints == 1 or expected < 0.25:
            assert found == expected
        else:  # as checkpoints agree
            assert found in (0.25, 0.5, 0.75)


@pytest.mark.parametrize("normalizes", [False, True])
def test_freedom_is_found_in_the_first_checkpoint(
    normalizes, learned, tmp_path, monkeypatch
):
    model, train, _, states = learned
    seen = []

    def told(examples, count, logistic, *, normalized):
        assert normalized == normalizes
        seen.append((examples, count, logistic))
        return 0.3

    monkeypatch.setattr("trak.strength.freedom", told)
    monkeypatch.setattr("trak.strength.normalizes_batches", lambda _: normalizes)
    traker = TRAKer(model, TASK, N, tmp_path, whitening=0.5)
    chosen(traker, states, runs.split(train, 9))
    [(examples, count, logistic)] = seen
    assert (count, logistic) == (N, True)
    model.load_state_dict(states[0])
    rows = reference.flat_rows(reference.gradient_rows(model, train))
    kernel = rows @ rows.T  # up to a scale
    expected = kernel * (examples.kernel.trace() / kernel.trace())
    torch.testing.assert_close(examples.kernel.to(expected), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("proj_dim", ["auto", "exact", 7])
def test_the_first_checkpoint_is_fitted_once(proj_dim, learned, tmp_path, monkeypatch):
    fitted, real = [], Whitener.fit

    def fit(self, batch, model_id):
        fitted.append((model_id, len(batch[0])))
        return real(self, batch, model_id)

    monkeypatch.setattr(Whitener, "fit", fit)
    found = runs.one_call(learned, tmp_path / "a", proj_dim=proj_dim)
    per_id = [sum(size for i, size in fitted if i == model_id) for model_id in range(3)]
    assert per_id == [2 * N if proj_dim == "exact" else N, N, N]
    metadata = json.loads((tmp_path / "a" / "metadata.json").read_text())
    strength = metadata["whitening"]["strength"]
    given = runs.one_call(learned, tmp_path / "b", proj_dim=proj_dim, whitening=strength)
    np.testing.assert_array_equal(found, given)


def test_weights_are_hashed_once_a_pass(learned, stiff, tmp_path, monkeypatch):
    hashed, real = [], model_state.state_digest

    def digest(state, like=None):
        hashed.append(1)
        return real(state, like)

    monkeypatch.setattr(model_state, "state_digest", digest)
    runs.one_call(learned, tmp_path)
    # featurize and score; the trial of two, the first of which is looked at before
    assert len(hashed) == 2 * len(learned[-1]) + 2 + 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_grad_mode_does_not_matter(mode, learned, stiff, tmp_path):
    expected = runs.one_call(learned, tmp_path / "a")
    with mode():
        found = np.array(runs.one_call(learned, tmp_path / "b"))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("whitening", "told"), [("auto", True), (0.25, True), (0.1, False)]
)
def test_too_much_whitening_is_told(whitening, told, learned, tmp_path, caplog):
    model, train, _, states = learned
    traker = TRAKer(model, TASK, N, tmp_path, whitening=whitening, proj_dim="exact")
    traker.load_checkpoint(states[0], model_id=0)
    for batch in runs.split(train, 9):
        traker.fit_whitening(batch=batch)
    for batch in runs.split(train, 9):
        traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert any("Use whitening=0.1" in message for message in said) == told
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        runs.one_call(learned, tmp_path / "attribute")
    assert "Use whitening" not in caplog.text


def two_classes(share):
    """Rows of which about this share of the variance is along the outputs."""
    rng = torch.Generator().manual_seed(0)
    outputs = 3 + torch.randn(200, generator=rng, dtype=torch.float64)
    rest = torch.randn(200, 400, generator=rng, dtype=torch.float64) / 20
    along = outputs / outputs.square().mean().sqrt()
    rows = torch.cat([(1 - share) ** 0.5 * rest, share**0.5 * along[:, None]], dim=1)
    noise = torch.randn(200, generator=rng, dtype=torch.float64)
    return rows @ rows.T, 0.1 * (outputs + 3 * noise), torch.sigmoid(-outputs)


def test_growth_is_free_where_it_is_a_large_part_of_the_rows(monkeypatch):
    # after trainings that were not short, where growth is like the rest
    monkeypatch.setattr(stationarity, "decay_of", lambda *_: Decay(1.0, 0.0))
    found = {}
    for share in (0.005, 0.08, 0.3):
        kernel, pull, q = two_classes(share)
        found[share] = growth_stiffness(kernel, pull, q, logistic=True)
    assert found[0.005] >= 1
    assert found[0.3] < 0.5
    assert found[0.3] < found[0.08] < 1
    kernel, pull, q = two_classes(0.3)
    assert growth_stiffness(kernel, pull, q, logistic=False) == 1
    assert growth_stiffness(kernel, pull, 2 * q - 3, logistic=True) == 1
    held = 500 * pull  # as by batch normalization
    assert growth_stiffness(kernel, held, q, logistic=True) > 1


def test_strength_follows_agreement(learned, tmp_path, caplog, monkeypatch, stiff):
    model, train, _, states = learned
    traker = TRAKer(model, TASK, N, tmp_path, whitening=0.5, proj_dim="exact")
    batches = runs.split(train, 9)
    assert chosen(traker, states[:1], batches) == 0.4
    with monkeypatch.context() as patch:  # residuals, and no probabilities
        patch.setattr(
            traker.gradient_computer,
            "compute_loss_grad",
            lambda b: 3 * torch.randn(len(b[-1])),
        )
        assert chosen(traker, states[:1], batches) == 0.0
        assert chosen(traker, states, batches) == 0.0
    for agreements, expected in (
        ([0.5, 0.504, 0.9], 0.25),
        ([0.5, 0.506, 0.9], 0.75),
        ([0.5, 0.52, 0.523], 0.5),
        ([0.5, 0.52, 0.54], 0.75),
        ([0.5, 0.52, 0.4], 0.5),
        ([0.5, 0.4, 0.402], 0.25),
    ):
        answers = iter(agreements)
        monkeypatch.setattr("trak.agreement._agreement", lambda *_, a=answers: next(a))
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert chosen(traker, states, batches) == expected
        assert "scores of two checkpoints agree by 0.500 (0.25)" in caplog.text


def test_whitening_is_of_no_use_before_anything_is_learned(
    world, tmp_path, monkeypatch, stiff
):
    model, train, _, states = world
    traker = TRAKer(model, TASK, N, tmp_path, whitening=0.5, proj_dim="exact")
    hardly = [{k: 0.02 * v for k, v in state.items()} for state in states]
    batches = runs.split(train, 9)
    assert chosen(traker, hardly[:1], batches) == 0.0
    assert chosen(traker, hardly, batches) == 0.0
    # most are wrong, but not equally
    sure = {k: 6 * v for k, v in states[0].items()}
    model.load_state_dict(sure)
    q = reference.loss_weights(model, train)
    assert float(q.median()) > 0.5
    assert chosen(traker, [sure], batches) == 0.4
    # of other losses that says nothing
    monkeypatch.setattr(type(traker.task), "loss_is_logistic", False)
    assert chosen(traker, hardly[:1], batches) == 0.4
    assert chosen(traker, hardly, batches) > 0


def test_agreement_is_one_for_equal_checkpoints_and_less_for_others(
    learned, tmp_path, caplog, stiff
):
    model, train, _, states = learned
    traker = TRAKer(model, TASK, N, tmp_path, whitening=0.5, proj_dim="exact")
    with caplog.at_level(logging.INFO):
        chosen(traker, [states[0]] * 2, runs.split(train, 9))
    assert "agree by 1.000 (0.25), 1.000 (0.5), 1.000 (0.75)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        chosen(traker, states, runs.split(train, 9))
    assert "1.000" not in caplog.text
