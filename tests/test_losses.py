"""Whether a loss is logistic: told from a few outputs and loss weights."""

import json
import logging

import numpy as np
import pytest
import torch
from tests import cases, reference, runs
from torch.func import functional_call

from trak.errors import NumericalError
from trak.gradient_computers import (
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
)
from trak.modelout_functions import (
    AbstractModelOutput,
    CLIPModelOutput,
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
)
from trak.savers import AbstractSaver, MmapSaver
from trak.score_computers.auto_ridge import relative_ridge
from trak.score_computers.logistic import is_logistic, log_odds
from trak.score_computers.ridge_sample import Situation
from trak.score_computers.stationarity import training_of

N, M = 48, 3


def random(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def test_log_odds():
    f = torch.linspace(-8, 8, 20, dtype=torch.float64)
    torch.testing.assert_close(log_odds(torch.sigmoid(-f)), f)
    assert float(log_odds(torch.zeros(1).double(), 1e-30)) == pytest.approx(
        69.0776, rel=1e-4
    )


def words(length, seed=0):
    """Means over words of log-odds, and one minus the mean probability."""
    each = 2 * random(60, length, seed=seed) + random(60, 1, seed=seed + 1)
    return each.mean(dim=1), torch.sigmoid(-each).mean(dim=1)


@pytest.mark.parametrize("length", [2, 5, 30])
def test_a_mean_over_words_is_not_logistic(length):
    assert is_logistic(*words(length)) is False


def test_one_word_is():
    assert is_logistic(*words(1)) is True


@pytest.mark.parametrize(("scale", "constant"), [(1, 0), (0.3, 0), (5, 2), (1, 1e-3)])
def test_outputs_on_another_scale_are_logistic(scale, constant):
    f = random(40)
    assert is_logistic(scale * f + constant, torch.sigmoid(-f)) is True
    assert is_logistic(-scale * f + constant, torch.sigmoid(-f)) is False


def test_outputs_that_are_all_the_same():
    f = torch.full((20,), 0.7, dtype=torch.float64)
    assert is_logistic(f, torch.sigmoid(-f)) is True


def test_other_numbers_are_not_logistic():
    f = random(40)
    assert is_logistic(f, f) is False
    assert is_logistic(f, torch.sigmoid(-random(40, seed=1))) is False


def test_rounding_says_nothing():
    f = 20 + random(40)
    assert is_logistic(f, torch.sigmoid(-f)) is None
    mixed = torch.cat([f, random(10)])
    assert is_logistic(mixed, torch.sigmoid(-mixed).float()) is True


class Words(AbstractModelOutput):
    """Every class is a word of the text, and all of them are right."""

    @staticmethod
    def get_output(model, weights, buffers, x, y):
        logits = functional_call(model, (weights, buffers), (x[None],))
        return logits.mean() + 0 * y

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        logits = functional_call(model, (weights, buffers), (batch[0],))
        return torch.sigmoid(-40 * logits).mean(dim=1, keepdim=True)


class SaysSo(Words):
    loss_is_logistic = True


class Squared(Words):
    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        logits = functional_call(model, (weights, buffers), (batch[0],))
        return 3 * logits.mean(dim=1, keepdim=True)


def record_of(folder, task, size=7, scale=1, **options):
    model, train, _ = runs.data("mlp", N, M)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale
    traker = runs.make_traker(model, N, folder, task=task, lambda_reg="auto", **options)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    runs.featurize(traker, train, state, size=size)
    traker.finalize_features()
    path = folder / "0" / "loss.json"
    return traker, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.parametrize("size", [1, 7, N])
@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (ImageClassificationModelOutput(), True),
        (Words(), False),
        (SaysSo(), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_it_is_found_out_while_featurizing(task, expected, size, tmp_path):
    traker, record = record_of(tmp_path, task, size)
    assert record == {"logistic": expected}
    assert traker.pipeline.losses.known(0) is expected


def test_the_ridge_depends_on_it(tmp_path):
    traker, _ = record_of(tmp_path / "a", Words(), projector="rademacher", proj_dim=40)
    rows = torch.from_numpy(traker.saver.train_rows(0).array("grads").copy())
    loss = traker.saver.train_rows(0).array("out_to_loss")
    ridges = {
        logistic: relative_ridge(rows, Situation(loss=loss, columns=40, logistic=logistic))
        for logistic in (True, False, None)
    }
    found = traker.saver.load_factor(0)[1]["auto"]
    assert found == pytest.approx(ridges[False], rel=1e-6)
    assert found != pytest.approx(ridges[True], rel=1e-2)
    said, _ = record_of(tmp_path / "b", SaysSo(), projector="rademacher", proj_dim=40)
    assert said.saver.load_factor(0)[1]["auto"] == pytest.approx(ridges[True], rel=1e-6)


def test_what_is_known_is_not_guessed():
    rows = random(100, 8)
    wrong = torch.sigmoid(1.5 + 0.3 * random(100, seed=3))  # most are, by chance
    kernel = rows @ rows.T / 8
    pull = kernel @ wrong
    assert training_of(kernel, pull, wrong).answers is not None
    assert training_of(kernel, pull, wrong, logistic=True).answers is None
    right = torch.sigmoid(-(rows @ random(8, seed=2)))
    pull = kernel @ right
    assert training_of(kernel, pull, right).answers is None
    assert training_of(kernel, pull, right, logistic=False).answers is not None


def test_a_saver_may_do_without(tmp_path):
    class Old(MmapSaver):
        record_loss = AbstractSaver.record_loss
        loss_record = AbstractSaver.loss_record

    traker, record = record_of(tmp_path, "image_classification", saver=Old)
    assert record is None
    assert traker.pipeline.losses.known(0) is None
    assert traker.saver.load_factor(0)[1]["auto"] > 0


def test_a_temperature_leaves_it_open(tmp_path):
    task = ImageClassificationModelOutput(temperature=20)
    traker, record = record_of(tmp_path, task, scale=4)
    assert record is None
    assert len(traker.saver.loss_record(0)["seen"]) >= 16
    assert traker.pipeline.losses.known(0) is None


def test_what_was_found_stays(tmp_path):
    record_of(tmp_path, "image_classification")
    (tmp_path / "0" / "loss.json").write_text('{"logistic": false}')
    traker, record = record_of(tmp_path, "image_classification")
    assert record == {"logistic": False}
    assert traker.pipeline.losses.known(0) is False


def test_processes_with_few_examples_find_out_together(tmp_path):
    model, train, _ = runs.data("mlp", 24, M)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for start in range(0, 24, 6):
        traker = runs.make_traker(model, 24, tmp_path)
        traker.load_checkpoint(state, model_id=0)
        batch = tuple(part[start : start + 6] for part in train)
        traker.featurize(batch=batch, inds=range(start, start + 6))
        known = traker.pipeline.losses.known(0)
        assert known is (True if start >= 12 else None)
    assert traker.saver.loss_record(0) == {"logistic": True}


def test_clip_says_so():
    assert CLIPModelOutput.loss_is_logistic is True


@pytest.mark.parametrize("name", cases.NAMES)
@pytest.mark.parametrize("kind", [FunctionalGradientComputer, HookGradientComputer])
def test_computers_compute_outputs(name, kind):
    model, batch = cases.make(name, 6, torch.float64)
    computer = kind(model, ImageClassificationModelOutput())
    computer.load_model_params(model.eval())
    expected = torch.stack([
        reference.model_output(model, [part[j : j + 1] for part in batch]) for j in range(6)
    ])
    found = computer.compute_outputs(batch, 6)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach())


def test_the_iterative_computer_does():
    model, batch = cases.make("mlp", 6, torch.float64)
    computer = IterativeGradientComputer(model, IterativeImageClassificationModelOutput())
    computer.load_model_params(model.eval())
    expected = torch.stack([
        reference.model_output(model, [part[j : j + 1] for part in batch]) for j in range(6)
    ])
    torch.testing.assert_close(computer.compute_outputs(batch, 6), expected.detach())


def decided(folder, found, caplog):
    """The records of checkpoints whose first examples say different things."""
    model, train, _ = runs.data("mlp", N, M)
    traker = runs.make_traker(model, N, folder, lambda_reg="auto", curvature=True)
    states = cases.checkpoints("mlp", len(found))
    for number, (state, logistic) in enumerate(zip(states, found, strict=True)):
        runs.featurize(traker, train, state, number)
        path = folder / str(number) / "loss.json"
        path.write_text(json.dumps({"logistic": logistic}))
    caplog.clear()
    traker.finalize_features()
    factors = [traker.saver.load_factor(i)[1]["logistic"] for i in range(len(found))]
    warned = [r.getMessage() for r in caplog.records if "looks logistic" in r.getMessage()]
    return traker, factors, warned


@pytest.mark.parametrize(
    ("found", "expected", "warns"),
    [
        ([True, False, True], False, True),
        ([True, None], True, False),
        ([None, False], False, False),
        ([None, None], None, False),
    ],
)
def test_checkpoints_have_one_answer(found, expected, warns, tmp_path, caplog):
    traker, factors, warned = decided(tmp_path, found, caplog)
    assert factors == [expected] * len(found)
    assert len(warned) == warns
    if warns:
        assert "at checkpoints [0, 2] and does not at [1]" in warned[0]
        assert "loss_is_logistic" in warned[0]


def test_rows_are_weighted_by_the_answer_that_was_factored(tmp_path, caplog):
    model, train, targets = runs.data("mlp", N, M)
    traker = decided(tmp_path, [True, False], caplog)[0]
    loss = np.array(traker.saver.train_rows(0).array("out_to_loss"))
    loss[:5] = 1.5  # no probability: clipped if the loss is logistic, else no weights
    np.lib.format.open_memmap(tmp_path / "0" / "out_to_loss.mmap", mode="r+")[:] = loss
    traker = runs.make_traker(model, N, tmp_path, lambda_reg="1x", curvature=True)
    traker.finalize_features()
    states = cases.checkpoints("mlp", 2)
    for number, state in enumerate(states):
        runs.score(traker, targets, state, number)
    found = traker.finalize_scores("exp", model_ids=[0])
    rows = torch.from_numpy(np.array(traker.saver.train_rows(0).array("grads")))
    aims = torch.from_numpy(np.array(traker.saver.target_rows("exp", 0).array("grads")))
    gram = rows.T @ rows
    gram += torch.eye(len(gram)) * gram.trace() / N
    expected = loss * (rows @ torch.linalg.solve(gram, aims.T)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * expected.std())


@pytest.mark.parametrize("certain", [True, False])
def test_loss_weights_that_are_all_zero_are_told_of(certain, tmp_path, caplog):
    model, train, targets = runs.data("mlp", 20, 3)

    class Task(ImageClassificationModelOutput):
        def get_out_to_loss_grad(self, *args):
            return super().get_out_to_loss_grad(*args) * (not certain)

    traker = runs.make_traker(model, 20, tmp_path, task=Task())
    with caplog.at_level(logging.WARNING):
        scores = runs.whole_run(traker, train, targets, [model.state_dict()])
    assert (
        any("is 0 for all training examples" in r.getMessage() for r in caplog.records)
        == certain
    )
    assert scores.any() != certain
    assert traker.scores("exp", method="cosine").any()


@pytest.mark.parametrize("double", [True, False])
def test_loss_weights_that_cannot_be_stored_are_named(double, tmp_path):
    dtype = torch.float64 if double else torch.float32
    model, train, _ = runs.data("mlp", 20, 3, dtype)

    class Task(ImageClassificationModelOutput):
        def get_out_to_loss_grad(self, *args):
            found = super().get_out_to_loss_grad(*args).double()
            found[7:8] *= 1e300
            return found

    traker = runs.make_traker(model, 20, tmp_path, task=Task(), row_dtype="float32")
    traker.load_checkpoint(model.state_dict(), 0)
    with pytest.raises(NumericalError, match="Q of sample 7 is larger than float32"):
        traker.featurize(train, num_samples=20)
    assert not traker.saver.train_rows(0).refresh().any()
