"""The ridge that is chosen, and ridges by name."""

import numpy as np
import pytest
import torch
from tests import cases, runs

from trak.arguments import as_ridge
from trak.errors import InputError
from trak.score_computers import BasicScoreComputer, RidgeScoreComputer
from trak.score_computers.auto_ridge import (
    BASE,
    BY_STRENGTH,
    Situation,
    leading,
    relative_ridge,
    unfinished,
)
from trak.score_computers.gram import dual_gram, primal_gram


def chosen(rows, form="primal", **situation):
    gram = primal_gram(rows) if form == "primal" else dual_gram(rows)
    return relative_ridge(rows, gram, form, Situation(**situation))


def logistic(n=300, k=12, ridge=5.0, steps=60, seed=0):
    """Rows, and loss weights at the optimum of their regularized logistic loss."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=rng, dtype=torch.float64)
    rows = rows * torch.linspace(3, 0.5, k)
    rows = rows + torch.randn(k, generator=rng)  # so that margins are mostly positive
    w = torch.zeros(k, dtype=torch.float64)
    for _ in range(steps):
        q = torch.sigmoid(-rows @ w)
        gradient = rows.T @ q - ridge * w
        hessian = rows.T @ (rows * (q * (1 - q))[:, None]) + ridge * torch.eye(k)
        w = w + torch.linalg.solve(hessian, gradient)
    return rows, torch.sigmoid(-rows @ w)


def test_what_is_known_beforehand():
    rows = torch.randn(90, 20, dtype=torch.float64)
    assert chosen(rows) == BASE
    assert chosen(rows, strength=0.5) == BASE + 0.5 * BY_STRENGTH
    assert chosen(rows, checkpoints=8) == pytest.approx(BASE / 2)
    assert chosen(rows, columns=10) == pytest.approx(BASE * 2)
    assert chosen(rows, columns=10, checkpoints=8) < BASE / 2 * 1.1


@pytest.mark.parametrize("ridge", [2.0, 20.0])
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_the_ridge_of_a_linear_model_is_found_again(ridge, form):
    rows, q = logistic(ridge=ridge)
    gram = primal_gram(rows) if form == "primal" else dual_gram(rows)
    found = unfinished(rows, gram, form, q)
    unit = float(rows.square().sum(1).mean())
    expected = ridge / float((q * (1 - q)).mean()) / unit * float(q.quantile(0.1))
    assert found == pytest.approx(expected, rel=1e-4)


def test_both_forms_agree():
    rows, q = logistic(n=40, k=30)
    one, other = (
        unfinished(rows, gram(rows), form, q)
        for form, gram in (("primal", primal_gram), ("dual", dual_gram))
    )
    assert one == pytest.approx(other, rel=1e-6)


def test_a_model_that_was_hardly_trained_gets_a_larger_ridge():
    rows, q = logistic(ridge=0.1)
    late = chosen(rows, loss=q)
    early = chosen(rows, loss=logistic(ridge=2000.0)[1])
    assert early > 5 * late
    assert late < 1.5 * BASE


@pytest.mark.parametrize(
    "loss",
    [
        None,
        torch.zeros(50),
        torch.ones(50),
        torch.linspace(-3, 3, 50),  # residuals of a regression
        torch.full((50, 1), 5.0),
    ],
)
def test_other_loss_weights_say_nothing(loss):
    rows = torch.randn(50, 8, dtype=torch.float64)
    assert unfinished(rows, primal_gram(rows), "primal", loss) == 0


def test_leading_eigenvectors():
    rows = torch.randn(400, 150, dtype=torch.float64) * torch.linspace(4, 0.01, 150) ** 2
    gram = rows.T @ rows
    values, vectors = leading(gram)
    exact = torch.linalg.eigvalsh(gram).flip(0)[: len(values)]
    torch.testing.assert_close(values, exact, rtol=0.02, atol=0)
    assert vectors.shape == (150, 20)
    assert leading(torch.eye(3, dtype=torch.float64))[1].shape == (3, 3)


def test_it_is_the_default_and_recorded(tmp_path):
    model, train, targets = runs.data("mlp", 30, 4)
    states = cases.checkpoints("mlp", 2)
    traker = runs.make_traker(model, 30, tmp_path, lambda_reg="auto")
    found = runs.whole_run(traker, train, targets, states)
    info = traker.saver.load_factor(1)[1]
    assert info["lambda_reg"] is None
    assert info["checkpoints"] == 2
    unit = info["mean_squared_norm"]
    assert info["ridge"] == pytest.approx(info["auto"] * unit)
    rows = traker.saver.train_rows(1)
    expected = chosen(
        torch.from_numpy(rows.array("grads")).double(),
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
