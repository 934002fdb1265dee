"""Banks: their files byte by byte where it matters, damage, and refusal by hash."""

import dataclasses
import hashlib
import io
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests import cases, runs
from tests.evaluation import recipes

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
    load_checkpoints,
    masks_from_indices,
    save_bank,
)


def arrays(subsets=6, n=21, seeds=2, m=4):
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(subsets, seeds, m)).astype(np.float32)
    return {"masks": rng.random((subsets, n)) < 0.5, "outputs": outputs}


def full_bank(**changes):
    given = {
        **arrays(),
        "name": "toy",
        "seeds": np.arange(12).reshape(6, 2),
        "seed_rule": "any",
        "recipe": {"epochs": 3},
        "data": "a" * 64,
        "examples": np.arange(1, 22),
        "checkpoints": ("0" * 32, "1" * 32),
        "notes": {"accuracy": [0.5]},
        **changes,
    }
    return Bank(**given)


def states(count=2):
    torch.manual_seed(0)
    return [
        {
            "weight": torch.randn(3, 2),
            "half": torch.randn(2).bfloat16(),
            "single": torch.tensor(1.5, dtype=torch.float64),
            "steps": torch.tensor([j, 7]),
            "flags": torch.tensor([True, False]),
            "empty": torch.zeros(0, 3),
        }
        for j in range(count)
    ]


def write_weights(folder, made):
    folder.mkdir(exist_ok=True)
    tensors = {f"{j}/{k}": v for j, state in enumerate(made) for k, v in state.items()}
    save_file(tensors, folder / "checkpoints.safetensors")


def assert_equal(one, other):
    for field in dataclasses.fields(Bank):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name


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


def edit(folder, **changes):
    path = folder / "bank.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def as_folder(path):
    path.unlink()
    path.mkdir()


def rewrite(folder, content):
    (folder / "truth.npz").write_bytes(content)
    edit(folder, files={"truth.npz": hashlib.sha256(content).hexdigest()})


def encoded(write, *given, **arrays):
    file = io.BytesIO()
    write(file, *given, **arrays)
    return file.getvalue()


def with_dtype(folder, **dtypes):
    with np.load(folder / "truth.npz") as truth:
        given = {
            name: array.astype(dtypes.get(name, array.dtype))
            for name, array in truth.items()
        }
    rewrite(folder, encoded(np.savez, **given))


DAMAGE = {
    "describes no bank": lambda f: (f / "bank.json").unlink(),
    "describes no bank.*JSON": lambda f: (f / "bank.json").write_text("{"),
    "describes no bank.*version": lambda f: (f / "bank.json").write_text("{}"),
    "version 2, this reads 1": lambda f: edit(f, version=2),
    "truth.npz is lost": lambda f: (f / "truth.npz").unlink(),
    "truth.npz is not the file": lambda f: (f / "truth.npz").write_bytes(b"PK"),
    "must list truth.npz": lambda f: edit(f, files={}),
    r"lists \['/etc/passwd'": lambda f: edit(f, files={"/etc/passwd": "", "truth.npz": ""}),
    "bank.json says": lambda f: edit(f, targets=5),
    "contradicts itself.*name": lambda f: (f / "bank.json").write_text(
        json.dumps({
            k: v
            for k, v in json.loads((f / "bank.json").read_text()).items()
            if k != "name"
        })
    ),
    "contradicts itself": lambda f: edit(f, n=22),
    "describes no bank.*iterable": lambda f: edit(f, files=3),
    "lists.*'3'": lambda f: edit(f, files=[[3, ""], ["x", ""]]),
    "truth.npz cannot be read": lambda f: as_folder(f / "truth.npz"),
    "hold . to .* subset_size = 10": lambda f: edit(f, subset_size=10),
    "subset_size = 'half'": lambda f: edit(f, subset_size="half"),
    "seed_rule must be a text, got 3": lambda f: edit(f, seed_rule=3),
    "no archive of arrays.*No data": lambda f: rewrite(f, b""),
    "no archive of arrays.*BadZip": lambda f: rewrite(f, b"PK\x03\x04 and no more"),
    "no archive of arrays": lambda f: rewrite(f, encoded(np.save, np.ones(3))),
    "outputs must be float32 or float16, got >f8": lambda f: with_dtype(f, outputs=">f8"),
    "outputs must be float32 or float16, got int64": lambda f: with_dtype(f, outputs="i8"),
    "seeds must be int64, got int32": lambda f: with_dtype(f, seeds="i4"),
    "examples must be int64, got float64": lambda f: with_dtype(f, examples="f8"),
    "masks must be uint8, got bool": lambda f: with_dtype(f, masks="?"),
    "contradicts itself.*'masks'": lambda f: rewrite(f, encoded(np.savez)),
}


@pytest.mark.parametrize("n", [19, 20, 22, 24])
def test_another_number_of_examples_is_refused(n, tmp_path):
    given = arrays()
    given["masks"][:, 18:] = False  # so that the last byte shows no example
    save_bank(Bank(masks=given["masks"], outputs=given["outputs"]), tmp_path)
    assert load_bank(tmp_path).n == 21
    edit(tmp_path, n=n)
    with pytest.raises(BankCorruptedError, match=f"for n = 21, bank.json says n = {n}"):
        load_bank(tmp_path)


@pytest.mark.parametrize("n", [21, 23])
def test_without_a_second_record_suspicious_numbers_are_told(n, tmp_path, caplog):
    save_bank(Bank(**arrays()), tmp_path)
    with np.load(tmp_path / "truth.npz") as truth:
        given = {
            name: array for name, array in truth.items() if name in {"masks", "outputs"}
        }
    rewrite(tmp_path, encoded(np.savez, **given))
    edit(tmp_path, n=n)
    assert load_bank(tmp_path).n == n
    assert ("no subset holds an example after number 20" in caplog.text) == (n == 23)


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_noticed(message, tmp_path):
    save_bank(full_bank(), tmp_path)
    load_bank(tmp_path)
    DAMAGE[message](tmp_path)
    with pytest.raises(BankCorruptedError, match=message):
        load_bank(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", ">f4"])
def test_numbers_that_float32_holds_are_read(dtype, tmp_path):
    bank = full_bank(outputs=arrays()["outputs"].astype(np.float16))
    save_bank(bank, tmp_path)
    with_dtype(tmp_path, outputs=dtype)
    assert_equal(load_bank(tmp_path), bank)


def test_paths_must_be_paths(tmp_path):
    for call in (load_bank, load_checkpoints, lambda f: save_bank(full_bank(), f)):
        with pytest.raises(InputTypeError, match="folder must be a path, got 3"):
            call(3)
    (tmp_path / "checkpoints.safetensors").mkdir()
    with pytest.raises(BankCorruptedError, match="is no safetensors file.*directory"):
        load_checkpoints(tmp_path)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_objects_in_a_bank_are_refused(tmp_path):
    save_bank(full_bank(), tmp_path)
    outputs = np.full((6, 2, 4), Harmful(tmp_path / "ran"), dtype=object)
    np.savez(tmp_path / "truth.npz", masks=np.zeros((6, 3), np.uint8), outputs=outputs)
    digest = hashlib.sha256((tmp_path / "truth.npz").read_bytes()).hexdigest()
    edit(tmp_path, files={"truth.npz": digest})
    with pytest.raises(BankCorruptedError, match="truth.npz is no archive of arrays"):
        load_bank(tmp_path)
    assert not (tmp_path / "ran").exists()


ENTRY = b'{"dtype":"%s","shape":[2],"data_offsets":[0,%d]}'


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"[]", b""),
        (b"\xff", b""),
        (b'{"0/a":' + ENTRY % (b"F32", 8) + b"}", b"1234"),  # the end is missing
        (b'{"0/a":' + ENTRY % (b"F32", 4) + b"}", b"1234"),  # too few for the shape
        (b'{"0/a":' + ENTRY % (b"X", 2) + b"}", b"12"),
        (b'{"a":' + ENTRY % (b"U8", 2) + b"}", b"12"),  # of no checkpoint
    ],
)
def test_damaged_weights_are_refused(header, body, tmp_path):
    path = tmp_path / "checkpoints.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    with pytest.raises(BankCorruptedError):
        load_checkpoints(tmp_path)
    good = b'{"0/a":' + ENTRY % (b"U8", 2) + b"}"
    path.write_bytes(len(good).to_bytes(8, "little") + good + b"12")
    assert load_checkpoints(tmp_path)[0]["a"].tolist() == [49, 50]


def test_no_weights(tmp_path):
    with pytest.raises(BankCorruptedError, match="came without weights"):
        load_checkpoints(tmp_path)


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
