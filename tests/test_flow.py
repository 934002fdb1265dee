"""How long a linear model was trained without any ridge, told by following its training."""

import pytest
import torch

from trak.score_computers import flow
from trak.score_computers.flow import followed, weaker
from trak.score_computers.stationarity import LEAST, training_of


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


def amounts_to(kernel, added, loss, counts):
    """`lambda` at which `lambda w = Phi^T q` holds along `w`, in units of `q (1 - q)`."""
    pulled = kernel @ (counts * added)
    ridge = (counts * loss) @ pulled / ((counts * added) @ pulled)
    return float(ridge / (loss * (1 - loss) * counts).mean())


def ended(time, counts=None):
    rows = hard_rows()
    kernel = rows @ rows.T
    counts = torch.ones(200, dtype=torch.float64) if counts is None else counts
    added, loss = small_steps(kernel, counts, time)
    return kernel, loss, counts, amounts_to(kernel, added, loss, counts)


def test_a_long_training_amounts_to_a_small_ridge():
    kernel, loss, counts, expected = ended(100.0)
    assert 0.03 < expected < 0.15
    assert weaker(0.3, kernel, loss, counts, 1.0) == pytest.approx(expected, rel=0.15)


def test_it_is_never_next_to_nothing():
    kernel, loss, counts, expected = ended(400.0)
    assert expected < 0.028
    assert weaker(0.3, kernel, loss, counts, 1.0) == pytest.approx(0.03)


def test_a_training_like_that_of_networks_stays_what_it_is():
    kernel, loss, counts, expected = ended(11.0)
    assert 0.25 < expected < 0.29
    assert weaker(0.3, kernel, loss, counts, 1.0) == 0.3


def test_what_is_known_to_be_weaker_stays():
    kernel, loss, counts, expected = ended(100.0)
    assert weaker(expected / 2, kernel, loss, counts, 1.0) == expected / 2


def test_how_much_examples_count_changes_only_the_time():
    even = torch.ones(200, dtype=torch.float64)
    kernel, loss, counts, expected = ended(100.0)
    thrice = weaker(0.3, kernel, loss, 3 * counts, 1.0)
    assert thrice == pytest.approx(weaker(0.3, kernel, loss, even, 1.0), rel=1e-3)
    lots = torch.Generator().manual_seed(1)
    uneven = torch.rand(200, generator=lots, dtype=torch.float64) * 3 + 0.1
    kernel, loss, counts, expected = ended(80.0, uneven)
    assert expected < 0.15
    assert weaker(0.3, kernel, loss, counts, 1.0) == pytest.approx(expected, rel=0.15)


def test_a_sample_stands_for_the_whole():
    rows = torch.cat([hard_rows()] * 2)  # every example twice
    kernel = rows @ rows.T
    counts = torch.ones(400, dtype=torch.float64)
    added, loss = small_steps(kernel, counts, 50.0)
    expected = amounts_to(kernel, added, loss, counts)
    assert expected < 0.15
    whole = weaker(0.3, kernel, loss, counts, 1.0)
    half = weaker(0.3, kernel[:200, :200], loss[:200], counts[:200], 0.5)
    assert whole == pytest.approx(expected, rel=0.15)
    assert half == pytest.approx(whole, rel=0.02)


def test_loss_weights_that_no_flow_has_say_nothing():
    kernel, loss, counts, _ = ended(100.0)
    lots = torch.Generator().manual_seed(1)
    mixed = loss[torch.randperm(200, generator=lots)]
    assert weaker(0.3, kernel, mixed, counts, 1.0) == 0.3


def test_wrong_labels_pull_back_as_no_ridge_does():
    rng = torch.Generator().manual_seed(0)
    rows = 1 + 0.3 * torch.randn(200, 4, generator=rng, dtype=torch.float64)
    rows[:20] *= -1  # whose labels are wrong
    kernel, even = rows @ rows.T, torch.ones(200, dtype=torch.float64)
    kernel = kernel / kernel.diagonal().mean()
    outputs = torch.where(rows.mean(dim=1) > 0, 3.0, -3.0).double()
    loss = torch.sigmoid(-outputs)  # beyond what the linearized model comes to
    found = followed(kernel.float().__matmul__, loss.float())
    assert found.distance < 0.1 * float(loss.var())
    assert float((kernel @ found.added.double()) @ loss) < 0
    assert weaker(0.3, kernel, loss, even, 1.0) == 0.3


def test_equal_loss_weights_are_no_error():
    kernel, _, counts, _ = ended(1.0)
    half = torch.full((200,), 0.5, dtype=torch.float64)
    assert weaker(0.3, kernel, half, counts, 1.0) == 0.3


def test_the_training_has_it():
    kernel, loss, _, expected = ended(100.0)
    found = training_of(kernel, kernel @ loss, loss, logistic=True)
    steep = float((loss * (1 - loss)).mean())
    assert found.ridge / steep == pytest.approx(expected, rel=0.15)
    assert found.ridge / steep < LEAST / 2


def test_a_training_that_came_to_rest_is_not_followed(monkeypatch):
    kernel, loss, _, _ = ended(100.0)

    def never(*_):
        pytest.fail("stationarity says enough")

    monkeypatch.setattr("trak.score_computers.stationarity.weaker", never)
    outputs = (1 / loss - 1).log()
    pull = kernel @ loss
    for ridge in (0.35, 1.0, 4.0):  # a pull that a ridge explains
        held = ridge * 2.5 * float((loss * (1 - loss)).mean()) * (outputs - outputs.mean())
        training_of(kernel, held + pull.mean(), loss, logistic=True)


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
