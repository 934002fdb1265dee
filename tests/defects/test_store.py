"""Files of a store that were lost, cut or mixed up, and stores shared by several."""

import json

import numpy as np
import pytest
from tests import runs
from tests.defects.helpers import (
    N,
    assert_scores,
    data,
    featurize,
    net,
    oracle,
    take,
    tracker,
    weights,
    whole_run,
)
from torch import nn

from trak.errors import (
    ModelIDException,
    NumericalError,
    PhaseError,
    StoreCorruptedError,
    StoreMismatchError,
)
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import BasicProjector, NoOpProjector

JSON = ("metadata.json", "0/checkpoint.json", "0/factor.json", "experiments/exp.json")
ARRAYS = ("0/grads.mmap", "0/out_to_loss.mmap", "0/examples.mmap", "0/exp_grads.mmap")


def use(folder):
    """Opens a finished store and goes through its last steps."""
    traker = tracker(folder)
    traker.load_checkpoint(weights(), 0)
    traker.finalize_features()
    return traker.finalize_scores("exp")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    whole_run(tracker(folder), *data(), [weights()])
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def copy(finished, tmp_path):
    for name, content in finished.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


REMEDIES = ("featurize again", "finalize", "score these targets again")


@pytest.mark.parametrize("name", [*JSON, *ARRAYS, "0/factor.npy"])
@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_emptied_and_cut_files_are_named(copy, name, damage):
    path = copy / name
    path.write_bytes(b"" if damage == "empty" else path.read_bytes()[:-9])
    with pytest.raises(StoreCorruptedError) as caught:
        use(copy)
    assert str(path) in str(caught.value)
    assert any(word in str(caught.value) for word in REMEDIES)


@pytest.mark.parametrize("name", [*ARRAYS, "0/factor.npy"])
def test_lost_files_are_not_replaced_by_zeros(copy, name):
    """The journal, or factor.json, still says that they exist."""
    (copy / name).unlink()
    with pytest.raises(StoreCorruptedError) as caught:
        use(copy)
    assert str(copy / name) in str(caught.value)


def test_a_lost_factor_comes_back_by_the_way_that_the_message_names(copy):
    before = use(copy).copy()
    (copy / "0/factor.npy").unlink()
    (copy / "0/factor.json").unlink()
    np.testing.assert_array_equal(use(copy), before)


def test_lost_rows_come_back_by_the_way_that_the_message_names(copy):
    before = use(copy).copy()
    (copy / "0/grads.mmap").unlink()
    (copy / "0/grads.journal").unlink()
    traker = tracker(copy)
    with pytest.raises(ModelIDException, match="rows .* are gone"):
        traker.finalize_scores("exp")
    featurize(traker, data()[0], weights())
    np.testing.assert_allclose(traker.finalize_scores("exp"), before, rtol=1e-9)


def test_a_folder_that_is_removed_during_the_run_is_named(copy):
    traker = tracker(copy)
    (copy / "0" / "grads.journal").unlink()
    with pytest.raises(StoreCorruptedError, match=r"grads\.journal is gone"):
        traker.finalize_features()


def test_numbers_damaged_on_disk_are_named(copy):
    array = np.load(copy / "0" / "grads.mmap", mmap_mode="r+")
    array[11, 2] = np.nan
    array.flush()
    with pytest.raises(NumericalError, match="Row 11 .*file is damaged"):
        use(copy)


def test_rows_without_the_checkpoints_record_are_not_given_to_other_weights(copy):
    (copy / "0" / "checkpoint.json").unlink()
    with pytest.raises(StoreCorruptedError, match=r"checkpoint\.json is gone"):
        tracker(copy).load_checkpoint(weights(1), model_id=0)


def test_rows_without_metadata_are_not_given_to_other_settings(copy):
    (copy / "metadata.json").unlink()
    with pytest.raises(StoreCorruptedError, match=r"metadata\.json is gone"):
        tracker(copy, projector_seed=7)
    assert not (copy / "metadata.json").exists()


def renamed():
    model = net()
    return nn.Sequential(model[0], nn.Identity(), nn.Tanh(), model[2])


CHANGES = {
    "no layout": (
        {"projector": BasicProjector(51, 12, 0, "rademacher", "cpu")},
        "projection.by_name",
    ),
    "no projection": ({"projector": NoOpProjector()}, r"projection\.(class|kind)"),
    "names": ({"model": renamed()}, r"architecture\.3\.weight"),
    "temperature": (
        {"task": ImageClassificationModelOutput(temperature=2.0)},
        r"task\.loss_temperature: the store has 1\.0, this run 2\.0",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_further_settings_are_compared_when_a_store_is_opened(change, tmp_path):
    options, message = CHANGES[change]
    tracker(tmp_path)
    with pytest.raises(StoreMismatchError, match=message) as caught:
        tracker(tmp_path, **options)
    assert "Use another save_dir" in str(caught.value)
    assert "fingerprint" not in str(caught.value)  # which differs with every setting
    tracker(tmp_path, grad_wrt=[name for name, _ in net().named_parameters()])


@pytest.mark.parametrize(("key", "value"), [("format", 99), ("fingerprint", "0" * 32)])
def test_stores_of_other_versions_are_refused(key, value, tmp_path):
    tracker(tmp_path)
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(StoreMismatchError, match=f"{key}: the store has"):
        tracker(tmp_path)


@pytest.mark.parametrize("change", ["one weight", "buffer"])
def test_the_smallest_change_of_weights_is_noticed(change, tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    traker = tracker(tmp_path, model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    traker.load_checkpoint(state, model_id=0)
    other = {name: value.clone() for name, value in state.items()}
    if change == "buffer":
        other["1.running_var"][1] += 1e-9
    else:
        other["0.weight"][1, 2] += 1e-12
    with pytest.raises(StoreMismatchError, match="model_id=0"):
        traker.load_checkpoint(other, model_id=0)


@pytest.mark.parametrize("changed", ["inputs", "labels"])
def test_a_pass_resumed_with_other_data_is_refused(changed, tmp_path):
    train, _ = data()
    first = tracker(tmp_path)
    first.load_checkpoint(weights(), 0)
    first.featurize(take(train, slice(10)), num_samples=10)
    inputs, labels = train[0].clone(), train[1].clone()
    if changed == "inputs":
        inputs[8] += 1e-9
    else:
        labels[8] = (labels[8] + 1) % 3
    second = tracker(tmp_path)
    second.load_checkpoint(weights(), 0)
    with pytest.raises(StoreMismatchError, match=r"training example in row 8 .*model_id=0"):
        second.featurize((inputs, labels), num_samples=N)
    assert second.checkpoints()[0].num_featurized == 10


def test_a_second_pass_computes_nothing(tmp_path, monkeypatch):
    train, targets = data()
    first = whole_run(tracker(tmp_path), train, targets, [weights()])
    again = tracker(tmp_path)
    monkeypatch.setattr(type(again.gradient_computer), "run", None)
    np.testing.assert_array_equal(whole_run(again, train, targets, [weights()]), first)


def test_a_checkpoint_that_another_traker_added_is_not_left_out(tmp_path):
    """`finalize_scores` averages over all checkpoints of the store."""
    train, targets = data()
    one = tracker(tmp_path)
    whole_run(one, train, targets, [weights(0)])
    other = tracker(tmp_path)
    featurize(other, train, weights(1), model_id=1)
    runs.score(other, targets, weights(1), model_id=1)
    found = one.finalize_scores("exp")
    assert [c.model_id for c in one.checkpoints()] == [0, 1]
    assert_scores(found, oracle(one, train, targets, [weights(0), weights(1)]))


@pytest.mark.parametrize("load", [True, False])
def test_an_experiment_that_another_traker_began_can_be_finalized(load, tmp_path):
    train, targets = data()
    one = tracker(tmp_path, load_from_save_dir=load)
    featurize(one, train, weights())
    runs.score(tracker(tmp_path), targets, weights(), exp_name="B")
    assert_scores(one.finalize_scores("B"), oracle(one, train, targets))
    with pytest.raises(PhaseError, match="no experiment 'C'"):
        one.finalize_scores("C")


def test_a_first_traker_sees_what_a_second_finalized(tmp_path):
    train, targets = data()
    one = tracker(tmp_path)
    runs.featurize(one, train, weights())
    tracker(tmp_path).finalize_features()
    runs.score(one, targets, weights())
    assert_scores(one.finalize_scores("exp"), oracle(one, train, targets))
