"""Banks: their files byte by byte where it matters, damage, and refusal by hash."""

import hashlib
import json

import numpy as np
import pytest
import torch
from tests.evaluation.recipes import arrays, assert_equal, full_bank, states, write_weights

from trak.digests import state_digest
from trak.errors import BankCorruptedError, InputError, InputTypeError
from trak.evaluation import Bank, load_bank, load_checkpoints, save_bank


def test_a_bank_comes_back_as_it_was(tmp_path):
    bank = full_bank()
    save_bank(bank, tmp_path / "a")
    assert_equal(load_bank(tmp_path / "a"), bank)
    bare = Bank(**arrays())
    save_bank(bare, tmp_path / "b")
    assert_equal(load_bank(tmp_path / "b"), bare)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["bank.json", "truth.npz"]


def test_the_files_are_those_of_the_specification(tmp_path):
    bank = full_bank()
    save_bank(bank, tmp_path)
    manifest = json.loads((tmp_path / "bank.json").read_text())
    truth = (tmp_path / "truth.npz").read_bytes()
    expected = {
        "version": 1,
        "name": "toy",
        "n": 21,
        "targets": 4,
        "subsets": 6,
        "seeds": 2,
        "subset_size": None,  # the masks differ in size
        "seed_rule": "any",
        "recipe": {"epochs": 3},
        "data": "a" * 64,
        "checkpoints": 2,
        "checkpoint_hashes": ["0" * 32, "1" * 32],
        "accuracy": [0.5],
        "files": {"truth.npz": hashlib.sha256(truth).hexdigest()},
    }
    assert manifest == expected
    with np.load(tmp_path / "truth.npz", allow_pickle=False) as found:
        assert sorted(found) == ["examples", "masks", "n", "outputs", "seeds"]
        np.testing.assert_array_equal(found["masks"], np.packbits(bank.masks, axis=1))
        assert found["masks"].shape == (6, 3)
        assert found["outputs"].dtype == np.float32


def test_a_bank_of_the_benchmarks_is_read(tmp_path):
    """With weights and without the keys that came later."""
    made = states()
    write_weights(tmp_path, made)
    given = arrays()
    masks = np.packbits(given["masks"], axis=1)
    np.savez_compressed(tmp_path / "truth.npz", masks=masks, outputs=given["outputs"])
    files = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("truth.npz", "checkpoints.safetensors")
    }
    manifest = {
        "version": 1,
        "name": "toy",
        "n": 21,
        "targets": 4,
        "subsets": 6,
        "seeds": 2,
    }
    manifest |= {"subset_size": None, "mask_seed": 2023, "seed_rule": "words", "data": "d"}
    manifest |= {"recipe": {}, "checkpoints": 2, "accuracy": [1, 1], "files": files}
    (tmp_path / "bank.json").write_text(json.dumps(manifest))
    bank = load_bank(tmp_path)
    np.testing.assert_array_equal(bank.masks, given["masks"])
    np.testing.assert_array_equal(bank.outputs, given["outputs"])
    assert bank.checkpoints == tuple(state_digest(state) for state in made)
    assert bank.notes == {"mask_seed": 2023, "accuracy": [1, 1]}
    for found, state in zip(load_checkpoints(tmp_path), made, strict=True):
        assert set(found) == set(state)
        for name, value in state.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
    bank.check(checkpoints=made[1:], data="d")


def test_weights_in_the_folder_must_be_the_banks(tmp_path):
    made = states()
    write_weights(tmp_path, made)
    with pytest.raises(InputError, match="holds 2 checkpoints, which are not the 1"):
        save_bank(Bank(**arrays(), checkpoints=made[:1]), tmp_path)
    save_bank(Bank(**arrays(), checkpoints=made), tmp_path)
    assert load_bank(tmp_path).checkpoints == tuple(map(state_digest, made))
    manifest = json.loads((tmp_path / "bank.json").read_text())
    assert set(manifest["files"]) == {"truth.npz", "checkpoints.safetensors"}
    manifest["checkpoint_hashes"][0] = "f" * 32
    (tmp_path / "bank.json").write_text(json.dumps(manifest))
    with pytest.raises(BankCorruptedError, match="not those of the weights"):
        load_bank(tmp_path)


def test_saving_leaves_no_temporary_files_and_replaces(tmp_path):
    save_bank(full_bank(), tmp_path)
    save_bank(full_bank(name="new"), tmp_path)
    assert load_bank(tmp_path).name == "new"
    with pytest.raises(InputError, match="must hold JSON values"):
        save_bank(full_bank(recipe={"model": object()}), tmp_path)
    with pytest.raises(InputError, match="notes may not be called files"):
        save_bank(full_bank(notes={"files": 1}), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bank.json", "truth.npz"]
    assert load_bank(tmp_path).name == "new"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": np.ones((5, 21), bool)}, "subsets of outputs must be 5"),
        ({"masks": np.full((6, 21), 2)}, "0 and 1"),
        ({"outputs": np.full((6, 2, 4), np.nan)}, "got nan at subset 0, seed 0, target 0"),
        ({"seeds": np.arange(6)}, r"seeds must be integers of shape \(6, 2\)"),
        ({"examples": np.arange(20)}, r"examples must be integers of shape \(21,\)"),
        ({"examples": np.ones(21)}, "examples must be integers"),
        ({"checkpoints": ["abc"]}, "32 hexadecimal digits"),
        ({"checkpoints": "0" * 32}, "single one into a list"),
    ],
)
def test_banks_that_cannot_be_are_refused(changes, message):
    with pytest.raises((InputError, InputTypeError), match=message):
        full_bank(**changes)


def test_one_seed_without_an_axis():
    given = arrays(seeds=1)
    assert Bank(masks=given["masks"], outputs=given["outputs"][:, 0]).outputs.shape == (
        6,
        1,
        4,
    )


@pytest.mark.parametrize("bank", [None, "bank", {"masks": [[True]]}, np.ones(3)])
def test_only_banks_are_saved(bank, tmp_path):
    with pytest.raises(InputTypeError, match=r"bank must be a Bank, .* got (N|s|d|n)"):
        save_bank(bank, tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
