"""Scores and data are held against the bank that is to judge them."""

import hashlib
import json

import numpy as np
import pytest
import torch
from tests import cases, runs
from tests.evaluation import recipes
from tests.evaluation.recipes import arrays, full_bank, states

from trak.digests import state_digest
from trak.errors import (
    BankCorruptedError,
    BankMismatchError,
    InputError,
    InputTypeError,
    StoreCorruptedError,
)
from trak.evaluation import (
    Bank,
    checkpoint_hash,
    data_hash,
    example_hashes,
    lds,
    load_bank,
    masks_from_indices,
    save_bank,
)


@pytest.fixture
def scored(tmp_path):
    model, train, targets = runs.data("mlp", 21, 4)
    checkpoints = cases.checkpoints("mlp", 2)
    traker = runs.make_traker(model, 21, tmp_path / "store")
    scores = runs.whole_run(traker, train, targets, checkpoints)
    return traker, train, checkpoints, scores


def test_scores_of_the_banks_own_models_and_data_are_accepted(scored, tmp_path):
    traker, train, checkpoints, scores = scored
    bank = full_bank(checkpoints=checkpoints, examples=example_hashes(train))
    assert bank.checkpoints == tuple(c.digest for c in traker.checkpoints())
    bank.check(traker)
    bank.check(tmp_path / "store")
    bank.check(checkpoints=checkpoints[1:])
    lds(scores, bank.masks, bank.outputs, draws=5)
    further = full_bank(checkpoints=[*checkpoints, "2" * 32], examples=None)
    further.check(traker)  # scores of some of its models


def test_scores_of_other_models_or_data_are_refused(scored):
    traker, train, checkpoints, _ = scored
    with pytest.raises(BankMismatchError, match=r"1 checkpoints.*model_id=1 \("):
        full_bank(checkpoints=checkpoints[:1]).check(traker)
    with pytest.raises(BankMismatchError, match=r"number 0 \("):
        full_bank().check(checkpoints=checkpoints)
    hashes = example_hashes(train)
    hashes[[3, 4]] = hashes[[4, 3]]
    with pytest.raises(BankMismatchError, match="2 training examples of .* row 3"):
        full_bank(checkpoints=checkpoints, examples=hashes).check(traker)
    hashes[3:5] = 0  # unknown
    full_bank(checkpoints=checkpoints, examples=hashes).check(traker)
    given = arrays(n=20)
    with pytest.raises(BankMismatchError, match=r"about 21 training examples.*about 20"):
        Bank(**given, checkpoints=checkpoints).check(traker)


def test_data_is_refused_by_hash():
    x, y = torch.randn(5, 2), np.arange(5)
    bank = full_bank(data=data_hash(x, y))
    bank.check(data=[x, y])
    bank.check(data=data_hash(x.numpy().tolist()[0], y) and bank.data)
    assert bank.data == hashlib.sha256(x.numpy().tobytes() + y.tobytes()).hexdigest()
    for other in ([x], [y, x], [x + 1e-6, y]):
        with pytest.raises(BankMismatchError, match="from data with the hash"):
            bank.check(data=other)


def test_what_was_not_compared_is_warned_of(scored, tmp_path, caplog):
    traker, train, checkpoints, _ = scored
    hashes = example_hashes(train)
    full_bank(checkpoints=checkpoints, examples=hashes).check(traker)
    assert not [r for r in caplog.records if "compared" in r.getMessage()]
    full_bank(checkpoints=checkpoints, examples=None).check(traker)
    assert "records no training examples" in caplog.text
    hashes[3:5] = 0
    full_bank(checkpoints=checkpoints, examples=hashes).check(traker)
    assert "2 of 21 training examples" in caplog.text


@pytest.mark.parametrize("file", ["checkpoint.json", "examples.mmap"])
def test_a_damaged_store_says_so(file, scored, tmp_path):
    traker, train, checkpoints, _ = scored
    bank = full_bank(checkpoints=checkpoints, examples=example_hashes(train))
    for damaged in (b"{", b"[" * 100_000, recipes.damaged_array("no end")):
        (tmp_path / "store" / "0" / file).write_bytes(damaged)
        with pytest.raises(StoreCorruptedError, match=file):
            bank.check(tmp_path / "store")
    del traker


def test_what_is_no_store_no_weights_and_no_data():
    bank = full_bank()
    for scored in (np.ones(3), torch.nn.Linear(2, 2), bank):
        with pytest.raises(InputTypeError, match="scored must be the TRAKer"):
            bank.check(scored)
    for checkpoints in (
        3,
        np.array(3),
        torch.nn.Linear(2, 2),
        [torch.nn.Linear(2, 2)],
        [None],
    ):
        with pytest.raises(InputTypeError, match="state dict"):
            bank.check(checkpoints=checkpoints)
    with pytest.raises(InputTypeError, match="data must be"):
        bank.check(data=3)
    with pytest.raises(InputTypeError, match="data must be"):
        bank.check(data=np.array(3))
    with pytest.raises(InputTypeError, match="recipe must be a dict"):
        full_bank(recipe=None)
    with pytest.raises(InputError, match="n must be an integer"):
        masks_from_indices([[0, 1]], "3")
    for indices in (3, np.array(3), torch.tensor(3)):
        with pytest.raises(InputTypeError, match="indices must hold"):
            masks_from_indices(indices, 3)
    for notes in (3, None, [("rate", 1)]):
        with pytest.raises(InputTypeError, match="notes must be a dict"):
            full_bank(notes=notes)


def test_a_bank_is_its_own_and_finite():
    given = arrays()
    bank = Bank(**given)
    given["masks"][:] = False
    assert bank.masks.any()
    with pytest.raises(InputError, match="kept in float32"):
        Bank(masks=bank.masks, outputs=bank.outputs.astype(np.float64) * 1e300)


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 22},
        {"n": 30},
        {"n": 16},
        {"n": -1},
        {"n": None},
        {"n": True},
        {"version": True},
        {"recipe": None},
        {"name": 3},
        {"checkpoints": 7},
        {"data": 3},
        {"seed_rule": ["any"]},
        {"subset_size": True},
    ],
)
def test_a_description_that_contradicts_the_arrays(changes, tmp_path):
    save_bank(full_bank(), tmp_path)
    path = tmp_path / "bank.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(BankCorruptedError):
        load_bank(tmp_path)


def test_nothing_to_compare_is_an_error(tmp_path):
    with pytest.raises(InputError, match="Nothing to check"):
        full_bank().check()
    with pytest.raises(InputError, match="records no checkpoints"):
        full_bank(checkpoints=()).check(checkpoints=states())
    with pytest.raises(InputError, match="records no hash of its data"):
        full_bank(data=None).check(data="a" * 64)
    with pytest.raises(InputError, match="holds no checkpoints"):
        full_bank().check(tmp_path)
    with pytest.raises(BankMismatchError, match="none given"):
        full_bank().check(checkpoints=[])
    with pytest.raises(InputTypeError, match="list"):
        full_bank().check(checkpoints=states()[0])


def test_hashes():
    state = states()[0]
    assert checkpoint_hash(state) == checkpoint_hash(state_digest(state))
    with pytest.raises(InputTypeError, match="arrays of numbers"):
        data_hash(["a", "b"])
    assert data_hash(torch.ones(3).bfloat16()) != data_hash(torch.zeros(3).bfloat16())
    assert data_hash(np.eye(3).T) == data_hash(np.asfortranarray(np.eye(3)))
