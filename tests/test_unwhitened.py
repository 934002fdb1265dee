"""The ridge of whitened rows is told from examples that are not whitened."""

import numpy as np
import pytest
import torch
from tests.test_auto_ridge import chosen
from tests.test_linearized_training import logistic

from trak.errors import StoreCorruptedError
from trak.score_computers.auto_ridge import BY_STRENGTH, USUAL
from trak.score_computers.curvature import roots, weighted
from trak.score_computers.unwhitened import SAMPLE, Chosen, Unwhitened


def unwhitened(rows, q, size, seed=0):
    kept = Chosen(seed)
    for part, weights in zip(rows.split(size), q.split(size), strict=True):
        kept.add(part, weights[:, None])
    return kept.found()


@pytest.mark.parametrize("curvature", [False, True])
def test_whitened_rows_are_judged_by_unwhitened_ones(curvature):
    rows, q = logistic(n=120)
    plain = weighted(rows, roots(q)) if curvature else rows
    expected = chosen(plain, loss=q, curvature=curvature)
    found = chosen(
        torch.randn(120, 5, dtype=torch.float64),
        loss=q,
        curvature=curvature,
        strength=0.4,
        unwhitened=[unwhitened(rows, q, 50)],
    )
    assert found == pytest.approx((1 + BY_STRENGTH * 0.4) * expected, rel=1e-3)


def test_every_process_has_a_say():
    rows, q = logistic(n=400)
    few = unwhitened(rows[:60], q[:60], 20)
    many = unwhitened(rows[100:340] * torch.linspace(1, 9, 12), q[100:340], 60)
    settings = {"loss": q, "strength": 0.5}
    one = chosen(rows, unwhitened=[few], **settings)
    other = chosen(rows, unwhitened=[many], **settings)
    assert abs(other / one - 1) > 0.1
    both = chosen(rows, unwhitened=[few, many], **settings)
    assert both == pytest.approx(one**0.2 * other**0.8)
    assert chosen(rows, unwhitened=[many], **settings) == other


def test_whitened_rows_of_which_too_little_is_known():
    rows, q = logistic(n=120)
    usual = pytest.approx(1.15 * USUAL * (1 + BY_STRENGTH * 0.5))
    settings = {"loss": q, "strength": 0.5}
    assert chosen(rows, **settings) == usual
    assert chosen(rows, unwhitened=[unwhitened(rows[:30], q[:30], 9)], **settings) == usual
    zeros = unwhitened(torch.zeros_like(rows), q, 50)
    assert chosen(rows, unwhitened=[zeros], **settings) == usual
    assert unwhitened(rows * torch.nan, q, 50) is None
    assert Chosen().found() is None


def test_kept_examples_do_not_depend_on_the_batches():
    rows, q = logistic(n=1400)
    found = [unwhitened(rows, q, size) for size in (1400, 100, 7)]
    for one in found[1:]:
        torch.testing.assert_close(one.kernel, found[0].kernel, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.loss, found[0].loss, rtol=0, atol=0)
    whole = unwhitened(rows[:900], q[:900], 100)
    torch.testing.assert_close(whole.loss, q[:900].double(), rtol=0, atol=0)


def test_examples_that_are_kept_are_a_sample_of_all():
    rows, q = logistic(n=2000)
    found = unwhitened(rows, q, 37)
    numbers = [int((q == value).nonzero()) for value in found.loss]
    assert len(set(numbers)) == SAMPLE
    quarters = np.histogram(numbers, bins=4, range=(0, 2000))[0]
    assert quarters.min() > 100
    own = rows[numbers]
    torch.testing.assert_close(found.kernel, (own @ own.T).float())
    torch.testing.assert_close(found.pull, own @ (rows.T @ q) / 2000)
    again = unwhitened(rows, q, 37)
    assert torch.equal(again.kernel, found.kernel)
    whole = unwhitened(rows[:50], q[:50], 7)
    assert torch.equal(whole.loss, q[:50])


def test_examples_that_are_kept_survive_a_file(tmp_path):
    rows, q = logistic(n=60)
    found = unwhitened(rows, q, 60)
    arrays = found.arrays()
    again = Unwhitened.of_arrays(arrays, tmp_path)
    for part in ("kernel", "pull", "loss"):
        assert torch.equal(getattr(again, part), getattr(found, part))
    assert Unwhitened.of_arrays({"count": np.array(3)}, tmp_path) is None
    for broken in (
        {name: array for name, array in arrays.items() if not name.endswith("pull")},
        {**arrays, "unwhitened/loss": q.numpy()[:9]},
    ):
        with pytest.raises(StoreCorruptedError, match="call fit_whitening again"):
            Unwhitened.of_arrays(broken, tmp_path)


@pytest.mark.parametrize("counted", [False, True])
def test_examples_alone_pull_at_each_other_only(counted):
    rows, q = logistic(n=90)
    counts = torch.linspace(0.5, 2, 90, dtype=torch.float64)
    kept = Chosen()
    kept.add(rows, torch.stack([q, counts], 1) if counted else q[:, None])
    found, taken = kept.found().alone(30), torch.arange(30) * 3
    own = rows[taken]
    torch.testing.assert_close(found.kernel, (own @ own.T).float())
    torch.testing.assert_close(found.pull, own @ (own.T @ q[taken]) / 30)
    assert torch.equal(found.loss, q[taken])
    assert torch.equal(found.counts, counts[taken]) if counted else found.counts is None
    every = kept.found().alone(1000)
    assert torch.equal(every.loss, q)
