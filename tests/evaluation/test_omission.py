"""Leave-one-out: against SciPy, and bad input."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from trak.errors import InputError, InputTypeError
from trak.evaluation import leave_one_out


def world(n=30, m=4, seeds=2):
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(n, m)) ** 3
    noise = rng.normal(size=(n, seeds, m))
    return effects, 5 - effects[:, None] + noise  # an example that helps is missed


def test_correlations_are_scipys_with_the_sign_of_the_effect():
    scores, without = world()
    found = leave_one_out(scores, without, draws=100)
    for name, oracle in (("pearson", pearsonr), ("spearman", spearmanr)):
        each = [oracle(scores[:, j], -without.mean(1)[:, j]).statistic for j in range(4)]
        one = getattr(found, name)
        np.testing.assert_allclose(one.per_target, each, atol=1e-12)
        assert one.value == pytest.approx(np.mean(each))
        assert one.value > 0.5
        assert one.jointly.low < one.over_examples.low < one.value < one.jointly.high
    assert found.pearson.value != found.spearman.value
    assert found.level == 0.95


@pytest.mark.parametrize("scale", [1e-170, 1e-90, 1e170])
def test_correlations_do_not_depend_on_units(scale):
    scores, without = world()
    expected = leave_one_out(scores, without, draws=10)
    found = leave_one_out(scores * scale, without * min(scale, 1.0), draws=10)
    assert found.pearson.value == pytest.approx(expected.pearson.value, rel=1e-9)
    assert found.pearson.jointly.low == pytest.approx(expected.pearson.jointly.low)


def test_some_examples_in_any_order():
    scores, without = world()
    rows = np.array([7, 3, 20, 21, 5])
    found = leave_one_out(scores, without[rows], indices=rows, draws=5)
    expected = [
        spearmanr(scores[rows, j], -without[rows].mean(1)[:, j])[0] for j in range(4)
    ]
    np.testing.assert_allclose(found.spearman.per_target, expected, atol=1e-12)
    plain = leave_one_out(scores, without.mean(axis=1)[rows], indices=rows, draws=5)
    np.testing.assert_allclose(plain.pearson.per_target, found.pearson.per_target)


@pytest.mark.parametrize(
    ("rows", "indices", "message"),
    [
        (slice(5), None, "rows of outputs_without must be 30, as in scores, got 5"),
        (slice(5), [0, 1, 2, 3], "number of indices must be 5"),
        (slice(5), [0, 1, 2, 3, 30], "integers from 0 to 29"),
        (slice(5), [0, 1, 2, 3, -1], "integers from 0 to 29"),
        (slice(5), [0, 1, 2, 3, 3.5], "integers from 0 to 29"),
        (slice(5), [0, 1, 2, 3, 3], "an example twice"),
        (slice(5), [0, 1, [2], 3, 4], "indices is no array"),
        (slice(5), [0, 1, 2, 3, 1e300], "integers from 0 to 29"),
        (slice(2), [0, 1], "at least 3 removed examples, got 2"),
    ],
)
def test_bad_input_is_refused(rows, indices, message):
    scores, without = world()
    with pytest.raises(InputError, match=message):
        leave_one_out(scores, without[rows], indices=indices)


def test_a_mask_is_no_list_of_examples():
    scores, without = world()
    with pytest.raises(InputTypeError, match="truth values.*numpy.flatnonzero"):
        leave_one_out(scores, without[:5], indices=np.arange(30) < 5)


def test_constant_columns_and_shapes_are_refused():
    scores, without = world()
    with pytest.raises(InputError, match="columns of scores must be 4"):
        leave_one_out(scores[:, :3], without)
    scores[:, 1] = 2.0
    with pytest.raises(InputError, match="constant for 1 of 4 targets"):
        leave_one_out(scores, without)
    with pytest.raises(
        InputError, match="Outputs without the removed examples must differ"
    ):
        leave_one_out(world()[0], np.ones((30, 4)))
