"""Scores of several checkpoints at several strengths, without a run for each."""

import itertools
import logging

import numpy as np
import pytest
import torch
from tests import reference, runs

from trak import TRAKer, agreement
from trak.agreement import Trial, load
from trak.batches import normalize
from trak.errors import InputError
from trak.gradient_computers import FunctionalGradientComputer
from trak.pipeline.whiten import Foreseen, Whitener
from trak.projectors import NoOpProjector
from trak.projectors.leading import coordinates_holding
from trak.score_computers import products
from trak.score_computers.auto_ridge import (
    BY_CURVATURE,
    BY_STRENGTH,
    USUAL,
    noise_factor,
    relative_ridge,
)
from trak.score_computers.ridge_sample import FEWEST, Situation
from trak.whitening import Whitening
from trak.whitening.whitening import DAMPING

N = 60
TASK = "image_classification"
STRENGTHS = (0.0, 0.25, 0.75)


@pytest.fixture
def stiff(monkeypatch):
    """Growth of outputs is like other changes, so that checkpoints are asked."""
    monkeypatch.setattr("trak.strength.freedom", lambda *_, **__: 1.0)


@pytest.fixture
def whole(monkeypatch):
    """All coordinates are compared, of which the last one holds next to nothing."""
    monkeypatch.setattr(agreement, "HELD", 1 - 1e-12)


@pytest.fixture
def trial(learned, tmp_path):
    """Of two of three checkpoints; with batches."""
    model, train, _, states = learned
    traker = runs.make_traker(model, N, tmp_path, whitening=0.5, projector=NoOpProjector())
    sample = [normalize(batch) for batch in runs.split(train, 9)]
    return Trial(traker.pipeline, sample, states, lambda _: sample, curvature=True)


def agreements(trial, strengths=STRENGTHS):
    return trial.agreements(strengths)


def expected_scores(trial, model, train, state, strength, usual):
    """By explicit matrices: whitened gradients, weighted rows, and a solve in float64."""
    model.load_state_dict(state)
    grads = reference.gradient_rows(model, train)
    q = reference.loss_weights(model, train).double().flatten()
    whitener = trial.pipeline.whitener
    sums = whitener.sums[next(i for i, s in enumerate(trial.states) if s is state)]
    whitening = Whitening(sums, whitener.shapes, strength, DAMPING, torch.float64)
    rows = reference.flat_rows(whitening.whole(dict(grads), {}))
    held = np.arange(N) % 4 == 0
    factors = (q * (1 - q / 2)).clamp(min=1e-4).sqrt()[~held, None]
    kernel = rows[~held] @ rows.T
    gram = factors * kernel[:, ~held] * factors.T
    ridge = usual * (1 + BY_STRENGTH * strength)
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solved = torch.linalg.solve(gram, factors * kernel[:, held])
    return (solved / factors * q[~held, None]).numpy()


@pytest.mark.parametrize(("rounded", "tolerance"), [(False, 1e-3), (True, 0.02)])
def test_scores_are_those_of_whitened_gradients(
    trial, learned, whole, monkeypatch, rounded, tolerance
):
    model, train, _, _ = learned
    monkeypatch.setattr(agreement, "multiplies_bfloat16", lambda _: rounded)
    monkeypatch.setattr(products, "_WIDTH", 1)  # so that few columns may be rounded
    seen = []
    monkeypatch.setattr(agreement, "_agreement", lambda *scores: seen.append(scores) or 0.5)
    monkeypatch.setattr(Trial, "_ridge", lambda *_: 1.5)
    agreements(trial)
    assert [len(scores) for scores in seen[-3:]] == [2, 2, 2]
    for strength, scores in zip(STRENGTHS, seen[-3:], strict=True):
        for found, state in zip(scores, trial.states, strict=True):
            expected = expected_scores(trial, model, train, state, strength, 1.5)
            np.testing.assert_allclose(
                found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max()
            )


@pytest.mark.parametrize("most", [N, 45])
def test_the_ridge_is_that_of_gradients_without_whitening(
    trial, learned, monkeypatch, most
):
    model, train, _, states = learned
    trial.logistic = True
    monkeypatch.setattr(agreement, "_PLAYED", most)
    ridges, real = [], agreement.ridge_of_examples
    monkeypatch.setattr(
        agreement, "ridge_of_examples", lambda *a: ridges.append(real(*a)) or ridges[-1]
    )
    agreements(trial)
    [found] = ridges
    model.load_state_dict(states[0])
    rows = reference.flat_rows(reference.gradient_rows(model, train)).double()
    q = reference.loss_weights(model, train).double().flatten()
    taken = torch.arange(most) * N // most
    roots = (q * (1 - q / 2)).clamp(min=1e-4).sqrt()[:, None]
    situation = Situation(
        checkpoints=len(states), loss=q[taken], logistic=True, curvature=True
    )
    expected = relative_ridge((roots * rows)[taken], situation)
    assert found == pytest.approx(expected, rel=1e-6)


def test_nothing_can_be_told_from_few_examples(trial, monkeypatch):
    monkeypatch.setattr(agreement, "_PLAYED", FEWEST - 1)
    seen, real = [], agreement._solved
    monkeypatch.setattr(agreement, "_solved", lambda *a: seen.append(a[2]) or real(*a))
    agreements(trial, [0.0])
    situation = Situation(checkpoints=trial.together)
    expected = USUAL * noise_factor(0, situation) * BY_CURVATURE
    assert seen == pytest.approx([expected] * len(trial.states))


def test_checkpoints_that_are_alike_agree(trial):
    other, third = trial.states[1], trial.states[0]
    trial.states = [third, third]
    assert agreements(trial, [0.25]) == pytest.approx([1.0])
    trial.pipeline.whitener.sums.clear()
    trial.pipeline.whitener.chosen.clear()
    trial.states = [third, other]
    [less] = agreements(trial, [0.25])
    assert 0 < less < 0.999


@pytest.mark.parametrize("ridge", [1e-3, 0.9, 1.1])  # of the least that hides it
def test_products_are_as_rough_as_the_ridge_allows(trial, monkeypatch, ridge):
    dtypes, real = [], agreement._solved

    def solved(rows, *rest):
        dtypes.append(rows.dtype)
        return real(rows, *rest)

    monkeypatch.setattr(agreement, "_solved", solved)
    monkeypatch.setattr(agreement, "multiplies_bfloat16", lambda _: True)
    width = sum(trial.pipeline.maker.layout.values())
    least = (products._WIDTH / width) ** 0.5
    monkeypatch.setattr(agreement, "HELD", 1.0)
    monkeypatch.setattr(Trial, "_ridge", lambda *_: ridge * least)
    agreements(trial, [0.0])
    assert set(dtypes) == {torch.bfloat16 if ridge > 1 else torch.float32}


@pytest.mark.parametrize("limit", ["COORDINATES", "HELD"])
def test_few_coordinates_are_enough(trial, whole, monkeypatch, limit):
    expected = agreements(trial)
    every = sum(trial.pipeline.maker.layout.values())
    few = {"COORDINATES": every * 3 // 4, "HELD": 0.98}[limit]
    monkeypatch.setattr(agreement, limit, few)
    found = agreements(trial)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert found != expected


def test_a_checkpoint_too_large_to_remember_is_decomposed_once(trial, monkeypatch):
    made, real = [], Whitener.made

    def counted(self, *args, **options):
        made.append(args)
        return real(self, *args, **options)

    monkeypatch.setattr(Whitener, "made", counted)
    monkeypatch.setattr("trak.pipeline.whiten._REMEMBERED", 0)
    agreements(trial)
    assert len(made) == len(trial.states)


def test_as_many_are_compared_as_the_largest_strength_needs(trial, monkeypatch):
    widths, real = [], agreement._solved

    def solved(rows, *rest):
        widths.append(rows.shape[1])
        return real(rows, *rest)

    monkeypatch.setattr(agreement, "_solved", solved)
    trial.states = trial.states[:1]
    monkeypatch.setattr(agreement, "_agreement", lambda *_: 0.5)
    agreements(trial)
    whitener = trial.pipeline.whitener
    needed = [
        coordinates_holding(whitener.foresee(0, strength), whitener.shapes, agreement.HELD)
        for strength in (0.5, max(STRENGTHS))
    ]
    assert needed[0] < needed[1] < sum(trial.pipeline.maker.layout.values())
    assert set(widths) == {needed[1]}


def test_a_checkpoint_is_fitted_once_for_the_trial_and_the_run(
    learned, stiff, tmp_path, monkeypatch
):
    fitted, real = [], Whitener.fit

    def fit(self, batch, model_id):
        fitted.append(model_id)
        return real(self, batch, model_id)

    monkeypatch.setattr(Whitener, "fit", fit)
    runs.one_call(learned, tmp_path)
    assert [i for i, _ in itertools.groupby(fitted)] == [0, 1, 2]


@pytest.mark.parametrize("computer", [FunctionalGradientComputer, None])
def test_gradients_that_come_whole_are_tried_too(computer, learned, tmp_path, caplog):
    model, train, _, states = learned
    traker = TRAKer(
        model,
        TASK,
        N,
        tmp_path,
        whitening=0.5,
        **({"gradient_computer": computer} if computer else {}),
    )
    sample = [normalize(batch) for batch in runs.split(train, 9)]
    found = agreements(
        Trial(traker.pipeline, sample, states, lambda _: sample, curvature=True)
    )
    assert all(0 < each < 1 for each in found)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_large_sums_of_further_checkpoints_are_fitted_again(
    learned, stiff, tmp_path, monkeypatch
):
    expected = np.array(runs.one_call(learned, tmp_path / "a"))
    fitted, real = [], Whitener.fit

    def fit(self, batch, model_id):
        fitted.append(model_id)
        return real(self, batch, model_id)

    monkeypatch.setattr(Whitener, "fit", fit)
    monkeypatch.setattr("trak.pipeline.whiten._REMEMBERED", 100)
    found = runs.one_call(learned, tmp_path / "b")
    assert [i for i, _ in itertools.groupby(fitted)] == [0, 1, 2]
    assert fitted.count(1) == 2 * fitted.count(0) == 2 * fitted.count(2)
    np.testing.assert_array_equal(found, expected)


def test_rows_of_the_fit_do_not_stay_in_memory(trial):
    agreements(trial, [0.5])
    whitener = trial.pipeline.whitener
    assert set(whitener.sums) == set(whitener.chosen) == {0, 1}
    for chosen in whitener.chosen.values():
        assert chosen._rows.numel() == 0
        assert len(chosen.found().kernel) == N


class TestForeseen:
    def whitener(self, learned, folder):
        model, train, _, states = learned
        traker = runs.make_traker(
            model, N, folder, whitening=0.4, projector="leading", proj_dim=20
        )
        traker.load_checkpoint(states[0], model_id=0)
        for batch in runs.split(train, 9):
            traker.fit_whitening(batch=batch)
        return traker

    def test_another_strength_is_as_if_made_with_it(self, learned, tmp_path):
        whitener = self.whitener(learned, tmp_path).pipeline.whitener
        whitener.foresee(0, 0.75)
        found = whitener.foresee(0, 0.4)
        expected = whitener.made(whitener.sums[0], 0.4, in_bases=True)
        assert found.bases.keys() == expected.bases.keys() != set()
        for name, sides in expected.bases.items():
            for one, other in zip(found.bases[name], sides, strict=True):
                torch.testing.assert_close(one.powers, other.powers, rtol=0, atol=0)
                torch.testing.assert_close(one.vectors, other.vectors, rtol=0, atol=0)
        assert found.scales.keys() == expected.scales.keys() != set()
        for name, scale in expected.scales.items():
            torch.testing.assert_close(found.scales[name], scale, rtol=0, atol=0)

    def test_without_eigenvectors_there_is_no_other_strength(self, learned, tmp_path):
        whitener = self.whitener(learned, tmp_path).pipeline.whitener
        sums = whitener.sums[0]
        made = Whitening(sums, whitener.shapes, 0.5, DAMPING, torch.float32)
        with pytest.raises(InputError, match="in_bases"):
            made.at(0.75)

    def test_the_run_takes_it(self, learned, tmp_path, monkeypatch):
        rows = []
        for number in range(2):
            traker = self.whitener(learned, tmp_path / str(number))
            if number:
                traker.pipeline.whitener.foresee(0, 0.75)
                monkeypatch.setattr(Whitener, "made", None)  # must not be asked
            for batch in runs.split(learned[1], 9):
                traker.featurize(batch=batch, num_samples=len(batch[0]))
            rows.append(np.array(traker.saver.current_store["grads"]))
        np.testing.assert_array_equal(*rows)

    def test_not_where_something_was_added_since(self, learned, tmp_path):
        traker = self.whitener(learned, tmp_path)
        whitener = traker.pipeline.whitener
        before = whitener.foresee(0, 0.4)
        assert whitener.foreseen[0].is_of(whitener.sums[0])
        traker.fit_whitening(batch=[part[:3] for part in learned[1]])
        assert not whitener.foreseen[0].is_of(whitener.sums[0])
        after = whitener.foresee(0, 0.4)
        name = next(iter(before.bases))
        assert not torch.equal(before.bases[name][0].values, after.bases[name][0].values)

    def test_the_run_leaves_it_where_others_added_theirs(self, learned, tmp_path):
        rows = []
        for number in range(2):
            traker = self.whitener(learned, tmp_path / str(number))
            if number:
                traker.pipeline.whitener.foresee(0, 0.4)
            traker.fit_whitening(batch=[part[:5] for part in learned[1]])
            for batch in runs.split(learned[1], 9):
                traker.featurize(batch=batch, num_samples=len(batch[0]))
            rows.append(np.array(traker.saver.current_store["grads"]))
        np.testing.assert_array_equal(*rows)

    def test_large_ones_are_not_kept(self, learned, tmp_path, monkeypatch):
        whitener = self.whitener(learned, tmp_path).pipeline.whitener
        monkeypatch.setattr("trak.pipeline.whiten._REMEMBERED", 100)
        assert whitener.foresee(0, 0.4).bases
        assert not whitener.foreseen

    def test_not_of_other_parameters(self, learned, tmp_path):
        whitener = self.whitener(learned, tmp_path).pipeline.whitener
        whitener.foresee(0, 0.4)
        known = whitener.foreseen[0]
        fewer = dict(itertools.islice(known.sums.items(), len(known.sums) - 1))
        assert not Foreseen(fewer, known.whitening).is_of(whitener.sums[0])


def test_a_state_is_loaded_without_a_store_knowing(trial):
    load(trial.pipeline, trial.states[1])
    assert trial.pipeline.saver.model_ids == {}
