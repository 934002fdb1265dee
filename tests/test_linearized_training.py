"""Linearized models trained on halves, and how a training was regularized."""

import pytest
import torch

from trak.score_computers import retraining
from trak.score_computers.retraining import retrained
from trak.score_computers.stationarity import LEAST, MOST, training_of


def fitted(rows, ridge, steps=60):
    """The weights of a regularized logistic regression on rows that should be positive."""
    w = torch.zeros(rows.shape[1], dtype=torch.float64)
    for _ in range(steps):
        q = torch.sigmoid(-rows @ w)
        gradient = rows.T @ q - ridge * w
        hessian = rows.T @ (rows * (q * (1 - q))[:, None]) + ridge * torch.eye(len(w))
        w = w + torch.linalg.solve(hessian, gradient)
    return w


def logistic(n=300, k=12, ridge=5.0, seed=0):
    """Rows, and loss weights at the optimum of their regularized logistic loss."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=rng, dtype=torch.float64)
    rows = rows * torch.linspace(3, 0.5, k)
    rows = rows + torch.randn(k, generator=rng)  # so that margins are mostly positive
    return rows, torch.sigmoid(-rows @ fitted(rows, ridge))


def test_retraining_of_the_linearized_regression():
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(48, 7, generator=rng, dtype=torch.float64)
    answers = torch.randn(48, generator=rng, dtype=torch.float64)
    found = retrained(rows @ rows.T, 0.7, answers)
    assert sorted([*found.train.tolist(), *found.held.tolist()]) == list(range(48))
    for mask, outputs in zip(found.masks, found.outputs, strict=True):
        half = found.train[mask.bool()]
        assert len(half) == 18
        phi = rows[half]
        system = phi.T @ phi + 0.7 * torch.eye(7)
        weights = torch.linalg.solve(system, phi.T @ answers[half])
        torch.testing.assert_close(outputs, rows[found.held] @ weights)


@pytest.mark.parametrize("ridge", [3e-4, 0.02, 5.0])
def test_retraining_of_the_linearized_classifier(ridge):
    rows, _ = logistic(n=60)
    found = retrained(rows @ rows.T, ridge)
    for mask, outputs in zip(found.masks, found.outputs, strict=True):
        weights = fitted(rows[found.train[mask.bool()]], ridge, steps=200)
        torch.testing.assert_close(
            outputs, rows[found.held] @ weights, rtol=1e-3, atol=1e-3
        )


def test_far_outputs_take_few_steps(monkeypatch):
    rows, _ = logistic(n=60)
    ridge = 1e-4 * float(rows.square().sum(1).mean())
    taken, own = [], retraining._stepped
    monkeypatch.setattr(retraining, "_stepped", lambda *a: taken.append(1) or own(*a))
    found = retrained(rows @ rows.T, ridge)
    assert float(found.outputs.abs().max()) > 15
    assert len(taken) <= 9  # 12 without doubled ones


def test_outputs_that_lie_far_away_are_reached():
    # an example among others that are told apart by little has an output of hundreds
    rows, _ = logistic(n=60)
    rows[::7] *= 100
    ridge = 1e-4 * float(rows.square().sum(1).mean())
    found = retrained(rows @ rows.T, ridge)
    assert float(found.outputs.abs().max()) > 200
    for mask, outputs in zip(found.masks, found.outputs, strict=True):
        weights = fitted(rows[found.train[mask.bool()]], ridge, steps=400)
        torch.testing.assert_close(
            outputs, rows[found.held] @ weights, rtol=1e-2, atol=1e-2
        )


@pytest.mark.parametrize(("n", "k", "below"), [(200, 12, 2e-6), (300, 30, 5e-6)])
def test_long_steps_do_not_follow_what_rounding_adds(n, k, below):
    # eigenvalues below 0 that should be 0, along which the objective falls without end
    rng = torch.Generator().manual_seed(n)
    rows = torch.randn(n, k, generator=rng) * torch.linspace(2, 0.2, k) + 0.5
    rows = rows.double() / rows.square().sum(1).mean().sqrt()
    basis = torch.linalg.qr(rows).Q
    kernel = rows @ rows.T
    rounded = kernel - below * (torch.eye(n) - basis @ basis.T)
    found, expected = (retrained(each, 4e-5, subsets=4) for each in (rounded, kernel))
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=0.01, atol=0.01)


def test_a_tiny_ridge_is_not_lost_to_rounding():
    rows, _ = logistic(n=60)
    kernel = rows @ rows.T
    one, other = retrained(kernel, 1e-5), retrained(3 * kernel, 3e-5)  # the same problem
    torch.testing.assert_close(one.outputs, other.outputs, rtol=1e-5, atol=1e-5)


def test_separable_examples_do_not_diverge():
    rows = torch.rand(80, 5, dtype=torch.float64) + 0.5  # every output can be raised
    assert torch.isfinite(retrained(rows @ rows.T, 1e-9).outputs).all()


def test_the_ridge_of_a_training_is_found_again():
    found = []
    for ridge in (30.0, 120.0):
        rows, q = logistic(ridge=ridge)
        kernel = rows @ rows.T
        unit = kernel.diagonal().mean()
        training = training_of(kernel / unit, kernel @ q / unit, q)
        assert training.answers is None
        found.append(float(training.ridge * unit))
    assert found[1] / found[0] == pytest.approx(4, rel=0.25)  # an offset is fitted, too
    assert found[0] == pytest.approx(30 / 2.5, rel=0.25)


def test_the_ridge_of_a_training_stays_in_bounds():
    for ridge, bias, expected in ((1e-3, 0.0, LEAST), (1e6, 1.0, MOST)):
        rows = torch.cat([logistic()[0], torch.full((300, 1), bias).double()], dim=1)
        q = torch.sigmoid(-rows @ fitted(rows, ridge))
        kernel = rows @ rows.T
        unit = kernel.diagonal().mean()
        training = training_of(kernel / unit, kernel @ q / unit, q)
        steep = float((q * (1 - q)).mean())
        assert training.ridge / steep == pytest.approx(expected)


def test_answers_of_a_regression_lead_to_its_residuals():
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 60, generator=rng, dtype=torch.float64)
    kernel = rows @ rows.T / 60
    residuals = torch.randn(50, generator=rng, dtype=torch.float64)
    training = training_of(kernel, kernel @ residuals, residuals)
    ridge = training.ridge * torch.eye(50)
    duals = torch.linalg.solve(kernel + ridge, training.answers)
    torch.testing.assert_close(training.answers - kernel @ duals, residuals)


@pytest.mark.parametrize(
    ("low", "high", "words", "expected"),
    [(-1, 1, False, 0.4), (1, 1, False, 0.4), (0, 1, False, 0.8), (0, 1, True, 0.03)],
)
def test_losses_that_are_not_logistic_have_constants(low, high, words, expected):
    rows = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)).double()
    kernel = rows @ rows.T / 20
    loss = torch.linspace(low, high, 50).double()
    training = training_of(kernel, kernel @ loss, loss, logistic=False, words=words)
    assert training.ridge == expected
    differ = 0.5 if expected == 0.8 else None  # numbers from 0 to 1, but of words
    assert (training.power, training.path) == ((differ or 1), (differ or 0))


@pytest.mark.parametrize(
    ("leading", "logistic"), [(1.0, True), (0.85, True), (0.65, False), (0.0, False)]
)
def test_outputs_that_nobody_can_have_learned_are_no_outputs(leading, logistic):
    rows = torch.randn(240, 200, generator=torch.Generator().manual_seed(0)).double()
    kernel = rows @ rows.T / 200
    vectors = torch.linalg.eigh(kernel).eigenvectors
    parts = [vectors[:, -4:].sum(dim=1), vectors[:, 40:44].sum(dim=1)]
    outputs = 5 * (leading**0.5 * parts[0] + (1 - leading) ** 0.5 * parts[1]) - 2
    q = torch.sigmoid(-outputs)  # most examples are wrong
    assert (training_of(kernel, kernel @ q, q).answers is None) == logistic
    few = torch.sigmoid(-outputs - 5)  # most are right: details may have been learned
    assert training_of(kernel, kernel @ few, few).answers is None
    alike = torch.sigmoid(-0.5 * outputs - 5)  # hardly so where all are alike
    assert (training_of(kernel, kernel @ alike, alike).answers is None) == logistic


def test_a_direction_that_is_held_back_counts_less():
    rows = torch.randn(200, 150, generator=torch.Generator().manual_seed(0)).double()
    kernel = rows @ rows.T / 150
    values, vectors = torch.linalg.eigh(kernel)
    parts = torch.cat([torch.ones(199), torch.tensor([30.0])]).double()
    outputs = vectors @ parts
    q = torch.sigmoid(-outputs)
    steep = float((q * (1 - q)).mean())
    free = training_of(kernel, 3 * steep * outputs, q)
    torch.testing.assert_close(free.kernel, kernel)
    assert free.ridge == pytest.approx(3 * steep / 2.5)
    ratios = torch.cat([torch.full((199,), 3.0), torch.tensor([150.0])]).double()
    held = training_of(kernel, vectors @ (steep * ratios * parts), q)
    assert held.ridge == pytest.approx(free.ridge, rel=0.2)
    leading = vectors[:, -1]
    assert leading @ held.kernel @ leading < 0.1 * values[-1]
    others = vectors[:, :-20]
    torch.testing.assert_close(
        others.T @ held.kernel @ others, torch.diag(values[:-20]), rtol=0, atol=0.02
    )


def two_classes(ratios):
    """Rows that share one direction, along which outputs grow, and pulls at them."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 150, generator=rng, dtype=torch.float64)
    kernel = rows @ rows.T / 150 + 0.5 * torch.ones(200, 200).double()
    kernel = kernel / kernel.diagonal().mean()
    vectors = torch.linalg.eigh(kernel).eigenvectors
    leading = vectors[:, -1] * vectors[:, -1].sum().sign()
    outputs = 30 * leading + 0.1 * (vectors[:, :-1].sum(1))
    q = torch.sigmoid(-outputs)
    steep = float((q * (1 - q)).mean())
    pull = steep * (vectors @ (ratios(rng) * (vectors.T @ outputs)))
    return training_of(kernel, pull, q, logistic=True), kernel, leading


def test_growth_is_free_where_rows_share_it():
    trained, kernel, leading = two_classes(
        lambda rng: 1 + 4 * torch.rand(200, generator=rng)
    )
    before, after = (float(leading @ each @ leading) for each in (kernel, trained.kernel))
    assert before / 200 > 0.3
    assert 2 < after / before <= 5
    others = torch.linalg.eigh(kernel).eigenvectors[:, :-1]
    torch.testing.assert_close(
        others.T @ trained.kernel @ others, others.T @ kernel @ others, rtol=0, atol=0.1
    )


def test_growth_is_like_the_rest_in_a_linear_model_trained_to_its_end():
    trained, kernel, _ = two_classes(lambda _: torch.full((200,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(trained.kernel, kernel)


def test_growth_that_is_held_back_stays_so():
    def ratios(rng):
        found = 1 + 4 * torch.rand(200, generator=rng)
        found[-1] = 100  # of the leading direction
        return found

    trained, kernel, leading = two_classes(ratios)
    before, after = (float(leading @ each @ leading) for each in (kernel, trained.kernel))
    assert after < 0.2 * before
