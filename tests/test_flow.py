"""A training by gradient flow, followed in few steps."""

import pytest
import torch

from trak.score_computers import flow
from trak.score_computers.flow import followed


def hard_rows(count=200, width=40, seed=0):
    """Rows that a linear model can fit, though only after a long time."""
    lots = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=lots, dtype=torch.float64)
    rows = rows * torch.logspace(0, -1.5, width, dtype=torch.float64)
    rows[:, -1] = rows[:, -1].abs()
    return rows / rows.square().sum(dim=1).mean().sqrt()


def small_steps(kernel, counts, time):
    """The oracle: `a` and `q` after gradient flow from zero, by Euler's rule."""
    added = torch.zeros(len(kernel), dtype=torch.float64)
    largest = float(torch.linalg.eigvalsh(kernel)[-1] * counts.max())
    steps = int(2 * time * largest) + 1000
    for _ in range(steps):
        added += torch.sigmoid(-kernel @ (counts * added)) * time / steps
    return added, torch.sigmoid(-kernel @ (counts * added))


def test_the_flow_ends_where_its_loss_weights_are_closest():
    rows = hard_rows()
    kernel = rows @ rows.T
    even = torch.ones(200, dtype=torch.float64)
    added, loss = small_steps(kernel, even, 3.0)
    found = followed(kernel.float().__matmul__, loss.float())
    assert found.distance < 1e-4 * float(loss.var())
    torch.testing.assert_close(found.added.double(), added, rtol=0.05, atol=0.05)
    few = followed(kernel.float().__matmul__, loss.float(), 5)
    assert few.distance > found.distance
    assert flow._STEPS < flow.STEPS_OF_SAMPLES


def test_a_long_training_is_followed_in_few_products():
    rows = hard_rows()
    kernel = rows @ rows.T
    even = torch.ones(200, dtype=torch.float64)
    added, loss = small_steps(kernel, even, 300.0)
    products = 0

    def outputs(weights):
        nonlocal products
        products += 1
        return kernel.float() @ weights

    found = followed(outputs, loss.float(), flow.STEPS_OF_SAMPLES)
    assert found.distance < 1e-3 * float(loss.var())
    torch.testing.assert_close(found.added.double(), added, rtol=0.1, atol=0.5)
    euler = 300 * float(torch.linalg.eigvalsh(kernel)[-1]) / 4  # q (1 - q) is a quarter
    assert products < euler / 3


@pytest.mark.parametrize("stretch", [0.1, 1.0, 1.1, 4.0, 30.0, 200.0])
def test_one_step_follows_the_flow(stretch):
    """Along small eigenvalues as small steps do, and without growing along large ones."""
    rows = hard_rows()
    kernel = rows @ rows.T
    largest = float(torch.linalg.eigvalsh(kernel)[-1]) / 4
    begin, loss = small_steps(kernel, torch.ones(200).double(), 10 * stretch / largest)
    step = stretch / largest
    found, after = flow._stepped(
        kernel.__matmul__, torch.zeros_like(begin), begin, loss, step, stretch
    )
    torch.testing.assert_close(after, torch.sigmoid(-kernel @ found))
    exact, _ = small_steps(kernel, torch.ones(200).double(), 11 * stretch / largest)
    moved = (exact - begin).norm()
    assert (found - exact).norm() < 0.1 * moved


def test_the_flow_is_not_followed_for_ever():
    kernel = torch.eye(50)
    never = torch.full((50,), 1e-6)
    products = 0

    def outputs(weights):
        nonlocal products
        products += 1
        return kernel @ weights

    assert followed(outputs, never, 200).distance > 0
    assert products < 700
