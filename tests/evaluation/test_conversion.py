"""What counts as an array, and what is refused before anybody computes with it."""

import hashlib

import numpy as np
import pytest
import torch

from trak.errors import InputError, InputTypeError
from trak.evaluation import Bank, data_hash, group_scores, lds
from trak.evaluation.arrays import as_masks
from trak.evaluation.conversion import as_numpy

VALUES = torch.arange(12.0).reshape(4, 3) / 8  # all dtypes below hold them

KINDS = {
    "part of a graph": lambda t: t.clone().requires_grad_(),
    "bfloat16": torch.Tensor.bfloat16,
    "bfloat16 in a graph": lambda t: t.bfloat16().requires_grad_(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "sparse": torch.Tensor.to_sparse,
    "sparse in a graph": lambda t: t.to_sparse().requires_grad_(),
    "negated": lambda t: torch.complex(t, -t).conj().imag,
    "a view": lambda t: t.repeat(1, 2)[:, : t.shape[1]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_all_kinds_alone_and_in_lists(kind):
    made = KINDS[kind](VALUES)
    rows = [KINDS[kind](row[None])[0] for row in VALUES]
    for form in (made, rows, tuple(rows), [rows[0], *VALUES[1:].numpy()]):
        np.testing.assert_array_equal(as_numpy("x", form), VALUES.numpy())
    if "sparse" not in kind:
        cells = [list(row) for row in made]  # tensors without axes
        np.testing.assert_array_equal(as_numpy("x", cells), VALUES.numpy())


def test_lists_of_tensors_of_a_graph_are_scores():
    masks = np.array([[True, False, True, True], [False, True, False, True]])
    rows = [row.clone().requires_grad_() for row in VALUES]
    np.testing.assert_array_equal(
        group_scores(rows, masks), masks.astype(float) @ VALUES.double().numpy()
    )


def test_conjugated_tensors_are_what_they_mean():
    made = torch.complex(VALUES, VALUES).conj()
    np.testing.assert_array_equal(as_numpy("x", [*made]), VALUES.numpy() * (1 - 1j))


@pytest.mark.parametrize("inside_a_list", [False, True])
def test_tensors_without_numbers_are_refused(inside_a_list):
    empty = torch.zeros(4, 3, device="meta")
    with pytest.raises(InputTypeError, match="scores is a .* on meta, whose numbers"):
        group_scores([*empty] if inside_a_list else empty, np.ones((2, 4)))


def test_masked_entries_are_refused():
    scores, masks, outputs = np.eye(4), np.eye(4), np.random.default_rng(0).random((4, 4))
    whole = np.ma.masked_invalid(outputs)
    assert (
        lds(scores, masks, whole, draws=5).value
        == lds(scores, masks, outputs, draws=5).value
    )
    whole[1, 2] = np.ma.masked
    with pytest.raises(InputError, match="outputs has 1 masked entries"):
        lds(scores, masks, whole, draws=5)
    with pytest.raises(InputError, match="outputs has 1 masked entries"):
        lds(scores, masks, [*whole], draws=5)
    for name in ("masks", "outputs"):
        given = {"masks": masks, "outputs": outputs}
        given[name] = np.ma.masked_equal(given[name], given[name][0, 0])
        with pytest.raises(InputError, match=f"{name} has . masked entries"):
            Bank(**given)
    with pytest.raises(InputError, match="data has 1 masked entries"):
        data_hash(whole)


@pytest.mark.parametrize("form", [list, lambda t: t, torch.Tensor.to_sparse])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_data_hash_is_that_of_the_bytes(form, dtype):
    made = VALUES.to(dtype)
    expected = hashlib.sha256(made.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert data_hash(form(made)) == expected
    assert data_hash(form(made.clone().requires_grad_())) == expected


def test_data_hash_of_more_kinds():
    eighth = VALUES.to(torch.float8_e5m2)
    expected = hashlib.sha256(eighth.view(torch.uint8).numpy().tobytes()).hexdigest()
    assert data_hash(eighth) == expected
    turned = torch.complex(VALUES, VALUES).conj()
    assert data_hash(turned) == data_hash(turned.resolve_conj().numpy())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([[1, 2], [3]], InputError, "data is no array.*lists that nest to one shape"),
        ([torch.ones(2), torch.ones(3)], InputError, "data is no array"),
        (
            np.array([None, 3]),
            InputTypeError,
            "arrays of numbers, got ndarray of dtype obj",
        ),
        ({"x": 3}, InputTypeError, "arrays of numbers, got dict"),
        (None, InputTypeError, "arrays of numbers, got NoneType"),
        (torch.ones(3, device="meta"), InputTypeError, "whose numbers cannot be read"),
        (np.array(["2026-01-01"], dtype="M8[D]"), InputTypeError, "arrays of numbers"),
    ],
)
def test_what_has_no_hash_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        data_hash(np.ones(2), data)


@pytest.mark.parametrize("masks", [np.array([[None] * 4] * 4), np.full((4, 4), "1")])
def test_masks_of_no_numbers_are_refused(masks):
    with pytest.raises(InputError, match="masks must hold booleans, or 0 and 1"):
        Bank(masks=masks, outputs=np.ones((4, 4)))


@pytest.mark.parametrize("name", ["seeds", "examples"])
def test_ragged_lists_of_hashes_are_refused(name):
    with pytest.raises(InputError, match=f"{name} is no array"):
        Bank(masks=np.eye(4), outputs=np.ones((4, 1, 4)), **{name: [[1], [2, 3]]})


def test_lists_of_numbers_are_taken_as_they_are(monkeypatch):
    plain = [[1, 2.5], [True, 3]]
    np.testing.assert_array_equal(as_numpy("x", plain), np.array(plain))
    endless = [1.0]
    endless.append(endless)
    with pytest.raises(InputError, match="nests without end"):
        as_numpy("x", endless)


def test_truth_values_of_tables():
    mask = np.array([[True, False], [False, np.True_]], dtype=object)
    found = as_masks("masks", mask, axes=("subset", "example"))
    assert found.dtype == np.bool_
    assert found.tolist() == [[True, False], [False, True]]
    with pytest.raises(InputError, match="booleans, or 0 and 1"):
        as_masks("masks", np.array([[True, None]], dtype=object), axes=("a", "b"))
