"""Lost and damaged files, full disks, read-only stores and what killed processes leave."""

import builtins
import errno
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from tests import runs

import trak
from trak.errors import (
    StoreCorruptedError,
    StoreMismatchError,
    StoreNotWritableError,
    not_of_the_file,
)
from trak.modelout_functions import ImageClassificationModelOutput
from trak.savers import moments
from trak.savers.arrays import RowFile
from trak.savers.filesystem import replace_json
from trak.savers.gradient_files import GradientFiles
from trak.savers.leftovers import AGE
from trak.savers.wide_rows import WideRows

N, M = 24, 4


@pytest.fixture
def whole(tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    traker = runs.make_traker(model, N, tmp_path / "store")
    runs.whole_run(traker, train, targets, [model.state_dict()])
    scores = np.array(traker.scores("exp"))
    return tmp_path / "store", model, train, targets, scores


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def again(whole):
    _, model, train, targets, _ = whole
    traker = runs.make_traker(model, N, whole[0])
    return np.array(runs.whole_run(traker, train, targets, [model.state_dict()]))


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_rows_without_the_list_of_sums_are_refused_by_name(damage, tmp_path):
    model, train, _ = runs.data("mlp", N, M)

    def opened():
        traker = runs.make_traker(model, N, tmp_path, whitening=0.5)
        traker.load_checkpoint(model.state_dict(), 0)
        return traker

    traker = opened()
    traker.fit_whitening(train)
    traker.featurize(tuple(part[:9] for part in train), num_samples=9)
    damage(tmp_path / "0" / "whitening.json")
    traker = opened()
    rest = tuple(part[9:] for part in train)
    for step in (
        lambda: traker.whitening_is_fitted,
        lambda: traker.fit_whitening(rest),
        lambda: traker.featurize(rest, inds=range(9, N)),
    ):
        with pytest.raises(StoreCorruptedError, match=r"whitening\.json.*estore"):
            step()
    assert traker.saver.train_rows(0).refresh().sum() == 9


TARGETS = r"Remove it and .*0/exp_grads\.journal, and score"
REMEDIES = {
    "0/factor.npy": (truncate, ["0/factor.json"], r"Remove .*factor\.json and call"),
    "0/factor.json": (truncate, ["0/factor.json"], r"remove it and call finalize_features"),
    "0/exp_grads.mmap": (truncate, ["0/exp_grads.journal", "0/exp_grads.mmap"], TARGETS),
    "0/exp_examples.mmap": (
        truncate,
        ["0/exp_grads.journal", "0/exp_examples.mmap"],
        TARGETS,
    ),
    "0/exp_grads.journal": (
        lambda path: path.write_bytes(b"x\n" + path.read_bytes()),
        ["0/exp_grads.journal"],
        TARGETS,
    ),
    "experiments/exp.json": (
        truncate,
        ["experiments/exp.json"],
        "remove it, and start scoring",
    ),
    "scores/exp.mmap": (truncate, [], r"Call finalize_scores\(exp_name='exp'\) again"),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_what_a_message_says_mends_the_damage_and_keeps_the_rows(name, whole):
    store, model, *_, expected = whole
    damage, removed, message = REMEDIES[name]
    damage(store / name)
    with pytest.raises(StoreCorruptedError, match=f"(?s){re.escape(name)}.*{message}"):
        traker = runs.make_traker(model, N, store)
        traker.scores("exp")
        traker.start_scoring_checkpoint("exp", model.state_dict(), 0, M)
    for pattern in removed:
        for path in store.glob(pattern):
            path.unlink()
    before = (store / "0" / "grads.journal").read_bytes()
    np.testing.assert_allclose(again(whole), expected)
    assert (store / "0" / "grads.journal").read_bytes() == before


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_text("[]")])
@pytest.mark.parametrize("name", ["loss", "seen", "coverage"])
def test_what_is_told_of_gradients_is_told_again(name, damage, tmp_path):
    model, train, targets = runs.data("mlp", 48, M)
    states = [model.state_dict()]

    def make():
        return runs.make_traker(model, 48, tmp_path, lambda_reg="auto")

    expected = np.array(runs.whole_run(make(), train, targets, states))
    path = tmp_path / "0" / f"{name}.json"
    told = path.read_bytes()
    if name == "seen":  # which is read where nothing was decided yet
        (tmp_path / "0" / "loss.json").unlink()
    damage(path)
    (tmp_path / "0" / "factor.json").unlink()
    remedy = "for information" if name == "coverage" else "featurize again.*no gradient is"
    with pytest.raises(StoreCorruptedError, match=rf"{name}\.json.*emove it.*{remedy}"):
        traker = make()
        traker.load_checkpoint(states[0], 0)
        traker.saver.coverage(0)
        traker.finalize_features()
    path.unlink()
    before = (tmp_path / "0" / "grads.journal").read_bytes()
    np.testing.assert_array_equal(runs.whole_run(make(), train, targets, states), expected)
    assert (tmp_path / "0" / "grads.journal").read_bytes() == before
    if name == "loss":
        assert path.read_bytes() == told


def test_damaged_scores_of_a_further_ridge(whole):
    store, model, *_ = whole
    traker = runs.make_traker(model, N, store)
    traker.sweep(["exp"], lambda_regs=[0.5])
    truncate(store / "scores" / "ridge=0.5" / "exp.mmap")
    with pytest.raises(StoreCorruptedError, match=r"Call sweep\(\['exp'\]"):
        traker.saver.load_scores("exp", "0.5")


def test_rows_of_training_examples_are_made_again_as_before(whole):
    truncate(whole[0] / "0" / "grads.mmap")
    with pytest.raises(StoreCorruptedError, match="Remove its folder and featurize again"):
        runs.make_traker(whole[1], N, whole[0])


STEPS = {
    "featurize": lambda t, train, targets: t.featurize(train, inds=range(N)),
    "finalize": lambda t, train, targets: t.finalize_features(),
    "score": lambda t, train, targets: t.score(targets, inds=range(M)),
    "scores": lambda t, train, targets: t.finalize_scores("exp"),
    "top": lambda t, train, targets: t.top_scores("exp", k=2),
    "self-influence": lambda t, train, targets: t.self_influence(),
    "load": lambda t, train, targets: t.load_checkpoint(t.model.state_dict(), 1),
}
DONE = {"featurize": [], "finalize": ["featurize"]}


@pytest.mark.parametrize("step", STEPS)
def test_a_store_that_goes_away_is_told(step, tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    traker = runs.make_traker(model, N, tmp_path / "store")
    traker.load_checkpoint(model.state_dict(), 0)
    for done in DONE.get(step, ["featurize", "finalize"]):
        STEPS[done](traker, train, targets)
    if step not in {"featurize", "finalize", "load"}:
        traker.start_scoring_checkpoint("exp", model.state_dict(), 0, M)
        if step != "score":
            STEPS["score"](traker, train, targets)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(
        (StoreCorruptedError, StoreMismatchError), match="store.*is gone.*moved or removed"
    ):
        STEPS[step](traker, train, targets)
    (tmp_path / "elsewhere").rename(tmp_path / "store")
    STEPS[step](traker, train, targets)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("0/grads.mmap", "featurize"),
        ("0/out_to_loss.mmap", "featurize"),
        ("0/grads.journal", "featurize"),
        ("0/grads.mmap", "finalize"),
        ("0/out_to_loss.mmap", "finalize"),
        ("0/exp_grads.mmap", "scores"),
        ("0/grads.mmap", "top"),
        ("0/grads.mmap", "self-influence"),
    ],
)
def test_a_file_that_goes_away_is_named(name, step, whole, tmp_path):
    store, model, train, targets, _ = whole
    if step == "featurize":
        store = tmp_path / "other"
    traker = runs.make_traker(model, N, store, lambda_reg="2x")
    traker.load_checkpoint(model.state_dict(), 0)
    if step not in {"featurize", "finalize"}:
        traker.finalize_features()
    (store / name).rename(tmp_path / "away")
    message = rf"{re.escape(name)} is gone.*(repeat the call|Make a new TRAKer|Restore)"
    with pytest.raises(StoreCorruptedError, match=message):
        STEPS[step](traker, train, targets)
    (tmp_path / "away").rename(store / name)
    STEPS[step](traker, train, targets)


def test_files_of_others_are_not_taken_for_the_stores(whole):
    class Loading(ImageClassificationModelOutput):
        def get_out_to_loss_grad(self, *given):
            raise FileNotFoundError(errno.ENOENT, "No such file", "embeddings.pt")

    traker = runs.make_traker(whole[1], N, whole[0].parent / "other", task=Loading)
    traker.load_checkpoint(whole[1].state_dict(), 0)
    with pytest.raises(FileNotFoundError, match=r"embeddings\.pt"):
        traker.featurize(whole[2], num_samples=N)


def refuse_writing(monkeypatch):
    own_os, own = os.open, builtins.open

    def os_open(path, flags, *rest, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EROFS, "Read-only file system", str(path))
        return own_os(path, flags, *rest, **options)

    def refuse(self, *_, **__):
        raise PermissionError(errno.EROFS, "Read-only file system", str(self))

    def path_open(self, mode="r", *rest, **options):
        return own(self, mode, *rest, **options) if mode in {"r", "rb"} else refuse(self)

    monkeypatch.setattr(os, "open", os_open)
    monkeypatch.setattr(Path, "open", path_open)
    for name in ("touch", "unlink", "replace", "hardlink_to"):
        monkeypatch.setattr(Path, name, refuse)


@pytest.mark.parametrize("locked", [True, False])
def test_a_whole_store_can_be_read_where_nothing_can_be_written(locked, whole, monkeypatch):
    store, model, *_, expected = whole
    if not locked:  # as in stores that an earlier version made
        (store / "lock").unlink()
    with monkeypatch.context() as patch:
        refuse_writing(patch)
        traker = runs.make_traker(model, N, store)
        np.testing.assert_array_equal(traker.scores("exp"), expected)
        assert traker.top_scores("exp", k=3).indices.shape == (M, 3)
        assert traker.self_influence().shape == (N,)
        with pytest.raises(PermissionError):
            traker.finalize_scores("exp")


def test_the_one_call_gives_what_a_store_that_cannot_be_written_holds(
    tmp_path, monkeypatch
):
    model, train, targets = runs.data("mlp", N, M)
    states = [model.state_dict(), {k: 2 * v for k, v in model.state_dict().items()}]

    def call(count, **options):
        return trak.attribute(
            model,
            task="image_classification",
            train=[train],
            targets=[targets],
            checkpoints=states[:count],
            save_dir=tmp_path,
            progress=False,
            **options,
        )

    expected = np.array(call(2))
    with monkeypatch.context() as patch:
        refuse_writing(patch)
        np.testing.assert_array_equal(call(2), expected)
        for refused in ({"count": 1}, {"count": 2, "exp_name": "other"}):
            with pytest.raises(StoreNotWritableError):
                call(**refused)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_names_the_file_and_the_bytes(call, code, tmp_path, monkeypatch):
    file = RowFile(tmp_path / "a.mmap", (4, 2), np.float32)

    def full(*_):
        raise OSError(code, "full")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"for \d+ bytes of: '.*[ab]\.mmap'") as caught:
        file.write(np.arange(4), np.ones((4, 2)))
        RowFile(tmp_path / "b.mmap", (4, 2), np.float32)
    assert caught.value.errno == code
    assert [path.name for path in tmp_path.iterdir()] == ["a.mmap"]


def test_a_full_disk_names_gradients_of_the_exact_kernel(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"for 72 bytes of: '.*0\.npz'") as caught:
        GradientFiles(tmp_path).write(0, {"a": np.ones(9)})
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_disk_stay_as_they_are(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match=r"Input/output error$"):
        RowFile(tmp_path / "b.mmap", (4, 2), np.float32)


@pytest.mark.parametrize("what", ["json", "sums"])
def test_a_write_that_fails_leaves_no_temporary_file(what, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "0").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        if what == "json":
            replace_json(tmp_path / "a.json", {})
        else:
            moments.add(tmp_path / "0", {"count": np.array(1)})
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_killed_processes_left_goes_when_nobody_can_need_it(whole):
    store, model, *_ = whole
    hexadecimal = "0123456789abcdef"
    (store / "scores" / "ridge=0.1").mkdir()
    (store / "0" / "whitening").mkdir()
    folders = ["", "0", "0/whitening", "experiments", "scores", "scores/ridge=0.1"]
    old = [store / folder / f".exp.mmap.{hexadecimal}" for folder in folders]
    others = [
        store / f".new.{hexadecimal}",
        store / ".gitignore",
        store / f"mine.{hexadecimal}",
        store / "notes" / f".mine.{hexadecimal}",
    ]
    (store / "notes").mkdir()
    for path in (*old, *others):
        path.touch()
        os.utime(path, times=(0, time.time() - AGE - 60))
    os.utime(others[0], times=(0, time.time() - AGE + 600))
    traker = runs.make_traker(model, N, store)
    assert all(path.exists() for path in old)  # somebody may only want to read
    traker.load_checkpoint(model.state_dict(), 0)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in others)


def test_a_copied_store_goes_on(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "copy")
    np.testing.assert_array_equal(again((tmp_path / "copy", *whole[1:])), whole[-1])


OTHER_JSON = {
    "list": "[]",
    "nothing": "null",
    "empty": "{}",
    "numbers": '{"digest": 1, "shape": 6, "parts": 1, "num_targets": "6"}',
    "sizes": '{"digest": null, "shape": ["a", "b"], "parts": null, "num_targets": []}',
    "endless": "[" * 100_000,
}


@pytest.mark.parametrize("kind", OTHER_JSON)
@pytest.mark.parametrize(
    "name", ["0/checkpoint.json", "0/factor.json", "experiments/exp.json"]
)
def test_records_that_hold_something_else_are_named(name, kind, whole):
    (whole[0] / name).write_text(OTHER_JSON[kind])
    with pytest.raises(StoreCorruptedError, match=f"{re.escape(name)}.*emove"):
        again(whole)


@pytest.mark.parametrize("kind", OTHER_JSON)
def test_a_list_of_sums_that_is_none_is_named(kind, tmp_path):
    model, train, _ = runs.data("mlp", N, M)
    traker = runs.make_traker(model, N, tmp_path, whitening=0.5)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.fit_whitening(train)
    traker.featurize(train, num_samples=N)
    (tmp_path / "0" / "whitening.json").write_text(OTHER_JSON[kind])
    traker = runs.make_traker(model, N, tmp_path, whitening=0.5)
    with pytest.raises(StoreCorruptedError, match=r"whitening\.json"):
        traker.finalize_features()


def enlarge(path):
    """Changes an array's header, in an archive or not, to one of 10^18 numbers."""
    data = path.read_bytes()
    start = data.index(b"\x93NUMPY") + 10
    length = int.from_bytes(data[start - 2 : start], "little")
    header = data[start : start + length]
    changed = header[: header.index(b"'shape'")]
    changed += b"'shape': (1000000000000000, 1000), }"
    changed = changed.ljust(length - 1) + b"\n"
    assert len(changed) == length
    path.write_bytes(data[:start] + changed + data[start + length :])


@pytest.mark.parametrize("name", ["wide.mmap", "wide_numbers.mmap"])
def test_headers_of_wide_rows_that_ask_for_more_memory_than_there_is(name, tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((5, 3), np.float32))
    np.save(tmp_path / "numbers.npy", np.arange(5)[:, None])
    (tmp_path / "wide.npy").rename(tmp_path / "wide.mmap")
    (tmp_path / "numbers.npy").rename(tmp_path / "wide_numbers.mmap")
    assert WideRows(tmp_path).read() is not None
    enlarge(tmp_path / name)
    with pytest.raises(StoreCorruptedError, match=f"{name} is lost or damaged"):
        WideRows(tmp_path).read()


def test_headers_of_sums_that_ask_for_more_memory_than_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr("zipfile.ZipExtFile._update_crc", lambda *_: None)
    moments.settle(tmp_path, {"sums": np.ones((5, 3))})
    enlarge(next((tmp_path / "whitening").glob("*.npz")))
    with pytest.raises(StoreCorruptedError, match=r"npz is lost or damaged.*featurize"):
        moments.settled(tmp_path, settle=False, begun=True)


def test_memory_that_is_short_for_what_a_file_holds_is_no_damage(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.zeros((4, 4)))
    short = MemoryError()
    assert not_of_the_file(short, path)
    short.shape, short.dtype = (4, 4), np.dtype(np.float64)
    assert not_of_the_file(short, path)
    short.shape = (4, 4000)
    assert not not_of_the_file(short, path)
