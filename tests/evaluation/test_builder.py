"""The builder: the same bank by one worker and many, resuming, failures, refusals."""

import contextlib
import dataclasses
import functools
import json
import logging
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tests.evaluation import recipes

from trak.errors import (
    BankBuildError,
    BankCorruptedError,
    BankMismatchError,
    InputError,
    InputTypeError,
)
from trak.evaluation import BankPlan, build_bank, lds, load_bank

PLAN = BankPlan(n=recipes.N, recipe={"ridge": 1}, subsets=5, seeds=2, data="d", mask_seed=3)


def build(folder, train=recipes.train, plan=PLAN, **options):
    return build_bank(folder, train, recipes.evaluate, plan, **options)


def expected_outputs(masks):
    outputs = np.zeros((5, 2, recipes.M + 2), np.float32)
    for subset in range(5):
        for repetition in range(2):
            seed = repetition * 5 + subset
            torch.manual_seed(seed)
            model = recipes.train(np.flatnonzero(masks[subset]), seed)
            outputs[subset, repetition] = recipes.evaluate(model)
            outputs[subset, repetition, -2] = 1  # thread
    return outputs


def test_the_bank_is_what_the_plan_says(tmp_path):
    before = torch.get_rng_state(), torch.get_num_threads()
    bank = build(tmp_path, name="toy", checkpoints=["0" * 32], examples=np.arange(1, 25))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    rng = np.random.default_rng(3)
    for mask in bank.masks:
        assert sorted(rng.permutation(24)[:12]) == np.flatnonzero(mask).tolist()
    np.testing.assert_array_equal(bank.outputs, expected_outputs(bank.masks))
    np.testing.assert_array_equal(bank.seeds, np.arange(10).reshape(2, 5).T)
    np.testing.assert_array_equal(bank.outputs[:, :, -1], bank.seeds)
    assert bank.name == "toy"
    assert bank.recipe == {"ridge": 1}
    assert bank.data == "d"
    assert bank.checkpoints == ("0" * 32,)
    assert bank.notes["mask_seed"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank.json", "truth.npz"]
    scores = np.random.default_rng(0).normal(size=(24, recipes.M))
    lds(scores, bank.masks, bank.outputs[:, :, : recipes.M], draws=5)


def test_workers_build_the_same_bank(tmp_path, capfd):
    calls = []
    one = build(tmp_path / "one")
    two = build(tmp_path / "two", workers=2, progress=lambda *done: calls.append(done))
    np.testing.assert_array_equal(one.outputs, two.outputs)
    np.testing.assert_array_equal(one.masks, two.masks)
    assert calls == [(j, 10) for j in range(11)]
    assert "training with seed 9" in capfd.readouterr().err


def test_workers_have_the_threads_they_were_given(tmp_path):
    bank = build(tmp_path, workers=2, threads=3, plan=dataclasses.replace(PLAN, seeds=1))
    assert (bank.outputs[:, :, -2] == 3).all()
    before = torch.get_num_threads()
    assert (
        build(tmp_path / "here", threads=before + 1).outputs[:, :, -2] == before + 1
    ).all()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_is_reported_and_loses_nothing(workers, tmp_path, monkeypatch):
    monkeypatch.setenv("BANK_MARKER", str(tmp_path / "marker"))
    with pytest.raises(BankBuildError) as caught:
        build(tmp_path / "bank", recipes.fail_once, workers=workers)
    text = str(caught.value)
    assert "subset 4, repetition 0, seed 4 failed" in text
    assert "ValueError: the loss is infinite" in text
    assert "fail_once" in text  # the traceback
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "bank/work").glob("*/*.npy")}
    assert 4 <= len(kept) < 9
    assert f"{len(kept)} of 10 models are kept" in text
    again = []
    bank = build(
        tmp_path / "bank",
        recipes.fail_once,
        workers=workers,
        progress=lambda *done: again.append(done),
    )
    assert again == [(j, 10) for j in range(len(kept), 11)]
    np.testing.assert_array_equal(bank.outputs, build(tmp_path / "whole").outputs)


def test_a_killed_worker_is_reported_and_the_build_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("BANK_MARKER", str(tmp_path / "marker"))
    with pytest.raises(BankBuildError, match=r"seed 4 failed.*\n\n.*exit code -9"):
        build(tmp_path / "bank", recipes.die_once, workers=2)
    (folder,) = (tmp_path / "bank/work").iterdir()
    before = {p: p.stat().st_ino for p in folder.glob("*.npy")}
    assert len(before) >= 4
    trained = []

    def train(indices, seed):
        trained.append(seed)
        return recipes.train(indices, seed)

    bank = build(tmp_path / "bank", train)
    assert len(trained) == 10 - len(before)
    np.testing.assert_array_equal(bank.outputs, build(tmp_path / "whole").outputs)


def test_a_finished_bank_is_read(tmp_path):
    def never(indices, seed):
        pytest.fail("nothing is to be trained")

    bank = build(tmp_path)
    again = build(tmp_path, never, workers=2)
    np.testing.assert_array_equal(again.outputs, bank.outputs)
    other = {"checkpoints": ["1" * 32], "examples": np.arange(24), "name": "toy"}
    for name, value in other.items():
        with pytest.raises(
            BankMismatchError, match=f"finished bank, '', .* other {name} th"
        ):
            build(tmp_path, never, **{name: value})
    with pytest.raises(BankMismatchError, match="checkpoints and examples and name than"):
        build(tmp_path, never, **other)


def test_a_finished_bank_has_its_name(tmp_path):
    build(tmp_path, name="toy")
    for name in ("", "toy"):
        assert build(tmp_path, name=name).name == "toy"
    with pytest.raises(BankMismatchError, match="finished bank, 'toy', .* other name than"):
        build(tmp_path, name="game")


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"ridge": 2}},
        {"data": "e"},
        {"mask_seed": 4},
        {"seeds": 3},
        {"subsets": 6},
        {"fraction": 0.25},
    ],
)
def test_another_plan_is_another_bank(change, tmp_path):
    other = dataclasses.replace(PLAN, **change)
    build(tmp_path / "done")
    with pytest.raises(BankMismatchError, match="finished bank of another plan"):
        build(tmp_path / "done", plan=other)
    # an unfinished one of another plan is left alone
    stopped = []

    def stop(indices, seed):
        stopped.append(seed)
        if len(stopped) == 3:
            raise KeyboardInterrupt
        return recipes.train(indices, seed)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "bank", stop)
    (unfinished,) = (tmp_path / "bank/work").iterdir()
    bank = build(tmp_path / "bank", plan=other)
    assert len(list(unfinished.glob("*.npy"))) == 2
    np.testing.assert_array_equal(
        bank.outputs, build(tmp_path / "alone", plan=other).outputs
    )


def test_a_damaged_file_of_a_build_is_named(tmp_path):
    def stop(indices, seed):
        if seed == 3:
            raise KeyboardInterrupt
        return recipes.train(indices, seed)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, stop)
    (folder,) = (tmp_path / "work").iterdir()
    (folder / "1-0.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(BankCorruptedError, match="1-0.npy is damaged"):
        build(tmp_path)
    (folder / "1-0.npy").unlink()
    np.testing.assert_array_equal(build(tmp_path).outputs, build(tmp_path / "b").outputs)


def test_what_evaluate_returns_is_checked(tmp_path):
    def uneven(model):
        return recipes.evaluate(model)[: 3 + (model[1] == 7)]

    with pytest.raises(BankBuildError, match="evaluate returned 4 outputs, and 3 for"):
        build_bank(tmp_path, recipes.train, uneven, PLAN)
    with pytest.raises(BankBuildError, match="evaluate returned must be finite"):
        build_bank(tmp_path / "b", recipes.train, lambda _: [1.0, np.nan], PLAN)
    with pytest.raises(BankBuildError, match="kept in float32"):
        build_bank(tmp_path / "c", recipes.train, lambda _: [1.0, 1e300], PLAN)


@pytest.mark.parametrize("what", ["examples", "checkpoints"])
def test_a_build_does_not_go_on_with_other_data(what, tmp_path, monkeypatch):
    monkeypatch.setenv("BANK_MARKER", str(tmp_path / "marker"))
    given = {"examples": np.arange(1, 25), "checkpoints": ["0" * 32]}
    other = {"examples": np.arange(2, 26), "checkpoints": ["1" * 32]}
    with pytest.raises(BankBuildError, match="loss is infinite"):
        build(tmp_path / "bank", recipes.fail_once, **given)
    with pytest.raises(BankMismatchError, match=f"begun with other {what}"):
        build(tmp_path / "bank", **{**given, what: other[what]})
    assert build(tmp_path / "bank", **given).checkpoints == ("0" * 32,)


@pytest.mark.parametrize(
    "content", ["", "[]", "null", "{}", '{"examples": null}', "\x00", '"examples"', "3"]
)
def test_a_damaged_description_of_a_build_is_named(content, tmp_path):
    def stop(indices, seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, stop)
    (about,) = tmp_path.glob("work/*/about.json")
    about.write_text(content)
    with pytest.raises(BankCorruptedError, match=r"about\.json is damaged.*Delete its"):
        build(tmp_path)


def test_what_cannot_become_a_bank_is_refused_before_training(tmp_path):
    trained = []

    def train(indices, seed):
        trained.append(seed)

    for options in ({"name": 3}, {"plan": None}, {"checkpoints": 7}):
        with pytest.raises(InputTypeError):
            build(tmp_path, train, **options)
    (tmp_path / "checkpoints.safetensors").write_bytes(b"junk")
    with pytest.raises(BankCorruptedError):
        build(tmp_path, train)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be the folder of a bank"):
        build(tmp_path / "file", train)
    for recipe in (None, "Adam"):
        with pytest.raises(InputTypeError, match="recipe must be a dict"):
            BankPlan(n=9, recipe=recipe)
    with pytest.raises(InputError, match="recipe must hold JSON values"):
        BankPlan(n=9, recipe={"rate": float("nan")})
    with pytest.raises(InputTypeError, match="data must be a hash"):
        BankPlan(n=9, recipe={}, data=np.ones(3))
    assert not trained


def test_a_damaged_work_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("BANK_MARKER", str(tmp_path / "marker"))
    with pytest.raises(BankBuildError):
        build(tmp_path / "bank", recipes.fail_once)
    work = next((tmp_path / "bank" / "work").iterdir())
    np.save(work / "0-0.npy", np.full(7, np.nan, np.float32))
    with pytest.raises((BankCorruptedError, BankBuildError), match=r"0-0\.npy is damaged"):
        build(tmp_path / "bank")
    (work / "0-0.npy").write_bytes(recipes.damaged_array("no end"))
    with pytest.raises((BankCorruptedError, BankBuildError), match=r"0-0\.npy is damaged"):
        build(tmp_path / "bank")
    (work / "0-0.npy").unlink()
    build(tmp_path / "bank")


@pytest.mark.parametrize(("used", "expected"), [(True, [0, 1]), (False, [])])
def test_the_random_states_of_gpus_in_use_are_kept(used, expected, tmp_path, monkeypatch):
    """`torch.manual_seed` seeds them too."""
    kept = []

    @contextlib.contextmanager
    def fork(devices):
        kept.append(list(devices))
        yield

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "fork_rng", fork)
    monkeypatch.setattr(torch, "manual_seed", lambda _seed: None)
    build(tmp_path)
    assert kept == [expected] * 10


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_trained_after_progress_raises(workers, tmp_path):
    def stops(done, total):
        if done == 1:
            raise KeyboardInterrupt

    try:
        build(tmp_path, recipes.train_slowly, workers=workers, progress=stops)
    except KeyboardInterrupt as error:
        kept = error  # with its traceback, as notebooks keep it
    work = next((tmp_path / "work").iterdir())
    trained = len(list(work.glob("*.npy")))
    assert 1 <= trained <= 1 + 2 * workers
    time.sleep(1.5)
    assert len(list(work.glob("*.npy"))) == trained
    del kept


def test_training_may_read_its_input(tmp_path):
    one = build(tmp_path / "one")
    two = build(tmp_path / "two", recipes.read_input, workers=2)
    np.testing.assert_array_equal(
        one.outputs[..., : recipes.M], two.outputs[..., : recipes.M]
    )


@pytest.mark.parametrize(
    "train",
    [
        lambda indices, seed: None,
        functools.partial(recipes.train),
        recipes.np.random.default_rng(0).normal,
    ],
)
def test_workers_need_a_function_that_can_be_imported(train, tmp_path):
    with pytest.raises(InputError, match="train must be a function at the top level"):
        build(tmp_path, train, workers=2)


SCRIPT = """
import sys
import numpy as np
from trak.evaluation import BankPlan, build_bank

def train(indices, seed):
    return indices, seed

def evaluate(model):
    return [model[0].sum(), model[1]]

plan = BankPlan(n=9, recipe={{}}, subsets=3)
{guard}build_bank(sys.argv[1], train, evaluate, plan, workers=2)
"""


@pytest.mark.parametrize("guard", [True, False])
def test_functions_of_a_script(guard, tmp_path):
    (tmp_path / "script.py").write_text(
        SCRIPT.format(guard='if __name__ == "__main__": ' if guard else "")
    )
    run = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "bank")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100, check=False)
    if guard:
        assert done.returncode == 0, done.stderr
        bank = load_bank(tmp_path / "bank")
        sums = [np.flatnonzero(mask).sum() for mask in bank.masks]
        assert bank.outputs[:, 0, 0].tolist() == sums
    else:
        assert 'under `if __name__ == "__main__":`' in done.stderr
        assert "BankBuildError" in done.stderr


def test_progress_goes_to_the_log(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trak.evaluation"):
        build(tmp_path)
    assert [r.getMessage() for r in caplog.records] == [
        "0 of 10 models are trained.",
        "10 of 10 models are trained.",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subsets": 2}, "subsets must be an integer of at least 3"),
        ({"seeds": 0}, "seeds must be an integer of at least 1"),
        ({"n": 1}, "n must be an integer of at least 2"),
        ({"fraction": 1.0}, "is 24; a subset must hold some"),
        ({"fraction": 0.01}, "is 0; a subset must hold some"),
        ({"fraction": -1}, "fraction must be a finite number above 0"),
        ({"recipe": {"model": object()}}, "recipe must hold JSON values"),
    ],
)
def test_bad_plans_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PLAN, **change)


def test_bad_options_are_refused_before_anything_is_trained(tmp_path):
    def never(indices, seed):
        pytest.fail("too late")

    for options, message in (
        ({"workers": 0}, "workers must be"),
        ({"threads": 0}, "threads must be"),
        ({"examples": np.arange(23)}, r"examples must be integers of shape \(24,\)"),
        ({"checkpoints": ["x"]}, "32 hexadecimal digits"),
    ):
        with pytest.raises(InputError, match=message):
            build(tmp_path, never, **options)
    for given, message in (
        ((tmp_path, None, recipes.evaluate, PLAN), "train must be a function, called as"),
        ((tmp_path, never, "evaluate", PLAN), "evaluate must be a function, called as"),
        ((3, never, recipes.evaluate, PLAN), "folder must be a path, got 3"),
    ):
        with pytest.raises(InputTypeError, match=message):
            build_bank(*given, workers=2)
    with pytest.raises(InputTypeError, match=r"called as progress\(done, total\), got 3"):
        build(tmp_path, never, progress=3)
    assert not list(tmp_path.iterdir())


def test_the_unfinished_say_what_they_are(tmp_path):
    def stop(indices, seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, stop)
    (plan,) = tmp_path.glob("work/*/plan.json")
    assert BankPlan(**json.loads(plan.read_text())) == PLAN
    with pytest.raises(BankCorruptedError, match="build has not ended"):
        load_bank(tmp_path)


GUARDED = """
import sys
from trak.evaluation import BankPlan, build_bank

if __name__ == "__main__":
    def train(indices, seed):
        return indices

    def evaluate(model):
        return [model.sum()]

    plan = BankPlan(n=9, recipe={}, subsets=3)
    build_bank(sys.argv[1], train, evaluate, plan, workers=int(sys.argv[2]))
"""


def test_functions_under_the_guard_of_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(GUARDED)

    def run(workers):
        call = [sys.executable, str(script), str(tmp_path / "bank"), str(workers)]
        return subprocess.run(
            call, capture_output=True, text=True, timeout=100, check=False
        )

    failed = run(2).stderr
    assert "BankBuildError" in failed
    assert f"{script} does not define train where a worker imports it" in failed
    assert "move the function, and the data it needs, above that line" in failed
    assert run(1).returncode == 0
