"""Squared losses: recognized by Q's slope, and a ridge told from outputs and residuals."""

import json
import logging

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tests import runs
from torch import nn
from torch.func import functional_call

from trak.errors import StoreCorruptedError
from trak.gradient_computers import (
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
)
from trak.modelout_functions import AbstractModelOutput
from trak.pipeline import kept_outputs
from trak.pipeline.squared import slope_of
from trak.projectors import NoOpProjector
from trak.savers import AbstractSaver, MmapSaver
from trak.savers.arrays import npy_header
from trak.score_computers.auto_ridge import relative_ridge
from trak.score_computers.residuals import LEAST, MOST, ridge_left
from trak.score_computers.ridge_sample import Outputs, Situation, drawn

N = 48


def random(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


class Regression(AbstractModelOutput):
    """Half the squared error."""

    @staticmethod
    def get_output(model, weights, buffers, x, y):
        found = functional_call(model, (weights, buffers), (x[None],))
        return found[0, 0] + 0 * y

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        found = functional_call(model, (weights, buffers), (batch[0],))
        return self.weight(found[:, 0], batch[1])

    @staticmethod
    def weight(found, y):
        return y - found


class Batched(Regression):
    def get_batch_output(self, model, batch):
        return model(batch[0])[:, 0]


class Twice(Batched):
    @staticmethod
    def weight(found, y):
        return 2 * (y - found)


class Flipped(Batched):
    @staticmethod
    def weight(found, y):
        return found - y


class Huber(Batched):
    @staticmethod
    def weight(found, y):
        return (y - found).clamp(-0.05, 0.05)


class Counts(Batched):
    @staticmethod
    def weight(found, y):
        return y.abs() - found.exp()


class Quantile(Batched):
    @staticmethod
    def weight(found, y):
        return 0.5 - torch.sigmoid((found - y) / 0.1)


class Ones(Batched):
    @staticmethod
    def weight(found, y):
        return torch.ones_like(found)


class ByHand(Batched):
    """The model is not called, but its only layer."""

    @staticmethod
    def get_output(model, weights, buffers, x, y):
        return (weights["0.weight"] @ x)[0] + 0 * y

    def get_batch_output(self, model, batch):
        return model[0](batch[0])[:, 0]

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return batch[1] - (batch[0] @ weights["0.weight"].T)[:, 0]


class Positive(Batched):
    """A scale, which may not be negative."""

    error = ValueError

    def checked(self, found):
        if bool((found < 0).any()):
            raise self.error("scale must be positive")
        return found

    def get_batch_output(self, model, batch):
        return self.checked(model(batch[0])[:, 0])

    def weight(self, found, y):
        return y - self.checked(found)


class Named(nn.Module):
    """Outputs with a name, as those of transformers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"logits": self.inner(x), "column": torch.tensor(0)}


class OfNames(Batched):
    @staticmethod
    def get_output(model, weights, buffers, x, y):
        found = functional_call(model, (weights, buffers), (x[None],))
        return found["logits"][0, 0] + 0 * y

    def get_batch_output(self, model, batch):
        found = model(batch[0])
        return found["logits"].index_select(1, found["column"])[:, 0]

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        found = functional_call(model, (weights, buffers), (batch[0],))
        return batch[1] - found["logits"][:, 0]


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def examples(count=N, dtype=torch.float32):
    return random(count, 5, seed=1).to(dtype), random(count, seed=2).to(dtype)


@pytest.mark.parametrize(
    ("task", "expected"),
    [(Batched, -1), (Twice, -2), (Flipped, 1)]
    + [(task, None) for task in (Huber, Counts, Quantile, Ones)],
)
def test_a_squared_loss_is_told_by_its_slope(task, expected):
    found = slope_of(HookGradientComputer(net(), task()), examples())
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-3))


@pytest.mark.parametrize(
    "computer", [FunctionalGradientComputer, IterativeGradientComputer]
)
def test_by_other_computers(computer):
    if computer is IterativeGradientComputer:

        class Task(Batched):
            @staticmethod
            def get_output(model, weights, buffers, x, y):
                return model(x)[:, 0] + 0 * y

            def get_out_to_loss_grad(self, model, weights, buffers, batch):
                return batch[1] - model(batch[0])[:, 0]

    else:
        Task = Regression
    assert slope_of(computer(net(), Task()), examples()) == pytest.approx(-1, rel=1e-3)


def test_outputs_with_names():
    found = slope_of(HookGradientComputer(Named(net()), OfNames()), examples())
    assert found == pytest.approx(-1, rel=1e-3)


def test_bfloat16_rounds_and_is_squared_all_the_same():
    dtype = torch.bfloat16
    computer = HookGradientComputer(net(dtype=dtype), Batched(), dtype=dtype)
    assert slope_of(computer, examples(dtype=dtype)) == pytest.approx(-1, rel=0.03)


def test_what_the_model_does_not_make_cannot_be_told():
    model = nn.Sequential(nn.Linear(5, 1, bias=False))
    computer = HookGradientComputer(model, ByHand(), grad_wrt=["0.weight"])
    assert slope_of(computer, examples()) is None


@pytest.mark.parametrize("error", [ValueError, RuntimeError, LookupError, TypeError])
def test_a_task_that_refuses_such_outputs_is_no_error(error):
    model = net()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.fill_(1.0)
        model[2].weight[0, 0] = 0.2
    x, y = examples()
    task = Positive()
    task.error = error
    computer = HookGradientComputer(model, task)
    assert slope_of(computer, (x, y)) == pytest.approx(-1, rel=1e-3)  # steps are small
    with torch.no_grad():
        model[2].bias.fill_(0.21)
        assert 0 < float(model(x).min()) < 0.25 * float(model(x).max())
    assert slope_of(computer, (x, y)) is None


def test_the_model_is_left_as_it_was():
    model = net()
    slope_of(HookGradientComputer(model, Batched()), examples())
    assert "forward" not in vars(model)


def outputs_of(model, batch):
    with torch.no_grad():
        return model(batch[0])[:, 0].double().numpy()


def run(folder, task=Batched, size=7, count=N, **options):
    model, train = net(), examples(count)
    defaults = {"task": task, "lambda_reg": "auto", "projector": NoOpProjector()}
    traker = runs.make_traker(model, count, folder, **(defaults | options))
    runs.featurize(traker, train, model.state_dict(), size=size)
    return traker, model, train


@pytest.mark.parametrize("size", [1, 7, 30, N])
@pytest.mark.parametrize("task", [Batched, Regression])
def test_outputs_are_kept(task, size, tmp_path):
    traker, model, train = run(tmp_path, task, size)
    numbers, outputs = traker.saver.sample_outputs(0).read()
    assert numbers.tolist() == list(range(N))
    np.testing.assert_allclose(outputs, outputs_of(model, train), rtol=1e-5, atol=1e-6)
    record = json.loads((tmp_path / "0" / "loss.json").read_text())
    assert record["logistic"] is False
    assert record["slope"] == pytest.approx(-1, rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"projector": None, "proj_dim": "exact"}, {}, {"task": Regression}]
)
def test_of_a_sample_where_there_are_many(options, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_outputs, "drawn", lambda count: drawn(count, 20))
    traker, model, train = run(tmp_path, **options)
    numbers, outputs = traker.saver.sample_outputs(0).read()
    assert numbers.tolist() == drawn(N, 20).tolist()
    expected = outputs_of(model, train)[numbers]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    header = len(npy_header((20, 2), np.dtype("<f8")))
    assert (tmp_path / "0" / "outputs.mmap").stat().st_size == header + 20 * 2 * 8


def test_no_further_forward_pass_is_run_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_outputs, "drawn", lambda count: drawn(count, 20))
    passes = []

    class Counted(nn.Sequential):
        def forward(self, x):
            passes.append(len(x))
            return super().forward(x)

    model, (x, y) = Counted(*net()), examples()
    traker = runs.make_traker(
        model, N, tmp_path, task=Batched, lambda_reg="auto", projector=NoOpProjector()
    )
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize((x[:36], y[:36]), inds=np.arange(36))  # enough were compared then
    passes.clear()
    traker.featurize((x[36:], y[36:]), inds=np.arange(36, N))
    assert passes == [N - 36]
    assert len(traker.saver.sample_outputs(0).read()[0]) == 20


@pytest.mark.parametrize("size", [5, 30])
def test_a_run_that_is_interrupted_keeps_the_same(size, tmp_path):
    whole, model, (x, y) = run(tmp_path / "whole", size=size)
    state = model.state_dict()
    for start in range(0, N, size):
        part = slice(start, start + size)
        again = runs.make_traker(
            net(),
            N,
            tmp_path / "parts",
            task=Batched,
            lambda_reg="auto",
            projector=NoOpProjector(),
        )
        again.load_checkpoint(state, model_id=0)
        again.featurize((x[part], y[part]), inds=np.arange(N)[part])
    for found, expected in zip(
        *(t.saver.sample_outputs(0).read() for t in (again, whole)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    for traker in (whole, again):
        traker.finalize_features()
    assert factor(again)["auto"] == pytest.approx(factor(whole)["auto"], rel=1e-6)


def factor(traker):
    return traker.saver.load_factor(0)[1]


@pytest.mark.parametrize("task", [Huber, Counts, Ones])
def test_nothing_is_kept_of_other_losses(task, tmp_path):
    traker, *_ = run(tmp_path, task, size=20)
    assert not (tmp_path / "0" / "outputs.mmap").exists()
    assert "slope" not in traker.saver.loss_record(0)
    traker.finalize_features()
    assert factor(traker)["auto"] > 0


def test_nothing_is_kept_of_a_classifier(tmp_path):
    model, train, _ = runs.data("mlp", N, 3)
    traker = runs.make_traker(model, N, tmp_path)
    runs.featurize(traker, train, model.state_dict(), size=20)
    assert not (tmp_path / "0" / "outputs.mmap").exists()


def test_loss_weights_that_stay_are_not_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    traker, *_ = run(tmp_path, loss_power="auto")
    traker.finalize_features()
    assert "Automatic ridge" in caplog.text
    assert "to the power of" not in caplog.text
    assert factor(traker).get("power", 1.0) == 1


def kernel_of(rows):
    kernel = rows @ rows.T
    return kernel / kernel.diagonal().mean()


@pytest.mark.parametrize("ridge", [0.05, 0.3, 2.0, 7.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_ridge_of_a_ridge_regression_is_found(ridge, weighted):
    rows, counts = random(90, 30), torch.ones(90).double()
    if weighted:
        counts = 0.2 + random(90, seed=3).abs()
    rows = rows - counts @ rows / counts.sum()  # as where the level is fitted, too
    kernel = kernel_of(rows)
    y = rows @ random(30, seed=1) / 5 + random(90, seed=2)
    y = 100 + y - counts @ y / counts.sum()
    roots = counts.sqrt()
    system = kernel * torch.outer(roots, roots) + ridge * torch.eye(90).double()
    # (K C + lambda) a = y - level: outputs K C a + level, residuals lambda a
    q = ridge * torch.linalg.solve(system, roots * (y - 100)) / roots
    known = kernel, kernel @ (counts * q), y - q, q, counts, 1.0
    mean = float(counts.mean())
    # beside an absurd one, or where it is the usual one
    assert ridge_left(*known, 1e-9) == pytest.approx(ridge, rel=0.15)
    assert ridge_left(*known, ridge / mean) == pytest.approx(ridge, rel=0.02)


def test_a_half_of_the_examples_tells_the_same():
    rows = random(400, 20)
    rows = rows - rows.mean(dim=0)
    kernel, y = kernel_of(rows), rows[:, 0] + random(400, seed=2)
    y = y - y.mean()
    q = 3 * torch.linalg.solve(kernel + 3 * torch.eye(400).double(), y)
    some = slice(0, 200)
    ones = torch.ones(200).double()
    part = kernel[some, some], (kernel @ q)[some], (y - q)[some], q[some]
    found = ridge_left(*part, ones, 0.5, 1e-9)
    assert found == pytest.approx(3, rel=0.25)


def ridge_regression():
    """Kernel, outputs and residuals of one with a ridge of 1."""
    rows = random(90, 30)
    rows = rows - rows.mean(dim=0)
    kernel, y = kernel_of(rows), rows[:, 0] + random(90, seed=2)
    y = y - y.mean()
    q = torch.linalg.solve(kernel + torch.eye(90).double(), y)
    return kernel, y - q, q


@pytest.mark.parametrize(
    ("usual", "expected"),
    [(1.0, 1.0), (1.7, 1.7), (0.6, 0.6), (4.0, 1.0), (0.3, 1.0), (2.5, None)],
)
def test_the_usual_ridge_is_kept_where_it_is_about_right(usual, expected):
    kernel, outputs, q = ridge_regression()
    found = ridge_left(kernel, 0 * q, outputs, q, torch.ones(90).double(), 1.0, usual)
    if expected is None:
        assert 1.2 < found < 2.2
    else:
        assert found == pytest.approx(expected, rel=1e-6 if expected == usual else 0.15)


def test_it_is_held_between_bounds():
    rows, ones = random(60, 60), torch.ones(60).double()
    kernel, y = kernel_of(rows), random(60, seed=1)
    fitted = kernel, 0 * y, 1e3 * y, 1e-3 * random(60, seed=2), ones, 1.0
    begun = kernel, 0 * y, 1e-6 * random(60, seed=2), y, ones, 1.0
    assert ridge_left(*fitted, 0.4) == pytest.approx(LEAST)
    assert ridge_left(*begun, 0.4) == pytest.approx(MOST)


def test_where_nothing_can_be_told_it_is_the_usual_one():
    rows, ones = random(60, 60), torch.ones(60).double()
    kernel, y = kernel_of(rows), random(60, seed=1)
    same = torch.full((60,), 0.3).double()
    assert ridge_left(kernel, y, y, same, ones, 1.0, 0.4) == pytest.approx(0.4)
    assert ridge_left(kernel, y, -y, y, ones, 1.0, 0.4) == pytest.approx(0.4)
    assert ridge_left(kernel, y, y / 0, y, ones, 1.0, 0.4) == pytest.approx(0.4)
    assert ridge_left(kernel, y, y, y, 0 * ones, 1.0, 0.4) == 0


@pytest.mark.parametrize(
    ("told", "expected"), [(1.0, 1.0), (5.0, 1.0), (0.25, 0.5), (1e-4, 0.25), (-1.0, 1.0)]
)
def test_trainings_that_came_to_rest_have_a_smaller_ridge(told, expected):
    kernel, outputs, q = ridge_regression()

    def found(pull, noisy=False):
        known = kernel, pull, outputs, q, torch.ones(90).double(), 1.0
        return ridge_left(*known, 1e-9, noisy=noisy)

    for noisy in (False, True):
        assert found(told * outputs, noisy) == pytest.approx(expected, rel=0.05)
    elsewhere = outputs.norm() * random(90, seed=4) / 90**0.5
    assert found(told * elsewhere) == pytest.approx(1.0, rel=0.05)
    mixed = found(told * (outputs + 0.8 * elsewhere))  # explained in between
    assert min(expected, 1) - 0.05 <= mixed <= 1.05


def regression(ridge, count=120, width=15):
    """Rows, Q, outputs, and what models on halves answer, all in closed form."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count + 30, width)) * np.linspace(2, 0.2, width)
    y = x @ rng.normal(size=width) + 2 * rng.normal(size=count + 30)
    train, targets = x[:count], x[count:]
    added = ridge * (train**2).sum() / count

    def fit(rows, answers):
        gram = rows.T @ rows + added * np.eye(width)
        return np.linalg.solve(gram, rows.T @ answers)

    masks = np.array([rng.permutation(count) < count // 2 for _ in range(64)])
    retrained = np.array([targets @ fit(train[m], y[:count][m]) for m in masks])
    outputs = train @ fit(train, y[:count])
    return train, targets, y[:count] - outputs, outputs, masks, retrained


def lds(train, targets, q, masks, retrained, ridge):
    added = ridge * (train**2).sum() / len(train)
    gram = train.T @ train + added * np.eye(train.shape[1])
    scores = q[:, None] * (train @ np.linalg.solve(gram, targets.T))
    found = masks @ scores
    return np.mean([
        spearmanr(a, b).statistic for a, b in zip(found.T, retrained.T, strict=True)
    ])


def chosen(train, q, outputs, slope=-1.0):
    known = outputs is not None
    numbers = np.arange(len(train))
    situation = Situation(
        loss=q[:, None],
        logistic=False,
        outputs=Outputs(numbers, outputs, slope) if known else None,
    )
    return relative_ridge(torch.from_numpy(train), situation)


@pytest.mark.parametrize("ridge", [0.05, 0.4, 4.0])
def test_scores_at_that_ridge_predict_retrained_regressions(ridge):
    train, targets, q, outputs, masks, retrained = regression(ridge)
    truth = train, targets, q, masks, retrained
    best = max(lds(*truth, r) for r in np.logspace(-3, 3, 25))
    assert lds(*truth, chosen(train, q, outputs)) >= 0.985 * best


def test_a_longer_training_has_a_smaller_ridge():
    found, constant = {}, {}
    for ridge in (0.05, 0.4, 4.0):
        train, _, q, outputs, *_ = regression(ridge)
        found[ridge] = chosen(train, q, outputs)
        constant[ridge] = chosen(train, q, None)
    assert found[0.05] < 0.5 * found[0.4] < 0.2 * found[4.0]
    assert constant[4.0] < 2 * constant[0.05]


@pytest.mark.parametrize("factor", [2.0, 0.1, -1.0])
def test_the_scale_and_sign_of_q_do_not_matter(factor):
    train, _, q, outputs, *_ = regression(4.0)
    expected = chosen(train, q, outputs)
    found = chosen(train, factor * q, outputs, slope=-factor)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_part_of_the_sample_does_not_tell():
    train, _, q, outputs, *_ = regression(4.0)
    situation = Situation(
        loss=q[:, None],
        logistic=False,
        outputs=Outputs(np.arange(60), outputs[:60], -1.0),
    )
    found = relative_ridge(torch.from_numpy(train), situation)
    assert found == chosen(train, q, None)


def test_a_traker_uses_it(tmp_path):
    train, targets, q, outputs, *_ = regression(4.0)
    gram = train.T @ train + 4 * (train**2).sum() / len(train) * np.eye(train.shape[1])
    model = nn.Linear(train.shape[1], 1, bias=False).double()
    weight = np.linalg.solve(gram, train.T @ (outputs + q))
    state = {"weight": torch.from_numpy(weight[None])}
    traker = runs.make_traker(
        model,
        len(train),
        tmp_path,
        task=Regression,
        lambda_reg="auto",
        projector=NoOpProjector(),
    )
    batch = torch.from_numpy(train), torch.from_numpy(outputs + q)
    runs.featurize(traker, batch, state, size=50)
    traker.finalize_features()
    expected = chosen(train, q, outputs)
    assert factor(traker)["auto"] == pytest.approx(expected, rel=1e-4)
    assert factor(traker)["auto"] > 2 * chosen(train, q, None)


@pytest.mark.parametrize("content", [b"", b"not an array", None])
def test_a_damaged_file_is_refused(content, tmp_path):
    traker, *_ = run(tmp_path)
    path = tmp_path / "0" / "outputs.mmap"
    if content is None:
        np.save(tmp_path / "x.npy", np.ones((N, 2)))
        content = (tmp_path / "x.npy").read_bytes()
    path.write_bytes(content)
    with pytest.raises(StoreCorruptedError, match=r"outputs\.mmap.*delete it"):
        traker.finalize_features()


def test_without_the_file_it_is_a_constant(tmp_path):
    traker, *_ = run(tmp_path / "a")
    (tmp_path / "a" / "0" / "outputs.mmap").unlink()
    traker.finalize_features()

    class Old(MmapSaver):
        sample_outputs = AbstractSaver.sample_outputs

    old, *_ = run(tmp_path / "b", saver=Old)
    assert not (tmp_path / "b" / "0" / "outputs.mmap").exists()
    old.finalize_features()
    assert factor(old)["auto"] == factor(traker)["auto"]


def test_means_over_words_keep_their_constant(tmp_path):
    class Words(Batched):
        loss_is_of_words = True

    run(tmp_path, Words, size=20)
    assert not (tmp_path / "0" / "outputs.mmap").exists()


def gradients_of(model, batch):
    per_sample = [
        torch.autograd.grad(model(x[None])[0, 0], list(model.parameters()))
        for x in batch[0]
    ]
    return [torch.stack(each) for each in zip(*per_sample, strict=True)]


def test_scores_are_those_of_the_oracle_at_that_ridge(tmp_path):
    traker, model, train = run(tmp_path)
    targets = examples(5)
    traker.finalize_features()
    runs.score(traker, targets, model.state_dict())
    found = traker.finalize_scores("exp")
    phi, aims = (
        torch.cat([g.flatten(1) for g in gradients_of(model, batch)], dim=1).double()
        for batch in (train, targets)
    )
    scale = phi.shape[1]  # rows are divided by the square root of it
    gram = phi.T @ phi / scale
    ridge = factor(traker)["auto"] * float(gram.trace()) / N
    system = gram + ridge * torch.eye(len(gram)).double()
    q = train[1].double() - torch.from_numpy(outputs_of(model, train))
    expected = q[:, None] * (phi @ torch.linalg.solve(system, aims.T)) / scale
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-3, atol=1e-5)
