"""Guards against wrong scores that nobody would notice."""

import json
import zlib

import numpy as np
import pytest
import torch
from tests import cases, runs

from trak.errors import NumericalError, PhaseError, StoreCorruptedError
from trak.gradient_computers import FunctionalGradientComputer


@pytest.mark.parametrize(("scale", "word"), [(1e-6, "small"), (1e7, "beyond")])
def test_rows_outside_half_precision_are_refused_by_name(scale, word, tmp_path):
    model, train, _ = runs.data("mlp", 8, 1, torch.float32)
    traker = runs.make_traker(
        model,
        8,
        tmp_path,
        use_half_precision=True,
        gradient_computer=FunctionalGradientComputer,
    )
    real = traker.gradient_computer.compute_per_sample_grad

    def scaled(batch):
        return {name: gradient * scale for name, gradient in real(batch).items()}

    traker.gradient_computer.compute_per_sample_grad = scaled
    traker.load_checkpoint(model.state_dict(), model_id=0)
    with pytest.raises(
        NumericalError, match=rf"sample 3.*{word}.*use_half_precision=False"
    ):
        traker.featurize([part[3:] for part in train], inds=[3, 4, 5, 6, 7])
    assert not traker.saver.train_rows(0).done.any()


def test_scores_of_an_older_ridge_are_not_handed_out(tmp_path):
    model, train, targets = runs.data("mlp", 12, 3)
    first = runs.make_traker(model, 12, tmp_path)
    runs.whole_run(first, train, targets, [model.state_dict()])
    second = runs.make_traker(model, 12, tmp_path, lambda_reg=0.3)
    second.finalize_features()
    for read in (second.scores, second.top_k):
        with pytest.raises(PhaseError, match="finalize_scores"):
            read("exp")
    second.finalize_scores("exp")
    assert second.scores("exp").shape == (12, 3)


@pytest.mark.parametrize("what", ["weight", "buffer"])
def test_weights_and_statistics_may_not_change_after_loading(what, tmp_path):
    model, train, _ = runs.data("cnn", 8, 1)
    traker = runs.make_traker(model, 8, tmp_path)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    with torch.no_grad():
        (model[0].weight if what == "weight" else model[1].running_mean).add_(1.0)
    with pytest.raises(PhaseError, match="changed after"):
        traker.featurize(train, num_samples=8)
    traker.load_checkpoint(cases.make("cnn", 1)[0].state_dict(), model_id=1)
    traker.featurize(train, num_samples=8)


def test_a_mode_set_by_the_user_neither_matters_nor_is_lost(tmp_path):
    model, train, _ = runs.data("mlp", 8, 1)
    traker = runs.make_traker(model, 8, tmp_path)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize([p[:4] for p in train], num_samples=4)
    model.train()
    traker.featurize([p[4:] for p in train], num_samples=4)
    assert model.training
    assert model[2].training
    other = runs.make_traker(model, 8, tmp_path / "other")
    other.load_checkpoint(model.state_dict(), model_id=0)
    other.featurize(train, num_samples=8)
    stored = [t.saver.current_store["grads"] for t in (traker, other)]
    np.testing.assert_allclose(stored[0], stored[1], rtol=1e-9)


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "checkpoint.json").write_text("mine")
    model, train, targets = runs.data("mlp", 12, 3)
    traker = runs.make_traker(model, 12, tmp_path)
    runs.whole_run(traker, train, targets, [model.state_dict()])
    assert [c.model_id for c in traker.checkpoints()] == [0]
    assert (tmp_path / "notes" / "checkpoint.json").read_text() == "mine"


def test_a_journal_with_rows_that_cannot_be_is_refused(tmp_path):
    model, train, _ = runs.data("mlp", 12, 3)
    traker = runs.make_traker(model, 12, tmp_path)
    runs.featurize(traker, train, model.state_dict())
    text = json.dumps({"done": [[10, 5]]}).encode()
    with (tmp_path / "0" / "grads.journal").open("ab") as file:
        file.write(b"%08x %s\n" % (zlib.crc32(text), text))
    with pytest.raises(StoreCorruptedError, match="rows 10 to 14"):
        runs.make_traker(model, 12, tmp_path)


def test_a_death_while_scores_are_replaced_leaves_no_false_record(tmp_path, monkeypatch):
    model, train, targets = runs.data("mlp", 12, 3)
    traker = runs.make_traker(model, 12, tmp_path)
    runs.whole_run(traker, train, targets, [model.state_dict()])

    def die(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", die)
        with pytest.raises(KeyboardInterrupt):
            traker.finalize_scores("exp")
    before = np.array(traker.scores("exp"))
    np.testing.assert_allclose(traker.finalize_scores("exp"), before)


def test_further_writers_files_are_not_overlooked(tmp_path):
    model, train, _ = runs.data("mlp", 12, 3)
    runs.featurize(runs.make_traker(model, 12, tmp_path), train, model.state_dict())
    (tmp_path / "0" / "grads.w1.journal").touch()
    with pytest.raises(ValueError, match="further writers"):
        runs.make_traker(model, 12, tmp_path)
