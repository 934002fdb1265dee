"""Scores of whole runs against the oracle."""

from functools import partial

import numpy as np
import pytest
import torch
from tests import cases, reference, runs

from trak import TRAKer
from trak.encodings import encoding_of
from trak.errors import InputError, NumericalError
from trak.gradient_computers import IterativeGradientComputer
from trak.projectors import BasicProjector, NoOpProjector, SparseProjector
from trak.score_computers import (
    AbstractScoreComputer,
    BasicScoreComputer,
    BasicSingleBlockScoreComputer,
    RidgeScoreComputer,
    RunningTop,
    top_scores,
)
from trak.score_computers.factor import factorize


def assert_scores(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", cases.NAMES)
def test_scores_equal_the_oracle(name, count, tmp_path):
    model, train, targets = runs.data(name, 30, 5)
    states = cases.checkpoints(name, count)
    traker = runs.make_traker(model, 30, tmp_path)
    found = runs.whole_run(traker, train, targets, states)
    assert found.dtype == np.float64
    expected = runs.oracle(model, train, targets, states, traker.projector)
    assert_scores(found, reference.trak_scores(expected))


@pytest.mark.parametrize("n", [10, 60])
@pytest.mark.parametrize("kind", ["normal", "rademacher", "sparse", "none"])
def test_every_projection_with_more_and_fewer_rows_than_columns(kind, n, tmp_path):
    model, train, targets = runs.data("mlp", n, 4)
    states = cases.checkpoints("mlp", 1)
    width = sum(p.numel() for p in model.parameters())
    projector = {
        "none": NoOpProjector(device="cpu"),
        "sparse": SparseProjector(width, 24, 3, device="cpu", nonzeros=2),
    }.get(kind) or BasicProjector(width, 24, 3, kind, "cpu")
    traker = runs.make_traker(model, n, tmp_path, projector=projector)
    found = runs.whole_run(traker, train, targets, states)
    per_checkpoint = []
    for phi, aims, q in runs.oracle(model, train, targets, states, None):
        rows = [phi, aims]
        if kind != "none":
            matrix = projector.matrix("", width, 0).double()
            rows = [part @ matrix for part in rows]
        per_checkpoint.append((*rows, q))
    assert_scores(found, reference.trak_scores(per_checkpoint))


@pytest.mark.parametrize("n", [10, 60])
def test_an_explicit_ridge_is_added_as_it_is(n, tmp_path):
    model, train, targets = runs.data("mlp", n, 4)
    states = cases.checkpoints("mlp", 2)
    traker = runs.make_traker(model, n, tmp_path, lambda_reg=0.37, proj_dim=20)
    found = runs.whole_run(traker, train, targets, states)
    expected = runs.oracle(model, train, targets, states, traker.projector)
    assert_scores(found, reference.trak_scores(expected, ridge=0.37))


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-4), (True, 3e-2)])
def test_float32_models_and_half_precision_rows(half, tolerance, tmp_path):
    model, train, targets = runs.data("mlp", 40, 5, torch.float32)
    states = cases.checkpoints("mlp", 2, torch.float32)
    traker = runs.make_traker(model, 40, tmp_path, use_half_precision=half)
    found = runs.whole_run(traker, train, targets, states)
    assert found.dtype == np.float32
    expected = runs.oracle(model, train, targets, states, traker.projector)
    assert_scores(found, reference.trak_scores(expected), tolerance)


def test_bfloat16_models(tmp_path):
    model, train, targets = runs.data("mlp", 40, 5, torch.bfloat16)
    states = cases.checkpoints("mlp", 1, torch.bfloat16)
    traker = runs.make_traker(model, 40, tmp_path)
    found = runs.whole_run(traker, train, targets, states)
    model.double()
    wide = [
        tuple(p.double() if p.is_floating_point() else p for p in b)
        for b in (train, targets)
    ]
    expected = runs.oracle(model, *wide, states, traker.projector)
    correlation = np.corrcoef(found.ravel(), reference.trak_scores(expected).ravel())[0, 1]
    assert correlation > 0.99


def test_selected_parameters_only(tmp_path):
    model, train, targets = runs.data("mlp", 30, 5)
    names = ["3.weight", "3.bias"]
    states = cases.checkpoints("mlp", 1)
    traker = runs.make_traker(model, 30, tmp_path, grad_wrt=(n for n in names))
    assert traker.num_params_for_grad == 18
    found = runs.whole_run(traker, train, targets, states)
    expected = runs.oracle(model, train, targets, states, traker.projector, names)
    assert_scores(found, reference.trak_scores(expected))


def test_the_iterative_computer_gives_the_same_scores(tmp_path):
    model, train, targets = runs.data("cnn", 20, 3)
    states = cases.checkpoints("cnn", 1)
    usual = runs.make_traker(model, 20, tmp_path / "a")
    first = runs.whole_run(usual, train, targets, states)
    other = TRAKer(
        model=model,
        task="iterative_image_classification",
        train_set_size=20,
        lambda_reg="1x",
        save_dir=tmp_path / "b",
        device="cpu",
        proj_dim=16,
        use_half_precision=False,
        gradient_computer=IterativeGradientComputer,
    )
    assert_scores(runs.whole_run(other, train, targets, states), np.asarray(first), 1e-9)


def test_positive_scores_raise_the_targets_output(tmp_path):
    """One step of training on an example moves a target's output by its score's sign."""
    model, train, targets = runs.data("mlp", 40, 6)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    projector = NoOpProjector(device="cpu")
    traker = runs.make_traker(model, 40, tmp_path, projector=projector, lambda_reg=1e6)
    scores = np.array(runs.whole_run(traker, train, targets, [state]))

    def outputs():
        return np.array([
            reference.model_output(model, [p[j : j + 1] for p in targets]).item()
            for j in range(6)
        ])

    before = outputs()
    moves = np.empty_like(scores)
    for i in range(40):
        model.load_state_dict(state)
        inputs, labels = (p[i : i + 1] for p in train)
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-4 * p.grad
                p.grad = None
        moves[i] = outputs() - before
    # with a huge ridge TRAK is the gradient inner product, so the sign is exact
    large = np.abs(moves) > 1e-3 * np.abs(moves).max()
    assert (np.sign(moves) == np.sign(scores))[large].all()


def test_a_singular_system_without_ridge_is_refused(tmp_path):
    model, train, targets = runs.data("mlp", 60, 4)
    options = {"projector": NoOpProjector(device="cpu"), "lambda_reg": 0.0}
    traker = runs.make_traker(model, 60, tmp_path, **options)
    with pytest.raises(NumericalError, match=r"singular.*lambda_reg.*softmax model"):
        runs.whole_run(traker, train, targets, cases.checkpoints("mlp", 1))
    options = {"score_computer": BasicScoreComputer, "proj_dim": 64, "lambda_reg": 0.0}
    traker = runs.make_traker(model, 60, tmp_path / "primal", **options)
    with pytest.raises(NumericalError, match=r"proj_dim exceeds.*examples\. Leave"):
        runs.whole_run(traker, train, targets, cases.checkpoints("mlp", 1))


def test_fewer_rows_than_columns_without_ridge_gives_the_least_norm_solution(tmp_path):
    model, train, targets = runs.data("mlp", 8, 4)
    states = cases.checkpoints("mlp", 1)
    traker = runs.make_traker(model, 8, tmp_path, proj_dim=30, lambda_reg=0.0)
    found = runs.whole_run(traker, train, targets, states)
    phi, aims, q = runs.oracle(model, train, targets, states, traker.projector)[0]
    expected = (phi @ torch.linalg.pinv(phi.T @ phi, rtol=1e-12) @ aims.T * q).numpy()
    assert_scores(found, expected, 1e-5)


def test_another_ridge_needs_no_second_pass_over_the_data(tmp_path):
    model, train, targets = runs.data("mlp", 30, 4)
    states = cases.checkpoints("mlp", 1)
    first = runs.make_traker(model, 30, tmp_path, lambda_reg=0.1)
    runs.whole_run(first, train, targets, states)
    second = runs.make_traker(model, 30, tmp_path, lambda_reg=2.0)
    with pytest.raises(RuntimeError, match="finalize_features"):
        second.finalize_scores("exp")
    second.finalize_features()
    expected = runs.oracle(model, train, targets, states, second.projector)
    found = second.finalize_scores("exp")
    assert_scores(found, reference.trak_scores(expected, ridge=2.0))


class UpstreamStyle(AbstractScoreComputer):
    """A user's score computer with upstream's three methods and nothing else."""

    def __init__(self, dtype, device, logging_level, lambda_reg):
        super().__init__(dtype, device)
        self.ridge = lambda_reg

    def get_xtx(self, grads):
        return grads.T @ grads

    def get_x_xtx_inv(self, grads, xtx):
        return grads @ torch.linalg.inv(xtx + self.ridge * torch.eye(len(xtx)))

    def get_scores(self, features, target_grads, accumulator):
        accumulator += features @ target_grads.T


@pytest.mark.parametrize("computer", [UpstreamStyle, BasicScoreComputer])
def test_other_score_computers(computer, tmp_path):
    model, train, targets = runs.data("mlp", 40, 4)
    states = cases.checkpoints("mlp", 2)
    traker = runs.make_traker(model, 40, tmp_path, score_computer=computer, lambda_reg=0.5)
    found = runs.whole_run(traker, train, targets, states)
    per_checkpoint = runs.oracle(model, train, targets, states, traker.projector)
    if computer is BasicScoreComputer:
        parts = []
        for phi, aims, _ in per_checkpoint:
            inverse = torch.linalg.inv(phi.T @ phi + 0.5 * torch.eye(16))
            parts.append(phi @ (inverse / inverse.abs().mean()) @ aims.T)
        weights = torch.stack([q for _, _, q in per_checkpoint]).mean(0)
        expected = (torch.stack(parts).mean(0) * weights).numpy()
        assert_scores(found, expected)
    else:
        assert_scores(found, reference.trak_scores(per_checkpoint, ridge=0.5), 1e-4)


def test_upstreams_bare_score_computer_can_be_made(tmp_path):
    model, train, targets = runs.data("mlp", 60, 4)
    computer = BasicSingleBlockScoreComputer
    traker = runs.make_traker(model, 60, tmp_path, score_computer=computer, proj_dim=8)
    states = cases.checkpoints("mlp", 1)
    found = runs.whole_run(traker, train, targets, states)
    expected = runs.oracle(model, train, targets, states, traker.projector)
    assert_scores(found, reference.trak_scores(expected, ridge=0.0), 1e-4)
    with pytest.raises(InputError, match="no ridge"):
        BasicSingleBlockScoreComputer(lambda_reg=0.1)


def test_upstreams_methods_of_the_default_computer():
    phi, aims = (
        torch.randn(30, 6, dtype=torch.float64),
        torch.randn(4, 6, dtype=torch.float64),
    )
    computer = RidgeScoreComputer(lambda_reg="1x")
    features = computer.get_x_xtx_inv(phi, computer.get_xtx(phi))
    scores = torch.zeros(30, 4, dtype=torch.float64)
    computer.get_scores(features, aims, accumulator=scores)
    torch.testing.assert_close(scores, reference.scores_before_q(phi, aims))


@pytest.mark.parametrize("helpful", [True, False])
@pytest.mark.parametrize("block", [7, 1000])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_top_scores_equal_a_full_sort(dtype, block, helpful, monkeypatch):
    monkeypatch.setattr("trak.score_computers.topk._FEWEST_ROWS", block)
    monkeypatch.setattr("trak.score_computers.topk._BLOCK_BYTES", 1)
    scores = np.random.default_rng(0).integers(0, 20, (100, 6)).astype(dtype)
    scores[40:60, 2] = np.nan
    scores[::3, 3] = np.inf
    scores[:, 4], scores[::20, 4] = -np.inf, [1, 2, 1, 3, np.nan]
    scores[:, 5] = 0
    scores.flags.writeable = False
    for k in (1, 9, 100, 500):
        found = top_scores(scores, k, helpful=helpful)
        ordered = np.where(np.isnan(scores), np.inf, -scores if helpful else scores)
        order = np.argsort(ordered, axis=0, kind="stable")[:k].T
        assert np.array_equal(found.indices, order)
        expected = np.take_along_axis(scores.T, order, axis=1)
        assert np.array_equal(found.scores, expected, equal_nan=True)
        assert found.scores.dtype == np.dtype(dtype).newbyteorder("=")
    with pytest.raises(InputError, match="k must be"):
        top_scores(scores, 0)
    assert top_scores(scores[:0], 3).indices.shape == (6, 0)


def test_top_scores_hold_no_more_of_many_targets(monkeypatch):
    seen = []

    class Watched(RunningTop):
        def add(self, start, block):
            seen.append(block.nbytes)
            super().add(start, block)

    monkeypatch.setattr("trak.score_computers.topk.RunningTop", Watched)
    monkeypatch.setattr("trak.score_computers.topk._BLOCK_BYTES", 1 << 20)
    for num_targets in (3, 300):
        scores = np.zeros((3000, num_targets), dtype=np.float32)
        assert top_scores(scores, 2).indices.tolist() == [[0, 1]] * num_targets
    assert sum(seen) == 3000 * 303 * 4
    assert max(seen) <= 1 << 20


@pytest.mark.parametrize("row_dtype", ["float16", "bfloat16", "int8"])
def test_the_default_ridge_is_never_called_singular(row_dtype):
    """Many rows, and nearly all of them along a few columns."""
    n, k = 1_000_000, 512
    gram = torch.diag(n * torch.logspace(0, -12, k, dtype=torch.float64))
    ridge = float(gram.trace()) / n
    eps = encoding_of(row_dtype).eps
    factor = factorize(gram, form="primal", ridge=ridge, num_rows=n, row_eps=eps)
    torch.testing.assert_close(factor.gram(), gram, atol=1e-9 * n, rtol=0)
    with pytest.raises(NumericalError, match="singular"):
        factorize(gram, form="primal", ridge=ridge * 1e-9, num_rows=n, row_eps=eps)


@pytest.mark.parametrize(
    ("dtype", "rank", "ridge", "warns"),
    [
        ("float16", 10, 1e-4, True),
        ("float16", 10, 1e-2, False),
        ("float16", 64, 1e-4, False),  # no direction is left to the rounding
        ("float32", 10, 1e-4, False),
    ],
)
def test_a_ridge_that_rounding_of_the_rows_drowns_warns(dtype, rank, ridge, warns, caplog):
    rng = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=rng, dtype=torch.float64)
    basis = draw(rank, 64) if rank < 64 else torch.eye(64).double()
    spread = torch.arange(1, rank + 1).double() ** -1.5
    rows, targets = (draw(count, rank) * spread @ basis for count in (5000, 8))
    scores = []
    for kept in (rows, rows.to(getattr(torch, dtype))):
        scorer = RidgeScoreComputer(lambda_reg=f"{ridge}x")
        aims = targets.to(kept.dtype).double()
        scores.append(scorer.scorer(scorer.finalize(kept), kept, aims)(0, 5000).flatten())
    assert ("row_dtype='float32'" in caplog.text) == warns
    alike = float(torch.corrcoef(torch.stack(scores))[0, 1])
    assert alike > (0.99 if warns else 0.999)
