"""Each way in which the reference implementation goes wrong: right here, or an error.

What other files cover: rows lost by two processes and torn files (test_store.py),
singular systems and another ridge (test_scores.py), seed collisions (test_counter.py),
chunked projectors (test_projectors.py), frozen parameters and `grad_wrt`
(test_gradients.py), CLIP (test_clip.py).
"""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import cases, reference, runs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trak import TRAKer
from trak.digests import example_digests
from trak.errors import (
    InputError,
    InputTypeError,
    ModelIDException,
    NumericalError,
    PhaseError,
    StoreCorruptedError,
    StoreMismatchError,
)
from trak.gradient_computers import FunctionalGradientComputer, IterativeGradientComputer
from trak.projectors import BasicProjector
from trak.score_computers.gram import primal_gram


@pytest.fixture
def setting(tmp_path):
    """Model, training batch, targets, and a maker of TRAKers over one store."""
    model, train, targets = runs.data("mlp", 20, 5)

    def make(**options):
        return runs.make_traker(model, 20, tmp_path, **options)

    return model, train, targets, make


def other_weights(model):
    return {name: value + 0.1 for name, value in model.state_dict().items()}


def expect(traker, train, targets, states, found):
    per_checkpoint = runs.oracle(traker.model, train, targets, states, traker.projector)
    expected = reference.trak_scores(per_checkpoint)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


# Silent wrong answers


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


# Crashes


def test_projecting_again_after_finalizing_works(setting):
    """Upstream's BasicProjector with proj_dim <= 100 loses its matrix."""
    model, train, targets, make = setting
    projector = BasicProjector(53, 16, 0, "normal", "cpu")
    traker = make(projector=projector)
    runs.whole_run(traker, train, targets, [model.state_dict()])
    traker.finalize_features()
    traker.finalize_features()


def test_allow_skip_leaves_out_what_is_not_ready_and_says_so(setting, caplog):
    model, train, targets, make = setting
    traker = make()
    states = [
        {k: v.clone() for k, v in model.state_dict().items()},
        {k: v.clone() for k, v in other_weights(model).items()},
    ]
    runs.whole_run(traker, train, targets, states[:1])
    runs.featurize(traker, train, states[1], model_id=1)
    with pytest.raises(ModelIDException, match="model_id=1 is not finalized"):
        traker.finalize_scores("exp")
    traker.finalize_features()
    with pytest.raises(ModelIDException, match="no targets for model_id=1"):
        traker.finalize_scores("exp")
    with caplog.at_level(logging.WARNING, "trak"):
        found = traker.finalize_scores("exp", allow_skip=True)
    assert "model_id=1" in caplog.text
    expect(traker, train, targets, states[:1], found)
    expect(traker, train, targets, states[:1], traker.finalize_scores("exp", model_ids=[0]))


def test_a_fresh_folder_without_loading_is_fine(setting):
    model, train, targets, make = setting
    traker = make(load_from_save_dir=False)
    found = runs.whole_run(traker, train, targets, [model.state_dict()])
    expect(traker, train, targets, [model.state_dict()], found)


CHECKPOINT_JOB = """
import sys
from tests import cases, runs
model, train, _ = runs.data("mlp", 20, 5)
number = int(sys.argv[2])
state = cases.checkpoints("mlp", number + 1)[number]
traker = runs.make_traker(model, 20, sys.argv[1], load_from_save_dir=sys.argv[3] == "1")
runs.featurize(traker, train, state, model_id=number)
traker.finalize_features(model_ids=[number])
"""


@pytest.mark.parametrize("load", ["1", "0"])
def test_concurrent_jobs_of_a_job_array(setting, load, tmp_path):
    model, train, targets, make = setting
    root = Path(__file__).parents[1]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", CHECKPOINT_JOB, str(tmp_path), str(c), load], cwd=root
        )
        for c in range(3)
    ]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    traker = make()
    states = cases.checkpoints("mlp", 3)
    for model_id, state in enumerate(states):
        runs.score(traker, targets, state, model_id)
    expect(traker, train, targets, states, traker.finalize_scores("exp"))


def test_two_trakers_may_keep_an_experiment_each(setting):
    model, train, targets, make = setting
    runs.featurize(make(), train, model.state_dict())
    make().finalize_features()
    one, other = make(), make()
    runs.score(one, targets, model.state_dict(), exp_name="a")
    runs.score(other, [p.flip(0) for p in targets], model.state_dict(), exp_name="b")
    first, second = one.finalize_scores("a"), other.finalize_scores("b")
    np.testing.assert_allclose(first, second[:, ::-1], rtol=1e-9)
    assert [e.name for e in make().experiments()] == ["a", "b"]


def test_an_emptied_metadata_file_is_named(setting, tmp_path):
    *_, make = setting
    make()
    (tmp_path / "metadata.json").write_text("")
    with pytest.raises(StoreCorruptedError, match=r"metadata\.json"):
        make()


def test_a_train_set_size_that_is_too_large_names_the_missing_rows(tmp_path):
    model, train, _ = runs.data("mlp", 20, 5)
    traker = runs.make_traker(model, 23, tmp_path)
    runs.featurize(traker, train, model.state_dict())
    with pytest.raises(ModelIDException, match=r"3 of 23.*20, 21, 22.*train_set_size"):
        traker.finalize_features()


def test_a_train_set_size_that_is_too_small_is_noticed_at_once(tmp_path):
    model, train, _ = runs.data("mlp", 20, 5)
    traker = runs.make_traker(model, 18, tmp_path)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize([p[:15] for p in train], num_samples=15)
    with pytest.raises(InputError, match="Row 18.*train_set_size=18"):
        traker.featurize([p[15:] for p in train], num_samples=5)
    assert traker.checkpoints()[0].num_featurized == 15


def test_a_failed_batch_can_be_tried_again(setting, monkeypatch):
    model, train, targets, make = setting
    traker = make()
    traker.load_checkpoint(model.state_dict(), model_id=0)
    computer = traker.gradient_computer
    real, calls = computer.compute_per_sample_grad, []

    def sometimes(batch):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return real(batch)

    monkeypatch.setattr(computer, "compute_per_sample_grad", sometimes)
    for batch in runs.split(train, 5):
        try:
            traker.featurize(batch, num_samples=5)
        except torch.OutOfMemoryError:
            traker.featurize([p[:2] for p in batch], num_samples=2)
            traker.featurize([p[2:] for p in batch], num_samples=3)
    traker.finalize_features()
    runs.score(traker, targets, model.state_dict())
    expect(traker, train, targets, [model.state_dict()], traker.finalize_scores("exp"))


def test_a_num_samples_that_is_not_the_batchs_size_is_refused(setting):
    model, train, _, make = setting
    traker = make()
    traker.load_checkpoint(model.state_dict(), model_id=0)
    with pytest.raises(InputError, match="num_samples=16, but the batch holds 4"):
        traker.featurize([p[:4] for p in train], num_samples=16)


@pytest.mark.parametrize("kind", ["missing", "shape", "extra", "not a dict"])
def test_a_refused_checkpoint_leaves_nothing_behind(setting, kind, tmp_path):
    model, _, _, make = setting
    traker = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    files = sorted(tmp_path.rglob("*"))
    state = other_weights(model)
    if kind == "missing":
        del state["3.bias"]
    elif kind == "shape":
        state["3.bias"] = torch.zeros(4)
    elif kind == "extra":
        state["4.bias"] = torch.zeros(4)
    else:
        state = list(state.values())
    with pytest.raises((InputError, InputTypeError), match=r"3\.bias|4\.bias|state dict"):
        traker.load_checkpoint(state, model_id=0)
    assert sorted(tmp_path.rglob("*")) == files
    assert traker.checkpoints() == []
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("model_id", ["0", 1.0, None, True, -1])
def test_ids_that_are_no_integers_are_refused(setting, model_id):
    model, _, _, make = setting
    with pytest.raises(InputError, match="model_id must be"):
        make().load_checkpoint(model.state_dict(), model_id=model_id)


def test_iterative_computer_with_grad_wrt_and_frozen_parameters(tmp_path):
    model, train, targets = runs.data("mlp", 20, 5)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    traker = TRAKer(
        model=model,
        task="iterative_image_classification",
        train_set_size=20,
        lambda_reg="1x",
        save_dir=tmp_path,
        device="cpu",
        proj_dim=16,
        use_half_precision=False,
        gradient_computer=IterativeGradientComputer,
    )
    states = [model.state_dict()]
    found = runs.whole_run(traker, train, targets, states)
    names = ["3.weight", "3.bias"]
    per_checkpoint = runs.oracle(model, train, targets, states, traker.projector, names)
    np.testing.assert_allclose(found, reference.trak_scores(per_checkpoint), rtol=1e-6)


# Batches that cannot be used


@pytest.mark.parametrize(
    ("labels", "word"),
    [
        (torch.tensor([0, 3, 1]), "label 3"),
        (torch.tensor([0, -1, 1]), "label -1"),
        (torch.tensor([0.0, 1.0, 1.0]), "integers"),
        (torch.tensor([[0], [1], [1]]), r"\(3, 1\)"),
        (torch.tensor([0, 1]), "first .sample. axis"),
        (torch.tensor(1), "first .sample. axis"),
    ],
)
def test_labels_that_do_not_fit_are_explained(setting, labels, word):
    model, train, _, make = setting
    traker = make()
    traker.load_checkpoint(model.state_dict(), model_id=0)
    with pytest.raises((InputError, InputTypeError), match=word):
        traker.featurize([train[0][:3], labels], inds=[0, 1, 2])


@pytest.mark.parametrize(
    ("inds", "word"),
    [
        ([0, 1, 1], "got 1 more than once"),
        ([0, 1], "one number a sample, 3 for this batch, got 2"),
        ([0, 1, 20], "Row 20"),
        ([-1, 1, 2], "Row -1"),
        ([0.0, 1.0, 2.0], "integers"),
        ([True, False, True], "integers"),
    ],
)
def test_inds_that_do_not_fit_are_explained(setting, inds, word):
    model, train, _, make = setting
    traker = make()
    traker.load_checkpoint(model.state_dict(), model_id=0)
    with pytest.raises((InputError, InputTypeError), match=word):
        traker.featurize([p[:3] for p in train], inds=inds)
    with pytest.raises(InputError, match="exactly one.*got neither"):
        traker.featurize([p[:3] for p in train])
    with pytest.raises(InputError, match="exactly one"):
        traker.featurize([p[:3] for p in train], inds=[0, 1, 2], num_samples=3)


@pytest.mark.parametrize("batch", [(), {}, "abc", 7, ("a", "b"), {"x": ["a"]}])
def test_things_that_are_no_batch_are_explained(setting, batch):
    model, _, _, make = setting
    traker = make()
    traker.load_checkpoint(model.state_dict(), model_id=0)
    with pytest.raises((InputError, InputTypeError), match="batch"):
        traker.featurize(batch, num_samples=1)


def test_empty_batches_do_nothing(setting):
    model, train, _, make = setting
    traker = make()
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize([p[:0] for p in train], num_samples=0)
    traker.featurize([p[:0] for p in train], inds=[])
    assert traker.checkpoints()[0].num_featurized == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_grad_mode_does_not_matter(setting, mode):
    model, train, targets, make = setting
    traker = make()
    with mode():
        inside = [tuple(p.clone() for p in batch) for batch in (train, targets)]
        found = np.array(runs.whole_run(traker, *inside, [model.state_dict()]))
    expect(traker, train, targets, [model.state_dict()], found)


def test_unknown_tasks_and_devices_are_explained(setting):
    model, *_, make = setting
    with pytest.raises(InputError, match="'language modeling'.*|text_classification"):
        TRAKer(model=model, task="language modeling", train_set_size=3)
    with pytest.raises(InputTypeError, match="get_output"):
        TRAKer(model=model, task=object(), train_set_size=3)
    with pytest.raises(InputError, match="train_set_size"):
        TRAKer(model=model, task="image_classification", train_set_size=0)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            make(device="cuda")
