"""The one call, against the steps that it stands for."""

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from tests import runs
from tests.runs import one_call as call
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

import trak
from trak import TRAKer
from trak.errors import (
    InputError,
    InputTypeError,
    NumericalError,
    StoreCorruptedError,
    StoreMismatchError,
)
from trak.loaders import some_of, spread
from trak.pipeline.project import RowMaker
from trak.preparation import EXACT_UP_TO
from trak.projectors import FactoredProjector, NoOpProjector
from trak.projectors.dimension import chosen_dimension, exact_cost
from trak.savers import MmapSaver

N, M = 60, 6
TASK = "image_classification"


def test_it_is_the_steps_of_traker(world, tmp_path):
    model, train, targets, states = world
    found = call(world, tmp_path / "a", whitening=0.5)
    traker = TRAKer(
        model,
        TASK,
        N,
        tmp_path / "b",
        projector=NoOpProjector(),
        row_dtype="float32",
        whitening=0.5,
        curvature=True,
        loss_power="auto",
    )
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id=model_id)
        for batch in runs.split(train, 9):
            traker.fit_whitening(batch=batch)
        for batch in runs.split(train, 9):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    np.testing.assert_array_equal(found, runs.whole_run(traker, train, targets, states))
    assert found.shape == (N, M)


def test_loaders_lists_and_functions_give_the_same(world, tmp_path):
    model, train, targets, states = world
    loaders = {
        "train": DataLoader(TensorDataset(*train), batch_size=9),
        "targets": DataLoader(TensorDataset(*targets), batch_size=4),
        "checkpoints": [lambda state=state: state for state in states],
    }
    np.testing.assert_array_equal(
        call(world, tmp_path / "a"), call(world, tmp_path / "b", **loaders)
    )


def test_the_model_is_left_as_it_was(world, tmp_path):
    model, train, _, states = world
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    call(world, tmp_path / "a")
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(InputError):
        call(world, tmp_path / "b", targets=[(train[0][:2] * torch.nan, train[1][:1])])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_model_itself_is_the_default_and_may_be_among_the_checkpoints(world, tmp_path):
    model, _, _, states = world
    alone = call(world, tmp_path / "a", checkpoints=None)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    np.testing.assert_array_equal(alone, call(world, tmp_path / "b", checkpoints=[own]))
    both = call(world, tmp_path / "c", checkpoints=[states[0], model])
    np.testing.assert_array_equal(
        both, call(world, tmp_path / "d", checkpoints=[states[0], own])
    )


def test_rows_of_double_precision_are_to_be_asked_for(tmp_path):
    model, train, targets = runs.data("mlp", 20, 3, torch.float64)
    world = model, train, targets, [model.state_dict()]
    asked = ({}, {"row_dtype": "float64"}, {"use_half_precision": False})
    found = []
    for number, options in enumerate(asked):
        scores = call(world, tmp_path / str(number), whitening=0.5, **options)
        rows = np.load(tmp_path / str(number) / "0" / "grads.mmap", mmap_mode="r")
        found.append((rows.dtype.name, scores.dtype.name))
    assert found == [("float32",) * 2, ("float64",) * 2, ("float64",) * 2]


def test_it_goes_on_and_adds_targets(learned, tmp_path, monkeypatch):
    whole = call(learned, tmp_path / "a")
    real, calls = TRAKer.featurize, []

    def breaks(self, batch, **options):
        calls.append(len(batch[0]))
        if len(calls) == 9:
            raise KeyboardInterrupt
        real(self, batch, **options)

    monkeypatch.setattr(TRAKer, "featurize", breaks)
    with pytest.raises(KeyboardInterrupt):
        call(learned, tmp_path / "b")
    metadata = json.loads((tmp_path / "b" / "metadata.json").read_text())
    monkeypatch.setattr("trak.preparation.choose_strength", None)  # must not be asked
    np.testing.assert_array_equal(whole, call(learned, tmp_path / "b"))
    monkeypatch.setattr(TRAKer, "featurize", real)
    making = RowMaker.making

    def targets_only(self, *arguments, training):
        assert not training  # rows are there already
        return making(self, *arguments, training=training)

    monkeypatch.setattr(RowMaker, "making", targets_only)
    few = [tuple(p[:3] for p in learned[2])]
    more = call(learned, tmp_path / "b", targets=few, exp_name="few")
    np.testing.assert_allclose(more, whole[:, :3], rtol=1e-5)
    assert metadata["whitening"]["strength"] > 0


def test_progress_is_shown_and_can_be_turned_off(world, tmp_path, capsys):
    call(world, tmp_path / "a")
    assert not capsys.readouterr().err
    call(world, tmp_path / "b", progress=True, whitening=0.5)
    shown = capsys.readouterr().err
    for what in ("whitening", "training examples", "targets"):
        assert f"checkpoint 3 of 3, {what}" in shown
    assert "60/60" in shown


class Backwards(SequentialSampler):
    def __iter__(self):
        return reversed(range(len(self.data_source)))


class Mixed(BatchSampler):
    """Batches of a bucket sampler."""

    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


def test_samplers_of_other_kinds_that_go_through_in_order_will_do(world, tmp_path):
    _, train, *_ = world
    dataset = TensorDataset(*train)
    sampler = [list(range(start, start + 20)) for start in (0, 20, 40)]
    found = call(world, tmp_path / "a", train=DataLoader(dataset, batch_sampler=sampler))
    np.testing.assert_allclose(found, call(world, tmp_path / "b"), rtol=1e-5)


@pytest.mark.parametrize("live", ["function", "parts", "dict", "itself"])
def test_a_checkpoint_may_share_the_models_memory(live, world, tmp_path):
    model, _, _, states = world
    expected = call(world, tmp_path / "a", checkpoints=[*states[1:], states[0]])
    model.load_state_dict(states[0])
    shared = {
        "function": model.state_dict,
        "parts": nn.Sequential(*model),
        "dict": model.state_dict(),
        "itself": model,
    }
    found = call(world, tmp_path / "b", checkpoints=[*states[1:], shared[live]])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_has_no_fixed_order_is_refused(world, tmp_path):
    _, train, targets, _ = world
    dataset = TensorDataset(*train)
    for loader in (
        DataLoader(dataset, batch_size=9, shuffle=True),
        DataLoader(dataset, batch_size=9, drop_last=True),
        DataLoader(dataset, batch_size=None),
        DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 9, False)),
        DataLoader(dataset, batch_sampler=[[1, 0], [2, 3]]),
        DataLoader(dataset, batch_size=9, sampler=Backwards(dataset)),
        DataLoader(dataset, batch_sampler=Mixed(SequentialSampler(dataset), 9, False)),
    ):
        with pytest.raises(InputError, match="same order"):
            call(world, tmp_path, train=loader)
    with pytest.raises(InputError, match="only once"):
        call(world, tmp_path, targets=iter([targets]))
    with pytest.raises(InputTypeError, match="must be a DataLoader"):
        call(world, tmp_path, train=3)
    with pytest.raises(InputError, match="Nothing to attribute"):
        call(world, tmp_path, targets=[])
    with pytest.raises(InputTypeError, match="state dicts"):
        call(world, tmp_path, checkpoints=["model.pt"])
    with pytest.raises(InputError, match="whitening must be"):
        call(world, tmp_path, whitening="much")


def test_dimensions_that_are_chosen(tmp_path):
    assert chosen_dimension("auto", 50_000, 10**8, 2) == 4096
    assert chosen_dimension("auto", 2_000_000, 10**8, 2) == 2048
    assert chosen_dimension("auto", 10**9, 10**8, 2) == 512
    assert chosen_dimension("auto", 1500, 10**6, 2) == 32_768
    assert chosen_dimension("auto", 1500, 30_000, 2) is None
    assert chosen_dimension("auto", 4000, 10**6, 2) == 16_384
    assert chosen_dimension("auto", 100, 4000, 2) is None
    assert chosen_dimension("exact", 100, 10**9, 2) is None
    assert chosen_dimension(7, 100, 10**9, 2) == 7
    with pytest.raises(InputError, match="proj_dim must be"):
        chosen_dimension("large", 1, 1, 1)
    assert exact_cost(100, 1000, 4) == (400_000, 1e7)
    model, _, _ = runs.data("mlp", N, M)
    options = {"save_dir": tmp_path / "a", "train_set_size": N, "task": TASK}
    assert isinstance(TRAKer(model, **options).projector, NoOpProjector)
    with pytest.raises(InputError, match="means no projection"):
        TRAKer(model, proj_dim="exact", projector="sparse", **options)
    with pytest.raises(InputError, match="do not fit"):
        TRAKer(
            torch.nn.Linear(500, 500),
            TASK,
            10**9,
            tmp_path / "b",
            proj_dim="exact",
        )
    named = TRAKer(model, TASK, N, tmp_path / "c", projector="factored")
    assert isinstance(named.projector, FactoredProjector)
    assert named.proj_dim == named.num_params_for_grad
    assert EXACT_UP_TO < 1 << 30


def test_state_dicts_of_the_model_itself_are_taken_as_they_were(world, tmp_path):
    model, _, _, states = world
    own = {name: value.clone() for name, value in model.state_dict().items()}
    expected = call(world, tmp_path / "a", checkpoints=[states[1], own], whitening=0.4)
    live = [states[1], model.state_dict()]  # loading the first overwrites the second
    found = call(world, tmp_path / "b", checkpoints=live, whitening=0.4)
    np.testing.assert_array_equal(found, expected)


def test_the_same_weights_twice_are_noticed(world, tmp_path, caplog):
    model, train, _, states = world
    traker = TRAKer(model, TASK, N, tmp_path)
    traker.load_checkpoint(states[0], model_id=0)
    live = model.state_dict()
    traker.load_checkpoint(states[1], model_id=1)
    assert "counts twice" not in caplog.text
    traker.load_checkpoint(live, model_id=2)
    assert "model_id=2 has the same weights as model_id=1" in caplog.text


def test_examples_whose_gradients_are_not_finite_are_named(world, tmp_path):
    model, train, _, states = world
    broken = {name: value.clone() for name, value in states[0].items()}
    next(iter(broken.values())).view(-1)[0] = torch.nan
    with pytest.raises(NumericalError, match="sample 0 is not finite"):
        trak.attribute(
            model,
            task=TASK,
            train=runs.split(train, 9),
            targets=runs.split(train, 9),
            checkpoints=[states[1], broken],
            save_dir=tmp_path,
            progress=False,
        )


def changed(train, what):
    x, y = (part.clone() for part in train)
    if what == "order":
        return x.flip(0), y.flip(0)
    if what == "one example":
        x[41] += 1
    else:
        y[0] = (y[0] + 1) % 2
    return x, y


@pytest.mark.parametrize("what", ["order", "one example", "one label"])
def test_other_training_data_in_the_folder_is_refused(what, world, tmp_path):
    model, train, targets, states = world
    call(world, tmp_path)
    other = model, changed(train, what), targets, states
    for exp_name in ("targets", "others"):
        with pytest.raises(StoreMismatchError, match="training example"):
            call(other, tmp_path, exp_name=exp_name)


def test_a_call_averages_over_its_own_checkpoints(world, tmp_path):
    states = world[-1]
    options = {"whitening": 0.5, "lambda_reg": "2x"}
    call(world, tmp_path / "all", **options)
    alone = call(world, tmp_path / "one", checkpoints=states[:1], **options)
    found = call(world, tmp_path / "all", checkpoints=states[:1], **options)
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-8)
    found = call(world, tmp_path / "all", **options, exp_name="again")
    assert not np.allclose(found, alone, rtol=1e-2)
    few = call(world, tmp_path / "all", checkpoints=states[:1], **options, exp_name="new")
    np.testing.assert_allclose(few, alone, rtol=1e-5, atol=1e-8)


def test_no_checkpoint_is_not_the_model_as_it_is(world, tmp_path):
    model, *_, states = world
    with pytest.raises(InputError, match="checkpoints is empty"):
        call(world, tmp_path, checkpoints=[])
    for one in (states[0], {}, model, "model.pt", 3):
        with pytest.raises(InputTypeError, match="checkpoints must be a list"):
            call(world, tmp_path, checkpoints=one)
    assert call(world, tmp_path, checkpoints=(s for s in states[:1])).shape == (N, M)


def test_what_is_no_model_or_no_folder(world, tmp_path):
    _, *rest = world
    with pytest.raises(InputTypeError, match=r"must be a torch\.nn\.Module, got str"):
        call(("a model", *rest), tmp_path)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be a folder"):
            call(world, folder)
        with pytest.raises(InputError, match="cannot be a folder"):
            TRAKer(world[0], TASK, N, folder)
    with pytest.raises(InputTypeError, match="save_dir must be the path"):
        call(world, None)


def test_a_model_that_takes_no_weights_is_told_before_any_are_put_back(world, tmp_path):
    with torch.inference_mode():
        frozen = nn.Linear(6, 3).double()
    for model, word in ((frozen, "inference_mode"), (nn.LazyLinear(3), "has no shape yet")):
        with pytest.raises(InputError, match=word):
            call((model, *world[1:]), tmp_path, checkpoints=None)


@pytest.mark.parametrize("content", ["", "[]", "3", '{"format": 1'])
def test_a_damaged_description_of_the_store(content, world, tmp_path):
    (tmp_path / "metadata.json").write_text(content)
    for whitening in ("auto", 0.0):
        with pytest.raises(StoreCorruptedError, match=r"metadata\.json"):
            call(world, tmp_path, whitening=whitening)


def test_parameters_are_named_by_a_generator(world, tmp_path):
    names = [name for name, _ in world[0].named_parameters()][:2]
    listed = call(world, tmp_path / "a", grad_wrt=names)
    found = call(world, tmp_path / "b", grad_wrt=(name for name in names))
    np.testing.assert_array_equal(found, listed)


def test_models_whose_state_is_not_tensors_alone(world, tmp_path):
    class Extra(torch.nn.Sequential):
        extra: ClassVar = {"epoch": 3}

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = dict(state)

    model = Extra(world[0]).double()
    found = call((model, *world[1:]), tmp_path / "a", checkpoints=None)
    expected = call(world, tmp_path / "b", checkpoints=None)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    assert model.extra == {"epoch": 3}


class Versioned(nn.Linear):
    """State dicts without a version are of a time when weights were kept halved."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        if metadata.get("version", 1) < 2:
            state[prefix + "weight"] = 2 * state[prefix + "weight"]
        super()._load_from_state_dict(state, prefix, metadata, *others)


@pytest.mark.parametrize("form", ["model", "state", "function", "live"])
def test_versions_in_state_dicts_reach_the_modules_that_ask_for_them(form, world, tmp_path):
    torch.manual_seed(0)
    model, other = (nn.Sequential(Versioned(6, 3)).double() for _ in range(2))
    weight = model[0].weight.detach().clone()
    forms = {
        "model": other,
        "state": other.state_dict(),
        "function": other.state_dict,
        "live": model.state_dict(),
    }
    plain = nn.Sequential(nn.Linear(6, 3)).double()
    plain.load_state_dict((model if form == "live" else other).state_dict())
    found = call((model, *world[1:]), tmp_path / "a", checkpoints=[forms[form]])
    expected = call((plain, *world[1:]), tmp_path / "b", checkpoints=[plain])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert torch.equal(model[0].weight, weight)


def test_batches_are_spread_over_the_examples(world):
    train = world[1]
    even = runs.split(train, 6)
    assert spread(even, N, 30) == {0, 2, 4, 6, 8}
    assert spread(DataLoader(TensorDataset(*train), batch_size=6), N, 30) == spread(
        even, N, 30
    )
    uneven = [tuple(p[:2] for p in train), tuple(p[2:] for p in train)]
    assert spread(uneven, N, 30) == {1}
    assert spread(uneven, N, N) == {0, 1}
    ragged = [tuple(p[a:b] for p in train) for a, b in ((0, 1), (1, 2), (2, 50), (50, N))]
    assert spread(ragged, N, 30) == {0, 2}


def test_some_batches_are_taken_and_no_further_ones_loaded(world):
    even, taken = runs.split(world[1], 6), []

    class Watched(list):
        def __iter__(self):
            for batch in super().__iter__():
                taken.append(batch)
                yield batch

    found = list(some_of(Watched(even), N, 30))
    assert [batch[0] is even[j][0] for batch, j in zip(found, (0, 2, 4, 6, 8), strict=True)]
    assert len(taken) == 10 + 9  # for their sizes, and up to the last that is wanted


def test_the_trial_needs_no_room_for_exact_rows(world, tmp_path, monkeypatch):
    monkeypatch.setattr("trak.preparation.choose_strength", lambda *a, **o: 0.5)
    asked = []
    real = TRAKer.__init__

    def made(self, *arguments, **options):
        asked.append((options["save_dir"], options["proj_dim"]))
        real(self, *arguments, **options)

    monkeypatch.setattr(TRAKer, "__init__", made)
    call(world, tmp_path, proj_dim="exact")
    assert [dim for _, dim in asked] == ["auto", "exact"]
    assert asked[1][0] == tmp_path


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(60))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda train: DataLoader(Stream()), InputError, "map-style dataset"),
        (lambda train: train, InputTypeError, r"train=\[batch\]"),
        (lambda train: train[0], InputTypeError, r"train=\[batch\]"),
    ],
)
def test_what_is_no_list_of_batches(wrong, error, message, world, tmp_path):
    with pytest.raises(error, match=message):
        call(world, tmp_path, train=wrong(world[1]))
    batches = runs.split(world[1], 9)
    np.testing.assert_array_equal(
        call(world, tmp_path / "a", train=tuple(batches)), call(world, tmp_path / "b")
    )


@pytest.mark.parametrize("number", [0, 1])
def test_a_checkpoint_that_does_not_fit_is_an_input_error(number, world, tmp_path):
    states = [dict(state) for state in world[3]]
    name = next(iter(states[number]))
    states[number][name] = torch.zeros(1, 2, 3)
    with pytest.raises(InputError, match="does not fit the model"):
        call(world, tmp_path, checkpoints=states)


def test_scores_do_not_depend_on_what_else_was_asked_for(world, tmp_path):
    *_, states = world
    few = call(world, tmp_path / "a", checkpoints=states[:2], whitening=0.4)
    call(world, tmp_path / "a", whitening=0.4)
    again = call(world, tmp_path / "a", checkpoints=states[:2], whitening=0.4)
    np.testing.assert_array_equal(again, few)


@pytest.mark.parametrize("saved", [0, 1, 2])
def test_a_call_that_was_cut_off_while_finalizing_goes_on(
    saved, world, tmp_path, monkeypatch
):
    whole = call(world, tmp_path / "a", whitening=0.4)
    save, calls = MmapSaver.save_factor, []

    def cut_off(self, *given):
        if len(calls) == saved:
            raise KeyboardInterrupt
        calls.append(given[0])
        save(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(MmapSaver, "save_factor", cut_off)
        with pytest.raises(KeyboardInterrupt):
            call(world, tmp_path / "b", whitening=0.4)
    np.testing.assert_array_equal(call(world, tmp_path / "b", whitening=0.4), whole)
