"""Trainings that do what a library does not expect: processes, folders, closed output."""

import os
import subprocess
import sys

import numpy as np
import pytest
from tests.evaluation import recipes

from trak.evaluation import BankPlan, build_bank, load_bank

PLAN = BankPlan(n=recipes.N, recipe={"ridge": 1}, subsets=3)

SCRIPT = """
import sys
from torch.utils.data import DataLoader, Dataset
from trak.evaluation import BankPlan, build_bank

class Indices(Dataset):
    def __init__(self, indices):
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        return int(self.indices[place])

def train(indices, seed):
    loader = DataLoader(
        Indices(indices), num_workers=1, multiprocessing_context=sys.argv[2]
    )
    return sum(int(batch) for batch in loader)

def evaluate(model):
    return [model]

if __name__ == "__main__":
    plan = BankPlan(n=9, recipe={}, subsets=3)
    build_bank(sys.argv[1], train, evaluate, plan, workers=2)
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_training_in_a_script_may_start_processes(start, tmp_path):
    """By spawn they import the script, and unpickle what it defines."""
    (tmp_path / "script.py").write_text(SCRIPT)
    run = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "bank"), start]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    bank = load_bank(tmp_path / "bank")
    sums = [np.flatnonzero(mask).sum() for mask in bank.masks]
    assert bank.outputs[:, 0, 0].tolist() == sums


def test_training_may_change_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def train(indices, seed):
        os.chdir(elsewhere)
        return recipes.train(indices, seed)

    bank = build_bank("bank", train, recipes.evaluate, PLAN)
    assert not list(elsewhere.iterdir())
    recipes.assert_equal(load_bank(tmp_path / "bank"), bank)


def test_training_may_close_its_output(tmp_path):
    one = build_bank(tmp_path / "one", recipes.train, recipes.evaluate, PLAN)
    two = build_bank(
        tmp_path / "two", recipes.close_output, recipes.evaluate, PLAN, workers=2
    )
    np.testing.assert_array_equal(one.outputs, two.outputs)
