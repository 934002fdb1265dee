"""Where the reference implementation is wrong in silence: right here, or an error.

What other files cover: rows lost by two processes and torn files (test_store.py),
singular systems and another ridge (test_scores.py), seed collisions (test_counter.py),
chunked projectors (test_projectors.py), frozen parameters and `grad_wrt`
(test_gradients.py), CLIP (test_clip.py).
"""

import numpy as np
import pytest
import torch
from tests import reference, runs
from tests.runs import expect, other_weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trak import TRAKer
from trak.digests import example_digests
from trak.errors import (
    InputError,
    ModelIDException,
    NumericalError,
    PhaseError,
    StoreMismatchError,
)
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import BasicProjector
from trak.score_computers.gram import primal_gram


@pytest.mark.parametrize("inds", [False, True])
def test_one_nan_sample_is_named_and_nothing_is_stored(setting, inds):
    model, train, _, make = setting
    train[0][13, 2] = torch.nan
    traker = make()
    traker.load_checkpoint(model.state_dict(), model_id=0)
    batches = runs.split(train, 5)
    for start in (0, 5):
        traker.featurize(batches[start // 5], num_samples=5)
    with pytest.raises(NumericalError, match="sample 13"):
        if inds:
            traker.featurize(batches[2], inds=[10, 11, 12, 13, 14])
        else:
            traker.featurize(batches[2], num_samples=5)
    assert traker.checkpoints()[0].num_featurized == 10


def test_a_gradient_that_is_not_finite_names_sample_layer_and_checkpoint(
    setting, monkeypatch
):
    model, train, _, make = setting
    traker = make(gradient_computer=FunctionalGradientComputer)
    real = traker.gradient_computer.compute_per_sample_grad

    def broken(batch):
        grads = real(batch)
        hit = (batch[0] == train[0][7]).all(1)
        grads["3.weight"][hit] = torch.inf
        return grads

    monkeypatch.setattr(traker.gradient_computer, "compute_per_sample_grad", broken)
    traker.load_checkpoint(model.state_dict(), model_id=4)
    with pytest.raises(NumericalError, match=r"sample 7 .*model_id=4.*'3\.weight'"):
        traker.featurize(train, num_samples=20)


@pytest.mark.parametrize("half", [True, False])
def test_fewer_examples_than_columns_is_right_by_default(half, tmp_path):
    model, train, targets = runs.data("mlp", 20, 5, torch.float32)
    options = {"proj_dim": 500, "use_half_precision": half}
    traker = runs.make_traker(model, 20, tmp_path, **options)
    states = [model.state_dict()]
    found = runs.whole_run(traker, train, targets, states)
    expected = reference.trak_scores(
        runs.oracle(model, train, targets, states, traker.projector)
    )
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


def test_new_weights_under_an_old_id_are_refused(setting):
    model, train, _, make = setting
    runs.featurize(make(), train, model.state_dict())
    with pytest.raises(StoreMismatchError, match="model_id=0.*another model_id"):
        make().load_checkpoint(other_weights(model), model_id=0)


def test_scoring_with_other_weights_is_refused(setting):
    model, train, targets, make = setting
    traker = make()
    runs.featurize(traker, train, model.state_dict())
    traker.finalize_features()
    with pytest.raises(StoreMismatchError, match="content hash"):
        runs.score(traker, targets, other_weights(model))


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ({"projector_seed": 1}, r"projection\.seed"),
        ({"proj_dim": 17}, "proj_dim"),
        ({"grad_wrt": ["0.weight"]}, "grad_wrt"),
        ({"use_half_precision": True}, "precision"),
        ({"projector": BasicProjector(53, 16, 0, "normal", "cpu")}, r"projection\.kind"),
    ],
)
def test_changed_settings_are_refused_when_the_store_is_opened(setting, option, name):
    model, train, _, make = setting
    runs.featurize(make(), train, model.state_dict())
    with pytest.raises(StoreMismatchError, match=name):
        make(**option)


def test_another_architecture_task_size_or_library_is_refused(setting, tmp_path):
    model, _, _, make = setting
    make()
    wider = nn.Sequential(
        nn.Linear(6, 7), nn.ReLU(), nn.Dropout(), nn.Linear(7, 3)
    ).double()
    with pytest.raises(StoreMismatchError, match=r"architecture\.0\.weight"):
        runs.make_traker(wider, 20, tmp_path)
    with pytest.raises(StoreMismatchError, match="train_set_size"):
        runs.make_traker(model, 21, tmp_path)
    with pytest.raises(StoreMismatchError, match=r"task\.class"):
        TRAKer(
            model=model,
            task="text_classification",
            train_set_size=20,
            save_dir=tmp_path,
            device="cpu",
            proj_dim=16,
            use_half_precision=False,
        )
    path = tmp_path / "metadata.json"
    path.write_text(path.read_text().replace('"library": "', '"library": "9.'))
    with pytest.raises(StoreMismatchError, match="library"):
        make()


@pytest.mark.parametrize("step", ["load", "finalize", "start", "scores"])
def test_settings_are_checked_at_every_step_and_not_only_when_opened(
    setting, step, tmp_path
):
    model, train, targets, make = setting
    traker = make()
    runs.whole_run(traker, train, targets, [model.state_dict()])
    traker.projector.seed = 99
    with pytest.raises(StoreMismatchError, match=r"projection\.seed"):
        {
            "load": lambda: traker.load_checkpoint(model.state_dict(), 0),
            "finalize": traker.finalize_features,
            "start": lambda: traker.start_scoring_checkpoint("e", model.state_dict(), 0, 5),
            "scores": lambda: traker.finalize_scores("exp"),
        }[step]()


@pytest.mark.parametrize("load_from_save_dir", [True, False])
def test_a_restart_keeps_the_rows_that_exist(setting, load_from_save_dir):
    model, train, _, make = setting
    first = make(load_from_save_dir=load_from_save_dir)
    first.load_checkpoint(model.state_dict(), model_id=3)
    first.featurize([p[:10] for p in train], num_samples=10)
    again = make(load_from_save_dir=load_from_save_dir)
    again.load_checkpoint(model.state_dict(), model_id=3)
    assert again.saver.train_rows(3).done.sum() == 10


def test_scoring_before_finalizing_is_refused(setting):
    model, train, targets, make = setting
    traker = make()
    runs.featurize(traker, train, model.state_dict())
    with pytest.raises(ModelIDException, match="finalize_features"):
        runs.score(traker, targets, model.state_dict())
    with pytest.raises(ModelIDException, match="not finalized"):
        traker.finalize_scores("exp")


def test_unscored_targets_are_named(setting):
    model, train, targets, make = setting
    traker = make()
    runs.featurize(traker, train, model.state_dict())
    traker.finalize_features()
    traker.start_scoring_checkpoint("exp", model.state_dict(), 0, num_targets=5)
    traker.score([p[:2] for p in targets], inds=[0, 3])
    with pytest.raises(ModelIDException, match="lacks 3 targets.*1, 2, 4"):
        traker.finalize_scores("exp")


def test_an_experiments_name_keeps_its_number_of_targets(setting):
    model, train, targets, make = setting
    traker = make()
    runs.whole_run(traker, train, targets, [model.state_dict()])
    with pytest.raises(StoreMismatchError, match="has 5 targets; num_targets=3"):
        runs.score(traker, [p[:3] for p in targets], model.state_dict())


def test_other_targets_under_an_experiments_name_are_refused(setting):
    model, train, targets, make = setting
    traker = make()
    runs.whole_run(traker, train, targets, [model.state_dict()])
    with pytest.raises(StoreMismatchError, match="target in row 0"):
        runs.score(traker, [p.flip(0) for p in targets], model.state_dict())


def test_scoring_a_further_checkpoint_leaves_finished_scores_alone(setting):
    model, train, targets, make = setting
    traker = make()
    states = [model.state_dict(), other_weights(model)]
    states = [{k: v.clone() for k, v in s.items()} for s in states]
    before = np.array(runs.whole_run(traker, train, targets, states[:1]))
    runs.featurize(traker, train, states[1], model_id=1)
    traker.finalize_features()
    traker.start_scoring_checkpoint("exp", states[1], 1, num_targets=5)
    assert np.array_equal(traker.scores("exp"), before)
    runs.score(traker, targets, states[1], model_id=1)
    expect(traker, train, targets, states, traker.finalize_scores("exp"))


def test_one_logit_models_are_binary_classifiers(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double()
    inputs, labels = torch.randn(30, 6).double(), torch.randint(0, 2, (30,))
    traker = runs.make_traker(model, 25, tmp_path)
    batches = [(inputs[:25], labels[:25]), (inputs[25:], labels[25:])]
    found = runs.whole_run(traker, *batches, [model.state_dict()])

    class TwoLogits(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = model.weight, model.bias

        def forward(self, x):
            logit = x @ self.weight.T + self.bias
            return torch.cat([torch.zeros_like(logit), logit], 1)

    wide = TwoLogits()
    expect_model = [{k: v.clone() for k, v in wide.state_dict().items()}]
    per_checkpoint = runs.oracle(wide, *batches, expect_model, traker.projector)
    np.testing.assert_allclose(found, reference.trak_scores(per_checkpoint), rtol=1e-6)
    assert np.abs(found).min() > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shuffling_loader_with_num_samples_is_refused(setting, workers):
    model, train, _, make = setting
    traker = make()
    traker.load_checkpoint(model.state_dict(), model_id=0)
    loader = DataLoader(
        TensorDataset(*train), batch_size=5, shuffle=True, num_workers=workers
    )
    with pytest.raises(InputError, match="shuffle=False"):
        for batch in loader:
            traker.featurize(batch=batch, num_samples=5)
    ordered = DataLoader(TensorDataset(*train), batch_size=5, num_workers=workers)
    for batch in ordered:
        traker.featurize(batch=batch, num_samples=5)
    assert traker.checkpoints()[0].is_featurized


def test_a_shuffled_loader_with_inds_is_right(setting):
    model, train, targets, make = setting
    traker = make()
    traker.load_checkpoint(model.state_dict(), model_id=0)
    numbered = TensorDataset(*train, torch.arange(20))
    for *batch, numbers in DataLoader(numbered, batch_size=6, shuffle=True):
        traker.featurize(batch=batch, inds=numbers)
    traker.finalize_features()
    runs.score(traker, targets, model.state_dict())
    expect(traker, train, targets, [model.state_dict()], traker.finalize_scores("exp"))


def test_another_order_at_a_second_checkpoint_is_refused(setting):
    model, train, _, make = setting
    traker = make()
    runs.featurize(traker, train, model.state_dict())
    with pytest.raises(StoreMismatchError, match="training example in row 0.*model_id=0"):
        runs.featurize(traker, [p.flip(0) for p in train], other_weights(model), model_id=1)
    unchecked = make(check_examples=False)
    runs.featurize(unchecked, [p.flip(0) for p in train], other_weights(model), model_id=2)


def test_padding_with_zeros_to_another_length_is_the_same_example():
    ids = torch.tensor([[4, 5, 6, 0], [4, 5, 0, 0]])
    short = example_digests((ids[:, :3], torch.tensor([1, 0])))
    assert np.array_equal(example_digests((ids, torch.tensor([1, 0]))), short)
    assert short[0] != short[1]
    assert np.all(example_digests((ids, torch.tensor([0, 1]))) != short)


def test_large_rows_do_not_overflow_the_gram_matrix():
    rows = torch.full((20_000, 3), 3.0, dtype=torch.float16)
    assert torch.equal(
        primal_gram(rows), torch.full((3, 3), 180_000.0, dtype=torch.float64)
    )


def test_featurizing_while_scoring_is_refused(setting):
    model, train, targets, make = setting
    traker = make()
    runs.whole_run(traker, train, targets, [model.state_dict()])
    with pytest.raises(PhaseError, match="load_checkpoint"):
        traker.featurize(train, num_samples=20)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    with pytest.raises(PhaseError, match="start_scoring_checkpoint"):
        traker.score(targets, num_samples=5)
