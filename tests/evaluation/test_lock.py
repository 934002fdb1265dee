"""One build a folder at a time, whatever happens to its process."""

import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from tests.evaluation import recipes
from tests.evaluation.test_builder import PLAN, build

from trak.errors import BankBuildError, InputError
from trak.evaluation.bank_files import save_bank
from trak.evaluation.lock import only_build

BUSY = r"Another build is running in .*bank \(a process holds the lock .*Wait until"
HOLDER = """
import sys, time
from pathlib import Path
from trak.evaluation.lock import only_build
with only_build(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def no_training(indices, seed):
    pytest.fail("nothing is to be trained")


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock, as a build in it would."""
    run = [sys.executable, "-c", HOLDER, str(tmp_path / "bank" / "work")]
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_build_is_refused_before_it_trains(holder, tmp_path):
    for _ in range(2):
        with pytest.raises(BankBuildError, match=BUSY):
            build(tmp_path / "bank", no_training)
    build(tmp_path / "other")  # another folder is free
    assert not list((tmp_path / "bank").glob("work/*/"))


def test_the_lock_of_a_killed_process_does_not_block(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "bank/work/lock").exists()
    build(tmp_path / "bank")
    assert {p.name for p in (tmp_path / "bank").iterdir()} == {"bank.json", "truth.npz"}


def test_a_second_build_while_the_first_trains(tmp_path):
    refused = []

    def train(indices, seed):
        if seed == 3:
            with pytest.raises(BankBuildError, match=BUSY) as caught:
                build(tmp_path / "bank", no_training)
            refused.append(caught.value)
        return recipes.train(indices, seed)

    bank = build(tmp_path / "bank", train)
    assert len(refused) == 1
    np.testing.assert_array_equal(bank.outputs, build(tmp_path / "alone").outputs)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_build_that_ends_early_leaves_no_lock(error, tmp_path):
    def stop(indices, seed):
        raise error

    with pytest.raises((KeyboardInterrupt, BankBuildError)):
        build(tmp_path, stop)
    assert [p.name for p in (tmp_path / "work").iterdir()] == [PLAN.key]
    build(tmp_path)


def test_a_build_that_waited_reads_what_the_other_wrote(tmp_path, monkeypatch):
    """Another process finishes the bank between the first look and the lock."""
    written = build(tmp_path / "other")

    def slow(folder):
        save_bank(written, folder.parent)
        return only_build(folder)

    monkeypatch.setattr("trak.evaluation.builder.only_build", slow)
    bank = build(tmp_path / "bank", no_training)
    np.testing.assert_array_equal(bank.outputs, written.outputs)


def test_what_a_crash_left_of_a_finished_bank_is_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as crash:
        crash.setattr("trak.evaluation.builder.load_bank", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(tmp_path)
    left = tmp_path / "work" / PLAN.key
    assert len(list(left.glob("*.npy"))) == 10
    (tmp_path / "work" / "another").mkdir()
    (tmp_path / "work" / "lock").touch()
    build(tmp_path, no_training)
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["another"]
    (tmp_path / "work" / "another").rmdir()
    build(tmp_path, no_training)
    assert {p.name for p in tmp_path.iterdir()} == {"bank.json", "truth.npz"}


def test_a_finished_bank_is_read_while_another_process_tidies(holder, tmp_path):
    save_bank(build(tmp_path / "other"), tmp_path / "bank")
    build(tmp_path / "bank", no_training)
    assert (tmp_path / "bank" / "work" / "lock").exists()


def test_a_folder_that_cannot_be_worked_in_is_refused(tmp_path):
    (tmp_path / "work").touch()
    with pytest.raises(InputError, match="work/lock cannot be made: .*may write to"):
        build(tmp_path, no_training)
    with pytest.raises(InputError, match="cannot be the folder of a bank: embedded null"):
        build("a\0b", no_training)


def test_only_one_of_many_holds_the_lock(tmp_path):
    folder, inside, most = tmp_path / "work", [0], [0]
    held = []

    def take():
        for _ in range(200):
            try:
                with only_build(folder):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    held.append(1)
                    (folder / "lock").stat()
                    inside[0] -= 1
            except BankBuildError:
                continue

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert held
    assert not folder.exists()


@pytest.mark.parametrize("place", ["work", "work/lock"])
def test_links_to_what_is_gone_are_said_to_be(place, tmp_path):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(tmp_path / "gone" / "further")
    gone = pytest.raises(InputError, match="link to something that is gone")
    with gone, only_build(tmp_path / "work"):
        pass


def test_file_systems_without_locks_are_said_to_be(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("trak.evaluation.lock.fcntl.flock", no_locks)
    refused = pytest.raises(InputError, match="cannot be locked")
    with refused, only_build(tmp_path / "work"):
        pass
