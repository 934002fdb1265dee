"""Several processes that finalize, score and attribute in one store."""

import contextlib
import copy
import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests import cases, runs

import trak
from trak.errors import PhaseError, StoreMismatchError, StoreNotWritableError
from trak.pipeline import finalizing, methods, scoring, variances
from trak.pipeline.readiness import scores_with_record
from trak.pipeline.scoring import ScorePass
from trak.pipeline.whiten import Whitener
from trak.projectors import KernelProjector
from trak.savers import MmapSaver, factor_files
from trak.savers.filesystem import read_json
from trak.savers.locks import changing, reading

N, M = 24, 4

WORKER = """
import sys
from pathlib import Path
import numpy as np
import torch
import trak
from tests import cases, runs
from trak.projectors import KernelProjector

torch.set_num_threads(1)
what, folder, out = sys.argv[1:]
model, train, targets = runs.data("mlp", 24, 4)
if what == "finalize":
    traker = runs.make_traker(model, 24, folder)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(40):
        traker.finalize_scores("exp")
        traker.saver.save_factor(0, *traker.saver.load_factor(0))
    scores = traker.scores("exp")
else:
    print("ready", flush=True)
    sys.stdin.readline()
    scores = trak.attribute(
        model,
        task="image_classification",
        train=runs.split(train, 5),
        targets=runs.split(targets, 3),
        checkpoints=cases.checkpoints("mlp", 2),
        save_dir=folder,
        whitening=0.5,
        projector=KernelProjector(24) if what == "exact" else None,
        row_dtype="float64",
        progress=False,
    )
np.save(out, scores)
"""


@pytest.fixture
def scored(tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    traker = runs.make_traker(model, N, tmp_path / "store")
    runs.whole_run(traker, train, targets, [model.state_dict()])
    return traker, model, targets


def together(what, folder, tmp_path):
    outs = [tmp_path / f"{what}{number}.npy" for number in range(2)]
    command = [sys.executable, "-c", WORKER, what, str(folder)]
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen([*command, str(out)], stdin=pipe, stdout=pipe, stderr=pipe)
            )
            for out in outs
        ]
        for worker in workers:
            worker.stdout.readline()
        for worker in workers:
            worker.stdin.write(b"\n")
            worker.stdin.flush()
        errors = [worker.communicate()[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return [np.load(out) for out in outs]


def test_finalizing_at_once_never_fails(scored, tmp_path):
    expected = np.array(scored[0].scores("exp"))
    for found in together("finalize", tmp_path / "store", tmp_path):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scored[0].scores("exp"), expected)


@pytest.mark.parametrize("how", ["attribute", "exact"])
def test_two_calls_of_attribute_on_a_new_folder_give_the_same_scores(how, tmp_path):
    one, other = together(how, tmp_path / "store", tmp_path)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("late", ["fitting", "settling"])
def test_a_call_goes_on_where_another_settled_on_the_whitening(late, tmp_path, monkeypatch):
    def call(folder):
        model, train, targets = runs.data("mlp", N, M)
        options = {"task": "image_classification", "whitening": 0.5, "progress": False}
        batches = {"train": runs.split(train, 5), "targets": [targets]}
        return np.array(trak.attribute(model, save_dir=folder, **batches, **options))

    name = "fit" if late == "fitting" else "settle"
    own = getattr(Whitener, name)

    def overtaken(self, *given):
        with monkeypatch.context() as patch:
            patch.setattr(Whitener, name, own)
            call(tmp_path / "a")
        own(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Whitener, name, overtaken)
        found = call(tmp_path / "a")
    np.testing.assert_array_equal(found, call(tmp_path / "b"))
    (part,) = (tmp_path / "a" / "0" / "whitening").iterdir()
    assert read_json(tmp_path / "a" / "0" / "whitening.json") == {"parts": [part.name]}


def test_readers_wait_while_files_are_exchanged(scored, tmp_path, monkeypatch):
    store = tmp_path / "store"
    free = []

    def try_lock(*_):
        descriptor = os.open(store / "lock", os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            free.append(True)
        except BlockingIOError:
            free.append(False)
        finally:
            os.close(descriptor)

    replace = os.replace

    def watched(source, target, **options):
        try_lock()
        replace(source, target, **options)

    monkeypatch.setattr(os, "replace", watched)
    scored[0].finalize_scores("exp")
    scored[0].saver.save_factor(0, *scored[0].saver.load_factor(0))
    assert len(free) == 5  # scores with two records, a factor with one
    assert not any(free)


def test_without_locks_on_the_file_system_files_are_exchanged_all_the_same(
    tmp_path, monkeypatch
):
    def refuse(descriptor, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / "0").mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    factor_files.save(tmp_path / "0", np.eye(2), {})
    assert factor_files.load(tmp_path / "0")[1] == {"shape": [2, 2]}


def test_other_troubles_with_locks_are_told(tmp_path, monkeypatch):
    def refuse(descriptor, kind):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"), changing(tmp_path):
        pass
    with pytest.raises(OSError, match="Input/output"), reading(tmp_path):
        pass


def test_an_experiment_without_a_row_may_have_another_number_of_targets(scored):
    traker, model, targets = scored
    store = traker.saver.save_dir
    runs.featurize(traker, runs.data("mlp", N, M)[1], model.state_dict(), 1)
    traker.finalize_features()
    for model_id in 0, 1:
        traker.start_scoring_checkpoint("new", model.state_dict(), model_id, 2 * M)
    runs.score(traker, targets, model.state_dict(), exp_name="new")
    runs.score(traker, targets, model.state_dict(), 1, exp_name="new")
    runs.score(traker, targets, model.state_dict(), 1, exp_name="exp")
    found = traker.sweep(["new", "exp"])
    one, other = found.values()
    np.testing.assert_array_equal(one, other)
    assert read_json(store / "experiments" / "new.json")["num_targets"] == M


@pytest.mark.parametrize("kept", ["row", "scores"])
def test_one_that_holds_something_keeps_its_number(kept, scored):
    traker, model, targets = scored
    state = model.state_dict()
    if kept == "row":
        traker.start_scoring_checkpoint("new", state, 0, M)
        traker.score(tuple(part[:1] for part in targets), num_samples=1)
    else:
        (traker.saver.save_dir / "0" / "exp_grads.journal").unlink()
    with pytest.raises(StoreMismatchError, match=f"has {M} targets"):
        traker.start_scoring_checkpoint("new" if kept == "row" else "exp", state, 0, 2)


def test_who_began_with_the_other_number_is_refused_and_writes_nothing(scored):
    traker, model, targets = scored
    state = model.state_dict()
    first = runs.make_traker(model, N, traker.saver.save_dir)
    first.start_scoring_checkpoint("new", state, 0, 2 * M)
    second = runs.make_traker(copy.deepcopy(model), N, traker.saver.save_dir)
    second.start_scoring_checkpoint("new", state, 0, M)
    before = (second.saver.save_dir / "0" / "new_grads.mmap").read_bytes()
    with pytest.raises(StoreMismatchError, match="another exp_name"):
        first.score(targets, inds=range(M))
    row = {"grads": np.ones((1, 16)), "examples": np.ones((1, 1))}
    with pytest.raises(StoreMismatchError, match="another exp_name"):
        first.saver.target_rows("new", 0).commit(np.array([0]), row)
    assert (second.saver.save_dir / "0" / "new_grads.mmap").read_bytes() == before
    second.score(targets, num_samples=M)
    np.testing.assert_array_equal(
        second.finalize_scores("new"), np.array(second.finalize_scores("exp"))
    )


def test_a_journal_that_was_replaced_takes_no_further_rows(scored):
    traker, model, targets = scored
    state = model.state_dict()
    traker.start_scoring_checkpoint("new", state, 0, M)
    path = traker.saver.save_dir / "0" / "new_grads.journal"
    content = path.read_bytes()
    rows = traker.saver.target_rows("new", 0)
    path.unlink()
    path.write_bytes(content.replace(b"[0,4]", b"[0,9]"))
    with pytest.raises(StoreMismatchError, match="no longer the journal of 4 rows"):
        rows._journal.append(np.array([0]))  # where a race would come
    assert b"done" not in path.read_bytes()


def test_what_a_process_finalized_is_what_it_returns(scored, monkeypatch):
    traker = scored[0]
    expected = np.array(traker.scores("exp"))
    refresh = MmapSaver.refresh

    def replaced(self, model_id=None):
        path = self.save_dir / "scores" / "exp.mmap"
        other = path.with_name("other.npy")
        with other.open("wb") as file:
            np.save(file, np.zeros_like(expected))
        other.replace(path)
        refresh(self, model_id)

    writes = []
    write = traker.saver.save_score_sets

    def save(*given):
        with monkeypatch.context() as patch:
            patch.setattr(MmapSaver, "refresh", replaced)
            writes.append(given)
            return write(*given)

    monkeypatch.setattr(traker.saver, "save_score_sets", save)
    np.testing.assert_array_equal(traker.finalize_scores("exp"), expected)
    assert writes


def test_without_scores_the_message_is_as_before(scored):
    traker, model, _ = scored
    traker.start_scoring_checkpoint("new", model.state_dict(), 0, M)
    with pytest.raises(PhaseError, match="has no scores yet"):
        traker.scores("new")
    path = traker.saver.save_dir / "experiments" / "new.json"
    assert json.loads(path.read_text())["scores_finalized"] == 0


def at(folder, ridge):
    model, *_ = runs.data("mlp", N, M)
    return runs.make_traker(model, N, folder, lambda_reg=ridge)


def before(monkeypatch, owner, name, action):
    """Lets another process act once, just before a method."""
    own = getattr(owner, name)

    def overtaken(*args, **options):
        monkeypatch.setattr(owner, name, own)
        action()
        return own(*args, **options)

    monkeypatch.setattr(owner, name, overtaken)


READS = {
    "finalize_scores": lambda t: t.finalize_scores("exp"),
    "top_scores": lambda t: t.top_scores("exp", k=2),
    "self_influence": lambda t: t.self_influence(),
    "relatif": lambda t: t.scores("exp", method="relatif"),
    "errors": lambda t: t.scores("exp", with_error=True),
}


@pytest.mark.parametrize("name", READS)
def test_what_another_ridge_was_finalized_for_is_not_scored(name, scored, monkeypatch):
    traker = scored[0]
    other = at(traker.saver.save_dir, "50x")
    where = scoring if name in {"finalize_scores", "top_scores"} else methods
    before(
        monkeypatch,
        variances if name == "errors" else where,
        "kept_factor",
        other.finalize_features,
    )
    with pytest.raises(PhaseError, match=r"meanwhile, with .*50x.*lambda_reg='1x'.*again"):
        READS[name](traker)
    traker.finalize_features()
    READS[name](traker)


def test_scores_are_of_the_ridge_that_their_record_names(scored, monkeypatch):
    traker = scored[0]
    expected = np.array(traker.scores("exp"))
    other = at(traker.saver.save_dir, "50x")
    before(monkeypatch, ScorePass, "arrays", other.finalize_features)
    np.testing.assert_array_equal(traker.finalize_scores("exp"), expected)
    record = read_json(traker.saver.save_dir / "experiments" / "exp.json")
    assert record["factors"]["0"]["lambda_reg"] == "1x"
    for each in (traker, other):
        with pytest.raises(PhaseError, match="with another ridge"):
            each.scores("exp")
    assert np.abs(other.finalize_scores("exp") - expected).max() > 0.1 * expected.std()


def test_scores_come_with_the_record_of_the_same_moment(scored, monkeypatch):
    traker = scored[0]
    other = at(traker.saver.save_dir, "50x")

    def replace():
        other.finalize_features()
        other.finalize_scores("exp")

    before(monkeypatch, traker.saver, "load_scores", replace)
    found, record = scores_with_record(traker.saver, "exp")
    assert record["factors"]["0"]["lambda_reg"] == "50x"
    np.testing.assert_array_equal(found, other.scores("exp"))


def test_features_are_of_the_factor_that_is_there(scored):
    traker = scored[0]
    at_first = np.array(traker.saver.current_store["features"])
    other = at(traker.saver.save_dir, "50x")
    other.finalize_features()
    other.saver.load_current_store(0)
    now = traker.saver.current_store["features"]
    assert np.abs(now - at_first).max() > 0.1 * at_first.std()
    np.testing.assert_array_equal(now, other.saver.current_store["features"])


def test_the_shared_ridge_is_that_of_the_factor_that_was_found(tmp_path, monkeypatch):
    model, train, *_ = runs.data("mlp", 48, M)
    trakers = [
        runs.make_traker(model, 48, tmp_path, lambda_reg="auto", whitening=0)
        for _ in range(2)
    ]
    states = cases.checkpoints("mlp", 2)
    for number, state in enumerate(states):
        runs.featurize(trakers[0], train, state, number)
    trakers[0].finalize_features()
    expected = factor_files.load(tmp_path / "1")[1]["auto"]
    (tmp_path / "1" / "factor.json").unlink()
    before(
        monkeypatch,
        finalizing.logger,
        "info",
        lambda: trakers[1].finalize_features(model_ids=[0]),
    )
    trakers[0].finalize_features()
    assert factor_files.load(tmp_path / "1")[1]["auto"] == expected


@pytest.mark.parametrize("projector", [None, KernelProjector(N)])
def test_what_is_written_has_the_modes_of_the_users_umask(projector, tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    before = os.umask(0o002)  # of people who share folders with their group
    try:
        folder = tmp_path / "store"
        traker = runs.make_traker(model, N, folder, projector=projector)
        runs.whole_run(traker, train, targets, [model.state_dict()])
    finally:
        os.umask(before)
    paths = [folder, *folder.rglob("*")]
    assert [path for path in paths if not path.stat().st_mode & 0o020] == []


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS])
def test_a_store_that_may_not_be_written_is_told(reason, world, tmp_path, monkeypatch):
    runs.one_call(world, tmp_path)
    opened = os.open

    def refusing(path, flags, *rest, **named):
        if Path(path).name == "lock" and flags & os.O_RDWR:
            raise OSError(reason, os.strerror(reason), str(path))
        return opened(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(StoreNotWritableError, match=r"lock cannot be .* use the copy as"):
        runs.one_call(world, tmp_path, exp_name="others")
