"""The mathematics of the comparison benchmarks, against ways that take longer."""

import math

import pytest
import torch
from benchmarks.choice_variants import Choice, Part, merged, reshaped, scores
from benchmarks.systems import System, kernel_of, leave_one_out_loss

from trak.score_computers.curvature import RULE, roots


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return torch.randn(40, 7, dtype=torch.float64) * torch.linspace(0.5, 2, 7)


N = 30


def whole(rows):
    return (rows[:N] @ rows.T).double()


def test_scores_and_leverage_are_those_of_the_primal_form(rows):
    weights = torch.rand(N, dtype=torch.float64) + 0.1
    system, phi = System(whole(rows), weights), rows[:N]
    curved = phi.T @ (phi * weights[:, None])
    ridge = 0.3 * float(curved.trace()) / N
    inverse = torch.linalg.inv(curved + ridge * torch.eye(7))
    torch.testing.assert_close(system.tau(0.3), phi @ inverse @ rows[N:].T)
    expected = weights * ((phi @ inverse) * phi).sum(1)
    torch.testing.assert_close(system.leverage(0.3), expected)


def test_leverage_gives_what_ridge_regressions_without_an_example_give(rows):
    phi, targets, system = rows[:N], rows[N:], System(whole(rows))
    labels = torch.randn(N, dtype=torch.float64)
    ridge = 0.2 * float(phi.square().sum()) / N

    def fitted(kept):
        gram = phi[kept].T @ phi[kept] + ridge * torch.eye(7)
        return torch.linalg.solve(gram, phi[kept].T @ labels[kept])

    every = torch.arange(N)
    all_of_them = fitted(every)
    loss = labels - phi @ all_of_them
    part = Part(
        {"all": whole(rows)}, loss.repeat(2)[: len(rows)], loss[:10], curvature=False
    )
    part.loss = loss
    found = scores(Choice(leave_out=True), [part], 0.2)
    corrected = leave_one_out_loss(loss, system.leverage(0.2), system.weights)
    for i in range(N):
        without = fitted(every[every != i])
        torch.testing.assert_close(found[i], targets @ (all_of_them - without))
        torch.testing.assert_close(corrected[i], labels[i] - phi[i] @ without)


def test_corrected_loss_weights_are_a_newton_step_of_logistic_regression(rows):
    # 1e4 times as many copies: leaving one out is a small step
    phi = rows[:N]
    weights = torch.full((7,), 0.3, dtype=torch.float64)
    loss = torch.sigmoid(-phi @ weights)
    curvature = loss * (1 - loss)
    inverse = torch.linalg.inv(1e4 * phi.T @ (phi * curvature[:, None]))
    leverage = curvature * ((phi @ inverse) * phi).sum(1)
    found = leave_one_out_loss(loss, leverage, curvature)
    moved = weights - loss[:, None] * (phi @ inverse)
    expected = torch.sigmoid(-(phi * moved).sum(1))
    torch.testing.assert_close(found - loss, expected - loss, rtol=1e-2, atol=0.0)
    assert bool((found > loss).all())


@pytest.mark.parametrize("name", ["centred", "centred both", "unit"])
def test_kernels_of_changed_rows(rows, name):
    phi, targets = rows[:N].clone(), rows[N:].clone()
    mean = phi.mean(0)
    if name == "unit":
        phi = phi / phi.norm(dim=1, keepdim=True)
    else:
        phi = phi - mean
        targets = targets - mean * (name == "centred both")
    expected = phi @ torch.cat([phi, targets]).T
    torch.testing.assert_close(reshaped(whole(rows), name), expected)


def test_one_checkpoint_is_its_own_average(rows):
    kernel = whole(rows)
    loss = torch.rand(len(rows), dtype=torch.float64)
    sizes = rows[N:].square().sum(1)
    part = Part({"all": kernel}, loss, sizes, curvature=True)
    usual = scores(Choice(), [part], 1.0)
    for choice in (Choice(q="own"), Choice(average="median")):
        torch.testing.assert_close(scores(choice, [part, part], 1.0), usual)
    one = merged([part, part], equal=True)
    torch.testing.assert_close(scores(Choice(), [one], 1.0) / 1.0, usual)


def test_kernels_add_up_over_parts(rows):
    parts = [rows[:, :3].float(), rows[:, 3:].float()]
    torch.testing.assert_close(
        kernel_of(parts, N).double(), whole(rows), rtol=1e-5, atol=1e-5
    )
    assert not math.isnan(float(kernel_of(parts, N).sum()))


def test_powers_of_loss_weights(rows):
    loss = torch.rand(len(rows), dtype=torch.float64)
    part = Part({"all": whole(rows)}, loss, rows[N:].square().sum(1), curvature=False)
    root = scores(Choice(power=0.5), [part], 1.0)
    usual = scores(Choice(), [part], 1.0)
    torch.testing.assert_close(root * loss[:N, None].sqrt(), usual)


def test_weights_by_a_rule_of_the_choice():
    torch.manual_seed(0)
    kernel = torch.randn(N, 9)
    kernel = torch.cat([kernel @ kernel.T, torch.randn(N, 3)], dim=1)
    loss = torch.rand(N + 3).double()
    sizes = torch.ones(3).double()
    part = Part({"all": kernel}, loss, sizes, curvature=True)
    own = roots(loss[:N]).flatten().square()
    torch.testing.assert_close(part.weights, own, rtol=1e-6, atol=0)
    usual = scores(Choice(), [part], 2.0)
    for rule, weights in (("1", torch.ones(N)), ("q", loss[:N]), (RULE, own)):
        found = scores(Choice(weights=rule), [part], 2.0)
        expected = System(kernel, weights).tau(2.0) * loss[:N, None]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert torch.allclose(found, usual, rtol=1e-6) == (rule == RULE)
