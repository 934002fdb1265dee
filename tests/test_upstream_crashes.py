"""What made `traker` 0.3.2 crash, or fail late, works here or is explained."""

import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import cases, reference, runs
from tests.runs import expect, other_weights

from trak import TRAKer
from trak.errors import InputError, InputTypeError, ModelIDException, StoreCorruptedError
from trak.gradient_computers import IterativeGradientComputer
from trak.projectors import BasicProjector

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
