"""Rows weighted by the curvature of the loss, against the formula written out."""

import numpy as np
import pytest
import torch
from tests import cases, runs

from trak.errors import InputError, InputTypeError
from trak.score_computers import BasicScoreComputer, RidgeScoreComputer
from trak.score_computers.curvature import FLOOR, roots
from trak.score_computers.ridge_sample import Situation

N, M = 24, 5


def explicit(rows, ridge):
    """mean(Phi (Phi^T R Phi + ridge I)^-1 Psi^T) mean(q), with inverses."""
    found, weights = [], []
    for phi, psi, q in rows:
        q = q.reshape(-1, 1)
        curvature = (q * (1 - q / 2)).clamp(min=FLOOR)
        gram = phi.T @ (phi * curvature)
        absolute = ridge * float(gram.trace()) / len(phi)
        inverse = torch.linalg.inv(gram + absolute * torch.eye(len(gram)))
        found.append(phi @ inverse @ psi.T)
        weights.append(q)
    return (torch.stack(found).mean(0) * torch.stack(weights).mean(0)).numpy()


@pytest.fixture(params=["primal", "dual"])
def finished(request, tmp_path):
    """A TRAKer with two finalized checkpoints and scored targets, and the oracle's rows."""
    model, train, targets = runs.data("mlp", N, M)
    states = cases.checkpoints("mlp", 2)
    size = 6 if request.param == "primal" else 50
    traker = runs.make_traker(
        model, N, tmp_path, proj_dim=size, lambda_reg="2x", curvature=True
    )
    scores = runs.whole_run(traker, train, targets, states)
    assert traker.saver.load_factor(0)[1]["form"] == request.param
    rows = runs.oracle(model, train, targets, states, traker.projector)
    return traker, scores, [tuple(part.double() for part in one) for one in rows]


def close(found, expected):
    np.testing.assert_allclose(
        found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
    )


def test_scores_equal_the_formula(finished):
    _, scores, rows = finished
    close(scores, explicit(rows, 2.0))
    plain = torch.stack([phi @ psi.T for phi, psi, _ in rows]).mean(0)
    assert abs(np.corrcoef(scores.ravel(), plain.ravel())[0, 1]) < 0.999


def test_other_ridges_and_the_strongest(finished):
    traker, scores, rows = finished
    close(traker.sweep(["exp"], ["9x"])["exp", "9x"], explicit(rows, 9.0))
    top = traker.top_scores("exp", k=3)
    order = np.argsort(-scores, axis=0, kind="stable")[:3].T
    np.testing.assert_array_equal(top.indices, order)


def test_methods_over_the_same_system(finished):
    traker, _, rows = finished
    found = traker.self_influence()
    energies, weights = [], []
    for phi, _, q in rows:
        q = q.flatten()
        gram = phi.T @ (phi * (q * (1 - q / 2)).clamp(min=FLOOR)[:, None])
        gram += 2 * float(gram.trace()) / N * torch.eye(len(gram))
        energies.append((phi @ torch.linalg.inv(gram) * phi).sum(1))
        weights.append(q)
    expected = torch.stack(energies).mean(0) * torch.stack(weights).mean(0)
    close(found, expected.numpy())
    features = traker.saver.features(1)
    phi, psi, q = rows[1]
    close(features @ psi.numpy().T * q.numpy().reshape(-1, 1), explicit(rows[1:], 2.0))


@pytest.mark.parametrize("row_dtype", ["float16", "int8", "float64"])
def test_rows_of_every_encoding(row_dtype, tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    states = cases.checkpoints("mlp", 1)
    traker = runs.make_traker(
        model, N, tmp_path, lambda_reg="2x", curvature=True, row_dtype=row_dtype
    )
    found = runs.whole_run(traker, train, targets, states)
    expected = explicit(runs.oracle(model, train, targets, states, traker.projector), 2.0)
    tolerance = {"float16": 5e-3, "int8": 5e-2, "float64": 1e-6}[row_dtype]
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_it_is_part_of_what_a_checkpoint_was_finalized_with(tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    states = cases.checkpoints("mlp", 1)
    runs.whole_run(runs.make_traker(model, N, tmp_path), train, targets, states)
    curved = runs.make_traker(model, N, tmp_path, curvature=True)
    with pytest.raises(Exception, match="finalize_features"):
        curved.finalize_scores("exp")
    curved.finalize_features()
    curved.finalize_scores("exp")
    info = curved.saver.load_factor(0)[1]
    assert curved.score_computer.matches(info)
    # other weights were used once, and noted down as True
    assert not curved.score_computer.matches(info | {"curvature": True})


def test_losses_of_constant_curvature_are_not_weighted():
    assert roots(torch.tensor([-1.0, 0.5, 2.0])) is None
    rows = torch.randn(9, 4, dtype=torch.float64)
    loss = torch.linspace(-2, 2, 9)

    one, other = (
        RidgeScoreComputer(lambda_reg=1.0, curvature=c).finalize(rows, Situation(loss=loss))
        for c in (True, False)
    )
    np.testing.assert_array_equal(one[0], other[0])
    q = torch.tensor([0.0, 0.5, 1.0])
    expected = np.sqrt([FLOOR, 0.375, 0.5])
    np.testing.assert_allclose(roots(q).flatten(), expected, rtol=1e-6)


@pytest.mark.parametrize("value", ["no", "auto", 1, None])
def test_it_is_true_or_false(value, tmp_path):
    """Texts are true, `"no"` too."""
    with pytest.raises(InputTypeError, match="curvature must be True or False"):
        RidgeScoreComputer(curvature=value)
    with pytest.raises(InputTypeError, match="curvature must be True or False"):
        runs.make_traker(runs.data("mlp", N, 2)[0], N, tmp_path, curvature=value)


def test_weights_are_the_softmaxs_curvature():
    # half the trace of diag(p) - p p^T, if many classes share what the right one lacks
    q = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    classes = 10**4
    p = torch.cat([1 - q[:, None], (q[:, None] / classes).expand(-1, classes)], dim=1)
    expected = (1 - p.square().sum(1)) / 2
    torch.testing.assert_close(roots(q).flatten().square(), expected, rtol=1e-3, atol=0)


def test_bad_input(tmp_path):
    model, _, _ = runs.data("mlp", N, M)
    with pytest.raises(InputError, match="does not weigh rows. Use curvature=False"):
        runs.make_traker(
            model, N, tmp_path, score_computer=BasicScoreComputer, curvature=True
        )
    with pytest.raises(InputError, match="settings of its own"):
        runs.make_traker(
            model, N, tmp_path, score_computer=RidgeScoreComputer(), curvature=True
        )
    with pytest.raises(InputError, match="need the loss weights Q"):
        RidgeScoreComputer(curvature=True).finalize(torch.randn(4, 3))
