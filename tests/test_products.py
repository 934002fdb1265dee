"""Products of rows: as cheap as they can be where the ridge hides what they round."""

import numpy as np
import pytest
import torch
from tests import reference

from trak.encodings import encoding_of
from trak.savers.rows import RowGroup
from trak.score_computers import RidgeScoreComputer, products
from trak.score_computers.gram import dual_gram
from trak.score_computers.products import _AMPLE, _ROUNDED, multiplies_bfloat16
from trak.score_computers.ridge_sample import Situation

SHAPES = [(40, 300), (300, 40)]  # dual and primal


def made(shape, size=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(*shape, generator=generator, dtype=torch.float64)
    rows *= torch.logspace(0, -2, shape[1], dtype=torch.float64)
    targets = torch.randn(7, shape[1], generator=generator, dtype=torch.float64)
    return (size * rows).to(dtype), (size * targets).to(dtype)


def scores_of(computer, kept, rows, targets):
    return computer.scorer(kept, rows, targets)(0, len(rows))


def expected(rows, targets, ridge):
    return reference.scores_before_q(rows.double(), targets.double(), ridge)


def error(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ridge", ["1x", None, "0.01x"])
def test_a_usual_ridge_takes_float32(shape, ridge):
    rows, targets = made(shape)
    computer = RidgeScoreComputer(lambda_reg=ridge)
    kept = computer.finalize(rows)
    assert kept[1]["products"] == "float32"
    wanted = expected(rows, targets, kept[1]["ridge"])
    assert error(scores_of(computer, kept, rows, targets), wanted) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ridge", ["1e-6x", 1e-6, 0.5])
def test_a_small_ridge_or_one_of_unknown_size_takes_float64(shape, ridge):
    rows, targets = made(shape)
    computer = RidgeScoreComputer(lambda_reg=ridge)
    kept = computer.finalize(rows)
    assert "products" not in kept[1]
    wanted = expected(rows, targets, kept[1]["ridge"])
    assert error(scores_of(computer, kept, rows, targets), wanted) < 1e-7


def test_how_small_depends_on_how_many_rows_there_are():
    for count in (50, 500):
        rows, _ = made((count, 600))
        least = _AMPLE * count
        for ridge, found in ((0.99 * least, None), (1.01 * least, "float32")):
            kept = RidgeScoreComputer(lambda_reg=f"{ridge}x").finalize(rows)
            assert kept[1].get("products") == found


@pytest.fixture
def fast(monkeypatch):
    """The processor multiplies bfloat16 numbers, whether this one does so fast or not."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda _: True)


def stored(folder, rows):
    encoding, shape = encoding_of("bfloat16"), rows.shape
    path = folder / "rows"
    arrays = {"grads": (path, shape[1], encoding.file)}
    group = RowGroup(folder / "j", shape[0], arrays, encoding)
    group.commit(np.arange(len(rows)), {"grads": rows.float().numpy()})
    return group.encoded()


@pytest.mark.parametrize(
    ("shape", "ridge", "found"),
    [
        ((300, 2500), "2x", "bfloat16"),
        ((300, 2500), "8x", "bfloat16"),
        ((300, 2500), "1.7x", None),
        ((300, 4096), "1.5x", "bfloat16"),
        ((300, 4096), "1.3x", None),
        ((300, 2500), 1e6, None),
        ((2000, 2500), "2.3x", None),
        ((2000, 2500), "2.5x", "bfloat16"),
        ((300, 200), "8x", None),
        ((300, 2500), "1e-6x", "float64"),
    ],
)
def test_ridges_that_hide_bfloat16_products(fast, shape, ridge, found):
    rows, targets = made(shape, dtype=torch.bfloat16)
    computer = RidgeScoreComputer(lambda_reg=ridge)
    kept = computer.finalize(rows)
    assert kept[1].get("products") == found
    wanted = expected(rows, targets, kept[1]["ridge"])
    assert error(scores_of(computer, kept, rows, targets), wanted) < 5e-3


def test_a_processor_without_them_takes_float32(monkeypatch):
    known = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert not multiplies_bfloat16(torch.device("cpu"))
    known |= {"avx512_bf16": False, "avx2": True}
    assert not multiplies_bfloat16(torch.device("cpu"))
    known |= {"avx512_bf16": True}
    assert multiplies_bfloat16(torch.device("cpu"))
    assert not multiplies_bfloat16(torch.device("cuda"))
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not multiplies_bfloat16(torch.device("cpu"))


def test_sums_are_rounded_in_short_stretches():
    rows, _ = made((300, 5000), dtype=torch.bfloat16)
    rows[:, 1:] = rows[:, :1]  # one sum over all columns would round alike everywhere
    rows *= torch.linspace(1, 2, 5000).to(torch.bfloat16)
    wanted = rows.double() @ rows.double().T
    found = dual_gram(rows, dtype=torch.bfloat16)
    assert torch.equal(found, found.T)
    errors = (found - wanted) / wanted.diagonal().sqrt().outer(wanted.diagonal().sqrt())
    assert errors.square().mean().sqrt() < 0.7 * torch.finfo(torch.bfloat16).eps / 12**0.5


def test_rows_with_scales_are_rounded_once(fast, tmp_path):
    rows, targets = made((300, 2500), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    q = torch.rand(300, 1, generator=generator, dtype=torch.float64)
    computer = RidgeScoreComputer(lambda_reg="2x", curvature=True)
    found = stored(tmp_path, rows)
    kept = computer.finalize(found, Situation(loss=q[:, 0]))
    assert kept[1]["products"] == "bfloat16"
    factors = (q * (1 - q / 2)).clamp(min=1e-4).sqrt()
    weighted = factors * rows.double()
    gram = weighted @ weighted.T
    assert kept[1]["ridge"] == pytest.approx(2 * float(gram.diagonal().mean()), rel=1e-3)
    gram.diagonal().add_(kept[1]["ridge"])
    wanted = torch.linalg.solve(gram, weighted @ targets.double().T) / factors
    scores = computer.scorer(kept, found, targets, q)(0, 300)
    assert error(scores, wanted) < 5e-3


def test_a_ridge_that_needs_more_is_not_made_of_rounded_products(fast):
    rows, targets = made((300, 2500), dtype=torch.bfloat16)
    computer = RidgeScoreComputer(lambda_reg="2x")
    kept = computer.finalize(rows)
    for ridges, found in ((["3x"], "bfloat16"), (["3x", "0.1x"], None), ([0.5], None)):
        for each in computer.at_ridges(kept, rows, ridges):
            assert each[1].get("products") == found
            wanted = expected(rows, targets, each[1]["ridge"])
            scores = scores_of(computer, each, rows, targets)
            assert error(scores, wanted) < (2e-3 if found else 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_rows_are_multiplied_as_ever(dtype):
    rows, _ = made(SHAPES[0], dtype=dtype)
    assert "products" not in RidgeScoreComputer(lambda_reg="1x").finalize(rows)[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ridge_that_float32_sums_would_drown_takes_float64(shape):
    rows, targets = made(shape, dtype=torch.float16)
    for ridge, found in ((0.5, "float64"), (2, None)):
        computer = RidgeScoreComputer(lambda_reg=f"{ridge * _ROUNDED * shape[0]}x")
        kept = computer.finalize(rows)
        assert kept[1].get("products") == found
    computer = RidgeScoreComputer(lambda_reg=f"{0.5 * _ROUNDED * shape[0]}x")
    kept = computer.finalize(rows)
    wanted = expected(rows, targets, kept[1]["ridge"])
    assert error(scores_of(computer, kept, rows, targets.half()), wanted) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_other_ridges_have_the_digits_that_they_need(shape):
    rows, targets = made(shape)
    computer = RidgeScoreComputer(lambda_reg="1x")
    kept = computer.finalize(rows)
    for ridges in (["2x", "0.3x"], ["2x", "1e-6x"], [1e-6], [3.0]):
        found = computer.at_ridges(kept, rows, ridges)
        ample = all(str(r).endswith("x") and float(r[:-1]) > 0.1 for r in ridges)
        for each in found:
            assert ("products" in each[1]) == ample
            wanted = expected(rows, targets, each[1]["ridge"])
            scores = scores_of(computer, each, rows, targets)
            assert error(scores, wanted) < (1e-5 if ample else 1e-8)


def test_float64_factors_serve_all_ridges_without_a_pass(monkeypatch):
    rows, _ = made(SHAPES[0])
    computer = RidgeScoreComputer(lambda_reg=0.5)
    kept = computer.finalize(rows)
    monkeypatch.setattr(RidgeScoreComputer, "_gram", None)
    for each in computer.at_ridges(kept, rows, ["1x", 1e-3]):
        assert "products" not in each[1]


@pytest.mark.parametrize("size", [1e-16, 1e-30, 1e18])
def test_sizes_that_float32_products_lose(size):
    rows, targets = made(SHAPES[0], size)
    computer = RidgeScoreComputer(lambda_reg="1x")
    kept = computer.finalize(rows)
    unit = float((rows.double() / size).square().sum(1).mean())
    wanted = expected(rows.double() / size, targets.double() / size, unit)
    assert error(scores_of(computer, kept, rows, targets), wanted) < 1e-5


def test_a_file_is_not_changed_by_decoding_weighted_rows(tmp_path):
    rows, _ = made((20, 30))
    encoding = encoding_of("float32")
    path = tmp_path / "rows"
    group = RowGroup(tmp_path / "j", 20, {"grads": (path, 30, encoding.file)}, encoding)
    group.commit(np.arange(20), {"grads": rows.numpy()})
    raw = torch.from_numpy(np.fromfile(path, np.float32)[-600:].reshape(20, 30))
    before = raw.clone()
    scales = torch.linspace(1, 2, 20)[:, None]
    found = encoding.decode(raw, scales)
    assert torch.equal(raw, before)
    torch.testing.assert_close(found, before * scales)
    double = encoding.decode(raw, scales, torch.float64)
    torch.testing.assert_close(double, before.double() * scales.double())
