"""Ground truth of other projects: lists of indices, and files of masks and margins."""

import numpy as np
import pytest
import torch
from tests.evaluation import recipes
from tests.evaluation.recipes import arrays

from trak.errors import InputError, InputTypeError
from trak.evaluation import bank_from_indices, lds, masks_from_indices, read_trak_bank


def test_masks_from_indices():
    masks = masks_from_indices([[0, 2], torch.tensor([1])], 3)
    np.testing.assert_array_equal(masks, [[True, False, True], [False, True, False]])
    for bad, message in (
        ([[0, 3]], "from 0 to 2, rows of the scores, got from 0 to 3"),
        ([[-1]], "subset 0 must be integers"),
        ([[0], [1, 1]], "subset 1 name an example twice"),
        ([[0.5]], "must be integers"),
        ([[0, 1e300]], "must be integers"),
        ([[0, 1], [0, [1]]], "indices of subset 1 is no array"),
        ([[0, 1], []], r"indices of subset 1 must have .* none of them empty"),
    ):
        with pytest.raises(InputError, match=message):
            masks_from_indices(bad, 3)
    for masks in (np.eye(3, dtype=bool), torch.eye(3).bool(), [[True, False, True]]):
        with pytest.raises(InputTypeError, match="truth values. A mask goes.*flatnonzero"):
            masks_from_indices(masks, 3)


def test_bank_from_indices_is_the_pair_of_dattri():
    given = arrays()
    rng = np.random.default_rng(0)
    indices = torch.tensor(np.stack([rng.permutation(21)[:10] for _ in range(6)]))
    values = torch.tensor(given["outputs"][:, 0])
    bank = bank_from_indices(values, indices, 21)
    scores = rng.normal(size=(21, 4))
    found = lds(scores, bank.masks, bank.outputs, draws=5).per_target
    predicted = np.stack([scores[row].sum(axis=0) for row in indices.numpy()])
    for j in range(4):
        one = np.argsort(np.argsort(predicted[:, j]))
        other = np.argsort(np.argsort(values[:, j].numpy()))
        assert found[j] == pytest.approx(np.corrcoef(one, other)[0, 1])
    with pytest.raises(InputError, match="subsets of outputs must be 5"):
        bank_from_indices(values, indices[:5], 21)


@pytest.mark.parametrize("repeated", [True, False])
def test_masks_and_margins_of_trak_are_read(repeated, tmp_path):
    given = arrays()
    masks = given["masks"].astype(np.int64)
    rows = np.repeat(masks, 2, axis=0) if repeated else masks
    np.save(tmp_path / "mask.npy", rows)
    np.save(
        tmp_path / "val_margins.npy", given["outputs"].reshape(12, 4).astype(np.float16)
    )
    read = tmp_path / "mask.npy", tmp_path / "val_margins.npy"
    bank = read_trak_bank(*read, seeds=2, name="cifar2")
    np.testing.assert_array_equal(bank.masks, given["masks"])
    np.testing.assert_allclose(bank.outputs, given["outputs"], rtol=1e-3)
    assert bank.name == "cifar2"
    assert bank.checkpoints == ()
    with pytest.raises(InputError, match="seeds=3|are not 5 a subset"):
        read_trak_bank(*read, seeds=3 if repeated else 5)
    if repeated:
        with pytest.raises(InputError, match="Subsets 0 and 1 have the same mask"):
            read_trak_bank(*read)


def test_models_of_one_mask_that_lie_apart_are_no_subsets(tmp_path):
    masks = np.tile(np.eye(4, 9, dtype=bool), (2, 1))[[0, 1, 2, 3, 6, 5]]
    np.save(tmp_path / "mask.npy", masks)
    np.save(tmp_path / "margins.npy", np.ones((6, 3)))
    read = tmp_path / "mask.npy", tmp_path / "margins.npy"
    with pytest.raises(InputError, match="Subsets 2 and 4 have .* follow each other"):
        read_trak_bank(*read)
    with pytest.raises(InputError, match="equal in groups of seeds=2"):
        read_trak_bank(*read, seeds=2)
    np.save(tmp_path / "mask.npy", masks[:4])
    np.save(tmp_path / "margins.npy", np.ones((4, 3)))
    assert len(read_trak_bank(*read).masks) == 4


def test_other_files_are_no_bank_of_trak(tmp_path):
    np.save(tmp_path / "ok.npy", np.ones((4, 3)))
    torch.save(torch.ones(4, 3), tmp_path / "t.pt")
    np.save(tmp_path / "objects.npy", np.array([None]))
    for name in ("t.pt", "objects.npy"):
        with pytest.raises(InputError, match="weights_only=True"):
            read_trak_bank(tmp_path / name, tmp_path / "ok.npy")
    for name in ("absent.npy", ""):
        with pytest.raises(InputError, match="masks must be the path of a .npy file, and"):
            read_trak_bank(tmp_path / name, tmp_path / "ok.npy")
    for kind in ("no end", "too large", "no number"):
        (tmp_path / "damaged.npy").write_bytes(recipes.damaged_array(kind))
        with pytest.raises(InputError, match=r"damaged\.npy is no \.npy file of numbers"):
            read_trak_bank(tmp_path / "ok.npy", tmp_path / "damaged.npy")
    with pytest.raises(InputTypeError, match="margins must be a path, got 3"):
        read_trak_bank(tmp_path / "ok.npy", 3)
    np.save(tmp_path / "more.npy", np.ones((6, 3)))
    with pytest.raises(InputError, match="rows of masks must be 6, as in margins, got 4"):
        read_trak_bank(tmp_path / "ok.npy", tmp_path / "more.npy")
