"""The logit of one of two classes as output: the same scores as its margin."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import trak
from trak import TRAKer
from trak.errors import InputError
from trak.modelout_functions import AbstractModelOutput
from trak.pipeline.sources import loss_sizes
from trak.score_computers.logistic import is_logistic, sizes

N, M = 120, 24


class Margin(AbstractModelOutput):
    """`f = s z` and `Q = 1 - p`, with `z` the logit and `s` 1 or -1 by the label."""

    @staticmethod
    def get_output(model, weights, buffers, x, y):
        z = functional_call(model, (weights, buffers), (x[None],)).sum()
        return (2 * y - 1) * z

    def get_batch_output(self, model, batch):
        return (2 * batch[1] - 1) * model(batch[0])[:, 0]

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        x, y = batch
        z = functional_call(model, (weights, buffers), (x,))[:, 0]
        return torch.sigmoid(-(2 * y - 1) * z)


class Signed(Margin):
    """`f = z` and `Q = y - p`."""

    @staticmethod
    def get_output(model, weights, buffers, x, y):
        return functional_call(model, (weights, buffers), (x[None],)).sum() + 0 * y

    def get_batch_output(self, model, batch):
        return model(batch[0])[:, 0]

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return (2 * batch[1] - 1) * super().get_out_to_loss_grad(
            model, weights, buffers, batch
        )


class Negative(Signed):
    """`Q = p - y`, after which every score has the other sign."""

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return -super().get_out_to_loss_grad(model, weights, buffers, batch)


def world():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + M, 6, generator=generator)
    y = (x[:, :2].sum(1) + 0.7 * torch.randn(N + M, generator=generator) > 0.4).float()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        for layer in model[::2]:
            layer.reset_parameters()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(60):
            loss = nn.functional.binary_cross_entropy_with_logits
            optimizer.zero_grad()
            loss(model(x[:N])[:, 0], y[:N]).backward()
            optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return model, states, (x[:N], y[:N]), (x[N:], y[N:])


def attributed(folder, task, count=2, **options):
    model, states, train, targets = world()
    scores = trak.attribute(
        model, task=task, train=[train], targets=[targets], checkpoints=states[:count],
        save_dir=folder, progress=False, device="cpu", **options,
    )  # fmt: skip
    return scores, (2 * targets[1] - 1).numpy()


@pytest.mark.parametrize(("task", "turned"), [(Signed, 1), (Negative, -1)])
@pytest.mark.parametrize(
    "options",
    [
        {"count": 1},
        {},
        {"proj_dim": 32},
        {"whitening": 0, "proj_dim": 16},
        {"whitening": 0, "curvature": False},
        {"proj_dim": "exact"},
    ],
)
def test_one_call(tmp_path, task, turned, options):
    expected, signs = attributed(tmp_path / "margin", Margin(), **options)
    found, _ = attributed(tmp_path / "signed", task(), **options)
    np.testing.assert_allclose(turned * found * signs, expected, rtol=1e-4, atol=1e-7)


def finished(folder, task, **options):
    model, states, train, targets = world()
    traker = TRAKer(model, task, N, folder, device="cpu", curvature=True, **options)
    for number, state in enumerate(states[:1]):
        traker.load_checkpoint(state, model_id=number)
        traker.featurize(train, num_samples=N)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", states[0], 0, M)
    traker.score(targets, num_samples=M)
    traker.finalize_scores("test")
    return traker, (2 * targets[1] - 1).numpy()


@pytest.mark.parametrize("method", ["relatif", "unit_norm", "cosine", "dot"])
def test_other_methods(tmp_path, method):
    traker, signs = finished(tmp_path / "margin", Margin(), proj_dim=16)
    other, _ = finished(tmp_path / "signed", Signed(), proj_dim=16)
    expected = np.array(traker.scores("test", method=method))
    found = np.array(other.scores("test", method=method))
    np.testing.assert_allclose(found * signs, expected, rtol=1e-4, atol=1e-7)


def test_errors_and_features(tmp_path):
    traker, _ = finished(tmp_path / "margin", Margin(), proj_dim=16)
    other, _ = finished(tmp_path / "signed", Signed(), proj_dim=16)
    expected = traker.scores("test", with_error=True).errors
    found = other.scores("test", with_error=True).errors
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)
    sizes_there = loss_sizes(other.saver, 0)
    assert bool((sizes_there.own >= 0).all())
    np.testing.assert_allclose(sizes_there.own, loss_sizes(traker.saver, 0).own, rtol=1e-6)


def test_a_task_may_say_so(tmp_path):
    class SaysNo(Signed):
        loss_is_logistic = False

    expected, signs = attributed(tmp_path / "margin", Margin(), whitening=0)
    found, _ = attributed(tmp_path / "other", SaysNo(), whitening=0)
    assert not np.allclose(found * signs, expected, rtol=1e-2)


class Words(Signed):
    """Neither squared nor logistic, and between 0 and 1."""

    loss_is_logistic = False

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        q = super().get_out_to_loss_grad(model, weights, buffers, batch)
        return 0.3 + 0.2 * q


class SaysWords(Words):
    loss_is_of_words = True


def test_only_a_task_says_that_texts_are_meant(tmp_path):
    ridges = []
    for task in (Words(), SaysWords()):
        traker, _ = finished(tmp_path / type(task).__name__, task)
        ridges.append(traker.saver.load_factor(0)[1]["auto"])
    assert ridges[1] < ridges[0] / 2


class Smoothed(Margin):
    """Some loss weights are below 0, as with smoothed labels."""

    loss_is_logistic = False

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        q = super().get_out_to_loss_grad(model, weights, buffers, batch)
        return torch.where(torch.arange(len(q)) < 3, -0.04, q)


def test_strays_are_named(tmp_path, caplog):
    with caplog.at_level("INFO", "trak"):
        finished(tmp_path / "a", Smoothed())
    assert "between 0 and 1 but for" in caplog.text
    assert "-0.0" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "trak"):
        finished(tmp_path / "b", Signed())
    assert "but for" not in caplog.text


class Settled(Margin):
    """A hinge loss that is 0 for every example."""

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return 0 * super().get_out_to_loss_grad(model, weights, buffers, batch)


def test_loss_weights_that_are_all_0_are_told(tmp_path, caplog):
    traker, _ = finished(tmp_path / "a", Settled())
    assert not np.array(traker.scores("test")).any()
    assert "Q of model_id=0 is 0 for all training examples" in caplog.text
    caplog.clear()
    finished(tmp_path / "b", Margin())
    assert "all training examples" not in caplog.text


class Density(Margin):
    """`log(p / (1 - p))` of `p = exp(-loss)` above 1, whose gradient is a number."""

    @staticmethod
    def get_output(model, weights, buffers, x, y):
        loss = nn.functional.softplus(-Margin.get_output(model, weights, buffers, x, y)) - 3
        return -loss - torch.log(-torch.expm1(-loss))

    def get_batch_output(self, model, batch):
        loss = nn.functional.softplus(-super().get_batch_output(model, batch)) - 3
        return -loss - torch.log(-torch.expm1(-loss))


def test_outputs_that_are_nan_beside_finite_gradients_are_told(tmp_path, caplog):
    finished(tmp_path / "a", Density())
    assert "of the first 120 samples are NaN at model_id=0" in caplog.text
    caplog.clear()
    finished(tmp_path / "b", Margin())
    assert "NaN" not in caplog.text


class OneNumber(Margin):
    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return super().get_out_to_loss_grad(model, weights, buffers, batch).mean()


def test_one_number_for_a_batch_is_named(tmp_path):
    with pytest.raises(InputError, match=r"one number a sample, \[120, 1\]"):
        attributed(tmp_path, OneNumber())


def test_tiny_gradients_are_kept(tmp_path):
    class Tiny(Margin):
        @staticmethod
        def get_output(model, weights, buffers, x, y):
            return 1e-9 * Margin.get_output(model, weights, buffers, x, y)

        def get_batch_output(self, model, batch):
            return 1e-9 * super().get_batch_output(model, batch)

    expected, _ = attributed(tmp_path / "a", Margin(), whitening=0)
    found, _ = attributed(tmp_path / "b", Tiny(), whitening=0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def random(*shape, seed=0):
    return 1.5 * torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def test_signs_are_understood():
    z = random(40)
    labels = (random(40, seed=1) > 0).double()
    q = labels - torch.sigmoid(z)
    assert is_logistic(z, q) is True
    assert is_logistic(0.2 * z, -q) is True
    assert is_logistic(z, (2 * labels - 1) * q) is False
    assert torch.equal(sizes(q, True), q.abs())
    assert torch.equal(sizes(q, False), q)


@pytest.mark.parametrize("scale", [0.02, 0.2, 0.3])
def test_residuals_of_the_squared_loss_are_not_logistic(scale):
    f = scale * random(60)
    residuals = (scale * random(60, seed=2) - 0.7 * f).clamp(-1, 1)
    assert is_logistic(f, residuals) is False
    assert is_logistic(f, residuals.sign()) is None
