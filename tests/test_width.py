"""Coordinates that hardly vary, and that the one call leaves out of many long rows."""

import json

import numpy as np
import pytest
from tests import cases, runs
from tests.runs import one_call as call

import trak
from trak import preparation, strength, width
from trak.gradient_computers import FunctionalGradientComputer
from trak.pipeline import Whitener
from trak.projectors import NoOpProjector
from trak.projectors.leading import coordinates_holding
from trak.whitening import Moments

N, M = 60, 6
TASK = "image_classification"


@pytest.fixture
def world():
    model, train, targets = runs.data("mlp", N, M)
    return model, train, targets, cases.checkpoints("mlp", 2)


def keep(monkeypatch, **parts):
    for name in ("ONE", "SEVERAL"):
        monkeypatch.setattr(width, name, getattr(width, name)._replace(**parts))


@pytest.fixture
def narrow(monkeypatch):
    """Any rows are many, and columns are counted one by one."""
    monkeypatch.setattr(preparation, "WHOLE", 0)
    monkeypatch.setattr(width, "_STEP", 1)


def projection(folder):
    return json.loads((folder / "metadata.json").read_text())["projection"]


def near(found, expected):
    return np.mean([
        np.corrcoef(a, b)[0, 1] for a, b in zip(found.T, expected.T, strict=True)
    ])


def fitted(world, folder, strength=0.5):
    model, train, _, states = world
    traker = runs.make_traker(
        model, N, folder, whitening=strength, projector=NoOpProjector()
    )
    traker.load_checkpoint(states[0], model_id=0)
    for batch in runs.split(train, 9):
        traker.fit_whitening(batch=batch)
    return traker.pipeline.whitener


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_the_smallest_number_that_holds_the_share(world, tmp_path, share):
    whitener = fitted(world, tmp_path)
    made = whitener.made(whitener.sums[0], 0.5, in_bases=True)
    every = []
    for name, shape in whitener.shapes.items():
        if name in made.bases:  # the product of both sides' variances
            left, right = (side.variances().double().numpy() for side in made.bases[name])
            every += [a * b for a in left for b in right]
        else:
            entries = made.entries[name]
            every += (entries.values.double() * entries.powers.double() ** 2).tolist()
        assert len(every) >= np.prod(shape)
    every = np.sort(every)[::-1]
    found = coordinates_holding(made, whitener.shapes, share)
    assert every[:found].sum() >= share * every.sum() > every[: found - 1].sum()


def test_what_was_never_seen_asks_for_none(world, tmp_path):
    whitener = fitted(world, tmp_path)
    made = whitener.made(whitener.sums[0], 0.5, in_bases=True)
    assert coordinates_holding(made, ["another parameter"], 0.9) == 0


def test_scores_are_nearly_those_of_all_coordinates(world, tmp_path, narrow):
    found = call(world, tmp_path / "a", whitening=0.5)
    made = projection(tmp_path / "a")
    every = sum(p.numel() for p in world[0].parameters())
    assert made["kind"] == "leading"
    assert 0 < made["proj_dim"] <= width._WORTH * every
    expected = call(world, tmp_path / "b", whitening=0.5, projector=NoOpProjector())
    assert projection(tmp_path / "b")["kind"] == "na"
    assert near(found, expected) > 0.98
    assert np.abs(found - expected).max() > 0


def test_rows_are_as_wide_as_the_share_asks_for(world, tmp_path, narrow, monkeypatch):
    widths = []
    for number, share in enumerate((0.5, 0.8, 0.95, 1 - 1e-12)):
        keep(monkeypatch, usual=share, many=1e9)
        folder = tmp_path / str(number)
        call(world, folder, whitening=0.5)
        whitener = fitted(world, tmp_path / f"{number}-again")
        made = whitener.made(whitener.sums[0], 0.5, in_bases=True)
        widths.append(coordinates_holding(made, whitener.shapes, share))
        every = sum(p.numel() for p in world[0].parameters())
        few = widths[-1] <= width._WORTH * every
        assert projection(folder)["proj_dim"] == (widths[-1] if few else every)
    assert widths == sorted(set(widths))
    assert projection(folder)["kind"] == "na"  # nearly all are all


@pytest.mark.parametrize(("checkpoints", "share"), [(1, width.ONE), (2, width.SEVERAL)])
@pytest.mark.parametrize("kept", ["least", "many", "usual"])
def test_of_many_columns_fewer_are_kept(
    world, tmp_path, narrow, monkeypatch, checkpoints, share, kept
):
    whitener = fitted(world, tmp_path / "fit")
    made = whitener.made(whitener.sums[0], 0.5, in_bases=True)
    usual, least = (
        coordinates_holding(made, whitener.shapes, s) for s in (share.usual, share.least)
    )
    middle = (usual + least) // 2
    assert least < middle < usual < share.many * N
    many = {"least": least - 1, "many": middle - 0.5, "usual": usual + 0.5}[kept] / N
    keep(monkeypatch, many=many)
    monkeypatch.setattr(width, "_WORTH", 1.0)
    call((*world[:3], world[3][:checkpoints]), tmp_path / "a", whitening=0.5)
    widths = {"least": least, "many": middle, "usual": usual}
    assert projection(tmp_path / "a")["proj_dim"] == widths[kept]


def test_several_checkpoints_need_fewer_columns(world, tmp_path, narrow):
    widths = []
    for checkpoints in (1, 2):
        folder = tmp_path / str(checkpoints)
        call((*world[:3], world[3][:checkpoints]), folder, whitening=0.5)
        widths.append(projection(folder)["proj_dim"])
    assert widths[1] < widths[0]


def test_the_width_is_that_of_the_first_call(world, tmp_path, narrow, monkeypatch):
    first = call(world, tmp_path, whitening=0.5)
    made = projection(tmp_path)
    keep(monkeypatch, usual=0.5)
    again = call(world, tmp_path, whitening=0.5, exp_name="again")
    np.testing.assert_array_equal(first, again)
    assert projection(tmp_path) == made


def test_a_store_that_keeps_all_goes_on_to(world, tmp_path, monkeypatch):
    first = call(world, tmp_path, whitening=0.5)
    monkeypatch.setattr(preparation, "WHOLE", 0)
    again = call(world, tmp_path, whitening=0.5, exp_name="again")
    np.testing.assert_array_equal(first, again)
    assert projection(tmp_path)["kind"] == "na"


@pytest.mark.parametrize(
    "options",
    [
        {"whitening": 0},
        {"whitening": None},
        {"projector": NoOpProjector()},
        {"proj_dim": "exact"},
        {"gradient_computer": FunctionalGradientComputer},
    ],
    ids=["0", "None", "projector", "exact", "functional"],
)
def test_all_are_kept_where_that_is_asked_for(world, tmp_path, narrow, options):
    call(world, tmp_path, **{"whitening": 0.5, **options})
    assert projection(tmp_path)["kind"] == "na"


def test_few_numbers_are_kept_as_they_are(world, tmp_path, monkeypatch):
    every = N * sum(p.numel() for p in world[0].parameters())
    for number, (most, kind) in enumerate(((every, "na"), (every - 1, "leading"))):
        monkeypatch.setattr(preparation, "WHOLE", most)
        monkeypatch.setattr(width, "_STEP", 1)
        call(world, tmp_path / str(number), whitening=0.5)
        assert projection(tmp_path / str(number))["kind"] == kind


def test_the_first_checkpoint_is_fitted_once(world, tmp_path, narrow, monkeypatch):
    counts = []
    merge = Moments.merge

    def counted(self, other):
        counts.append(other.count)
        merge(self, other)

    monkeypatch.setattr(Moments, "merge", counted)
    call((*world[:3], world[3][:1]), tmp_path / "a", whitening=0.5)
    once = sum(counts)
    counts.clear()
    call(
        (*world[:3], world[3][:1]), tmp_path / "b", whitening=0.5, projector=NoOpProjector()
    )
    assert once == sum(counts)


def test_a_checkpoint_is_decomposed_once(world, tmp_path, narrow, monkeypatch):
    made, real = [], Whitener.made

    def counted(self, *args, **options):
        made.append(args)
        return real(self, *args, **options)

    monkeypatch.setattr(Whitener, "made", counted)
    call(world, tmp_path, whitening=0.5)
    assert len(made) == len(world[3])
    call(world, tmp_path, whitening=0.5, exp_name="again", targets=[world[1]])
    assert len(made) == len(world[3])


def test_what_told_the_strength_is_not_fitted_again(world, tmp_path, narrow, monkeypatch):
    monkeypatch.setattr(strength, "_is_useful", lambda *_: True)
    counts = []
    fit = Whitener.fit

    def counted(self, batch, model_id):
        counts.append(len(batch[0]))
        fit(self, batch, model_id)

    monkeypatch.setattr(Whitener, "fit", counted)
    call((*world[:3], world[3][:1]), tmp_path)
    assert projection(tmp_path)["kind"] == "leading"
    assert sum(counts) == N


def test_gradients_without_factors_are_kept(world, tmp_path, narrow, monkeypatch):
    keep(monkeypatch, usual=0.3)  # of which few hold so much
    call(world, tmp_path, whitening=0.5, gradient_computer=FunctionalGradientComputer)
    assert projection(tmp_path)["kind"] == "na"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "bfloat16"),
        ({"lambda_reg": None}, "bfloat16"),
        ({"lambda_reg": "1x"}, "float32"),
        ({"lambda_reg": 0.5}, "float32"),
        ({"row_dtype": "float16"}, "float16"),
        ({"use_half_precision": False}, "float64"),
        ({"use_half_precision": True}, "float16"),
    ],
)
@pytest.mark.parametrize("whole_fit", [True, False])
def test_many_narrow_rows_are_rounded_where_the_ridge_hides_it(
    world, tmp_path, narrow, monkeypatch, options, found, whole_fit
):
    if not whole_fit:
        numbers = N * sum(p.numel() for p in world[0].parameters())
        monkeypatch.setattr(preparation, "EXACT_UP_TO", 4 * numbers - 1)
    call(world, tmp_path, whitening=0.5, **options)
    known = json.loads((tmp_path / "metadata.json").read_text())
    assert known["projection"]["kind"] == "leading"
    assert known["precision"] == found


def test_few_narrow_rows_are_precise(world, tmp_path, monkeypatch):
    monkeypatch.setattr(width, "_STEP", 1)
    every = N * sum(p.numel() for p in world[0].parameters())
    monkeypatch.setattr(preparation, "WHOLE", every - 1)  # narrow ones are fewer
    call(world, tmp_path, whitening=0.5)
    assert projection(tmp_path)["kind"] == "leading"
    assert json.loads((tmp_path / "metadata.json").read_text())["precision"] == "float32"


def test_rows_are_rounded_as_the_first_call_did(world, tmp_path, narrow):
    call(world, tmp_path, whitening=0.5, lambda_reg="1x")
    call(world, tmp_path, whitening=0.5, exp_name="again")
    known = json.loads((tmp_path / "metadata.json").read_text())
    assert known["precision"] == "float32"


def test_scores_of_rounded_rows_are_those_of_precise_ones(world, tmp_path, narrow):
    found = call(world, tmp_path / "a", whitening=0.5)
    expected = call(world, tmp_path / "b", whitening=0.5, row_dtype="float32")
    assert near(found, expected) > 0.9999
    assert np.abs(found - expected).max() > 0


def test_strength_and_width_are_chosen_together(world, tmp_path, narrow, monkeypatch):
    # of models that nobody has trained whitening is of no use
    monkeypatch.setattr(strength, "_is_useful", lambda *_: True)
    found = trak.attribute(
        world[0],
        task=TASK,
        train=list(runs.split(world[1], 9)),
        targets=list(runs.split(world[2], 4)),
        checkpoints=world[3],
        save_dir=tmp_path,
        progress=False,
    )
    found_strength = json.loads((tmp_path / "metadata.json").read_text())["whitening"]
    assert found_strength["strength"] > 0
    assert projection(tmp_path)["kind"] == "leading"
    assert found.shape == (N, M)
