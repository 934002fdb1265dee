"""Training that counts examples differently: an example of weight 2 is two of weight 1."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from tests import cases, reference, runs
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import trak
from trak.errors import InputError, InputTypeError
from trak.modelout_functions import (
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
    TextClassificationModelOutput,
)
from trak.savers import MmapSaver
from trak.score_computers.auto_ridge import _RIDGES, _sums
from trak.score_computers.curvature import FLOOR, roots
from trak.score_computers.logistic import weights_in
from trak.score_computers.losses import losses_of
from trak.score_computers.retraining import retrained
from trak.score_computers.ridge_sample import Sample, Situation, sampled
from trak.score_computers.stationarity import training_of

N, M = 24, 5
WEIGHTS = [1.0, 2.0, 3.0]
RIDGE = 0.02


class Weighted(ImageClassificationModelOutput):
    """The weight is the third part of a sample."""

    @staticmethod
    def get_output(model, weights, buffers, image, label, _):
        return ImageClassificationModelOutput.get_output(
            model, weights, buffers, image, label
        )

    def get_batch_output(self, model, batch):
        return super().get_batch_output(model, batch[:2])

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return super().get_out_to_loss_grad(model, weights, buffers, batch[:2])

    def get_sample_weights(self, batch):
        return batch[2]


def world():
    model, train, targets = runs.data("mlp", N, M)
    return model, train, targets, cases.checkpoints("mlp", 2)


def repeated(train):
    counts = torch.tensor(WEIGHTS)[train[1]].long()
    return counts, tuple(part.repeat_interleave(counts, dim=0) for part in train)


def summed(scores, counts):
    ends = counts.cumsum(0).numpy()
    return np.stack([
        part.sum(0) for part in np.split(np.asarray(scores, np.float64), ends[:-1])
    ])


def finished(folder, train, task="image_classification", **options):
    model, _, targets, states = world()
    options = {"lambda_reg": RIDGE, "task": task} | options
    traker = runs.make_traker(model, len(train[0]), folder, **options)
    return traker, runs.whole_run(traker, train, targets, states)


def close(found, expected, rtol=1e-4):
    np.testing.assert_allclose(
        found, expected, rtol=rtol, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("proj_dim", [6, 64, "exact"])
def test_a_weight_of_two_is_two_examples(proj_dim, curvature, tmp_path):
    _, train, _, _ = world()
    counts, copies = repeated(train)
    options = {"curvature": curvature, "proj_dim": proj_dim}
    other, expected = finished(tmp_path / "copies", copies, **options)
    task = ImageClassificationModelOutput(class_weights=WEIGHTS)
    traker, found = finished(tmp_path / "weights", train, task, **options)
    close(found, summed(expected, counts))
    _, plain = finished(tmp_path / "plain", train, **options)
    assert np.abs(found - plain).max() > 0.1 * np.abs(found).max()
    more = other.sweep(["exp"], [RIDGE * 7])["exp", RIDGE * 7]
    close(traker.sweep(["exp"], [RIDGE * 7])["exp", RIDGE * 7], summed(more, counts))


@pytest.mark.parametrize("curvature", [False, True])
def test_scores_equal_the_formula(curvature, tmp_path):
    model, train, targets, states = world()
    traker, scores = finished(
        tmp_path,
        train,
        ImageClassificationModelOutput(class_weights=WEIGHTS),
        curvature=curvature,
        lambda_reg="2x",
    )
    w = torch.tensor(WEIGHTS, dtype=torch.float64)[train[1]][:, None]
    found, weights = [], []
    for phi, psi, q in runs.oracle(model, train, targets, states, traker.projector):
        q = q.reshape(-1, 1)
        r = w * (q * (1 - q / 2)).clamp(min=FLOOR) if curvature else w
        gram = phi.T @ (phi * r)
        gram += 2 * float(gram.trace()) / N * torch.eye(len(gram))
        found.append(phi @ torch.linalg.inv(gram) @ psi.T)
        weights.append(w * q)
    close(scores, (torch.stack(found).mean(0) * torch.stack(weights).mean(0)).numpy())


def test_a_task_of_ones_own_says_it_sample_by_sample(tmp_path):
    _, train, targets, states = world()
    model = world()[0]
    weights = torch.linspace(0.5, 2, N + M, dtype=torch.float64)
    traker = runs.make_traker(model, N, tmp_path, task=Weighted(), lambda_reg=RIDGE)
    runs.whole_run(traker, (*train, weights[:N]), (*targets, weights[N:]), states)
    rows = traker.saver.train_rows(1)
    np.testing.assert_allclose(rows.array("sample_weights")[:, 0], weights[:N], rtol=1e-6)
    model.load_state_dict(states[1])
    q = reference.loss_weights(model, train).flatten()
    np.testing.assert_allclose(rows.array("out_to_loss")[:, 0], q * weights[:N], rtol=1e-5)
    # Q times weights are no logistic loss's, and yet it is known to be one
    assert traker.saver.loss_record(1)["logistic"] is True


@pytest.mark.parametrize("method", ["dot", "tracin", "relatif", "l_relatif"])
def test_methods_over_the_same_rows(method, tmp_path):
    _, train, _, _ = world()
    counts, copies = repeated(train)
    whole, _ = finished(tmp_path / "copies", copies)
    task = ImageClassificationModelOutput(class_weights=WEIGHTS)
    traker, _ = finished(tmp_path / "weights", train, task)
    found = np.array(traker.scores("exp", method=method))
    expected = np.array(whole.scores("exp", method=method))
    if method in {"dot", "tracin"}:
        close(found, summed(expected, counts))
    else:  # a quotient by the row's own length, however often it is there
        close(found, expected[np.r_[0, counts.cumsum(0).numpy()[:-1]]])


def test_self_influence_errors_and_features(tmp_path):
    _, train, _, _ = world()
    counts, copies = repeated(train)
    first = np.r_[0, counts.cumsum(0).numpy()[:-1]]
    whole, _ = finished(tmp_path / "copies", copies, proj_dim=64, curvature=True)
    task = ImageClassificationModelOutput(class_weights=WEIGHTS)
    traker, _ = finished(tmp_path / "weights", train, task, proj_dim=64, curvature=True)
    close(traker.self_influence(), whole.self_influence()[first] * counts.numpy())
    close(traker.saver.features(0), whole.saver.features(0)[first])
    found = traker.scores("exp", with_error=True)
    expected = whole.scores("exp", with_error=True)
    close(found.scores, summed(expected.scores, counts))


@pytest.mark.parametrize("proj_dim", [6, 64])
def test_features_without_curvature(proj_dim, tmp_path):
    _, train, _, _ = world()
    counts, copies = repeated(train)
    first = np.r_[0, counts.cumsum(0).numpy()[:-1]]
    whole, _ = finished(tmp_path / "copies", copies, proj_dim=proj_dim)
    task = ImageClassificationModelOutput(class_weights=WEIGHTS)
    traker, _ = finished(tmp_path / "weights", train, task, proj_dim=proj_dim)
    close(traker.saver.features(1), whole.saver.features(1)[first])


def test_a_store_is_gone_on_with_in_silence(tmp_path, caplog):
    _, train, _, _ = world()
    task = ImageClassificationModelOutput(class_weights=WEIGHTS)
    traker, expected = finished(tmp_path, train, task)
    assert traker.saver.loss_record(0)["logistic"] is True
    for name in ("loss.json", "seen.json"):
        (tmp_path / "0" / name).unlink(missing_ok=True)
    with caplog.at_level(logging.WARNING):
        again, found = finished(tmp_path, train, task)
    assert "loss weight Q" not in caplog.text
    # what the lost file said is told from the stored weights
    assert again.saver.loss_record(0)["logistic"] is True
    np.testing.assert_array_equal(found, expected)


def test_rows_are_kept_and_read_again(tmp_path):
    _, train, targets, states = world()
    task = ImageClassificationModelOutput(class_weights=torch.tensor(WEIGHTS))
    traker, expected = finished(tmp_path, train, task)
    assert json.loads((tmp_path / "metadata.json").read_text())["format"] == 4
    assert isinstance(traker.saver, MmapSaver)
    again, found = finished(
        tmp_path, train, ImageClassificationModelOutput(class_weights=WEIGHTS)
    )
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(trak.errors.StoreMismatchError, match="class_weights"):
        finished(tmp_path, train, ImageClassificationModelOutput(class_weights=[1, 2, 4]))
    with pytest.raises(trak.errors.StoreMismatchError, match="sample_weights"):
        finished(tmp_path, train)


def test_without_weights_a_store_is_as_it_was(tmp_path):
    _, train, _, _ = world()
    finished(tmp_path, train)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["format"] == 1
    assert "sample_weights" not in metadata
    assert "class_weights" not in metadata["task"]
    assert not (tmp_path / "0" / "sample_weights.mmap").exists()


@pytest.mark.parametrize("whitening", [0, 0.4, "auto"])
def test_the_one_call(whitening, tmp_path):
    model, train, targets = runs.data("mlp", 80, M)
    every = (model, train, targets, cases.checkpoints("mlp", 2))
    plain = runs.one_call(every, tmp_path / "plain", whitening=whitening)
    one = ImageClassificationModelOutput(class_weights=[1, 1, 1])
    same = runs.one_call(every, tmp_path / "one", whitening=whitening, task=one)
    close(same, plain, rtol=1e-3)
    task = ImageClassificationModelOutput(class_weights=[1, 1, 9])
    found = runs.one_call(every, tmp_path / "weights", whitening=whitening, task=task)
    # examples of the third class count for more
    share = [np.abs(s[train[1] == 2]).sum() / np.abs(s).sum() for s in (found, plain)]
    assert share[0] > 1.5 * share[1]
    ridges = [
        json.loads((tmp_path / name / "0" / "factor.json").read_text())["auto"]
        for name in ("one", "plain")
    ]
    np.testing.assert_allclose(*ridges, rtol=1e-6)


def test_the_scale_of_weights_does_not_matter_to_ridge_and_ranks(tmp_path):
    model, train, targets = runs.data("mlp", 80, M)
    every = (model, train, targets, cases.checkpoints("mlp", 1))
    weights = np.array([1.0, 2.0, 5.0])
    found = {}
    for scale in (1.0, 7.0):
        task = ImageClassificationModelOutput(class_weights=weights * scale)
        folder = tmp_path / str(scale)
        found[scale] = runs.one_call(every, folder, task=task, whitening=0.4)
        info = json.loads((folder / "0" / "factor.json").read_text())
        found[scale, "auto"] = info["auto"]
    np.testing.assert_allclose(found[7.0, "auto"], found[1.0, "auto"], rtol=1e-3)
    close(found[7.0], found[1.0], rtol=1e-3)


def test_the_scale_of_weights_does_not_matter_to_the_agreement(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr("trak.strength.freedom", lambda *_, **__: 1.0)
    model, train, targets = runs.data("cnn", 80, M)
    every = (model, train, targets, cases.checkpoints("cnn", 2))
    said = []
    for scale in (1.0, 7.0):
        task = ImageClassificationModelOutput(class_weights=[scale] * 3)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            runs.one_call(
                every, tmp_path / str(scale), task=task, logging_level=logging.INFO
            )
        told = [m for m in caplog.messages if "Automatic ridge" in m or "agree" in m]
        # the ridge of the training itself is in units of the weights
        said.append([re.sub(r"with a ridge of [^;]*", "", m) for m in told])
    assert any("agree by" in message for message in said[0])
    assert said[0] == said[1]


def test_weighted_sums_equal_the_formula():
    generator = torch.manual_seed(3)
    phi = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    phi /= phi.square().sum(1).mean().sqrt()
    q = torch.rand(40, dtype=torch.float64, generator=generator)
    w = torch.rand(40, dtype=torch.float64, generator=generator) * 5 + 0.1
    kernel, one = phi @ phi.T, torch.ones(40, dtype=torch.float64)
    sample = Sample(kernel, kernel @ (w * q), q, w, w.sqrt(), one, 1.0, curved=False)
    halves = retrained(kernel, 0.1, counts=w)
    sums, _ = _sums(sample, sample.roots, halves)
    train, held = halves.train, halves.held
    gram = phi[train].T @ (phi[train] * w[train, None])
    unit = float(gram.trace()) / len(train)  # that sums are in
    ridge = _RIDGES[20] * len(train) / 40 * unit
    inverse = torch.linalg.inv(gram + ridge * torch.eye(6))
    scores = phi[train] @ inverse @ phi[held].T * (w * q)[train, None]
    expected = halves.masks @ scores * unit
    np.testing.assert_allclose(sums[20], expected, rtol=1e-5, atol=2e-6)


def test_the_ridge_of_other_losses_follows_the_weights():
    phi = torch.randn(30, 4, dtype=torch.float64, generator=torch.manual_seed(4))
    kernel, residuals = phi @ phi.T, torch.linspace(-1, 1, 30, dtype=torch.float64)
    plain = training_of(kernel, kernel @ residuals, residuals, logistic=False)
    tenfold = training_of(
        kernel,
        kernel @ residuals * 10,
        residuals,
        counts=torch.full_like(residuals, 10),
        logistic=False,
    )
    assert tenfold.ridge == pytest.approx(10 * plain.ridge)
    np.testing.assert_allclose(tenfold.answers, plain.answers)


def test_linearized_models_count_examples_by_their_weights():
    rows = torch.randn(40, 6, dtype=torch.float64, generator=torch.manual_seed(0))
    counts = torch.ones(40, dtype=torch.float64) * 3
    for answers in (None, torch.linspace(-1, 1, 40, dtype=torch.float64)):
        weighted = retrained(rows @ rows.T, 0.6, answers, counts)
        plain = retrained(rows @ rows.T, 0.2, answers)
        np.testing.assert_allclose(weighted.outputs, plain.outputs, rtol=1e-6, atol=1e-9)


def test_a_weighted_training_is_read_off_its_stationary_point():
    generator = torch.manual_seed(1)
    phi = torch.randn(300, 20, dtype=torch.float64, generator=generator) / 20**0.5
    w = torch.rand(300, dtype=torch.float64, generator=generator) * 4 + 0.2
    theta = torch.zeros(20, dtype=torch.float64)
    ridge = 3.0
    for _ in range(200):
        q = torch.sigmoid(-phi @ theta)
        hessian = phi.T @ (phi * (w * q * (1 - q))[:, None]) + ridge * torch.eye(20)
        theta += torch.linalg.solve(hessian, phi.T @ (w * q) - ridge * theta)
    kernel = phi @ phi.T
    unit = float(kernel.diagonal().mean())
    pull = kernel @ (w * q) / unit
    found = training_of(kernel / unit, pull, q, counts=w, logistic=True)
    # of networks, whose outputs grow like the 2.5th power of their weights
    assert found.ridge * unit * 2.5 == pytest.approx(ridge, rel=0.02)


def test_a_sample_knows_how_much_its_examples_count():
    rows = torch.randn(50, 4, dtype=torch.float64, generator=torch.manual_seed(2))
    q, w = torch.rand(50).double(), torch.rand(50).double() + 0.5
    situation = Situation(loss=q * w, counts=w, curvature=True, logistic=True)
    factors = roots(situation.losses)
    found = sampled(rows * factors, situation)
    unit = rows.square().sum(1).mean()
    np.testing.assert_allclose(found.kernel, rows @ rows.T / unit, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.loss, q, rtol=1e-6)
    np.testing.assert_allclose(found.counts, w)
    pull = rows @ (rows.T @ (q * w)) / unit
    np.testing.assert_allclose(found.pull, pull, rtol=1e-5, atol=1e-5)


class Exact(ImageClassificationModelOutput):
    """The weighted loss's exact derivative, which is no logistic loss's."""

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        own = super().get_out_to_loss_grad(model, weights, buffers, batch)
        return own * torch.tensor(WEIGHTS)[batch[1]][:, None]


def test_weights_inside_of_q_are_told_of(tmp_path, caplog):
    _, train, _, _ = world()
    with caplog.at_level(logging.WARNING):
        finished(tmp_path, train, Exact())
    assert "times 1, 2, 3: weights by class?" in caplog.text


def test_a_sampler_that_weighs_is_told_of(tmp_path):
    model, train, targets, states = world()
    sampler = WeightedRandomSampler(torch.ones(N), N)
    loader = DataLoader(TensorDataset(*train), batch_size=6, sampler=sampler)
    with pytest.raises(InputError, match=r"shuffle=False.*get_sample_weights"):
        runs.one_call((model, train, targets, states), tmp_path / "a", train=loader)
    traker = runs.make_traker(model, N, tmp_path / "b")
    traker.load_checkpoint(states[0], model_id=0)
    with pytest.raises(InputError, match=r"shuffle=False.*get_sample_weights"):
        for batch in loader:
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    mixed = DataLoader(TensorDataset(*train), batch_size=6, shuffle=True)
    with pytest.raises(InputError, match=r"drop_last=False\.$"):
        runs.one_call((model, train, targets, states), tmp_path / "c", train=mixed)


def test_other_losses_are_not_taken_for_weighted_ones():
    outputs = torch.linspace(-2, 2, 16)
    own = torch.sigmoid(-outputs)
    pattern = torch.tensor([1.0, 4.0]).repeat(8)
    assert weights_in(outputs, own * pattern) == pytest.approx([1, 4], rel=1e-4)
    assert weights_in(outputs, own) == []
    assert weights_in(outputs, own * torch.linspace(1, 2, 16)) == []
    assert weights_in(outputs, outputs * pattern) == []


def test_quotients_that_rounding_puts_beyond_one_are_probabilities():
    w = torch.tensor([[3.3], [0.7]], dtype=torch.float32)
    found = losses_of(torch.nextafter(w, w + 1), w)
    assert found.are_probable
    assert not losses_of(w * 1.01, w).are_probable


def test_the_other_tasks_have_it_too():
    labels = torch.tensor([0, 1, 1])
    tokens = torch.ones(3, 4, dtype=torch.long)
    text = TextClassificationModelOutput(class_weights=(0.5, 2))
    batches = [
        (tokens, tokens, labels),
        {"input_ids": tokens, "attention_mask": tokens, "labels": labels},
    ]
    for batch in batches:
        assert text.get_sample_weights(batch).tolist() == [0.5, 2, 2]
    image = IterativeImageClassificationModelOutput(class_weights=(0.5, 2))
    assert image.get_sample_weights({"image": tokens, "label": labels}).tolist() == [
        0.5,
        2,
        2,
    ]
    assert TextClassificationModelOutput().get_sample_weights is None


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1, -1, 2], InputError, r"class_weights\[1\]"),
        ([1, 0, 2], InputError, r"class_weights\[1\]"),
        ([1, float("nan"), 2], InputError, r"class_weights\[1\]"),
        ([1, "2", 2], InputError, r"class_weights\[1\]"),
        ("balanced", InputTypeError, "list one number a class"),
        (2.0, InputTypeError, "list one number a class"),
        ([1], InputError, "two at least"),
    ],
)
def test_class_weights_that_cannot_be(weights, error, message):
    with pytest.raises(error, match=message):
        ImageClassificationModelOutput(class_weights=weights)


def test_too_few_class_weights_for_the_labels(tmp_path):
    _, train, _, _ = world()
    with pytest.raises(InputError, match="label 2, but class_weights has 2"):
        finished(tmp_path, train, ImageClassificationModelOutput(class_weights=[1, 2]))


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda batch: [1.0] * len(batch[0]), InputTypeError, "must return a tensor"),
        (lambda batch: torch.ones(len(batch[0]) + 1), InputError, "one number a sample"),
        (lambda batch: torch.zeros(len(batch[0])), InputError, "sample 0 .* has 0.*Leave"),
        (lambda batch: torch.full((len(batch[0]),), torch.inf), InputError, "above 0"),
    ],
)
def test_sample_weights_that_cannot_be(returned, error, message, tmp_path):
    _, train, _, _ = world()
    task = ImageClassificationModelOutput()
    wrong = type("Wrong", (type(task),), {"get_sample_weights": lambda _, b: returned(b)})
    with pytest.raises(error, match=message):
        finished(tmp_path, train, wrong())


class Hinge(trak.modelout_functions.AbstractModelOutput):
    """Its Q is a truth value, or a whole number."""

    def __init__(self, kind):
        self._kind = kind

    def get_output(self, model, weights, buffers, x, y, w):
        del w
        found = torch.func.functional_call(model, (weights, buffers), (x[None],))
        return (2 * y - 1) * found.sum()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        x, y, _ = batch
        found = torch.func.functional_call(model, (weights, buffers), (x,))[:, 0]
        return ((2 * y - 1) * found < 1).to(self._kind)

    def get_sample_weights(self, batch):
        return batch[2]


@pytest.mark.parametrize("kind", [torch.bool, torch.int8, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", [torch.float16, torch.float32])
def test_weights_keep_their_digits_whatever_the_dtype_of_q(kind, precision, tmp_path):
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).to(precision)
    weights = torch.linspace(0.3, 1e5, 20)
    model = torch.nn.Linear(4, 1).to(precision)
    traker = trak.TRAKer(
        model, Hinge(kind), 20, save_dir=tmp_path, row_dtype="float32", proj_dim=4
    )
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize((x, torch.arange(20) % 2, weights), num_samples=20)
    found = traker.saver.train_rows(0).array("sample_weights")[:, 0]
    np.testing.assert_array_equal(found, weights.numpy())
    loss = traker.saver.current_store["out_to_loss"][:, 0]
    assert set((loss / weights.numpy()).tolist()) <= {0.0, 1.0}
