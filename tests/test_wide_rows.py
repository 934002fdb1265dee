"""Wider rows of some examples, and the ridge of narrow rows that is told from them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import cases, reference, runs
from tests.evaluation import recipes

from trak.blocks import (
    ConvolvedBlock,
    DenseBlock,
    FactoredBlock,
    IndexedBlock,
    of_samples,
)
from trak.errors import StoreCorruptedError
from trak.pipeline import assembly
from trak.projectors import BasicProjector, NoOpProjector
from trak.savers import AbstractSaver, MmapSaver
from trak.score_computers import BasicScoreComputer, RidgeScoreComputer
from trak.score_computers.auto_ridge import best_ridge, noise_factor, relative_ridge
from trak.score_computers.ridge_sample import SAMPLE, Situation, Wide, drawn, sampled
from trak.score_computers.stationarity import training_of

N, M = 60, 4
CASES = ["mlp", "cnn", "tied", "reused", "encoder"]


def world(name):
    model, train, targets = runs.data(name, N, M)
    return model, train, targets, {k: v.clone() for k, v in model.state_dict().items()}


def narrow(name, folder, size=7, **options):
    model, train, targets, state = world(name)
    defaults = {"lambda_reg": "auto", "proj_dim": 8}
    traker = runs.make_traker(model, N, folder, **(defaults | options))
    runs.featurize(traker, train, state, size=size)
    return traker, train, targets, state


def assert_same_wide_rows(one, other):
    found, expected = (traker.saver.wide_rows(0).read() for traker in (one, other))
    assert np.array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-6)


@pytest.fixture
def few(monkeypatch):
    """Fewer examples get a wide row."""
    monkeypatch.setattr(assembly, "drawn", lambda count: drawn(count, 20))


@pytest.mark.parametrize("name", CASES)
def test_they_are_the_gradients_of_the_examples_drawn(name, few, tmp_path):
    traker, train, _, _ = narrow(name, tmp_path)
    numbers, rows = traker.saver.wide_rows(0).read()
    assert len(numbers) == 20
    assert set(numbers) < set(range(N))
    gradients = reference.gradient_rows(traker.model, train)
    assert rows.shape[1] == traker.num_params_for_grad  # which are few, so nothing is lost
    expected = reference.flat_rows(gradients)[numbers]
    torch.testing.assert_close(
        torch.from_numpy(rows).double(), expected, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_of_wide_models_they_are_a_sketch(name, few, tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "WIDE", 32)
    traker, train, _, _ = narrow(name, tmp_path)
    numbers, rows = traker.saver.wide_rows(0).read()
    gradients = reference.gradient_rows(traker.model, train)
    expected = reference.projected_rows(gradients, traker.pipeline.maker.sketch, 0)
    torch.testing.assert_close(
        torch.from_numpy(rows).double(), expected[numbers], rtol=1e-4, atol=1e-5
    )


def test_rows_of_the_store_are_what_they_are_without(few, tmp_path, monkeypatch):
    kept, *_ = narrow("cnn", tmp_path / "a")
    monkeypatch.setattr(assembly, "WIDE", 0)
    plain, *_ = narrow("cnn", tmp_path / "b")
    assert plain.saver.wide_rows(0).read() is None
    for name in ("grads", "out_to_loss"):
        one, other = (t.saver.train_rows(0).array(name) for t in (kept, plain))
        assert np.array_equal(one, other)


def test_a_sketch_is_not_the_rows_own(few, tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "WIDE", 32)
    traker, *_ = narrow("mlp", tmp_path)
    numbers, rows = traker.saver.wide_rows(0).read()
    assert rows.shape == (20, 32)
    own = traker.saver.train_rows(0).array("grads")[numbers]
    assert np.linalg.matrix_rank(np.concatenate([own, rows], axis=1)) == 20
    assert not np.isin(own, rows).any()


@pytest.mark.parametrize("size", [1, N])
def test_batches_do_not_matter(size, few, tmp_path):
    one, *_ = narrow("mlp", tmp_path / "a")
    other, *_ = narrow("mlp", tmp_path / "b", size=size)
    assert_same_wide_rows(one, other)


def test_a_run_that_was_interrupted_keeps_the_same(few, tmp_path):
    whole, train, _, state = narrow("mlp", tmp_path / "a")
    for part in (slice(40, N), slice(0, 40)):  # two objects, in another order
        model, *_ = world("mlp")
        traker = runs.make_traker(model, N, tmp_path / "b", lambda_reg="auto", proj_dim=8)
        traker.load_checkpoint(state, model_id=0)
        batch = tuple(p[part] for p in train)
        traker.featurize(batch=batch, inds=list(range(N))[part])
    assert_same_wide_rows(whole, traker)
    for t in (whole, traker):
        t.finalize_features()
    one, other = (t.saver.load_factor(0)[1]["auto"] for t in (whole, traker))
    assert one == pytest.approx(other, rel=1e-3)


def test_pieces_that_fit_into_memory_do_not_matter(few, tmp_path):
    one, *_ = narrow("mlp", tmp_path / "a")
    model, train, _, state = world("mlp")
    other = runs.make_traker(model, N, tmp_path / "b", lambda_reg="auto", proj_dim=8)
    other.pipeline.maker.micro.limit = 3
    runs.featurize(other, train, state, size=N)
    assert_same_wide_rows(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {"proj_dim": 200},  # wide enough
        {"proj_dim": "exact"},
        {"projector": NoOpProjector()},
        {"projector": BasicProjector(53, 8, 0, "rademacher", "cpu")},  # takes no blocks
        {"score_computer": BasicScoreComputer, "lambda_reg": None},
    ],
)
def test_who_needs_none_keeps_none(options, tmp_path):
    traker, *_ = narrow("mlp", tmp_path, **options)
    assert traker.saver.wide_rows(0).read() is None


def test_whitened_runs_keep_others(tmp_path):
    model, train, _, state = world("mlp")
    options = {"lambda_reg": "auto", "proj_dim": 8, "whitening": 0.5}
    traker = runs.make_traker(model, N, tmp_path, **options)
    traker.load_checkpoint(state, model_id=0)
    traker.fit_whitening(batch=train)
    traker.featurize(batch=train, num_samples=N)
    assert traker.saver.wide_rows(0).read() is None
    assert traker.pipeline.whitener.unwhitened(0)


def test_a_saver_without_a_place_for_them_does_without(tmp_path):
    class Old(MmapSaver):
        wide_rows = AbstractSaver.wide_rows

    traker, *_ = narrow("mlp", tmp_path, saver=Old)
    traker.finalize_features()
    assert not list(tmp_path.glob("0/wide*"))
    assert traker.saver.load_factor(0)[1]["auto"] > 0


def test_a_store_without_them_is_told_from_its_rows(few, tmp_path):
    traker, *_ = narrow("mlp", tmp_path)
    for path in tmp_path.glob("0/wide*"):
        path.unlink()
    traker.finalize_features()
    phi = torch.from_numpy(np.array(traker.saver.train_rows(0).array("grads")))
    loss = traker.saver.train_rows(0).array("out_to_loss")
    expected = relative_ridge(phi, Situation(columns=8, loss=loss, logistic=True))
    assert traker.saver.load_factor(0)[1]["auto"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["wide.mmap", "wide_numbers.mmap"])
def test_damage_is_named(name, few, tmp_path):
    traker, *_ = narrow("mlp", tmp_path)
    (tmp_path / "0" / name).write_bytes(b"nonsense")
    with pytest.raises(StoreCorruptedError, match=rf"{name} is lost or damaged") as error:
        traker.finalize_features()
    assert "pickle" not in str(error.value)
    (tmp_path / "0" / name).write_bytes(recipes.damaged_array("no end"))
    with pytest.raises(StoreCorruptedError, match=rf"{name} is lost or damaged"):
        traker.finalize_features()


def test_files_that_do_not_fit_together_are_damage(few, tmp_path):
    traker, *_ = narrow("mlp", tmp_path)
    np.save(tmp_path / "x.npy", np.zeros((3, 1), dtype=np.int64))
    (tmp_path / "x.npy").replace(tmp_path / "0" / "wide_numbers.mmap")
    with pytest.raises(StoreCorruptedError, match="20 rows for 3 numbers"):
        traker.finalize_features()


def test_the_examples_are_drawn_by_lot():
    assert drawn(7).tolist() == list(range(7))
    found = drawn(5000)
    assert len(set(found)) == len(found) == SAMPLE
    assert (np.diff(found) > 0).all()
    assert found[0] < 100 < 4900 < found[-1]
    assert np.array_equal(found, drawn(5000))


def sketched(n=240, p=400, k=8, seed=0):
    """Rows of a wide logistic model at its optimum, narrow sketches of them, and Q."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, p, generator=rng, dtype=torch.float64)
    rows = rows / torch.arange(1, p + 1) ** 0.5 + 0.2
    w = torch.zeros(p, dtype=torch.float64)
    for _ in range(40):
        q = torch.sigmoid(-rows @ w)
        hessian = rows.T @ (rows * (q * (1 - q))[:, None]) + 2 * torch.eye(p)
        w = w + torch.linalg.solve(hessian, rows.T @ q - 2 * w)
    matrix = torch.randn(p, k, generator=rng, dtype=torch.float64) / math.sqrt(k)
    return rows, rows @ matrix, torch.sigmoid(-rows @ w)


@pytest.mark.parametrize("checkpoints", [1, 4])
def test_the_noise_of_narrow_rows_is_measured(checkpoints):
    rows, thin, q = sketched()
    numbers = np.arange(0, 240, 2)
    wide = Wide(numbers, rows[numbers].numpy().astype(np.float32))
    given = {"columns": 8, "loss": q, "checkpoints": checkpoints}
    found = relative_ridge(thin, Situation(**given, wide=wide))

    sample = sampled(thin, Situation(**given, wide=wide))
    kernel = rows[numbers] @ rows[numbers].T
    kernel = kernel / kernel.diagonal().mean()
    own = best_ridge(sample, training_of(sample.kernel, sample.pull, sample.loss))
    training = training_of(kernel, sample.pull, sample.loss, noisy=True)
    seen = best_ridge(sample, training)
    whole = best_ridge(replace(sample, kernel=kernel), training)
    own *= noise_factor(240, Situation(**given))
    averaged = noise_factor(240, Situation(checkpoints=checkpoints))
    by_wide = whole * (seen / whole) ** (checkpoints**-0.7) * averaged
    assert found == pytest.approx(math.sqrt(own * by_wide), rel=1e-4)
    assert seen > 1.5 * whole  # or there is nothing to measure


@pytest.mark.parametrize("ridge", [4.0, 12.0])
def test_the_ridge_of_a_training_is_found_in_spite_of_the_noise(ridge):
    rng = torch.Generator().manual_seed(1)
    rows = torch.randn(300, 40, generator=rng, dtype=torch.float64) + 0.3
    w = torch.zeros(40, dtype=torch.float64)
    for _ in range(60):
        q = torch.sigmoid(-rows @ w)
        hessian = rows.T @ (rows * (q * (1 - q))[:, None]) + ridge * torch.eye(40)
        w = w + torch.linalg.solve(hessian, rows.T @ q - ridge * w)
    q = torch.sigmoid(-rows @ w)
    kernel = rows @ rows.T
    unit = kernel.diagonal().mean()
    found = []
    for seed in range(9):
        matrix = torch.randn(
            40, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        thin = rows @ matrix / 20**0.5
        pull = thin @ (thin.T @ q)
        training = training_of(kernel / unit, pull / unit, q, logistic=True, noisy=True)
        found.append(float(training.ridge * unit) * 2.5)
    assert float(np.median(found)) == pytest.approx(ridge, rel=0.4)


def test_rows_that_are_not_narrow_change_nothing():
    _, thin, q = sketched(k=60)
    numbers = np.arange(240)
    wide = Wide(numbers, thin.numpy().astype(np.float32))
    plain = relative_ridge(thin, Situation(loss=q))
    found = relative_ridge(thin, Situation(loss=q, wide=wide))
    assert found == pytest.approx(plain, rel=0.2)


def test_checkpoints_share_the_median_ridge(tmp_path):
    model, train, _ = runs.data("mlp", N, M)
    states = []
    for seed, scale in ((0, 1.0), (1, 1.0), (2, 6.0)):
        torch.manual_seed(seed)
        states.append({
            k: (v + 0.1 * torch.randn_like(v)) * scale
            for k, v in model.state_dict().items()
        })
    traker = runs.make_traker(model, N, tmp_path, lambda_reg="auto", proj_dim=8)
    for model_id, state in enumerate(states):
        runs.featurize(traker, train, state, model_id)
    own = []
    scorer = RidgeScoreComputer(lambda_reg="auto")
    for model_id in range(3):
        rows = traker.saver.train_rows(model_id)
        situation = Situation(
            checkpoints=3,
            columns=8,
            loss=rows.array("out_to_loss"),
            logistic=True,
            wide=Wide(*traker.saver.wide_rows(model_id).read()),
        )
        own.append(
            scorer.choose(torch.from_numpy(np.array(rows.array("grads"))), situation)
        )
    assert len({round(found.multiple, 6) for found in own}) > 1
    traker.finalize_features()
    for model_id in range(3):
        info = traker.saver.load_factor(model_id)[1]
        assert info["auto"] == pytest.approx(
            float(np.median([found.multiple for found in own])), rel=1e-6
        )
        unit = info["mean_squared_norm"]
        assert info["ridge"] == pytest.approx(info["auto"] * unit, rel=1e-6)


def blocks():
    rng = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    yield DenseBlock("w", random(5, 6))
    yield FactoredBlock("w", random(5, 3, 2), random(5, 3, 4))
    indices = torch.randint(0, 7, (5, 3), generator=rng)
    yield IndexedBlock("w", indices, random(5, 3, 2), 7)
    yield ConvolvedBlock(
        "w", random(5, 2, 6, 6), random(5, 3, 4, 4), (3, 3), (1, 1), (1, 1)
    )


@pytest.mark.parametrize("block", list(blocks()), ids=lambda block: type(block).__name__)
def test_a_block_of_some_samples(block):
    places = torch.tensor([3, 0])
    found = of_samples(block, places)
    assert type(found) is type(block)
    expected = block.dense().gradient[places]
    torch.testing.assert_close(found.dense().gradient, expected)


def test_cases_are_narrow_enough():
    for name in CASES:
        model, _ = cases.make(name, 2, torch.float64)
        assert sum(p.numel() for p in model.parameters()) >= 4 * 8
