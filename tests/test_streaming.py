"""One pass over the rows: several sets, top-k without a file, memory, failures."""

import threading

import numpy as np
import pytest
import torch
from tests import cases, reference, runs

from trak.encodings import ENCODINGS, encoding_of
from trak.errors import (
    InputError,
    ModelIDException,
    NumericalError,
    PhaseError,
    StoreCorruptedError,
)
from trak.projectors import NoOpProjector
from trak.savers.arrays import RowFile
from trak.savers.rows import RowGroup
from trak.score_computers import (
    BasicScoreComputer,
    RidgeScoreComputer,
    RunningTop,
    reader,
    stream,
    top_scores,
)
from trak.score_computers.gram import dual_gram, primal_gram


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks even for few rows."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 64 * 8)
    monkeypatch.setattr(stream, "_FEWEST", 7)


def two_experiments(folder, row_dtype="float64", n=40, **options):
    model, train, targets = runs.data("mlp", n, 6)
    states = cases.checkpoints("mlp", 2)
    traker = runs.make_traker(model, n, folder, row_dtype=row_dtype, **options)
    runs.whole_run(traker, train, targets, states)
    few = tuple(p[:4] for p in targets)
    for model_id, state in enumerate(states):
        runs.score(traker, few, state, model_id, exp_name="few")
    expected = runs.oracle(model, train, targets, states, traker.projector)
    return traker, expected


def close(found, expected, tolerance=1e-9):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def group(folder, rows, name):
    encoding = encoding_of(name)
    arrays = {"grads": (folder / "g", rows.shape[1], encoding.file)}
    if encoding.scaled:
        arrays["scales"] = (folder / "s", 1, np.float32)
    made = RowGroup(folder / "j", len(rows), arrays, encoding)
    made.commit(np.arange(len(rows)), {"grads": rows})
    return made


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("n", [1, 6, 7, 8, 50])
def test_gram_matrices_of_rows_in_a_file(name, n, tmp_path):
    rows = np.random.default_rng(0).standard_normal((n, 300))
    made = group(tmp_path, rows, name)
    stored = made.encoded().tensor(torch.float64)
    tolerance = {"rtol": 1e-6, "atol": 1e-5} if name[-1] != "4" else {}
    if name == "float32":
        tolerance = {}
    found = primal_gram(made.encoded())
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, stored.T @ stored, **tolerance)
    if tolerance:  # of sums of 300 products in float32
        tolerance["atol"] = 1e-4
    dual = dual_gram(made.encoded())
    assert dual.dtype is torch.float64
    torch.testing.assert_close(dual, stored @ stored.T, **tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_gram_matrices_beyond_the_range_of_float32(name, scale, tmp_path):
    rows = np.random.default_rng(0).standard_normal((20, 5)) * scale
    made = group(tmp_path, rows, name)
    stored = made.encoded().tensor(torch.float64)
    expected = stored.T @ stored
    torch.testing.assert_close(primal_gram(made.encoded()), expected, rtol=1e-9, atol=0)
    expected = stored @ stored.T
    torch.testing.assert_close(dual_gram(made.encoded()), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["float32", "float16", "int8"])
def test_a_row_that_is_not_finite_is_named(name, tmp_path):
    rows = np.ones((40, 5))
    made = group(tmp_path, rows, name)
    file = "s" if name == "int8" else "g"
    values = np.lib.format.open_memmap(tmp_path / file, "r+")
    values[23] = np.nan
    values.flush()
    for gram in (primal_gram, dual_gram):
        with pytest.raises(NumericalError, match="Row 23"):
            gram(made.encoded())


@pytest.mark.parametrize("row_dtype", ["float64", "float16"])
@pytest.mark.parametrize("n", [10, 40])
@pytest.mark.parametrize("helpful", [True, False])
def test_top_scores_need_no_file(row_dtype, n, helpful, tmp_path):
    traker, checkpoints = two_experiments(tmp_path, row_dtype, n)
    (tmp_path / "scores" / "exp.mmap").unlink()
    found = traker.top_scores("exp", 9, helpful=helpful)
    if row_dtype == "float64":
        expected = top_scores(reference.trak_scores(checkpoints), 9, helpful=helpful)
        assert np.array_equal(found.indices, expected.indices)
        close(found.scores, expected.scores)
    assert not list((tmp_path / "scores").iterdir())
    scores = traker.finalize_scores("exp")
    again = traker.top_k("exp", 9, helpful=helpful)
    assert np.array_equal(found.indices, again.indices)
    np.testing.assert_allclose(found.scores, again.scores, rtol=1e-5)
    assert found.scores.dtype == scores.dtype


@pytest.mark.parametrize("n", [10, 40])
def test_ridges_and_experiments_share_a_pass(n, tmp_path, monkeypatch):
    traker, checkpoints = two_experiments(tmp_path, n=n)
    passes = []
    real = reader.read_ahead
    monkeypatch.setattr(
        stream,
        "read_ahead",
        lambda stretches, device: passes.append(len(stretches)) or real(stretches, device),
    )
    ridges = ["1x", 0.01, 3]
    found = traker.sweep(["exp", "few"], ridges)
    assert list(found) == [(e, r) for r in ridges for e in ("exp", "few")]
    if n == 40:
        assert len(passes) == 1  # over both checkpoints, side by side
    for (name, ridge), scores in found.items():
        expected = reference.trak_scores(checkpoints, None if ridge == "1x" else ridge)
        close(scores, expected if name == "exp" else expected[:, :4])
    tops = traker.sweep(["exp", "few"], ridges, top_k=3)
    for key, top in tops.items():
        expected = top_scores(found[key], 3)
        assert np.array_equal(top.indices, expected.indices)
        close(top.scores, expected.scores)


def test_scores_of_further_ridges_are_files_and_do_not_touch_the_first(tmp_path):
    traker, _ = two_experiments(tmp_path)
    first = np.array(traker.scores("exp"))
    found = traker.sweep(["exp"], [0.5])["exp", 0.5]
    plain = np.load(tmp_path / "scores" / "ridge=0.5" / "exp.mmap")
    assert np.array_equal(plain, found)
    assert np.array_equal(traker.scores("exp"), first)
    record = traker.saver.experiment("exp")["ridges"]["0.5"]
    assert record == {"model_ids": [0, 1], "computer": "RidgeScoreComputer"}
    assert np.array_equal(traker.saver.load_scores("exp", "0.5"), found)
    with pytest.raises(PhaseError, match="ridge 0.7"):
        traker.saver.load_scores("exp", "0.7")


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int8"])
def test_other_ridges_equal_runs_with_those_ridges(name, tmp_path):
    traker, _ = two_experiments(tmp_path / "a", name, lambda_reg=5e3)
    other, _ = two_experiments(tmp_path / "b", name, lambda_reg=0.2)
    found = traker.sweep(["exp"], [0.2])["exp", 0.2]
    close(found, other.scores("exp"), 1e-6)


def test_the_basic_computer_inverts_at_several_ridges(tmp_path):
    options = {"score_computer": BasicScoreComputer, "lambda_reg": 0.3}
    traker, _ = two_experiments(tmp_path / "a", **options)
    other, _ = two_experiments(tmp_path / "b", **(options | {"lambda_reg": 0.9}))
    found = traker.sweep(["exp"], [0.3, 0.9])
    close(found["exp", 0.9], other.scores("exp"))
    close(found["exp", 0.3], traker.scores("exp"))


def test_sweeps_without_sense_are_refused(tmp_path):
    traker, _ = two_experiments(tmp_path)
    with pytest.raises(InputError, match="Nothing to score"):
        traker.sweep([])
    with pytest.raises(InputError, match="lambda_reg"):
        traker.sweep(["exp"], [-1.0])
    with pytest.raises(InputError, match="k must be"):
        traker.top_scores("exp", 0)
    with pytest.raises(PhaseError, match="no experiment 'none'"):
        traker.top_scores("none")
    basic = runs.make_traker(
        cases.make("mlp", 1)[0],
        40,
        tmp_path,
        row_dtype="float64",
        score_computer=BasicScoreComputer,
    )
    with pytest.raises(ModelIDException, match=r"a ridge of [\d.]+; this run asks for"):
        basic.sweep(["exp"], [0.5])


def test_more_checkpoints_than_two_and_skipping(tmp_path):
    model, train, targets = runs.data("mlp", 30, 4)
    states = cases.checkpoints("mlp", 4)
    traker = runs.make_traker(model, 30, tmp_path, row_dtype="float32")
    for model_id, state in enumerate(states):
        runs.featurize(traker, train, state, model_id)
    traker.finalize_features()
    for model_id, state in enumerate(states[:3]):
        runs.score(traker, targets, state, model_id)
    with pytest.raises(ModelIDException, match="allow_skip"):
        traker.top_scores("exp")
    found = traker.sweep(["exp"], top_k=4, allow_skip=True)
    expected = runs.oracle(model, train, targets, states[:3], traker.projector)
    full = reference.trak_scores(expected)
    (top,) = found.values()
    close(top.scores, np.sort(full, axis=0)[::-1][:4].T, 1e-4)


def test_scores_that_are_not_finite_name_the_row_and_the_target(tmp_path):
    traker, _ = two_experiments(tmp_path, "float16")
    q = np.lib.format.open_memmap(tmp_path / "1" / "out_to_loss.mmap", "r+")
    q[17] = np.inf
    q.flush()
    for act in (lambda: traker.finalize_scores("exp"), lambda: traker.top_scores("few")):
        with pytest.raises(NumericalError, match="training example 17 for target 0 of"):
            act()
    rows = np.lib.format.open_memmap(tmp_path / "1" / "grads.mmap", "r+")
    rows[31, 2] = np.nan
    rows.flush()
    with pytest.raises(NumericalError, match=r"Row 31.*1/grads\.mmap"):
        traker.top_scores("exp")


def test_a_failing_pass_leaves_the_old_scores_and_no_threads(tmp_path):
    traker, _ = two_experiments(tmp_path, "float16")
    before = np.array(traker.scores("exp"))
    q = np.lib.format.open_memmap(tmp_path / "0" / "out_to_loss.mmap", "r+")
    kept = q[39].copy()
    q[39] = np.nan
    q.flush()
    with pytest.raises(NumericalError):
        traker.finalize_scores("exp")
    q[39] = kept
    q.flush()
    assert np.array_equal(traker.scores("exp"), before)
    names = [t.name for t in threading.enumerate()]
    assert not {"trak-reader", "trak-writer"} & set(names)
    assert [p.name for p in (tmp_path / "scores").iterdir()] == ["exp.mmap"]


def test_a_file_that_ends_early_is_named(tmp_path):
    made = group(tmp_path, np.ones((40, 5)), "float32")
    rows = made.encoded()
    with (tmp_path / "g").open("r+b") as file:
        file.truncate(rows.offset + 30 * 20)
    with pytest.raises(StoreCorruptedError, match="40 rows need"):
        primal_gram(rows)


def test_a_full_disk_while_scores_are_written(tmp_path, monkeypatch):
    traker, _ = two_experiments(tmp_path, "float16")
    before = np.array(traker.scores("exp"))

    def fail(*args, **kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            traker.finalize_scores("exp")
    assert np.array_equal(traker.scores("exp"), before)


def test_tensors_and_files_give_the_same(tmp_path):
    rows = np.random.default_rng(1).standard_normal((50, 8)).astype(np.float16)
    made = group(tmp_path, rows, "float16")
    targets = torch.randn(3, 8, dtype=torch.float64)
    computer = RidgeScoreComputer(lambda_reg="1x")
    for source in (torch.from_numpy(rows), made.encoded()):
        kept = computer.finalize(source)
        scores = computer.scorer(kept, source, targets)(5, 31)
        expected = reference.scores_before_q(torch.from_numpy(rows).double(), targets)
        torch.testing.assert_close(scores, expected[5:31], rtol=1e-5, atol=1e-6)


def test_unprojected_rows_in_the_dual_form(tmp_path):
    model, train, targets = runs.data("mlp", 10, 6)
    options = {"projector": NoOpProjector(device="cpu"), "row_dtype": "float64"}
    traker = runs.make_traker(model, 10, tmp_path, **options)
    runs.whole_run(traker, train, targets, cases.checkpoints("mlp", 1))
    flat = traker.saver.train_rows(0).encoded().shape
    assert flat[1] > flat[0]
    assert traker.saver.load_factor(0)[1]["form"] == "dual"
    top = traker.top_scores("exp", 10)
    assert (np.sort(top.indices, axis=1) == np.arange(10)).all()


@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("piece", [5, 1024])
@pytest.mark.parametrize("many", [-1, 0.1, 1])
@pytest.mark.parametrize("k", [1, 4, 9, 300])
def test_running_top_equals_a_full_sort_with_ties(k, many, piece, negated, monkeypatch):
    monkeypatch.setattr("trak.score_computers.running._MANY", many)
    monkeypatch.setattr("trak.score_computers.running._PIECE", piece)
    scores = np.random.default_rng(k).integers(0, 12, (200, 30)).astype(np.float32)
    scores[:, 3] = 0
    signed = torch.from_numpy(-scores if negated else scores)
    top = RunningTop(30, k, torch.float32, torch.device("cpu"))
    for start in range(0, 200, 16):
        top.add(start, signed[start : start + 16])
    found = top.result(negated=negated)
    order = np.argsort(scores if negated else -scores, axis=0, kind="stable")[:k].T
    assert np.array_equal(found.indices, order)
    assert np.array_equal(found.scores, np.take_along_axis(scores.T, order, axis=1))
