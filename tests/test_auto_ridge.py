"""The ridge that is chosen, and ridges by name."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import cases, runs
from tests.test_linearized_training import fitted, logistic

from trak.arguments import as_ridge
from trak.errors import InputError
from trak.evaluation import lds
from trak.score_computers import BasicScoreComputer, RidgeScoreComputer
from trak.score_computers.auto_ridge import (
    BY_CURVATURE,
    USUAL,
    _smaller,
    best_ridge,
    noise_factor,
    relative_ridge,
)
from trak.score_computers.curvature import roots
from trak.score_computers.ridge_sample import Situation, sampled
from trak.score_computers.stationarity import training_of


def chosen(rows, **situation):
    return relative_ridge(rows, Situation(**situation))


def test_what_is_known_beforehand():
    one = noise_factor(90, Situation())
    assert one == pytest.approx(1.15)
    assert noise_factor(90, Situation(checkpoints=5)) == pytest.approx(0.83)
    narrow = noise_factor(90, Situation(columns=10))
    assert narrow > 2 * one
    assert noise_factor(90, Situation(columns=10, checkpoints=8)) < narrow
    assert noise_factor(90, Situation(columns=10**6)) == pytest.approx(one, rel=1e-3)


def play(rows, targets, ridge, subsets=40):
    """Outputs of logistic regressions that were really trained on halves."""
    rng = np.random.default_rng(1)
    masks = np.zeros((subsets, len(rows)), dtype=bool)
    outputs = np.zeros((subsets, 1, len(targets)))
    for mask, answer in zip(masks, outputs, strict=True):
        mask[rng.permutation(len(rows))[: len(rows) // 2]] = True
        answer[0] = targets @ fitted(rows[torch.from_numpy(mask)], ridge, steps=40)
    return masks, outputs


@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("ridge", [1.0, 60.0])
def test_it_is_as_good_as_the_best_of_a_sweep(ridge, curvature):
    rows, _ = logistic(n=240, k=60, seed=3)
    targets, rows = rows[:40], rows[40:]
    q = torch.sigmoid(-rows @ fitted(rows, ridge))
    masks, outputs = play(rows, targets, ridge)

    def quality(lambda_reg):
        computer = RidgeScoreComputer(lambda_reg=lambda_reg, curvature=curvature)
        kept = computer.finalize(rows, Situation(loss=q))
        scores = computer.scorer(kept, rows, targets, q)(0, len(rows)) * q[:, None]
        return lds(scores.numpy(), masks, outputs, draws=2).value

    swept = {f"{r:.3g}x": quality(f"{r:.3g}x") for r in np.logspace(-2, 3, 25)}
    assert quality(None) >= 0.97 * max(swept.values())
    assert min(swept.values()) < 0.9 * max(swept.values())  # so it is worth choosing


def test_weighted_rows_are_played_without_their_weights():
    rows, q = logistic(n=100)
    computer = RidgeScoreComputer(curvature=True)
    plain = sampled(rows, Situation(loss=q))
    other = sampled(computer.weighted(rows, q), Situation(loss=q, curvature=True))
    torch.testing.assert_close(other.kernel, plain.kernel)
    torch.testing.assert_close(other.pull, plain.pull)
    torch.testing.assert_close(other.roots[:, None], roots(q))


def test_a_sample_of_many_rows_stands_for_all():
    rows, q = logistic(n=2000)
    found = sampled(rows, Situation(loss=q))
    assert found.share == pytest.approx(0.3)
    assert found.kernel.shape == (600, 600)
    own = (
        torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:600].sort().values
    )
    unit = rows[own].square().sum(dim=1).mean()
    torch.testing.assert_close(found.pull, rows[own] @ (rows.T @ q) / unit)
    again = chosen(rows, loss=q)
    assert again == chosen(rows, loss=q)


def test_a_squared_loss_is_played_without_weights():
    rows, q = logistic(n=120)
    loss = q / q.max() * 0.2 + 0.8  # most are wrong: no outputs of a logistic model
    sample = sampled(
        RidgeScoreComputer(curvature=True).weighted(rows, loss),
        Situation(loss=loss, curvature=True),
    )
    training = training_of(sample.kernel, sample.pull, sample.loss)
    assert training.answers is not None
    even = replace(sample, roots=torch.ones_like(sample.roots))
    assert best_ridge(sample, training) == best_ridge(even, training)


@pytest.mark.parametrize("loss", [None, torch.zeros(50)])
def test_where_nothing_is_known(loss):
    rows = torch.randn(50, 8, dtype=torch.float64)
    assert chosen(rows, loss=loss) == pytest.approx(1.15 * USUAL)
    curved = 1.15 * USUAL * (1 if loss is None else BY_CURVATURE)
    assert chosen(rows, loss=loss, curvature=True) == pytest.approx(curved)
    squared = torch.linspace(-1, 2, 50)
    one, other = (chosen(rows, loss=squared, curvature=c) for c in (False, True))
    assert one == other
    assert chosen(torch.zeros(50, 8), loss=torch.rand(50)) == pytest.approx(1.15 * USUAL)
    assert chosen(rows[:20], loss=torch.rand(20)) == pytest.approx(1.15 * USUAL)


@pytest.mark.parametrize(
    "loss",
    [
        torch.ones(50),
        torch.linspace(-3, 3, 50),
        torch.full((50, 1), 5.0),
        1e-30 * torch.ones(50),
    ],
)
def test_any_loss_weights_lead_to_a_ridge(loss):
    rows = torch.randn(50, 8, dtype=torch.float64)
    assert 0.01 < chosen(rows, loss=loss) < 5000


def test_it_is_the_default_and_recorded(tmp_path):
    model, train, targets = runs.data("mlp", 30, 4)
    states = cases.checkpoints("mlp", 2)
    traker = runs.make_traker(model, 30, tmp_path, lambda_reg="auto")
    found = runs.whole_run(traker, train, targets, states)
    info = traker.saver.load_factor(1)[1]
    assert info["lambda_reg"] is None
    digests = {str(i): traker.saver.checkpoint_digest(i) for i in range(2)}
    assert info["together"] == digests
    unit = info["mean_squared_norm"]
    assert info["ridge"] == pytest.approx(info["auto"] * unit)
    rows = traker.saver.train_rows(1)
    expected = chosen(
        torch.from_numpy(rows.array("grads")),
        checkpoints=2,
        columns=16,
        loss=rows.array("out_to_loss"),
    )
    assert info["auto"] == pytest.approx(expected, rel=1e-6)
    same = traker.sweep(["exp"], [None])["exp", None]
    np.testing.assert_allclose(found, same, rtol=1e-6)
    unchanged = runs.make_traker(model, 30, tmp_path / "default", lambda_reg=None)
    np.testing.assert_array_equal(found, runs.whole_run(unchanged, train, targets, states))


def test_it_is_chosen_anew_when_checkpoints_are_added(tmp_path):
    model, train, targets = runs.data("mlp", 30, 4)
    states = cases.checkpoints("mlp", 2)
    together = runs.make_traker(model, 30, tmp_path / "a", lambda_reg="auto")
    expected = runs.whole_run(together, train, targets, states)
    traker = runs.make_traker(model, 30, tmp_path / "b", lambda_reg="auto")
    runs.whole_run(traker, train, targets, states[:1])
    alone = traker.saver.load_factor(0)[1]["ridge"]
    found = runs.whole_run(traker, train, targets, states)
    assert traker.saver.load_factor(0)[1]["ridge"] < alone
    np.testing.assert_array_equal(found, expected)


def test_relative_ridges_by_name(tmp_path):
    model, train, targets = runs.data("mlp", 30, 4)
    states = cases.checkpoints("mlp", 1)
    traker = runs.make_traker(model, 30, tmp_path / "a", lambda_reg="2.5x")
    found = runs.whole_run(traker, train, targets, states)
    info = traker.saver.load_factor(0)[1]
    assert info["ridge"] == pytest.approx(2.5 * info["mean_squared_norm"])
    absolute = runs.make_traker(model, 30, tmp_path / "b", lambda_reg=info["ridge"])
    np.testing.assert_array_equal(found, runs.whole_run(absolute, train, targets, states))
    swept = absolute.sweep(["exp"], ["2.5x"])["exp", "2.5x"]
    np.testing.assert_allclose(swept, found, rtol=1e-6)
    assert (tmp_path / "b" / "scores" / "ridge=2.5x" / "exp.mmap").exists()


def test_names_of_ridges():
    assert as_ridge("auto") is None
    assert as_ridge("3x") == as_ridge("3.0x") == "3x"
    assert as_ridge("1e-2x") == "0.01x"
    assert as_ridge(2) == 2.0
    for wrong in ("3", "x", "-1x", "nanx", "infx", "many", "3 x norm"):
        with pytest.raises(InputError, match="lambda_reg must be"):
            as_ridge(wrong)


def test_upstreams_computer_knows_no_relative_ridge(tmp_path):
    model, _, _ = runs.data("mlp", 6, 2)
    options = {"score_computer": BasicScoreComputer, "lambda_reg": "2x"}
    with pytest.raises(InputError, match="add lambda_reg as it is"):
        runs.make_traker(model, 6, tmp_path, **options)
    assert RidgeScoreComputer(lambda_reg="2x").lambda_reg == "2x"


def test_each_has_its_own_ridge_where_each_is_finalized_alone(tmp_path, caplog):
    model, train, targets = runs.data("mlp", 60, 4)
    states = cases.checkpoints("mlp", 3)
    found = {}
    for order in ([0, 1, 2], [2, 0, 1]):
        folder = tmp_path / str(order)
        for model_id in order:
            traker = runs.make_traker(model, 60, folder, lambda_reg="auto")
            runs.featurize(traker, train, states[model_id], model_id)
            traker.finalize_features(model_ids=[model_id])
        for model_id, state in enumerate(states):
            runs.score(traker, targets, state, model_id)
        caplog.clear()
        found[str(order)] = traker.finalize_scores("exp")
        assert "finalized in several calls" in caplog.text
    np.testing.assert_array_equal(*found.values())
    traker.finalize_features()
    infos = [traker.saver.load_factor(i)[1] for i in range(3)]
    assert [list(info["together"]) for info in infos] == [["0", "1", "2"]] * 3
    assert len({info["auto"] for info in infos}) == 1
    caplog.clear()
    traker.finalize_scores("exp")
    assert "several calls" not in caplog.text


@pytest.mark.parametrize(("left", "expected"), [(0.1, 1.0), (0.22, 1.0), (0.3, 0.5378)])
def test_many_directions_make_a_smaller_ridge(left, expected):
    spectrum = torch.tensor([1.0] * 100, dtype=torch.float64)
    assert _smaller(spectrum, (1 - left) / left) == pytest.approx(expected, rel=1e-3)
    assert _smaller(spectrum, 0.0) == pytest.approx(math.exp(-1))
    assert _smaller(torch.zeros(5), 1.0) == 1.0


def test_many_directions_count_where_a_classifiers_rows_are_plain(monkeypatch):
    torch.manual_seed(0)
    rows = torch.randn(200, 30, dtype=torch.float64)
    loss = torch.sigmoid(-rows @ torch.randn(30, dtype=torch.float64))
    cases = [
        {"loss": loss, "logistic": True},
        {"loss": loss, "logistic": True, "curvature": True},
        {"loss": loss - 0.5},
    ]
    as_played = [chosen(rows, **case) for case in cases]
    monkeypatch.setattr("trak.score_computers.auto_ridge._MANY", 1e-9)
    now = [chosen(rows, **case) for case in cases]
    assert now[0] == pytest.approx(as_played[0] / math.e)
    assert now[1:] == as_played[1:]


def test_a_checkpoint_that_was_replaced_is_another(tmp_path):
    model, train, _ = runs.data("mlp", 60, 4)
    states = cases.checkpoints("mlp", 3)

    def ridge(folder, chosen):
        traker = runs.make_traker(model, 60, folder, lambda_reg="auto")
        for model_id, state in enumerate(chosen):
            runs.featurize(traker, train, state, model_id)
        traker.finalize_features()
        return [traker.saver.load_factor(i)[1]["auto"] for i in range(len(chosen))]

    ridge(tmp_path / "a", states[:2])
    shutil.rmtree(tmp_path / "a" / "1")
    others = [states[0], states[2]]
    assert ridge(tmp_path / "a", others) == ridge(tmp_path / "b", others)


def test_a_ridge_that_is_given_asks_for_no_common_one(tmp_path, caplog):
    model, train, targets = runs.data("mlp", 60, 4)
    states = cases.checkpoints("mlp", 2)
    for model_id, state in enumerate(states):
        traker = runs.make_traker(model, 60, tmp_path, lambda_reg="2x")
        runs.featurize(traker, train, state, model_id)
        traker.finalize_features(model_ids=[model_id])
    for model_id, state in enumerate(states):
        runs.score(traker, targets, state, model_id)
    traker.finalize_scores("exp")
    traker.sweep(["exp"], ["3x", 0.5])
    assert "several calls" not in caplog.text
    traker.sweep(["exp"], [None])
    assert "several calls" in caplog.text
    # a store from before there was an automatic ridge
    record = tmp_path / "0" / "factor.json"
    kept = json.loads(record.read_text())
    record.write_text(
        json.dumps({n: kept[n] for n in kept if n not in {"auto", "together"}})
    )
    traker.sweep(["exp"], [None])
    assert "(unknown, " in caplog.text
    traker.finalize_features()
    autos = {traker.saver.load_factor(i)[1]["auto"] for i in range(2)}
    assert len(autos) == 1


def test_the_order_of_few_examples_hardly_matters():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 40, generator=generator) * torch.logspace(0.5, -1, 40)
    outputs = (rows @ torch.randn(40, generator=generator)).double()
    loss = torch.sigmoid(-outputs / outputs.std() - 0.5)[:, None]
    found = []
    for seed in range(6):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        situation = Situation(loss=loss[order], logistic=True)
        found.append(relative_ridge(rows[order], situation))
    assert max(found) < 2 * min(found)
