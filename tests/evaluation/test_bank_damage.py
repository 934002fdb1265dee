"""Banks whose files are damaged, or hold what no bank may hold."""

import hashlib
import io
import json
import logging
import os

import numpy as np
import pytest
from tests.evaluation.recipes import arrays, assert_equal, full_bank

from trak.errors import BankCorruptedError, InputTypeError
from trak.evaluation import Bank, load_bank, load_checkpoints, save_bank


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
    with caplog.at_level(logging.WARNING, logger="trak"):  # other tests set its level
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
