"""Differences by rounding are none, others stay, and nothing overflows in silence."""

import itertools

import numpy as np
import pytest

from trak.errors import InputError
from trak.evaluation import (
    bank_from_indices,
    group_scores,
    lds,
    lds_difference,
    leave_one_out,
    mislabelled,
    noise_ceiling,
    read_trak_bank,
    removal_curve_from_outputs,
)
from trak.evaluation.rounding import mean_over_seeds, without_rounding

TENTHS = np.array([0.1, 0.2, 0.3, 0.7, 1.9, -0.4])


def rows_in_all_orders():
    return np.array(list(itertools.permutations(TENTHS)))


def test_sums_of_the_same_terms_in_any_order_are_equal():
    terms = rows_in_all_orders()
    sums = np.array([sum(row) for row in terms])[:, None]
    assert len(np.unique(sums)) > 1  # or the test tests nothing
    scale = np.abs(terms).sum(axis=1)[:, None]
    both = np.r_[sums, sums + 1e-12]
    found = without_rounding(both, np.r_[scale, scale])
    assert len(np.unique(found)) == 2
    assert (found[: len(sums)] < found[len(sums) :]).all()


def test_other_numbers_stay_as_they_are():
    rng = np.random.default_rng(0)
    columns = rng.normal(size=(200, 3)) * [1, 1e-200, 1e200]
    assert without_rounding(columns, np.abs(columns)) is columns
    # an entry of large terms says nothing about the others
    columns[7, 0], scale = 1e20, np.abs(columns)
    scale[7, 0] = 1e20
    columns[8, 0] = columns[9, 0] + 1e-12
    np.testing.assert_array_equal(without_rounding(columns, scale), columns)


def test_equal_predictions_share_a_rank_in_the_lds():
    """Every subset holds two of the six kinds of example, in another place."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.permutation(TENTHS) for _ in range(40)])
    kinds = np.searchsorted(np.sort(TENTHS), scores)
    masks = np.array([
        [rng.random() < (0.5 if kind in pair else 0) for kind in kinds]
        for pair in itertools.combinations(range(6), 2)
        for _ in range(8)
    ])
    # integers tell which predictions are equal
    whole = (10 * scores).round()
    assert len(np.unique(masks @ whole)) < len(np.unique(masks @ scores))
    outputs = rng.normal(size=(len(masks), 4)) + (masks @ whole)[:, None] / 40
    found, expected = (
        lds(np.repeat(s[:, None], 4, axis=1), masks, outputs, draws=20)
        for s in (scores, whole)
    )
    np.testing.assert_array_equal(found.per_target, expected.per_target)
    assert found.jointly == expected.jointly


def in_other_orders():
    """Outputs `[subsets, seeds, 2]`; the first target's differ in their order only."""
    terms = rows_in_all_orders()[::30]
    assert len(np.unique(terms.mean(axis=1))) > 1
    varied = np.random.default_rng(0).normal(size=terms.shape)
    return np.stack([terms, varied], axis=2)


def test_outputs_that_differ_by_the_order_of_seeds_are_constant():
    outputs = in_other_orders()
    count = len(outputs)
    scores = np.random.default_rng(1).normal(size=(count, 2))
    constant = r"constant for 1 of 2 targets \(the first: 0\)"
    with pytest.raises(InputError, match="outputs of the subsets must differ.*" + constant):
        lds(scores, np.eye(count), outputs)
    with pytest.raises(InputError, match="outputs of the subsets must differ.*" + constant):
        lds_difference(scores, -scores, np.eye(count), outputs)
    with pytest.raises(InputError, match="Outputs without .* must differ.*" + constant):
        leave_one_out(scores, outputs)
    with pytest.raises(InputError, match="outputs of the subsets must differ.*" + constant):
        noise_ceiling(outputs)


def test_means_that_differ_by_the_order_of_seeds_share_a_rank():
    outputs = in_other_orders()[:, :, :1]
    outputs[::2] += 1  # two groups
    assert len(np.unique(mean_over_seeds(outputs))) == 2
    scores = np.arange(float(len(outputs)))[:, None]
    groups = 1.0 - np.arange(len(outputs))[:, None] % 2
    found, expected = (leave_one_out(scores, o, draws=5) for o in (outputs, groups))
    assert found.spearman.value == expected.spearman.value


def test_one_seed_is_taken_at_its_word():
    outputs = 1 + np.finfo(float).eps * np.arange(5)[:, None, None]
    np.testing.assert_array_equal(mean_over_seeds(outputs), outputs[:, 0])


HUGE = np.finfo(np.float64).max


@pytest.mark.parametrize("value", [HUGE, -HUGE, HUGE / 20])
def test_numbers_whose_sums_would_overflow_are_refused(value):
    rng = np.random.default_rng(0)
    masks, scores = np.eye(6), rng.normal(size=(6, 4))
    outputs = rng.normal(size=(6, 3, 4))
    large = outputs.copy()
    large[2] = value
    big_scores = scores.copy()
    big_scores[:2] = value
    for call in (
        lambda: lds(scores, masks, large),
        lambda: noise_ceiling(large),
        lambda: leave_one_out(scores, large),
        lambda: removal_curve_from_outputs([0.1], large[2], large[2][None]),
        lambda: lds(big_scores, masks, outputs),
        lambda: mislabelled(np.full(99, value), np.arange(99) < 3),
    ):
        with pytest.raises(InputError, match="reaches .*e\\+30[678], and sums.*Divide"):
            call()
    lds(scores * 1e300, masks, outputs * 1e300, draws=5)


def test_what_float64_does_not_hold_is_refused():
    wide = np.ones((4, 3), np.longdouble)
    with np.errstate(over="ignore"):  # where longdouble is float64
        wide[2, 1] = np.longdouble(HUGE) * 2
    with pytest.raises(
        InputError, match="scores must be finite, got inf at .* 2, target 1"
    ):
        group_scores(wide, np.eye(4))


@pytest.mark.parametrize("value", [3.5e38, 1e300])
def test_what_float32_does_not_hold_is_named_by_the_readers(value, tmp_path):
    outputs = np.ones((4, 3))
    outputs[2, 1] = value
    with pytest.raises(InputError, match=r"outputs are kept in float32.*\(2, 0, 1\)"):
        bank_from_indices(outputs, [[0], [1], [2], [0]], 3)
    np.save(tmp_path / "margins.npy", outputs)
    np.save(tmp_path / "masks.npy", np.eye(4))
    with pytest.raises(InputError, match=r"margins are kept in float32.*\(2, 1\)"):
        read_trak_bank(tmp_path / "masks.npy", tmp_path / "margins.npy")


def test_a_chain_of_small_steps_is_no_tie():
    eps = np.finfo(np.float64).eps
    sums = (1 + 40 * eps * np.arange(50))[:, None]  # neighbours are within 64 eps
    scale = np.ones_like(sums)
    np.testing.assert_array_equal(without_rounding(sums, scale), sums)
    both = np.concatenate([sums, 7 + eps * np.arange(3)[:, None]])
    found = without_rounding(both, np.ones_like(both))
    np.testing.assert_array_equal(found[:50], sums)
    assert len(np.unique(found[50:])) == 1
