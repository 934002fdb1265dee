"""Rows as float16, bfloat16 and int8: what is stored, what is read, how far scores move."""

import json

import numpy as np
import pytest
import torch
from tests import cases, reference, runs

from trak.encodings import ENCODINGS, encoding_of
from trak.errors import InputError, NumericalError, StoreMismatchError
from trak.pipeline.rows import to_store
from trak.savers.rows import RowGroup

# largest error of a score over the largest score, twice what the case below gives
LARGEST_ERROR = {
    "float64": 1e-9,
    "float32": 1e-6,
    "float16": 1.5e-3,
    "bfloat16": 1.2e-2,
    "int8": 3e-2,
}


def whole(row_dtype, tmp_path, dtype=torch.float64, **options):
    model, train, targets = runs.data("mlp", 60, 6, dtype)
    states = cases.checkpoints("mlp", 2, dtype)
    traker = runs.make_traker(model, 60, tmp_path, row_dtype=row_dtype, **options)
    found = runs.whole_run(traker, train, targets, states)
    return traker, found, runs.oracle(model, train, targets, states, traker.projector)


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_error_of_scores_against_the_oracle(name, tmp_path):
    _, found, checkpoints = whole(name, tmp_path)
    expected = reference.trak_scores(checkpoints)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < LARGEST_ERROR[name]
    if name != "float64":
        assert error > LARGEST_ERROR[name] / 100  # the dtype is really used


@pytest.mark.parametrize("name", ["float16", "bfloat16", "int8"])
def test_scores_are_those_of_the_stored_rows(name, tmp_path):
    """Beyond the rounding of the rows nothing is lost: the oracle, fed the stored rows."""
    traker, found, checkpoints = whole(name, tmp_path)
    stored = [
        (
            torch.from_numpy(traker.saver.train_rows(i).array("grads")).double(),
            torch.from_numpy(traker.saver.target_rows("exp", i).array("grads")).double(),
            q,
        )
        for i, (_, _, q) in enumerate(checkpoints)
    ]
    expected = reference.trak_scores(stored)
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_current_store_answers_with_floats(name, tmp_path):
    traker, _, checkpoints = whole(name, tmp_path)
    traker.saver.load_current_store(0, "exp")
    store = traker.saver.current_store
    for key, rows in (("grads", checkpoints[0][0]), ("exp_grads", checkpoints[0][1])):
        assert store[key].dtype.kind == "f"
        lost = np.linalg.norm(store[key] - rows.numpy(), axis=1)
        assert (lost <= 0.02 * rows.norm(dim=1).numpy()).all()
    assert np.isfinite(store["features"]).all()
    assert store["features"].dtype.kind == "f"


def test_bytes_of_bfloat16_rows(tmp_path):
    whole("bfloat16", tmp_path)
    bits = np.load(tmp_path / "0" / "grads.mmap", mmap_mode="r")
    assert bits.dtype == np.dtype("<u2")
    widened = (bits.astype(np.uint32) << 16).view(np.float32)
    rows = runs.make_traker(
        cases.make("mlp", 1)[0], 60, tmp_path, row_dtype=torch.bfloat16
    ).saver.train_rows(0)
    assert np.array_equal(rows.array("grads"), widened)
    assert not (tmp_path / "0" / "scales.mmap").exists()


def test_bytes_of_int8_rows(tmp_path):
    traker, _, checkpoints = whole("int8", tmp_path)
    steps = np.load(tmp_path / "0" / "grads.mmap", mmap_mode="r")
    scales = np.load(tmp_path / "0" / "scales.mmap", mmap_mode="r")
    assert (steps.dtype, scales.dtype) == (np.dtype("|i1"), np.dtype("<f4"))
    assert scales.shape == (60, 1)
    largest = checkpoints[0][0].abs().amax(dim=1).numpy()
    np.testing.assert_allclose(scales[:, 0], largest / 127, rtol=1e-6)
    assert (np.abs(steps).max(axis=1) == 127).all()
    rows = traker.saver.train_rows(0).array("grads")
    assert np.array_equal(rows, steps * scales)
    assert np.load(tmp_path / "0" / "exp_scales.mmap").shape == (6, 1)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_rows_whose_squares_float32_cannot_hold(size):
    rows = torch.full((2, 3), size)
    rows[1] = 0
    kept = to_store(rows, torch.bfloat16, np.arange(2))
    np.testing.assert_allclose(kept, rows, rtol=1e-2)
    with pytest.raises(NumericalError, match="sample 0 .* torch.float16"):
        to_store(rows, torch.float16, np.arange(2))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int8"])
def test_the_format_and_the_precision_are_in_the_metadata(name, tmp_path):
    model, _ = cases.make("mlp", 1)
    traker = runs.make_traker(model, 60, tmp_path, row_dtype=name)
    found = json.loads((tmp_path / "metadata.json").read_text())
    assert found["precision"] == name
    assert found["format"] == (2 if name in {"bfloat16", "int8"} else 1)
    assert traker.saver.metadata["fingerprint"] == found["fingerprint"]


def test_rows_of_two_dtypes_cannot_be_mixed(tmp_path):
    model, _ = cases.make("mlp", 1)
    runs.make_traker(model, 60, tmp_path, row_dtype="float16")
    with pytest.raises(StoreMismatchError, match="precision: the store has .float16"):
        runs.make_traker(model, 60, tmp_path, row_dtype="int8")


def test_half_precision_keeps_its_meaning(tmp_path):
    model, _ = cases.make("mlp", 1, torch.float32)
    for half, row_dtype, expected in [
        (True, None, torch.float16),
        (False, None, torch.float32),
        (True, "float32", torch.float32),
        (False, "int8", torch.int8),
        (True, np.float16, torch.float16),
    ]:
        folder = tmp_path / f"{half}{row_dtype}"
        options = {"use_half_precision": half, "row_dtype": row_dtype}
        traker = runs.make_traker(model, 60, folder, **options)
        assert traker.dtype is expected
        assert traker.gradient_computer.dtype.is_floating_point
        assert traker.score_computer.dtype.is_floating_point


@pytest.mark.parametrize("row_dtype", ["int4", "uint8", torch.int16, 7])
def test_other_row_dtypes_are_refused(row_dtype, tmp_path):
    model, _ = cases.make("mlp", 1)
    with pytest.raises(InputError, match="float64, float32, float16, bfloat16, int8"):
        runs.make_traker(model, 60, tmp_path, row_dtype=row_dtype)


@pytest.mark.parametrize("name", ENCODINGS)
def test_encoding_rounds_to_the_nearest(name):
    encoding = encoding_of(name)
    rows = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).double()
    back = encoding.decode(*encoding.encode(rows), torch.float64)
    unit = rows.abs().amax(dim=1, keepdim=True) if encoding.scaled else rows.abs()
    assert ((back - rows).abs() <= encoding.eps / 2 * unit * (1 + 1e-5)).all()
    again = encoding.decode(*encoding.encode(back), torch.float64)
    torch.testing.assert_close(again, back, rtol=1e-6, atol=0)


def test_int8_rows_of_zeros_stay_zeros():
    encoding = encoding_of("int8")
    raw, scales = encoding.encode(torch.zeros(2, 3))
    assert not raw.any()
    assert not encoding.decode(raw, scales).any()


def test_rows_that_int8_cannot_hold_are_refused(tmp_path):
    uneven = torch.ones(2, 4000) * 0.001
    uneven[1, 7] = 1.0
    with pytest.raises(NumericalError, match="sample 5 is so uneven.*row_dtype"):
        to_store(uneven, torch.int8, np.array([4, 5]))
    with pytest.raises(NumericalError, match="sample 4 reaches"):
        to_store(torch.full((1, 3), 1e300, dtype=torch.float64), torch.int8, np.array([4]))
    with pytest.raises(NumericalError, match="sample 4 reaches"):
        to_store(
            torch.full((1, 3), 1e300, dtype=torch.float64), torch.bfloat16, np.array([4])
        )


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_encoded_rows_exist_only_with_their_record(name, tmp_path):
    """A row whose writer died before the journal is written again, scales and all."""
    encoding = encoding_of(name)
    arrays = {"grads": (tmp_path / "g", 3, encoding.file)}
    if encoding.scaled:
        arrays["scales"] = (tmp_path / "s", 1, np.float32)
    group = RowGroup(tmp_path / "j", 4, arrays, encoding)
    group.commit(np.array([1]), {"grads": np.full((1, 3), 2.0, np.float32)})
    journal = (tmp_path / "j").read_bytes()
    group.commit(np.array([2]), {"grads": np.full((1, 3), 9.0, np.float32)})
    (tmp_path / "j").write_bytes(journal)
    again = RowGroup(tmp_path / "j", 4, arrays, encoding)
    assert np.flatnonzero(again.done).tolist() == [1]
    again.commit(np.array([2]), {"grads": np.full((1, 3), 4.0, np.float32)})
    assert again.array("grads")[1:3].tolist() == [[2.0] * 3, [4.0] * 3]
    part = again.encoded()[1:3]
    exact = torch.tensor([[2.0] * 3, [4.0] * 3], dtype=torch.float64)
    torch.testing.assert_close(part.tensor(torch.float64), exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_runs_go_on_with_encoded_rows(name, tmp_path):
    model, train, targets = runs.data("mlp", 30, 3)
    state = model.state_dict()
    expected = np.array(
        runs.whole_run(
            runs.make_traker(model, 30, tmp_path / "a", row_dtype=name),
            train,
            targets,
            [state],
        )
    )
    first = runs.make_traker(model, 30, tmp_path / "b", row_dtype=name)
    first.load_checkpoint(state, model_id=0)
    first.featurize(runs.split(train, 11)[0], num_samples=11)
    second = runs.make_traker(model, 30, tmp_path / "b", row_dtype=name)
    found = runs.whole_run(second, train, targets, [state])
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "size", [1e-44, 1e-42, 3e-40, 1e-39, 1e-33, 1e-20, 1.0, 1e20, 3.4e38]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_rows_are_refused_where_rounding_loses_them(size, dtype):
    rows = torch.ones(2, 5) * torch.tensor([1.0, -size])[:, None]
    rows[1, 1:] *= torch.tensor([0.3, 0.7, 0.9, 0.2])
    rounded = rows.to(dtype).double()
    lost = (rounded - rows.double()).norm(dim=1) / rows.double().norm(dim=1)
    if bool(rounded.isfinite().all()) and float(lost.max()) <= 0.05:
        found = torch.from_numpy(to_store(rows, dtype, np.arange(2)))
        torch.testing.assert_close(found.double(), rounded, rtol=0, atol=0)
    else:
        with pytest.raises(NumericalError, match="sample 1 "):
            to_store(rows, dtype, np.arange(2))
