"""The ridge that is chosen, and ridges by name."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import cases, runs

from trak.arguments import as_ridge
from trak.errors import InputError, StoreCorruptedError
from trak.evaluation import lds
from trak.score_computers import BasicScoreComputer, RidgeScoreComputer
from trak.score_computers.auto_ridge import (
    BY_CURVATURE,
    BY_STRENGTH,
    USUAL,
    _smaller,
    best_ridge,
    noise_factor,
    relative_ridge,
)
from trak.score_computers.curvature import roots, weighted
from trak.score_computers.retraining import retrained
from trak.score_computers.ridge_sample import Situation, sampled
from trak.score_computers.stationarity import EARLY, LEAST, MOST, training_of
from trak.score_computers.unwhitened import SAMPLE, Chosen, Unwhitened


def chosen(rows, **situation):
    return relative_ridge(rows, Situation(**situation))


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


def test_what_is_known_beforehand():
    one = noise_factor(90, Situation())
    assert one == pytest.approx(1.15)
    assert noise_factor(90, Situation(checkpoints=5)) == pytest.approx(0.83)
    narrow = noise_factor(90, Situation(columns=10))
    assert narrow > 2 * one
    assert noise_factor(90, Situation(columns=10, checkpoints=8)) < narrow
    assert noise_factor(90, Situation(columns=10**6)) == pytest.approx(one, rel=1e-3)


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


@pytest.mark.parametrize("ridge", [0.02, 5.0])
def test_retraining_of_the_linearized_classifier(ridge):
    rows, _ = logistic(n=60)
    found = retrained(rows @ rows.T, ridge)
    for mask, outputs in zip(found.masks, found.outputs, strict=True):
        weights = fitted(rows[found.train[mask.bool()]], ridge, steps=200)
        torch.testing.assert_close(
            outputs, rows[found.held] @ weights, rtol=1e-3, atol=1e-3
        )


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
    for ridge, bias, bound in ((1e-3, 0.0, LEAST), (1e6, 1.0, MOST)):
        rows = torch.cat([logistic()[0], torch.full((300, 1), bias).double()], dim=1)
        q = torch.sigmoid(-rows @ fitted(rows, ridge))
        kernel = rows @ rows.T
        unit = kernel.diagonal().mean()
        training = training_of(kernel / unit, kernel @ q / unit, q)
        steep = float((q * (1 - q)).mean())
        assert training.ridge / steep == pytest.approx(bound)


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


@pytest.mark.parametrize(
    ("offset", "common", "early"),
    [(-2.2, 1.0, True), (2.2, 1.0, False), (-2.2, 0.0, False)],
)
def test_a_training_that_had_hardly_begun(offset, common, early):
    # most are wrong, and all are pulled the same way by features that they share
    rows = torch.randn(240, 30, generator=torch.Generator().manual_seed(0)).double()
    rows = rows * 0.8 ** torch.arange(30) + common
    kernel = rows @ rows.T
    kernel = kernel / kernel.diagonal().mean()
    outputs = torch.full((240,), offset).double()
    for _ in range(3):  # steps of gradient descent
        outputs = outputs + 1e-3 * kernel @ torch.sigmoid(-outputs)
    q = torch.sigmoid(-outputs)
    ridge = training_of(kernel, kernel @ q, q).ridge / float((q * (1 - q)).mean())
    assert (ridge == pytest.approx(EARLY)) == early
    assert early or ridge <= MOST


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


def test_growth_is_like_the_rest_after_a_short_training():
    trained, kernel, _ = two_classes(
        lambda rng: 10 * (1 + 4 * torch.rand(200, generator=rng))
    )
    torch.testing.assert_close(trained.kernel, kernel, rtol=0, atol=0.2)


def test_growth_that_is_held_back_stays_so():
    def ratios(rng):
        found = 1 + 4 * torch.rand(200, generator=rng)
        found[-1] = 100  # of the leading direction
        return found

    trained, kernel, leading = two_classes(ratios)
    before, after = (float(leading @ each @ leading) for each in (kernel, trained.kernel))
    assert after < 0.2 * before


def play(rows, targets, ridge, subsets=40):
    """Outputs of logistic regressions that were really trained on halves."""
    rng = np.random.default_rng(1)
    masks = np.zeros((subsets, len(rows)), dtype=bool)
    outputs = np.zeros((subsets, 1, len(targets)))
    for mask, answer in zip(masks, outputs, strict=True):
        mask[rng.permutation(len(rows))[: len(rows) // 2]] = True
        answer[0] = targets @ fitted(rows[torch.from_numpy(mask)], ridge, steps=40)
    return masks, outputs


@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("ridge", [1.0, 60.0])
def test_it_is_as_good_as_the_best_of_a_sweep(ridge, curvature):
    rows, _ = logistic(n=240, k=60, seed=3)
    targets, rows = rows[:40], rows[40:]
    q = torch.sigmoid(-rows @ fitted(rows, ridge))
    masks, outputs = play(rows, targets, ridge)

    def quality(lambda_reg):
        computer = RidgeScoreComputer(lambda_reg=lambda_reg, curvature=curvature)
        kept = computer.finalize(rows, Situation(loss=q))
        scores = computer.scorer(kept, rows, targets, q)(0, len(rows)) * q[:, None]
        return lds(scores.numpy(), masks, outputs, draws=2).value

    swept = {f"{r:.3g}x": quality(f"{r:.3g}x") for r in np.logspace(-2, 3, 25)}
    assert quality(None) >= 0.97 * max(swept.values())
    assert min(swept.values()) < 0.9 * max(swept.values())  # so it is worth choosing


def test_weighted_rows_are_played_without_their_weights():
    rows, q = logistic(n=100)
    computer = RidgeScoreComputer(curvature=True)
    plain = sampled(rows, Situation(loss=q))
    other = sampled(computer.weighted(rows, q), Situation(loss=q, curvature=True))
    torch.testing.assert_close(other.kernel, plain.kernel)
    torch.testing.assert_close(other.pull, plain.pull)
    torch.testing.assert_close(other.roots[:, None], roots(q))


def test_a_sample_of_many_rows_stands_for_all():
    rows, q = logistic(n=2000)
    found = sampled(rows, Situation(loss=q))
    assert found.share == pytest.approx(0.3)
    assert found.kernel.shape == (600, 600)
    own = (
        torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:600].sort().values
    )
    unit = rows[own].square().sum(dim=1).mean()
    torch.testing.assert_close(found.pull, rows[own] @ (rows.T @ q) / unit)
    again = chosen(rows, loss=q)
    assert again == chosen(rows, loss=q)


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


def test_a_squared_loss_is_played_without_weights():
    rows, q = logistic(n=120)
    loss = q / q.max() * 0.2 + 0.8  # most are wrong: no outputs of a logistic model
    sample = sampled(
        RidgeScoreComputer(curvature=True).weighted(rows, loss),
        Situation(loss=loss, curvature=True),
    )
    training = training_of(sample.kernel, sample.pull, sample.loss)
    assert training.answers is not None
    even = replace(sample, roots=torch.ones_like(sample.roots))
    assert best_ridge(sample, training) == best_ridge(even, training)


@pytest.mark.parametrize("loss", [None, torch.zeros(50)])
def test_where_nothing_is_known(loss):
    rows = torch.randn(50, 8, dtype=torch.float64)
    assert chosen(rows, loss=loss) == pytest.approx(1.15 * USUAL)
    curved = 1.15 * USUAL * (1 if loss is None else BY_CURVATURE)
    assert chosen(rows, loss=loss, curvature=True) == pytest.approx(curved)
    squared = torch.linspace(-1, 2, 50)
    one, other = (chosen(rows, loss=squared, curvature=c) for c in (False, True))
    assert one == other
    assert chosen(torch.zeros(50, 8), loss=torch.rand(50)) == pytest.approx(1.15 * USUAL)
    assert chosen(rows[:20], loss=torch.rand(20)) == pytest.approx(1.15 * USUAL)


@pytest.mark.parametrize(
    "loss",
    [
        torch.ones(50),
        torch.linspace(-3, 3, 50),
        torch.full((50, 1), 5.0),
        1e-30 * torch.ones(50),
    ],
)
def test_any_loss_weights_lead_to_a_ridge(loss):
    rows = torch.randn(50, 8, dtype=torch.float64)
    assert 0.01 < chosen(rows, loss=loss) < 5000


def test_it_is_the_default_and_recorded(tmp_path):
    model, train, targets = runs.data("mlp", 30, 4)
    states = cases.checkpoints("mlp", 2)
    traker = runs.make_traker(model, 30, tmp_path, lambda_reg="auto")
    found = runs.whole_run(traker, train, targets, states)
    info = traker.saver.load_factor(1)[1]
    assert info["lambda_reg"] is None
    digests = {str(i): traker.saver.checkpoint_digest(i) for i in range(2)}
    assert info["together"] == digests
    unit = info["mean_squared_norm"]
    assert info["ridge"] == pytest.approx(info["auto"] * unit)
    rows = traker.saver.train_rows(1)
    expected = chosen(
        torch.from_numpy(rows.array("grads")),
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


def test_each_has_its_own_ridge_where_each_is_finalized_alone(tmp_path, caplog):
    model, train, targets = runs.data("mlp", 60, 4)
    states = cases.checkpoints("mlp", 3)
    found = {}
    for order in ([0, 1, 2], [2, 0, 1]):
        folder = tmp_path / str(order)
        for model_id in order:
            traker = runs.make_traker(model, 60, folder, lambda_reg="auto")
            runs.featurize(traker, train, states[model_id], model_id)
            traker.finalize_features(model_ids=[model_id])
        for model_id, state in enumerate(states):
            runs.score(traker, targets, state, model_id)
        caplog.clear()
        found[str(order)] = traker.finalize_scores("exp")
        assert "finalized in several calls" in caplog.text
    np.testing.assert_array_equal(*found.values())
    traker.finalize_features()
    infos = [traker.saver.load_factor(i)[1] for i in range(3)]
    assert [list(info["together"]) for info in infos] == [["0", "1", "2"]] * 3
    assert len({info["auto"] for info in infos}) == 1
    caplog.clear()
    traker.finalize_scores("exp")
    assert "several calls" not in caplog.text


@pytest.mark.parametrize(("left", "expected"), [(0.1, 1.0), (0.22, 1.0), (0.3, 0.5378)])
def test_many_directions_make_a_smaller_ridge(left, expected):
    spectrum = torch.tensor([1.0] * 100, dtype=torch.float64)
    assert _smaller(spectrum, (1 - left) / left) == pytest.approx(expected, rel=1e-3)
    assert _smaller(spectrum, 0.0) == pytest.approx(math.exp(-1))
    assert _smaller(torch.zeros(5), 1.0) == 1.0


def test_many_directions_count_where_a_classifiers_rows_are_plain(monkeypatch):
    torch.manual_seed(0)
    rows = torch.randn(200, 30, dtype=torch.float64)
    loss = torch.sigmoid(-rows @ torch.randn(30, dtype=torch.float64))
    cases = [
        {"loss": loss, "logistic": True},
        {"loss": loss, "logistic": True, "curvature": True},
        {"loss": loss - 0.5},
    ]
    as_played = [chosen(rows, **case) for case in cases]
    monkeypatch.setattr("trak.score_computers.auto_ridge._MANY", 1e-9)
    now = [chosen(rows, **case) for case in cases]
    assert now[0] == pytest.approx(as_played[0] / math.e)
    assert now[1:] == as_played[1:]


def test_a_checkpoint_that_was_replaced_is_another(tmp_path):
    model, train, _ = runs.data("mlp", 60, 4)
    states = cases.checkpoints("mlp", 3)

    def ridge(folder, chosen):
        traker = runs.make_traker(model, 60, folder, lambda_reg="auto")
        for model_id, state in enumerate(chosen):
            runs.featurize(traker, train, state, model_id)
        traker.finalize_features()
        return [traker.saver.load_factor(i)[1]["auto"] for i in range(len(chosen))]

    ridge(tmp_path / "a", states[:2])
    shutil.rmtree(tmp_path / "a" / "1")
    others = [states[0], states[2]]
    assert ridge(tmp_path / "a", others) == ridge(tmp_path / "b", others)


def test_a_ridge_that_is_given_asks_for_no_common_one(tmp_path, caplog):
    model, train, targets = runs.data("mlp", 60, 4)
    states = cases.checkpoints("mlp", 2)
    for model_id, state in enumerate(states):
        traker = runs.make_traker(model, 60, tmp_path, lambda_reg="2x")
        runs.featurize(traker, train, state, model_id)
        traker.finalize_features(model_ids=[model_id])
    for model_id, state in enumerate(states):
        runs.score(traker, targets, state, model_id)
    traker.finalize_scores("exp")
    traker.sweep(["exp"], ["3x", 0.5])
    assert "several calls" not in caplog.text
    traker.sweep(["exp"], [None])
    assert "several calls" in caplog.text
    traker.finalize_features()
    autos = {traker.saver.load_factor(i)[1]["auto"] for i in range(2)}
    assert len(autos) == 1


def test_the_order_of_few_examples_hardly_matters():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 40, generator=generator) * torch.logspace(0.5, -1, 40)
    outputs = (rows @ torch.randn(40, generator=generator)).double()
    loss = torch.sigmoid(-outputs / outputs.std() - 0.5)[:, None]
    found = []
    for seed in range(6):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        situation = Situation(loss=loss[order], logistic=True)
        found.append(relative_ridge(rows[order], situation))
    assert max(found) < 2 * min(found)
