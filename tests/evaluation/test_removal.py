"""Removal curves: a world whose outputs are sums of effects, so that all is known."""

import numpy as np
import pytest
import torch

from trak.errors import InputError, InputTypeError
from trak.evaluation import removal_curve, removal_curve_from_outputs, removed_indices

N, M = 20, 3
EFFECTS = np.random.default_rng(0).normal(size=(N, M))


def train(indices, seed):
    return indices.copy(), seed


def evaluate(model):
    indices, seed = model
    return EFFECTS[indices].sum(axis=0) + 10 * seed  # what a seed does cancels


def without(scores, count, sign):
    """The change for each target when its own top is left out."""
    return [
        -EFFECTS[np.argsort(-sign * scores[:, j], kind="stable")[:count], j].sum()
        for j in range(M)
    ]


def test_each_target_loses_its_own_examples():
    calls = []
    curve = removal_curve(
        EFFECTS,
        train,
        evaluate,
        [0.1, 0.25],
        seeds=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    for row, count in enumerate((2, 5)):
        np.testing.assert_allclose(curve.top.change[row], without(EFFECTS, count, 1))
        np.testing.assert_allclose(curve.bottom.change[row], without(EFFECTS, count, -1))
    assert (curve.top.change < 0).all()
    assert (curve.bottom.change > 0).all()
    assert (curve.top.mean < curve.random.mean).all()
    assert (curve.random.mean < curve.bottom.mean).all()
    np.testing.assert_allclose(curve.top.mean, curve.top.change.mean(axis=1))
    assert (curve.top.low < curve.top.mean).all()
    assert (curve.top.mean < curve.top.high).all()
    total = 2 * (1 + 2 * (2 * M + 1))
    assert calls == [(j, total) for j in range(1, total + 1)]


def test_random_removals_are_seeded_and_differ_by_training_seed():
    options = {"seeds": 2, "sides": ("top", "random")}
    one, same, other = (
        removal_curve(EFFECTS, train, evaluate, [0.25], seed=s, **options)
        for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.random.change, same.random.change)
    assert (one.random.change != other.random.change).all()
    sets = [removed_indices(EFFECTS, 0.25, "random", seed=[0, r])[0] for r in (0, 1)]
    assert sets[0].tolist() != sets[1].tolist()
    expected = np.mean([-EFFECTS[s].sum(axis=0) for s in sets], axis=0)
    np.testing.assert_allclose(one.random.change[0], expected)


def test_together_removes_the_same_for_all():
    calls = []
    curve = removal_curve(
        EFFECTS,
        train,
        evaluate,
        [0.2],
        together=True,
        sides=("top",),
        progress=lambda *numbers: calls.append(numbers),
    )
    worst = np.argsort(-EFFECTS.sum(axis=1))[:4]
    np.testing.assert_allclose(curve.top.change[0], -EFFECTS[worst].sum(axis=0))
    assert curve.bottom is None
    assert curve.random is None
    assert calls == [(1, 2), (2, 2)]


def test_plain_arrays_give_the_same_curve():
    full = EFFECTS.sum(axis=0)[None] + np.array([[0.0], [1.0]])
    top = np.stack([full + np.array(without(EFFECTS, c, 1)) for c in (2, 5)])
    curve = removal_curve_from_outputs([0.1, 0.25], full, top)
    expected = removal_curve(EFFECTS, train, evaluate, [0.1, 0.25], sides=["top"])
    np.testing.assert_allclose(curve.top.change, expected.top.change)
    np.testing.assert_allclose(curve.top.low, expected.top.low)
    assert curve.bottom is None
    once = removal_curve_from_outputs([0.1, 0.25], full, top.mean(axis=1))
    np.testing.assert_allclose(once.top.change, curve.top.change)


def test_removed_indices_take_the_first_of_equals():
    scores = np.array([[0.0], [1], [1], [1], [-1]])
    for side, expected in (("top", [1, 2]), ("bottom", [0, 4])):
        assert removed_indices(scores, 0.4, side)[0].tolist() == expected
    drawn = removed_indices(scores, 0.4, "random")
    assert [len(d) for d in drawn] == [2]


def test_bad_input_is_refused():
    for fraction in (-0.2, np.nan, np.inf, "a", None, [0.1, 0.2]):
        with pytest.raises(InputError, match="fraction must be a finite number"):
            removed_indices(EFFECTS, fraction, "top")
    for side in ("Top", "", None, EFFECTS, ["top"]):
        with pytest.raises(InputError, match="side must be one of"):
            removed_indices(EFFECTS, 0.1, side)
    for seed in (-1, 1.5, "3", None):
        with pytest.raises(InputError, match="seed must be an integer"):
            removed_indices(EFFECTS, 0.1, "random", seed=seed)
    one, *others = (
        removed_indices(EFFECTS, 0.1, "random", seed=s)
        for s in (3, np.int64(3), [3], np.array(3))
    )
    for other in others:
        np.testing.assert_array_equal(other, one)
    for fraction, count in ((0.0, 0), (1.0, 20), (0.01, 0)):
        with pytest.raises(InputError, match=f"removes {count} of 20"):
            removed_indices(EFFECTS, fraction, "top")
    with pytest.raises(InputError, match="removes 0 of 20"):
        removal_curve(EFFECTS, train, evaluate, [0.01])
    for fraction in (0.0, 1.0):  # nothing to train, though there may be outputs
        with pytest.raises(InputError, match="leave some and remove some"):
            removal_curve(EFFECTS, train, evaluate, [0.1, fraction])
    for fraction in (-0.1, 3):
        message = f"between 0 and 1, got {fraction:g} at fraction 1"
        with pytest.raises(InputError, match=message):
            removal_curve(EFFECTS, train, evaluate, [0.1, fraction])
        with pytest.raises(InputError, match=message):
            removal_curve_from_outputs([0.1, fraction], np.ones((1, 3)), np.ones((2, 3)))
    trained = []
    for options in ({"level": 95}, {"draws": 0}, {"seed": 1.5}, {"seed": -1}):
        with pytest.raises(InputError):
            removal_curve(
                EFFECTS, trained.append, evaluate, [0.1], sides=["top"], **options
            )
    for functions, message in (
        (
            {"train": None},
            r"train must be a function, called as train\(indices, seed\), got N",
        ),
        ({"evaluate": [1.0]}, r"evaluate must be a function, .* got \[1.0\]"),
        ({"progress": 3}, r"progress must be a function, .*\(done, total\), got 3"),
    ):
        given = {"train": trained.append, "evaluate": evaluate, **functions}
        with pytest.raises(InputTypeError, match=message):
            removal_curve(EFFECTS, fractions=[0.1], **given)
    assert not trained
    for together in ("no", None, 2, EFFECTS):
        with pytest.raises(InputTypeError, match="together must be True or False"):
            removal_curve(EFFECTS, train, evaluate, [0.1], together=together)
    several = (["bottom"], ["top", "left"], "top", b"top", None, torch.ones(2), [EFFECTS])
    for sides in several:
        with pytest.raises(InputError, match="with 'top'"):
            removal_curve(EFFECTS, train, evaluate, [0.1], sides=sides)
    with pytest.raises(InputError, match="length must be 3, as in the columns of scores"):
        removal_curve(EFFECTS, train, lambda model: evaluate(model)[:2], [0.1])
    with pytest.raises(InputError, match="evaluate returned must be finite, got nan"):
        removal_curve(EFFECTS, train, lambda model: evaluate(model) * np.nan, [0.1])
    with pytest.raises(InputError, match="top must be given"):
        removal_curve_from_outputs([0.1], np.ones((1, 3)), None)
    with pytest.raises(InputError, match="rows of top must be 1"):
        removal_curve_from_outputs([0.1], np.ones((1, 3)), np.ones((2, 3)))
    with pytest.raises(InputError, match="columns of random must be 3"):
        removal_curve_from_outputs([0.1], np.ones((1, 3)), np.ones((1, 3)), None, [[1.0]])
