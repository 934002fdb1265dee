"""The store: bytes, crashes, damage and several processes."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from tests import cases, reference, runs

from trak.errors import InputError, PhaseError, StoreCorruptedError, StoreMismatchError
from trak.gradient_computers import FunctionalGradientComputer
from trak.savers.arrays import RowFile
from trak.savers.filesystem import create_json, read_json, replace_json
from trak.savers.journal import Journal
from trak.savers.rows import RowGroup


def line(payload) -> bytes:
    text = json.dumps(payload, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def test_row_files_are_npy_files_byte_for_byte(tmp_path):
    file = RowFile(tmp_path / "a.mmap", (5, 3), np.float16)
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    file.write(np.array([3, 1]), values)
    expected = np.zeros((5, 3), np.float16)
    expected[[3, 1]] = values
    np.save(tmp_path / "b.npy", expected)
    assert (tmp_path / "a.mmap").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert np.array_equal(np.load(tmp_path / "a.mmap", mmap_mode="r"), expected)


def test_row_files_take_their_disk_space_at_once(tmp_path):
    RowFile(tmp_path / "a.mmap", (1000, 100), np.float32)
    assert (tmp_path / "a.mmap").stat().st_blocks * 512 >= 400_000


def test_opening_a_row_file_again_keeps_its_rows(tmp_path):
    RowFile(tmp_path / "a.mmap", (2, 2), np.float32).write(np.array([0]), np.ones((1, 2)))
    again = RowFile(tmp_path / "a.mmap", (2, 2), np.float32)
    assert again.read()[0].tolist() == [1, 1]


@pytest.mark.parametrize("damage", ["truncate", "header", "shape", "dtype"])
def test_damaged_row_files_are_refused(damage, tmp_path):
    path = tmp_path / "a.mmap"
    RowFile(path, (4, 2), np.float32)
    shape, dtype = (4, 2), np.float32
    if damage == "truncate":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "header":
        path.write_bytes(b"X" + path.read_bytes()[1:])
    elif damage == "shape":
        shape = (2, 4)
    else:
        dtype = np.int32
    with pytest.raises(StoreCorruptedError, match=r"a\.mmap"):
        RowFile(path, shape, dtype)


def test_changing_what_was_read_does_not_change_the_file(tmp_path):
    file = RowFile(tmp_path / "a.mmap", (2, 2), np.float32)
    file.read()[:] = 7
    assert not file.read().any()


def test_journal_bytes(tmp_path):
    journal = Journal(tmp_path / "j", 9)
    journal.append(np.array([4, 2, 3, 8]))
    journal.append(np.array([0]))
    header = line({"format": 1, "writer": 0, "rows": [0, 9]})
    rest = line({"done": [[2, 3], [8, 1]]}) + line({"done": [[0, 1]]})
    assert (tmp_path / "j").read_bytes() == header + rest
    assert np.flatnonzero(Journal(tmp_path / "j", 9).done).tolist() == [0, 2, 3, 4, 8]


def test_a_torn_last_line_is_cut_off_at_every_byte(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, 9)
    journal.append(np.array([1]))
    whole = len(path.read_bytes())
    journal.append(np.array([5]))
    data = path.read_bytes()
    for end in range(whole, len(data)):
        path.write_bytes(data[:end])
        again = Journal(path, 9)
        assert np.flatnonzero(again.done).tolist() == [1]
        again.append(np.array([7]))
        assert path.read_bytes() == data[:whole] + line({"done": [[7, 1]]})


def test_a_crash_while_the_journal_is_created_leaves_a_usable_store(tmp_path):
    path = tmp_path / "j"
    whole = len(line({"format": 1, "writer": 0, "rows": [0, 9]}))
    for end in range(whole):
        path.write_bytes(line({"format": 1, "writer": 0, "rows": [0, 9]})[:end])
        Journal(path, 9).append(np.array([3]))
        assert Journal(path, 9).done[3]


def test_damage_before_the_last_line_is_an_error_that_names_the_byte(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, 9)
    journal.append(np.array([1]))
    journal.append(np.array([5]))
    data = bytearray(path.read_bytes())
    start = data.index(b"\n") + 1
    data[start + 12] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorruptedError, match=f"byte {start}"):
        Journal(path, 9)


def test_a_journal_of_another_size_is_refused(tmp_path):
    Journal(tmp_path / "j", 9)
    with pytest.raises(StoreMismatchError, match=r"\[0, 9\].*\[0, 8\]"):
        Journal(tmp_path / "j", 8)


def test_two_journals_on_one_file_see_each_others_rows(tmp_path):
    first, second = Journal(tmp_path / "j", 9), Journal(tmp_path / "j", 9)
    first.append(np.array([1]))
    second.append(np.array([2]))
    first.append(np.array([3]))
    for journal in (first, second, Journal(tmp_path / "j", 9)):
        journal.refresh()
        assert np.flatnonzero(journal.done).tolist() == [1, 2, 3]


class Stop(BaseException):
    """Stands for a process that dies."""


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_death_at_any_write_loses_no_committed_row(call, tmp_path, monkeypatch):
    """A row that exists holds what was written, wherever the process dies."""
    arrays = {
        "x": (tmp_path / "x.mmap", 3, np.float32),
        "q": (tmp_path / "q.mmap", 1, np.float32),
    }

    def commit(group, row):
        group.commit(
            np.array([row]),
            {"x": np.full((1, 3), row + 1.0), "q": np.full((1, 1), row + 1.0)},
        )

    commit(RowGroup(tmp_path / "j", 8, arrays), 0)
    real = getattr(os, call)
    for deadline in range(6):
        count = 0

        def die(*args, deadline=deadline):
            nonlocal count
            count += 1
            if count > deadline:
                raise Stop
            return real(*args)

        monkeypatch.setattr(os, call, die)
        with contextlib.suppress(Stop):
            commit(RowGroup(tmp_path / "j", 8, arrays), 1 + deadline)
        monkeypatch.setattr(os, call, real)
        group = RowGroup(tmp_path / "j", 8, arrays)
        for name in ("x", "q"):
            rows = group.array(name)
            for row in np.flatnonzero(group.done):
                assert (rows[row] == row + 1).all()
        assert group.done[0]


def test_rows_are_on_disk_before_the_journal_says_so(tmp_path, monkeypatch):
    order = []
    real_fsync, real_pwrite = os.fsync, os.pwrite
    names = lambda d: os.path.basename(os.readlink(f"/proc/self/fd/{d}"))  # noqa: E731, PTH119, PTH115
    group = RowGroup(tmp_path / "j", 4, {"x": (tmp_path / "x", 1, np.float32)})
    monkeypatch.setattr(
        os, "fsync", lambda d: (order.append(("sync", names(d))), real_fsync(d))[1]
    )
    monkeypatch.setattr(
        os,
        "pwrite",
        lambda d, *a: (order.append(("write", names(d))), real_pwrite(d, *a))[1],
    )
    group.commit(np.array([2]), {"x": np.ones((1, 1))})
    assert order == [("write", "x"), ("sync", "x"), ("write", "j"), ("sync", "j")]


def test_json_is_replaced_as_a_whole_and_created_once(tmp_path):
    path = tmp_path / "a.json"
    assert create_json(path, {"a": 1})
    assert not create_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    replace_json(path, {"a": 3})
    assert read_json(path) == {"a": 3}
    assert os.listdir(tmp_path) == ["a.json"]  # noqa: PTH208
    path.write_text("")
    with pytest.raises(StoreCorruptedError, match=r"a\.json"):
        read_json(path)


def test_nothing_in_a_store_is_a_pickle_and_paths_are_relative(tmp_path):
    model, train, targets = runs.data("mlp", 12, 3)
    traker = runs.make_traker(model, 12, tmp_path / "store")
    scores = np.array(runs.whole_run(traker, train, targets, [model.state_dict()]))
    (tmp_path / "store").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*"):
        if path.suffix in {".mmap", ".npy"}:
            np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.is_file():
            assert str(tmp_path) not in path.read_text()
    again = runs.make_traker(model, 12, tmp_path / "moved")
    assert np.array_equal(again.scores("exp"), scores)
    plain = np.load(tmp_path / "moved" / "scores" / "exp.mmap", allow_pickle=False)
    assert np.array_equal(plain, scores)


def test_a_store_keeps_one_array_of_rows_and_a_square_factor(tmp_path):
    model, train, targets = runs.data("mlp", 40, 3)
    traker = runs.make_traker(model, 40, tmp_path, proj_dim=16)
    runs.whole_run(traker, train, targets, [model.state_dict()])
    shapes = {
        p.name: np.load(p, mmap_mode="r").shape
        for p in (tmp_path / "0").iterdir()
        if p.suffix in {".mmap", ".npy"}
    }
    assert shapes["factor.npy"] == (16, 16)
    assert [name for name, shape in shapes.items() if shape == (40, 16)] == ["grads.mmap"]


WORKER = """
import sys, torch
from tests import runs
folder, first, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model, train, _ = runs.data("mlp", 40, 3)
traker = runs.make_traker(model, 40, folder)
traker.load_checkpoint(model.state_dict(), model_id=0)
for i in range(first, stop, 5):
    traker.featurize([p[i:i+5] for p in train], inds=list(range(i, i + 5)))
"""


def test_processes_may_share_a_checkpoint(tmp_path):
    jobs = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(a), str(b)])
        for a, b in [(0, 20), (20, 40)]
    ]
    assert [job.wait() for job in jobs] == [0, 0]
    model, train, targets = runs.data("mlp", 40, 3)
    traker = runs.make_traker(model, 40, tmp_path)
    traker.finalize_features()
    runs.score(traker, targets, model.state_dict())
    expected = runs.oracle(model, train, targets, [model.state_dict()], traker.projector)
    found = traker.finalize_scores("exp")
    np.testing.assert_allclose(found, reference.trak_scores(expected), rtol=1e-6, atol=1e-9)


def test_an_interrupted_run_goes_on_at_the_row_with_any_batch_size(tmp_path, monkeypatch):
    model, train, targets = runs.data("mlp", 30, 3)
    state = model.state_dict()
    whole = runs.make_traker(model, 30, tmp_path / "whole")
    expected = np.array(runs.whole_run(whole, train, targets, [state]))
    first = runs.make_traker(model, 30, tmp_path / "parts")
    first.load_checkpoint(state, model_id=0)
    for batch in runs.split(train, 6)[:2]:
        first.featurize(batch, num_samples=6)
    second = runs.make_traker(
        model, 30, tmp_path / "parts", gradient_computer=FunctionalGradientComputer
    )
    computed = []
    real = second.gradient_computer.compute_per_sample_grad

    def count(batch):
        computed.append(len(batch[0]))
        return real(batch)

    monkeypatch.setattr(second.gradient_computer, "compute_per_sample_grad", count)
    runs.featurize(second, train, state, size=8)
    assert computed == [4, 8, 6]  # rows 12 to 15 of the second batch, then the rest
    second.finalize_features()
    runs.score(second, targets, state)
    np.testing.assert_allclose(second.finalize_scores("exp"), expected, rtol=1e-9)


def test_the_cursor_moves_only_after_the_rows_are_safe(tmp_path, monkeypatch):
    model, train, _ = runs.data("mlp", 12, 3)
    traker = runs.make_traker(model, 12, tmp_path)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    batches = runs.split(train, 4)
    traker.featurize(batches[0], num_samples=4)
    rows = traker.saver.train_rows(0)
    with monkeypatch.context() as patch:
        patch.setattr(
            rows, "commit", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
        )
        with pytest.raises(OSError, match="disk full"):
            traker.featurize(batches[1], num_samples=4)
    traker.featurize(batches[1], num_samples=4)
    traker.featurize(batches[2], num_samples=4)
    expected = reference.projected_rows(
        reference.gradient_rows(model, train), traker.projector, 0
    )
    np.testing.assert_allclose(traker.saver.current_store["grads"], expected, rtol=1e-9)


def test_a_store_of_other_settings_lists_what_differs(tmp_path):
    model, _ = cases.make("mlp", 1)
    runs.make_traker(model, 30, tmp_path)
    with pytest.raises(StoreMismatchError) as caught:
        runs.make_traker(model, 31, tmp_path, projector_seed=4, proj_dim=17)
    text = str(caught.value)
    for part in (
        "train_set_size: the store has 30, this run 31",
        "projection.seed",
        "proj_dim",
    ):
        assert part in text


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "a\0b"])
def test_experiment_names_stay_in_their_folder(name, tmp_path):
    model, train, targets = runs.data("mlp", 8, 3)
    traker = runs.make_traker(model, 8, tmp_path / "store")
    runs.featurize(traker, train, model.state_dict())
    traker.finalize_features()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="exp_name"):
        traker.start_scoring_checkpoint(name, model.state_dict(), 0, len(targets[0]))
    assert sorted(tmp_path.rglob("*")) == before


def test_scores_of_a_checkpoint_that_was_dropped_are_told_how_to_go_on(tmp_path):
    model, train, targets = runs.data("mlp", 20, 3)
    states = cases.checkpoints("mlp", 2)
    runs.whole_run(runs.make_traker(model, 20, tmp_path), train, targets, states)
    shutil.rmtree(tmp_path / "1")
    traker = runs.make_traker(model, 20, tmp_path)
    with pytest.raises(PhaseError, match=r"checkpoints \[1\], too, which are no longer"):
        traker.scores("exp")
    traker.finalize_features()
    found = traker.finalize_scores("exp")
    np.testing.assert_array_equal(traker.scores("exp"), found)
    runs.expect(traker, train, targets, states[:1], found)
