"""Leading coordinates of whitened gradients, against whole matrices in float64."""

import json

import numpy as np
import pytest
import torch
from tests import runs

from trak.blocks import FactoredBlock, IndexedBlock
from trak.errors import InputError, PhaseError, StoreCorruptedError
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import LeadingProjector, NoOpProjector
from trak.savers import AbstractSaver, MmapSaver
from trak.whitening import Moments, Whitening
from trak.whitening.whitening import DAMPING

N, M = 24, 5
CASES = ["mlp", "cnn", "tied", "reused", "encoder"]


def world(name):
    model, train, targets = runs.data(name, N, M)
    return model, train, targets, {k: v.clone() for k, v in model.state_dict().items()}


def fit(traker, train, state, size=5):
    traker.load_checkpoint(state, model_id=0)
    for batch in runs.split(train, size):
        traker.fit_whitening(batch=batch)


def rows_of(name, folder, whitening=0.5, **options):
    model, train, _, state = world(name)
    traker = runs.make_traker(
        model, N, folder, whitening=whitening, use_half_precision=False, **options
    )
    fit(traker, train, state)
    runs.featurize(traker, train, state)
    rows = torch.from_numpy(traker.saver.train_rows(0).array("grads").copy()).double()
    return traker, rows


def whitening_of(traker):
    """The run's whitening in float64, with its eigenvectors."""
    ((path, arrays),) = traker.saver.settled_moments(0, settle=False)
    return Whitening(
        Moments.of_arrays(arrays, path),
        traker.pipeline.whitener.shapes,
        0.5,
        DAMPING,
        torch.float64,
        in_bases=True,
    )


def explicit(traker, plain):
    """Every coordinate of unwhitened rows in the eigenbases, and its predicted variance."""
    whitening = whitening_of(traker)
    shapes = traker.pipeline.whitener.shapes
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    parts, variances = [], []
    for name, part in zip(shapes, plain.split(sizes, dim=1), strict=True):
        if name in whitening.bases:
            matrix, variance = torch.ones(1, 1).double(), torch.ones(1).double()
            for basis in whitening.bases[name]:
                vectors = torch.eye(basis.size).double()
                if basis.vectors is not None:
                    vectors = basis.vectors.double()
                matrix = torch.kron(matrix, vectors * basis.powers.double())
                left_over = basis.values.clamp(min=0) * basis.powers**2
                variance = torch.kron(variance, left_over.double())
            parts.append(part @ matrix)
            variances.append(variance)
        else:
            parts.append(part * whitening.scales[name])
            values = whitening.entries[name].values
            variances.append(values * whitening.scales[name] ** 2)
    return torch.cat(parts, dim=1), torch.cat(variances)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("k", [7, 40])
def test_the_largest_variances_are_kept(name, k, tmp_path):
    traker, rows = rows_of(name, tmp_path / "a", projector="leading", proj_dim=k)
    model, train, _, state = world(name)
    whole = runs.make_traker(
        model, N, tmp_path / "b", projector=NoOpProjector(), use_half_precision=False
    )
    runs.featurize(whole, train, state)
    plain = torch.from_numpy(whole.saver.train_rows(0).array("grads").copy()).double()
    coordinates, variances = explicit(traker, plain)
    kept = coordinates[:, variances.argsort(descending=True)[:k]]
    expected = kept @ kept.T
    torch.testing.assert_close(
        rows @ rows.T, expected, rtol=1e-4, atol=1e-5 * expected.max()
    )


@pytest.mark.parametrize("name", CASES)
def test_all_coordinates_are_the_whitened_gradient(name, tmp_path):
    _, whole = rows_of(name, tmp_path / "a", projector=NoOpProjector())
    k = whole.shape[1] + 3
    _, rows = rows_of(name, tmp_path / "b", projector="leading", proj_dim=k)
    expected = whole @ whole.T
    torch.testing.assert_close(
        rows @ rows.T, expected, rtol=1e-4, atol=1e-5 * expected.max()
    )
    assert (rows[:, -3:] == 0).all()


def test_its_matrix_is_what_it_does(tmp_path):
    traker, rows = rows_of("mlp", tmp_path / "a", projector="leading", proj_dim=30)
    model, train, _, state = world("mlp")
    whole = runs.make_traker(
        model, N, tmp_path / "b", projector=NoOpProjector(), use_half_precision=False
    )
    runs.featurize(whole, train, state)
    plain = torch.from_numpy(whole.saver.train_rows(0).array("grads").copy()).double()
    projector = traker.projector
    matrix = torch.cat([
        projector.matrix(name, size, 0).double() for name, size in projector.layout.items()
    ])
    torch.testing.assert_close(rows, plain @ matrix, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_with_the_coordinates_that_it_began_with(tmp_path):
    model, train, targets, state = world("encoder")
    options = {"whitening": 0.5, "projector": "leading", "proj_dim": 20}
    traker = runs.make_traker(model, N, tmp_path, **options)
    fit(traker, train, state)
    traker.featurize(batch=tuple(p[:10] for p in train), num_samples=10)
    path = tmp_path / "0" / "leading.npz"
    arrays = dict(np.load(path))
    flipped = {n: -a if n.startswith("left/") else a for n, a in arrays.items()}
    flipped |= {n: -a for n, a in arrays.items() if n.startswith("scale/")}
    np.savez(path, **flipped)  # as another machine's eigenvectors may be
    later = runs.make_traker(model, N, tmp_path, **options)
    runs.featurize(later, train, state)
    rows = later.saver.train_rows(0).array("grads").copy()
    path.unlink()
    np.savez(path, **arrays)
    again = runs.make_traker(model, N, tmp_path / "whole", **options)
    fit(again, train, state)
    runs.featurize(again, train, state)
    expected = again.saver.train_rows(0).array("grads").copy()
    np.testing.assert_allclose(rows[:10], expected[:10], rtol=2e-2, atol=1e-4)
    np.testing.assert_allclose(rows[10:], -expected[10:], rtol=2e-2, atol=1e-4)
    scores = runs.whole_run(again, train, targets, [state])
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    "break_it", [lambda p: p.write_bytes(p.read_bytes()[:90]), lambda p: p.unlink()]
)
def test_lost_and_damaged_coordinates_are_refused(break_it, tmp_path):
    model, train, _, state = world("mlp")
    options = {"whitening": 0.5, "projector": "leading", "proj_dim": 9}
    traker = runs.make_traker(model, N, tmp_path, **options)
    fit(traker, train, state)
    traker.featurize(batch=tuple(p[:10] for p in train), num_samples=10)
    break_it(tmp_path / "0" / "leading.npz")
    later = runs.make_traker(model, N, tmp_path, **options)
    with pytest.raises(StoreCorruptedError, match="leading.npz is lost"):
        runs.featurize(later, train, state)


def test_coordinates_of_another_model_are_refused(tmp_path):
    traker, _ = rows_of("mlp", tmp_path, projector="leading", proj_dim=30)
    arrays = dict(np.load(tmp_path / "0" / "leading.npz"))
    name = next(n for n in arrays if n.startswith("left/"))
    for changed in (
        {**arrays, name: arrays[name][1:]},
        {**arrays, name: arrays[name][:, :1]},
        {n: a for n, a in arrays.items() if not n.startswith(("left/", "scale/"))},
    ):
        with pytest.raises(StoreCorruptedError, match="other shapes, or damaged"):
            traker.projector.use(changed, 0)
    small = LeadingProjector(traker.pipeline.whitener.shapes, 3)
    with pytest.raises(StoreCorruptedError, match="k = 3"):
        small.use(arrays, 0)


def test_it_needs_whitening(tmp_path):
    model, train, _, state = world("mlp")
    for given in ("leading", LeadingProjector({"w": (3, 2)}, 4)):
        with pytest.raises(InputError, match="whitening='auto'"):
            runs.make_traker(model, N, tmp_path / "a", projector=given)
    projector = LeadingProjector({"w": (3, 2)}, 4)
    with pytest.raises(PhaseError, match="fit_whitening before featurize"):
        projector.project({"w": torch.ones(2, 3, 2)}, model_id=0)

    class Old(MmapSaver):
        settled_basis = AbstractSaver.settled_basis

    traker = runs.make_traker(
        model, N, tmp_path / "b", whitening=0.5, projector="leading", saver=Old
    )
    fit(traker, train, state)
    with pytest.raises(PhaseError, match="does not define settled_basis"):
        traker.featurize(batch=train, num_samples=N)


def test_it_is_what_whitened_runs_compress_with(tmp_path):
    model, *_ = world("mlp")
    whitened = {"whitening": "auto", "proj_dim": 16}
    kinds = {}
    for case, options in {
        "whitened": whitened,
        "named": {**whitened, "projector": "sparse"},
        "plain": {"proj_dim": 16},
        "dense": {**whitened, "gradient_computer": FunctionalGradientComputer},
        "exact": {"whitening": "auto", "proj_dim": "exact"},
    }.items():
        traker = runs.make_traker(model, N, tmp_path / case, **options)
        kinds[case] = type(traker.projector)
        known = json.loads((tmp_path / case / "metadata.json").read_text())
        leading = kinds[case] is LeadingProjector
        assert (known["JL matrix type"] == "leading") == leading
    assert kinds["whitened"] is LeadingProjector
    assert kinds["exact"] is NoOpProjector
    assert LeadingProjector not in {kinds[c] for c in ("named", "plain", "dense")}


def test_nothing_is_random_in_one_checkpoint(tmp_path):
    model, train, targets, state = world("mlp")
    traker = runs.make_traker(
        model, N, tmp_path, whitening=0.5, projector="leading", proj_dim=9
    )
    fit(traker, train, state)
    runs.whole_run(traker, train, targets, [state])
    with pytest.raises(InputError, match="checkpoint"):
        traker.scores("exp", with_error=True)


def test_what_is_kept_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    rows_of("mlp", tmp_path / "a", projector="leading", proj_dim=30)
    assert "30 leading coordinates hold" in caplog.text
    assert "projector='sparse'" not in caplog.text
    rows_of(
        "mlp",
        tmp_path / "b",
        projector="leading",
        proj_dim=30,
        gradient_computer=FunctionalGradientComputer,
    )
    assert "100 % of the whitened gradients' variance is in parameters" in caplog.text


@pytest.mark.parametrize(
    ("s", "o", "r", "i", "q"),
    [(9, 30, 1, 20, 15), (9, 20, 15, 30, 1), (3, 40, 5, 40, 5), (1, 4, 4, 4, 4)],
)
def test_products_of_factors_in_whatever_order(s, o, r, i, q):
    rng = torch.Generator().manual_seed(0)
    sizes = ((2, s, i), (2, s, o), (o, r), (i, q))
    inputs, backprops, left, right = (
        torch.randn(*size, generator=rng, dtype=torch.float64) for size in sizes
    )
    block = FactoredBlock("w", inputs, backprops)
    expected = left.T @ torch.einsum("bso,bsi->boi", backprops, inputs) @ right
    torch.testing.assert_close(block.sketch(left, right), expected)


def test_entries_of_a_table_are_picked():
    rng = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 9, (3, 7), generator=rng)
    backprops = torch.randn(3, 7, 4, generator=rng, dtype=torch.float64)
    block = IndexedBlock("w", indices, backprops, 9)
    columns = torch.tensor([2, 5, 0, 5, 1, 3, 4, 5, 5])  # 5 is none
    factors = torch.linspace(1, 3, 9, dtype=torch.float64)
    left = torch.zeros(9, 6, dtype=torch.float64)
    left[torch.arange(9), columns] = factors
    right = torch.randn(4, 2, generator=rng, dtype=torch.float64)
    expected = block.sketch(left[:, :5], right)
    torch.testing.assert_close(block.picked(columns, factors, 5, right), expected)
    dense = block.dense().gradient.view(3, 9, 4)
    torch.testing.assert_close(left[:, :5].T @ dense @ right, expected)


def test_a_table_is_picked_from():
    rng = torch.Generator().manual_seed(0)
    left = torch.zeros(9, 3)
    left[[1, 4, 8], [0, 1, 2]] = torch.tensor([1.0, -2.0, 0.5])
    arrays = {
        "left/w": left.numpy(),
        "right/w": torch.randn(4, 2, generator=rng).numpy(),
        "inside/w": np.array([0, 3, 4]),
    }
    projector = LeadingProjector({"w": (9, 4)}, 5, "cpu")
    projector.use(arrays, model_id=0)
    assert projector.parts["w"].picks is not None
    indices = torch.randint(0, 9, (6, 7), generator=rng)
    block = IndexedBlock("w", indices, torch.randn(6, 7, 4, generator=rng), 9)
    found, expected = torch.zeros(6, 5), torch.zeros(6, 5)
    projector.sink(found, 0)(block)
    projector.sink(expected, 0)(block.dense())
    assert found[:, :3].any()
    torch.testing.assert_close(found, expected)
