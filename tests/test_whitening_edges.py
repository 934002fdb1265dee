"""Whitening where gradients are zero, damaged, or hardly there."""

import copy

import numpy as np
import pytest
import torch
from tests import runs
from torch import nn

import trak
from trak.blocks import DenseBlock, FactoredBlock
from trak.errors import NumericalError, PhaseError, StoreCorruptedError
from trak.whitening import Moments, Whitening

N, M = 24, 5
TASK = "image_classification"


class Attention(nn.Module):
    """Softmax does not see the key's bias, whose gradient is zero but for rounding."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        weights = torch.softmax(self.query(x) @ self.key(x).mT / 8**0.5, dim=-1)
        return self.head((weights @ self.value(x)).mean(dim=1))


def attributed(model, x, y, folder, size, **options):
    return trak.attribute(
        model,
        task=TASK,
        train=runs.split((x[:N], y[:N]), size),
        targets=[(x[N:], y[N:])],
        save_dir=folder,
        progress=False,
        **options,
    )


def test_rounding_is_not_blown_up(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + M, 5, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (N + M,), generator=generator)
    torch.manual_seed(0)
    model = Attention().double()
    options = {"whitening": 1.0, "lambda_reg": "1x", "row_dtype": "float32"}
    exact = attributed(model, x, y, tmp_path / "a", 8, **options)
    found = attributed(model.float(), x.float(), y, tmp_path / "b", 5, **options)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


def test_small_gradients_are_whitened_and_tiny_ones_are_not():
    moments = Moments()
    moments.count = 4
    for name, size in {"large": 1.0, "small": 1e-3, "tiny": 1e-7}.items():
        moments.squares[name] = torch.tensor([1.0, 2.0, 3.0]) * size**2
    made = Whitening(moments, dict.fromkeys(moments.squares, (3,)), 1.0)
    large, small, tiny = (made.scales[name] for name in ("large", "small", "tiny"))
    torch.testing.assert_close(small, large * 1e3)
    torch.testing.assert_close(tiny, torch.ones(3))


class Divided(nn.Module):
    """The output is finite where the gradient is not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        z = self.linear(x) * x[:, :1]
        return z / (1 + z.square().sum(dim=1, keepdim=True).sqrt())


def test_an_example_without_a_gradient_does_not_spoil_the_store(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + M, 6, generator=generator)
    y = torch.randint(3, (N + M,), generator=generator)
    torch.manual_seed(0)
    model = Divided()
    broken = x.clone()
    broken[17, 0] = 0.0  # the derivative of sqrt at 0
    with pytest.raises(NumericalError, match="sample 5 of the batch is not finite"):
        attributed(model, broken, y, tmp_path, 12, whitening=0.4)
    found = attributed(model, x, y, tmp_path, 12, whitening=0.4)
    np.testing.assert_array_equal(
        found, attributed(model, x, y, tmp_path.with_name("new"), 12, whitening=0.4)
    )


def test_sums_that_overflow_are_not_added(tmp_path):
    model, train, _ = runs.data("mlp", N, M, torch.float32)
    traker = runs.make_traker(model, N, tmp_path, whitening=0.5)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    huge = train[0] * 1e25, train[1]
    with pytest.raises(NumericalError, match="Nothing of the batch was added"):
        traker.fit_whitening(batch=huge)
    traker.fit_whitening(batch=train)
    traker.featurize(batch=train, num_samples=N)
    traker.finalize_features()


class Constant(nn.Module):
    """No parameter has a part in the output."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x) * 0.0


@pytest.mark.parametrize("projector", ["leading", "rademacher"])
def test_gradients_that_are_all_zero_are_said_to_be(projector, tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + M, 6, generator=generator)
    y = torch.randint(3, (N + M,), generator=generator)
    options = {"whitening": 0.4, "proj_dim": 16, "projector": projector}
    with pytest.raises(NumericalError, match="zero"):
        attributed(Constant(), x, y, tmp_path, 12, **options)


def parts_of(folder, count=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))
    found = []
    for _ in range(count):
        own = copy.deepcopy(model)
        traker = runs.make_traker(own, 40, folder, whitening=0.4, proj_dim=12)
        traker.load_checkpoint(state, model_id=0)
        found.append(traker)
    return found, (x, y)


def test_what_was_fitted_too_late_is_not_dropped_in_silence(tmp_path):
    (one, other), (x, y) = parts_of(tmp_path)
    for traker, rows in ((one, slice(0, 20)), (other, slice(20, 40))):
        traker.fit_whitening(batch=(x[rows], y[rows]))
    one.featurize(batch=(x[:20], y[:20]), inds=range(20))
    with pytest.raises(PhaseError, match=r"20 examples\) comes too late"):
        other.save_whitening()
    assert len(list((tmp_path / "0" / "whitening").iterdir())) == 1
    other.featurize(batch=(x[20:], y[20:]), inds=range(20, 40))  # by what one fitted


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive"])
def test_damaged_sums_are_said_to_be(content, tmp_path):
    (one, other), (x, y) = parts_of(tmp_path)
    one.fit_whitening(batch=(x, y))
    one.save_whitening()
    (path,) = (tmp_path / "0" / "whitening").iterdir()
    path.write_bytes(content)
    with pytest.raises(StoreCorruptedError, match="lost or damaged"):
        other.featurize(batch=(x, y), num_samples=40)


def test_parameters_without_axes_are_whitened_as_a_whole():
    torch.manual_seed(0)
    layout = {"w": (3, 4), "t": ()}
    grads = {
        "w": torch.randn(6, 3, 4, dtype=torch.float64),
        "t": torch.randn(6, dtype=torch.float64),
    }
    sums = Moments()
    with sums.adding(6) as sink:
        for name, grad in grads.items():
            sink(DenseBlock(name, grad.reshape(6, -1)))
    whitening = Whitening(sums, layout, 0.5, dtype=torch.float64)
    found = whitening.whole(grads, {"w": 12, "t": 1})
    every = torch.cat([grad.reshape(6, -1) for grad in grads.values()], dim=1)
    expected = whitening.whole(every, {"w": 12, "t": 1})
    together = torch.cat([found[name].reshape(6, -1) for name in grads], dim=1)
    torch.testing.assert_close(together, expected)
    assert found["t"].shape == (6,)


def test_factors_of_some_batches_and_whole_gradients_of_others_count_alike():
    torch.manual_seed(0)
    left, right = torch.randn(9, 1, 3).double(), torch.randn(9, 1, 4).double()
    block = FactoredBlock("w", right, left)
    whole, mixed = Moments(), Moments()
    with whole.adding(9) as sink:
        sink(block.dense())
    with mixed.adding(8) as sink:
        sink(DenseBlock("w", block.dense().gradient[:8]))
    with mixed.adding(1) as sink:
        sink(FactoredBlock("w", right[8:], left[8:]))
    expected, found = (
        Whitening(sums, {"w": (3, 4)}, 0.5, dtype=torch.float64).apply(block).dense()
        for sums in (whole, mixed)
    )
    torch.testing.assert_close(found.gradient, expected.gradient)


class Experts(nn.Module):
    """Every token goes to one of three layers."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.gate, self.head = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        shares = self.gate(x).softmax(-1)
        chosen = shares.argmax(-1)
        found = torch.zeros_like(x)
        for j, expert in enumerate(self.experts):
            own = chosen == j
            found[own] = torch.tanh(expert(x[own])) * shares[own][:, j : j + 1]
        return self.head(found.mean(1))


def test_a_last_batch_of_one_sample_does_not_whiten_experts_alone(tmp_path):
    torch.manual_seed(0)
    model, x = Experts().double(), torch.randn(N + M, 5, 8, dtype=torch.float64)
    y = torch.arange(N + M) % 3
    options = {"whitening": 0.5, "lambda_reg": "1x", "row_dtype": "float64"}
    whole = attributed(model, x, y, tmp_path / "a", N, **options)
    found = attributed(model, x, y, tmp_path / "b", N - 1, **options)
    assert np.abs(found - whole).max() < 0.05 * np.abs(whole).max()
