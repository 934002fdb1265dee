"""Whitened features against explicit matrices, in float64."""

import logging
import math

import numpy as np
import pytest
import torch
from tests import cases, reference, runs
from torch import nn

from trak import blocks
from trak.blocks import ConvolvedBlock, DenseBlock, FactoredBlock, IndexedBlock
from trak.errors import InputError, NumericalError, PhaseError, StoreCorruptedError
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import FactoredProjector, NoOpProjector, make_projector
from trak.score_computers.auto_ridge import BY_STRENGTH
from trak.whitening import Moments, Whitening
from trak.whitening import moments as moments_module
from trak.whitening.whitening import DAMPING

N, M = 14, 5
CASES = ["mlp", "cnn", "tied", "reused", "encoder"]


def power(side, damping, strength):
    """(side + damping mean eigenvalue)^(-strength / 2), written out."""
    values, vectors = torch.linalg.eigh(side)
    values = values + damping * values.mean()
    return vectors @ torch.diag(values ** (-strength / 2)) @ vectors.T


def fit(traker, train, state, model_id=0, size=5):
    traker.load_checkpoint(state, model_id=model_id)
    for batch in runs.split(train, size):
        traker.fit_whitening(batch=batch)


def whitening_of(traker, model_id=0):
    return traker._pipeline.maker.whitenings[model_id]


def whitened_rows(traker, train, **options):
    traker.featurize(batch=train, num_samples=len(train[0]), **options)
    return torch.from_numpy(traker.saver.train_rows(0).array("grads").copy()).double()


def explicit(gradients, whitening):
    """Every sample's gradient multiplied by whole matrices."""
    found = {}
    for name, gradient in gradients.items():
        flat = gradient.flatten(1).double()
        if name in whitening.sides:
            sides = whitening.sides[name]
            left, right = (
                torch.diag(s) if s.ndim == 1 else s for s in (sides.left, sides.right)
            )
            flat = flat @ torch.kron(left, right).double()
        elif name in whitening.scales:
            flat = flat * whitening.scales[name].double()
        found[name] = flat
    return found


def test_factors_are_second_moments_of_inputs_and_backprops(tmp_path):
    # an MLP, where each layer sees one position a sample
    model, train, _ = runs.data("mlp", N, M)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    traker = runs.make_traker(model, N, tmp_path, whitening=0.7, projector=NoOpProjector())
    fit(traker, train, state)
    rows = whitened_rows(traker, train)
    gradients = reference.gradient_rows(model, train)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inputs, outputs = {}, {}
    for name, layer in layers.items():

        def keep(_, args, output, name=name):
            inputs[name], outputs[name] = args[0].detach(), output

        layer.register_forward_hook(keep)
    logits = model.eval()(train[0])
    right = logits[torch.arange(N), train[1]]
    wrong = logits.masked_fill(
        nn.functional.one_hot(train[1], logits.shape[1]) > 0, -math.inf
    )
    total = (right - wrong.logsumexp(1)).sum()
    backprops = torch.autograd.grad(total, list(outputs.values()))
    expected = []
    for name, gradient in gradients.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight":
            a, g = inputs[layer], backprops[list(layers).index(layer)]
            half = math.sqrt(DAMPING)
            left, right = g.T @ g / N, a.T @ a / N
            # only the product's scale is defined
            share = math.sqrt(float(left.trace() / right.trace()))
            left, right = left / share, right * share
            matrices = gradient.unflatten(1, (len(left), len(right)))
            whole = power(left, half, 0.7) @ matrices @ power(right, half, 0.7)
            expected.append(whole.flatten(1))
        else:
            mean = gradient.square().mean(0)
            expected.append(gradient * (mean + DAMPING * mean.mean()) ** -0.35)
    expected = torch.cat(expected, dim=1) / math.sqrt(traker.num_params_for_grad)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["rademacher", "factored", "masked", "sparse"])
def test_rows_are_projections_of_whitened_gradients(name, kind, tmp_path):
    model, train, _ = runs.data(name, N, M)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    traker = runs.make_traker(
        model, N, tmp_path, whitening=0.5, proj_dim=40, projector=kind
    )
    fit(traker, train, state)
    rows = whitened_rows(traker, train)
    gradients = {n: g.flatten(1) for n, g in reference.gradient_rows(model, train).items()}
    gradients = explicit(gradients, whitening_of(traker))
    expected = reference.projected_rows(gradients, traker.projector, 0)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [2, (2, 3), (50, 3)])
@pytest.mark.parametrize("positions", [1, 30])
def test_folding_is_whitening_first(rank, positions):
    torch.manual_seed(0)
    shapes = {"w": (9, 12), "b": (9,)}
    block = FactoredBlock(
        "w",
        torch.randn(4, positions, 12, dtype=torch.float64),
        torch.randn(4, positions, 9, dtype=torch.float64),
    )
    vector = DenseBlock("b", torch.randn(4, 9, dtype=torch.float64))
    sums = Moments()
    with sums.adding(4) as sink:
        sink(block)
        sink(vector)
    whitening = Whitening(sums, shapes, 0.5, dtype=torch.float64)
    projector = FactoredProjector(shapes, 32, device="cpu", rank=rank)
    folded, apart = (torch.zeros(4, 32, dtype=torch.float64) for _ in range(2))
    with projector.gathering(folded, 0, whitening) as sink:
        sink(block)
        sink(vector)
    for one in (block.dense(), vector):
        projector.add(whitening.apply(one), apart, 0)
    torch.testing.assert_close(folded, apart)
    plain = torch.zeros_like(folded)
    with projector.gathering(plain, 0) as sink:
        sink(block)
    again = torch.zeros_like(folded)
    projector.add(block.dense(), again, 0)
    torch.testing.assert_close(plain, again)
    assert not torch.allclose(plain, folded)


def test_full_strength_makes_independent_layers_about_white():
    torch.manual_seed(0)
    mix_a, mix_g = torch.randn(6, 6).double(), torch.randn(4, 4).double()
    a = torch.randn(20_000, 1, 6).double() @ mix_a
    g = torch.randn(20_000, 1, 4).double() @ mix_g
    block = FactoredBlock("w", a, g)
    sums = Moments()
    with sums.adding(len(a)) as sink:
        sink(block)
    white = Whitening(sums, {"w": (4, 6)}, 1.0, 1e-9, torch.float64).apply(block)
    rows = white.dense().gradient
    second = rows.T @ rows / len(rows)
    torch.testing.assert_close(second, torch.eye(24).double(), rtol=0, atol=0.05)


def test_a_tables_rows_are_weighed_by_how_often_they_are_read():
    torch.manual_seed(0)
    indices = torch.tensor([[0, 0, 1], [0, 2, 1]])
    backprops = torch.randn(2, 3, 4).double()
    backprops[1, 1] = 0  # row 2 was read where it did not matter
    block = IndexedBlock("t", indices, backprops, 5)
    sums = Moments()
    with sums.adding(2) as sink:
        sink(block)
    found = sums.matrices["t", "table"]
    assert found.left.tolist() == [3, 2, 0, 0, 0]
    assert int(found.positions) == 5
    whitening = Whitening(sums, {"t": (5, 4)}, 0.5, dtype=torch.float64)
    torch.testing.assert_close(
        whitening.apply(block).dense().gradient,
        whitening.apply(block.dense()).gradient,
    )


def test_a_long_side_is_described_by_its_diagonal(monkeypatch):
    torch.manual_seed(0)
    block = FactoredBlock("w", torch.randn(5, 2, 6), torch.randn(5, 2, 3))
    monkeypatch.setattr(moments_module, "LARGEST_SIDE", 4)
    sums = Moments()
    with sums.adding(5) as sink:
        sink(block)
    found = sums.matrices["w", "layer"]
    assert found.right.shape == (6,)
    assert found.left.shape == (3, 3)
    torch.testing.assert_close(found.right, block.activations.square().sum((0, 1)))
    whitening = Whitening(sums, {"w": (3, 6)}, 1.0)
    torch.testing.assert_close(
        whitening.apply(block).dense().gradient,
        whitening.apply(block.dense()).gradient,
    )


def test_sums_do_not_depend_on_batches_and_add_up_across_processes(tmp_path):
    model, train, targets = runs.data("encoder", N, M)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    scores = []
    for case, size in (("one", N), ("many", 3)):
        traker = runs.make_traker(model, N, tmp_path / case, whitening="auto")
        fit(traker, train, state, size=size)
        assert not traker.whitening_is_fitted
        scores.append(runs.whole_run(traker, train, targets, [state]))
    first = runs.make_traker(model, N, tmp_path / "two", whitening="auto")
    second = runs.make_traker(model, N, tmp_path / "two", whitening="auto")
    fit(first, tuple(p[:6] for p in train), state)
    fit(second, tuple(p[6:] for p in train), state)
    first.save_whitening()
    second.save_whitening()
    scores.append(runs.whole_run(first, train, targets, [state]))
    for other in scores[1:]:
        np.testing.assert_allclose(scores[0], other, rtol=1e-4, atol=1e-7)


def test_a_run_goes_on_with_what_was_fitted(tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    traker = runs.make_traker(model, N, tmp_path / "whole", whitening=0.5)
    fit(traker, train, state)
    whole = runs.whole_run(traker, train, targets, [state])
    traker = runs.make_traker(model, N, tmp_path / "cut", whitening=0.5)
    fit(traker, train, state)
    traker.featurize(batch=tuple(p[:4] for p in train), num_samples=4)
    later = runs.make_traker(model, N, tmp_path / "cut", whitening=0.5)
    later.load_checkpoint(state, model_id=0)
    assert later.whitening_is_fitted
    with pytest.raises(PhaseError, match="nothing can be added"):
        later.fit_whitening(batch=train)
    resumed = runs.whole_run(later, train, targets, [state])
    np.testing.assert_allclose(whole, resumed, rtol=1e-10, atol=1e-14)  # other batches


@pytest.mark.parametrize(
    "options",
    [
        {"projector": "leading", "proj_dim": 9},
        {"projector": NoOpProjector()},
        {"projector": "sparse"},
        {"projector": "factored", "proj_dim": 9},
    ],
)
def test_some_examples_are_kept_as_they_are(options, tmp_path):
    model, train, _ = runs.data("mlp", 60, M)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    traker = runs.make_traker(model, 60, tmp_path / "white", whitening=0.5, **options)
    fit(traker, train, state, size=17)
    runs.featurize(traker, train, state)
    if options["projector"] == "leading":  # which knows no unwhitened rows
        options = {"projector": NoOpProjector()}
    plain = runs.make_traker(model, 60, tmp_path / "plain", **options)
    runs.featurize(plain, train, state)
    rows = torch.from_numpy(plain.saver.train_rows(0).array("grads").copy()).double()
    q = torch.from_numpy(plain.saver.train_rows(0).array("out_to_loss").copy()).double()
    (found,) = traker.pipeline.whitener.unwhitened(0)
    scale = found.kernel[0, 0] / (rows[0] @ rows[0])
    close = {"rtol": 1e-5, "atol": 1e-6 * float(found.kernel.abs().max())}
    torch.testing.assert_close(found.kernel.double(), scale * rows @ rows.T, **close)
    torch.testing.assert_close(found.pull, (scale * rows @ rows.T @ q)[:, 0] / 60, **close)
    torch.testing.assert_close(found.loss, q[:, 0])


def test_the_ridge_is_told_from_what_every_process_kept(tmp_path):
    model, train, targets = runs.data("mlp", 90, M)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ridges = {}
    for case in ("whole", "resumed", "two"):
        options = {"whitening": 0.5, "projector": "sparse"}
        traker = runs.make_traker(model, 90, tmp_path / case, **options)
        other = runs.make_traker(model, 90, tmp_path / case, **options)
        if case == "two":
            fit(traker, tuple(p[:45] for p in train), state)
            fit(other, tuple(p[45:] for p in train), state)
            other.save_whitening()
            assert len(traker.pipeline.whitener.unwhitened(0)) == 0
        else:
            fit(traker, train, state)
        runs.featurize(traker, train, state)
        last = other if case == "resumed" else traker
        last.finalize_features()
        kept = last.pipeline.whitener.unwhitened(0)
        assert [len(each.loss) for each in kept] == ([45, 45] if case == "two" else [90])
        ridges[case] = last.saver.load_factor(0)[1]["auto"]
    assert ridges["whole"] == ridges["resumed"]
    assert ridges["two"] > 0
    alone = runs.make_traker(model, 90, tmp_path / "plain", projector="sparse")
    runs.featurize(alone, train, state)
    alone.finalize_features()
    plain = alone.saver.load_factor(0)[1]["auto"]
    assert ridges["whole"] == pytest.approx((1 + BY_STRENGTH * 0.5) * plain, rel=1e-2)


def test_every_checkpoint_has_its_own(tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    states = cases.checkpoints("mlp", 2)
    traker = runs.make_traker(model, N, tmp_path, whitening=0.5)
    for model_id, state in enumerate(states):
        fit(traker, train, state, model_id)
        traker.featurize(batch=train, num_samples=N)
    both = runs.whole_run(traker, train, targets, states)
    apart = []
    for model_id in (1, 0):
        alone = runs.make_traker(model, N, tmp_path / str(model_id), whitening=0.5)
        fit(alone, train, states[model_id], model_id)
        runs.featurize(alone, train, states[model_id], model_id)
        apart.insert(0, alone.saver.train_rows(model_id).array("grads").copy())
    for model_id in (0, 1):
        rows = traker.saver.train_rows(model_id).array("grads")
        np.testing.assert_array_equal(rows, apart[model_id])
    assert np.isfinite(both).all()


def test_whitening_is_part_of_the_stores_settings(tmp_path):
    model, _, _ = runs.data("mlp", N, M)
    runs.make_traker(model, N, tmp_path, whitening=0.5)
    with pytest.raises(Exception, match="whitening"):
        runs.make_traker(model, N, tmp_path)


def test_zero_is_plain_trak(tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plain = runs.make_traker(model, N, tmp_path / "a")
    zero = runs.make_traker(model, N, tmp_path / "b", whitening=0)
    np.testing.assert_array_equal(
        runs.whole_run(plain, train, targets, [state]),
        runs.whole_run(zero, train, targets, [state]),
    )


def test_bad_input_is_refused(tmp_path, caplog):
    model, train, _ = runs.data("mlp", N, M)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for wrong in (1.5, -0.1, "half", math.nan):
        with pytest.raises(InputError, match="whitening must be"):
            runs.make_traker(model, N, tmp_path / "x", whitening=wrong)
    plain = runs.make_traker(model, N, tmp_path / "plain")
    with pytest.raises(PhaseError, match="Call load_checkpoint before fit_whitening"):
        plain.fit_whitening(batch=train)
    plain.load_checkpoint(state, model_id=0)
    with pytest.raises(InputError, match="does not whiten"):
        plain.fit_whitening(batch=train)
    traker = runs.make_traker(model, N, tmp_path / "w", whitening=0.5)
    traker.load_checkpoint(state, model_id=0)
    with pytest.raises(PhaseError, match="fit_whitening"):
        traker.featurize(batch=train, num_samples=N)
    with caplog.at_level(logging.INFO):
        traker.fit_whitening(batch=train)
        traker.featurize(batch=train, num_samples=N)
    assert f"by {N} examples" in caplog.text


def test_lost_and_damaged_sums_are_refused(tmp_path):
    model, train, _ = runs.data("mlp", N, M)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    traker = runs.make_traker(model, N, tmp_path, whitening=0.5)
    fit(traker, train, state)
    traker.featurize(batch=tuple(p[:4] for p in train), num_samples=4)
    (path,) = (tmp_path / "0" / "whitening").glob("*.npz")
    path.write_bytes(path.read_bytes()[:100])
    later = runs.make_traker(model, N, tmp_path, whitening=0.5)
    later.load_checkpoint(state, model_id=0)
    with pytest.raises(StoreCorruptedError, match="damaged"):
        later.featurize(batch=train, num_samples=N)
    path.unlink()
    with pytest.raises(StoreCorruptedError, match="lost"):
        later.featurize(batch=train, num_samples=N)


def test_sums_that_are_not_finite_or_do_not_fit_are_refused():
    sums = Moments()
    with pytest.raises(InputError, match="no examples"):
        Whitening(sums, {"w": (3, 2)}, 0.5)
    with sums.adding(1) as sink:
        sink(FactoredBlock("w", torch.full((1, 1, 2), math.nan), torch.ones(1, 1, 3)))
    with pytest.raises(NumericalError, match="not finite"):
        Whitening(sums, {"w": (3, 2)}, 0.5)
    with pytest.raises(InputError, match="3 x 2"):
        Whitening(sums, {"w": (2, 3)}, 0.5)
    other = Moments()
    with other.adding(1) as sink:
        sink(FactoredBlock("w", torch.ones(1, 1, 5), torch.ones(1, 1, 3)))
    with pytest.raises(InputError, match="different shapes"):
        sums.merge(other)


def test_a_parameter_without_gradient_is_left_alone():
    sums = Moments()
    with sums.adding(2) as sink:
        sink(FactoredBlock("w", torch.zeros(2, 1, 2), torch.zeros(2, 1, 3)))
        sink(DenseBlock("b", torch.zeros(2, 3)))
    shapes = {"w": (3, 2), "b": (3,), "unseen": (4, 4)}
    whitening = Whitening(sums, shapes, 0.5)
    for name, width in (("w", 6), ("b", 3), ("unseen", 16)):
        block = DenseBlock(name, torch.randn(2, width))
        torch.testing.assert_close(whitening.apply(block).gradient, block.gradient)
    assert make_projector(shapes, 4, 0, torch.device("cpu")).proj_dim == 4


def test_rows_of_a_users_own_computer_and_projector(tmp_path):
    class Own(FunctionalGradientComputer):
        def compute_per_sample_grad(self, batch):
            grads = super().compute_per_sample_grad(batch)
            return torch.cat([g.flatten(1) for g in grads.values()], dim=1)

    model, train, _ = runs.data("mlp", N, M)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    found = []
    for folder, computer in (("a", Own), ("b", FunctionalGradientComputer)):
        traker = runs.make_traker(
            model,
            N,
            tmp_path / folder,
            whitening=0.5,
            gradient_computer=computer,
            projector=NoOpProjector(),
        )
        fit(traker, train, state)
        found.append(whitened_rows(traker, train))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_patches_of_a_convolution(axes, stride, dilation, monkeypatch):
    torch.manual_seed(0)
    size = 2 * dilation + 1 + 3  # room for a position that a stride of 2 leaves out
    images = torch.randn(2, 3, *[size] * axes).double().transpose(0, 1).contiguous()
    images = images.transpose(0, 1)  # not contiguous
    positions = [(size - 2 * dilation - 1) // stride + 1] * axes
    backprops = torch.randn(2, 4, *positions).double()
    kernel, *rest = ((n,) * axes for n in (3, stride, dilation))
    block = ConvolvedBlock("c", images, backprops, kernel, *rest)
    left, right = block.factors()
    assert right.shape == (2, math.prod(positions), 3 * 3**axes)
    whole = torch.einsum("bso,bsi->boi", left, right)
    torch.testing.assert_close(whole.flatten(1), block.dense().gradient)
    monkeypatch.setattr(blocks, "_PATCHES", 1)  # one sample at a time
    torch.testing.assert_close(whole.flatten(1), block.dense().gradient)
    assert len(block.taps()) == 2
    taps = block.taps().reshape(2, right.shape[2], -1)
    torch.testing.assert_close(taps.transpose(1, 2), right)


def test_moments_keep_their_digits_beside_large_inputs_without_gradient():
    torch.manual_seed(0)
    images, backprops = torch.randn(4, 2, 9, 9), torch.randn(4, 3, 7, 7)
    images[0, :, :3, :3] *= 1e5
    backprops[0, :, :3, :3] = 0
    block = ConvolvedBlock("c", images, backprops, (3, 3), (1, 1), (1, 1))
    left, right = (part.flatten(0, 1).double() for part in block.factors())
    moments = Moments()
    with moments.adding(4) as sink:
        sink(block)
    found = moments.matrices["c", "layer"].right.double()
    right = right[left.any(dim=1)]
    torch.testing.assert_close(found, right.T @ right, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("columns", [1, 27])
@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize("size", [3, 12])
def test_a_convolutions_gradient_between_matrices(columns, rows, size, monkeypatch):
    torch.manual_seed(0)
    images = torch.randn(5, 3, size + 2, size + 2).double()
    backprops = torch.randn(5, 4, size, size).double()
    block = ConvolvedBlock("c", images, backprops, (3, 3), (1, 1), (1, 1))
    right = torch.randn(27, columns).double()
    left = None if rows is None else torch.randn(4, rows).double()
    whole = block.dense().gradient.view(5, 4, 27) @ right
    expected = whole if left is None else left.T @ whole
    for formed in (True, False):
        monkeypatch.setattr(ConvolvedBlock, "_is_short", lambda *_, way=formed: way)
        torch.testing.assert_close(block.sketch(left, right), expected)
    monkeypatch.undo()
    torch.testing.assert_close(block.sketch(left, right), expected)
    # many columns and positions: the gradient is smaller than the patches' products
    assert block._is_short(left, right) == (columns == 27)


@pytest.mark.parametrize("shape", [(7,), (6, 5), (5, 4, 6)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(
    "kind", ["everywhere", "zeros in images", "zeros in backprops", "zeros in many"]
)
def test_moments_of_patches(shape, stride, dilation, kind):
    # as if all patches had been cut out, also where taps are added up along rows
    torch.manual_seed(0)
    axes = len(shape)
    taps = [3, 2, 1][:axes]
    padded = [shape[0] + 2, *shape[1:]]
    space = [
        (size - (tap - 1) * dilation - 1) // stride + 1
        for size, tap in zip(padded, taps, strict=True)
    ]
    images = torch.zeros(4, 3, *padded).double()
    images[:, :, 1:-1] = torch.randn(4, 3, *shape).double()
    backprops = torch.randn(4, 2, *space).double()
    if kind == "zeros in images":
        images[1] = 0
        images[2, :, :4] = 0
    if kind == "zeros in backprops":
        backprops[1, ..., 0] = 0
    if kind == "zeros in many":
        backprops[1:] = 0
    steps = (tuple(taps), (stride,) * axes, (dilation,) * axes)
    block = ConvolvedBlock("c", images, backprops, *steps)
    left, right = (part.flatten(0, 1) for part in block.factors())
    used = left.any(dim=1) & right.any(dim=1)
    assert bool(used.all()) == (kind == "everywhere")
    moments = Moments()
    with moments.adding(4) as sink:
        sink(block)
    sums = moments.matrices["c", "layer"]
    assert int(sums.positions) == int(used.sum())
    torch.testing.assert_close(sums.left, left[used].T @ left[used])
    torch.testing.assert_close(sums.right, right[used].T @ right[used])
    if kind == "zeros in backprops" and stride == 1 and axes < 3:  # it does matter
        assert not torch.allclose(sums.right, right.T @ right)
