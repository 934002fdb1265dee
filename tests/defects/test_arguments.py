"""Arguments that cannot be used, and numbers of other libraries, which can."""

import numpy as np
import pytest
import torch
from tests import runs
from tests.defects.helpers import (
    M,
    N,
    assert_scores,
    data,
    featurize,
    net,
    oracle,
    tracker,
    weights,
    whole_run,
)
from torch import nn

from trak import attribute
from trak.errors import AttributionError, InputError, InputTypeError, PhaseError
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import (
    CLIPModelOutput,
    ImageClassificationModelOutput,
    TextClassificationModelOutput,
)
from trak.projectors import BasicProjector, NoOpProjector
from trak.savers import MmapSaver
from trak.score_computers import BasicScoreComputer, RidgeScoreComputer

NAN, INF = float("nan"), float("inf")


def meta_model():
    with torch.device("meta"):
        return nn.Linear(4, 3)


def inference_model():
    with torch.inference_mode():
        return net()


CANNOT_BE = {
    "model: a name": ({"model": "bert-base-cased"}, "model must be a torch.nn.Module"),
    "model: a class": ({"model": nn.Linear}, "the class Linear"),
    "model: meta": ({"model": meta_model()}, "'weight' of the model is on the meta"),
    "model: inference": ({"model": inference_model()}, "inference_mode"),
    "model: lazy": ({"model": nn.Sequential(nn.LazyLinear(3))}, "has no shape yet"),
    "projector": ({"projector": NoOpProjector}, "projector must be an instance"),
    "computer": (
        {"gradient_computer": FunctionalGradientComputer(net(), "task")},
        "gradient_computer must be a class",
    ),
    "scorer": ({"score_computer": "basic"}, "score_computer must be a class"),
    "scorer: other": ({"score_computer": MmapSaver}, "score_computer.*class MmapSaver"),
    "saver": ({"saver": "mmap"}, "saver must be a class"),
    "saver: other": ({"saver": dict}, "saver must be a class with.*dict lacks train_rows"),
    "computer: other": ({"gradient_computer": dict}, "class dict lacks compute_per_sample"),
    "task: misspelt": ({"task": "image_clasification"}, "mean image_classification"),
    "projector: misspelt": ({"projector": "spars"}, "Did you mean sparse"),
    "examples: text": ({"check_examples": "no"}, "check_examples must be True or False"),
    "half: text": ({"use_half_precision": "no"}, "use_half_precision must be True or"),
    "load: text": ({"load_from_save_dir": "no"}, "load_from_save_dir must be True or"),
    "save_dir": ({"save_dir": None}, "save_dir must be a path"),
    "device": ({"device": "gpu"}, "device must be one of torch's.*'gpu'"),
    "grad_wrt: tensors": ({"grad_wrt": net().parameters()}, "grad_wrt must list names"),
    "grad_wrt: a number": ({"grad_wrt": 3}, "grad_wrt must list names.*3"),
    "width: many": ({"proj_dim": np.ones(2)}, "proj_dim must be an integer of at least 1"),
    "size: float": ({"train_set_size": float(N)}, "train_set_size must be an integer"),
    "size: text": ({"train_set_size": "24"}, "train_set_size must be an integer"),
    "size: none": ({"train_set_size": None}, "train_set_size must be an integer"),
    "size: bool": ({"train_set_size": True}, "train_set_size must be an integer"),
    "size: negative": ({"train_set_size": -3}, "of at least 1, got -3"),
    "seed: float": ({"projector_seed": 1.5}, "seed must be an integer, got 1.5"),
    "seed: text": ({"projector_seed": "0"}, "seed must be an integer"),
    "seed: none": ({"projector_seed": None}, "seed must be an integer"),
    "ridge: negative": ({"lambda_reg": -1.0}, "lambda_reg must be a finite number"),
    "ridge: nan": ({"lambda_reg": NAN}, "lambda_reg must be a finite number"),
    "ridge: infinite": ({"lambda_reg": INF}, "lambda_reg must be a finite number"),
    "ridge: beyond floats": ({"lambda_reg": 10**400}, "must be a finite number"),
    "whitening: many": ({"whitening": np.ones(2)}, "whitening must be a finite number"),
    "ridge: text": ({"lambda_reg": "0.1"}, "lambda_reg must be a number"),
    "ridge: many": ({"lambda_reg": torch.ones(2)}, "lambda_reg must be a finite number"),
}


@pytest.mark.parametrize("case", CANNOT_BE)
def test_arguments_that_cannot_be_are_explained_before_a_store_exists(case, tmp_path):
    options, message = CANNOT_BE[case]
    with pytest.raises(AttributionError, match=message):
        tracker(tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("form", [np.int64, np.uint8, torch.tensor, np.array])
def test_integers_of_other_libraries_work(form, tmp_path):
    train, targets = data()
    options = {"train_set_size": form(N), "proj_dim": form(12), "projector_seed": form(1)}
    traker = tracker(tmp_path, **options)
    runs.featurize(traker, train, weights(), model_id=form(0))
    traker.finalize_features(model_ids=[form(0)])
    traker.start_scoring_checkpoint("exp", weights(), form(0), num_targets=form(M))
    traker.score(targets, num_samples=M)
    found = traker.finalize_scores("exp", model_ids=[form(0)])
    assert_scores(found, oracle(traker, train, targets))
    tracker(tmp_path, projector_seed=1)  # the same settings as with plain integers


def test_arrays_where_one_thing_is_due_are_explained(tmp_path):
    train, targets = data()
    traker = tracker(tmp_path)
    whole_run(traker, train, targets, [weights()])
    for read in (traker.scores, traker.top_scores):
        with pytest.raises(InputError, match="method must be one of"):
            read("exp", method=np.array(["dot", "trak"]))
    with pytest.raises(InputTypeError, match="exp_names must list names"):
        traker.sweep([["exp"]])
    traker.load_checkpoint(weights(), model_id=1)
    for wrong in (np.ones(2), torch.ones(2), "24"):
        with pytest.raises(InputError, match="num_samples must be a finite number"):
            traker.featurize(train, num_samples=wrong)
    with pytest.raises(InputError, match="proj_dim must be an integer"):
        attribute(
            net(),
            task="image_classification",
            train=[train],
            targets=[targets],
            save_dir=tmp_path / "other",
            proj_dim=np.ones(2),
        )


@pytest.mark.parametrize("yes", [1, True, np.bool_(1), torch.tensor(True)])
def test_upstreams_flags_may_be_numbers(yes, tmp_path):
    traker = tracker(tmp_path, use_half_precision=yes, load_from_save_dir=yes)
    assert traker.dtype is torch.float16
    assert traker.load_from_save_dir is True


@pytest.mark.parametrize("form", [np.float32, np.float64, torch.tensor, np.array])
def test_ridges_of_other_libraries_work(form, tmp_path):
    train, targets = data()
    traker = tracker(tmp_path, lambda_reg=form(0.5))
    found = whole_run(traker, train, targets, [weights()])
    assert_scores(found, oracle(traker, train, targets, ridge=0.5))


@pytest.mark.parametrize("make", [RidgeScoreComputer, BasicScoreComputer])
def test_a_ridge_is_checked_when_a_score_computer_is_made(make):
    with pytest.raises(InputError, match="lambda_reg"):
        make(lambda_reg=NAN)


@pytest.mark.parametrize("task", [ImageClassificationModelOutput, CLIPModelOutput])
@pytest.mark.parametrize("temperature", [0, -1.0, NAN, "1"])
def test_a_temperature_that_means_nothing_is_refused(task, temperature):
    """A negative one would turn Q = 1 - p into p."""
    with pytest.raises(InputError, match="temperature must be a finite number above 0"):
        task(temperature=temperature)
    assert TextClassificationModelOutput(np.float32(2)).loss_temperature == 2.0


def test_a_projectors_seed_is_checked_when_it_is_made():
    """1.5 was 1, in silence."""
    with pytest.raises(InputError, match="seed must be an integer"):
        BasicProjector(51, 12, 1.5, "normal", "cpu")


@pytest.mark.parametrize("name", [3, None, b"exp"])
def test_an_experiment_name_that_is_no_string_is_explained(name, tmp_path):
    traker = tracker(tmp_path)
    featurize(traker, data()[0], weights())
    with pytest.raises(InputError, match="exp_name"):
        traker.start_scoring_checkpoint(name, weights(), 0, num_targets=M)
    with pytest.raises(InputError, match="exp_name"):
        traker.finalize_scores(name)


@pytest.mark.parametrize("model_ids", [0, "0", [0.0], [None], [], [0, 0], [7]])
def test_model_ids_that_cannot_be_are_explained(model_ids, tmp_path):
    """A checkpoint listed twice counted twice in the mean."""
    train, targets = data()
    traker = tracker(tmp_path)
    whole_run(traker, train, targets, [weights()])
    message = "model_ids? |Checkpoints"
    with pytest.raises(AttributionError, match=message):
        traker.finalize_features(model_ids=model_ids)
    with pytest.raises(AttributionError, match=message):
        traker.finalize_scores("exp", model_ids=model_ids)


@pytest.mark.parametrize("num_targets", [0, "5", 5.0, None, True])
def test_a_number_of_targets_that_cannot_be_is_explained(num_targets, tmp_path):
    traker = tracker(tmp_path)
    featurize(traker, data()[0], weights())
    with pytest.raises(InputError, match="num_targets must be an integer of at least 1"):
        traker.start_scoring_checkpoint("exp", weights(), 0, num_targets)
    assert traker.experiments() == []


CALLS = {
    "featurize": (lambda t: t.featurize(data()[0], inds=range(N)), "load_checkpoint"),
    "score": (lambda t: t.score(data()[1], inds=range(M)), "start_scoring_checkpoint"),
    "finalize_features": (lambda t: t.finalize_features(), "No checkpoint.*load_check"),
    "finalize one": (lambda t: t.finalize_features([3]), r"\[3\].*load_checkpoint"),
    "start": (lambda t: t.start_scoring_checkpoint("e", weights(), 0, 5), "model_id=0"),
    "finalize_scores": (lambda t: t.finalize_scores("exp"), "load_checkpoint"),
    "scores": (lambda t: t.scores("exp"), "'exp'.*start_scoring_checkpoint"),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_says_what_it_needs_first_and_leaves_no_trace(call, tmp_path):
    traker = tracker(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    function, message = CALLS[call]
    with pytest.raises(PhaseError, match=message):
        function(traker)
    assert sorted(tmp_path.rglob("*")) == before
