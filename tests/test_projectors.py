"""Projectors against their written-out matrices, and the statistics they promise."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trak.blocks import ConvolvedBlock, DenseBlock, FactoredBlock, IndexedBlock
from trak.errors import InputError
from trak.projectors import (
    BasicProjector,
    BasicSingleBlockProjector,
    ChunkedCudaProjector,
    CudaProjector,
    FactoredProjector,
    HadamardProjector,
    MaskedProjector,
    NoOpProjector,
    ProjectionType,
    SparseProjector,
    make_projector,
    projection_costs,
)

KINDS = ["rademacher", "normal", "sparse", "sparse-3", "hadamard", "factored"]
SHAPES = {"w": (9, 12), "v": (5, 2, 3), "c": (10, 2, 3, 3), "e": (30, 6), "b": (7,)}
FACTORED = {
    "factored": {},
    "factored, both sides": {"rank": (3, 4)},
    "factored, wide and narrow": {"rank": (3, 1000)},
    "masked": {"rank": 4},
    "masked, default": {},
}


def make(kind, grad_dim, proj_dim, seed=0, layout=None):
    if kind == "factored":
        shapes = {"": grad_dim} if layout is None else layout
        named = {name: (size,) for name, size in shapes.items()}
        return FactoredProjector(named, proj_dim, seed, "cpu")
    if kind == "hadamard":
        return HadamardProjector(grad_dim, proj_dim, seed, device="cpu", layout=layout)
    if kind.startswith("sparse"):
        nonzeros = int(kind.partition("-")[2] or 1)
        return SparseProjector(
            grad_dim, proj_dim, seed, device="cpu", nonzeros=nonzeros, layout=layout
        )
    return BasicProjector(grad_dim, proj_dim, seed, kind, "cpu", layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_projection_is_the_product_with_the_matrix(kind, dtype):
    layout = {"a": 30, "b": 1, "c": 200}
    projector = make(kind, 231, 37, seed=7, layout=layout)
    grads = {name: torch.randn(4, size).to(dtype) for name, size in layout.items()}
    expected = sum(
        grads[name].double() @ projector.matrix(name, size, 3).double()
        for name, size in layout.items()
    )
    found = projector.project(grads, model_id=3)
    assert found.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()
    side_by_side = torch.cat(list(grads.values()), dim=1)
    assert torch.equal(projector.project(side_by_side, model_id=3), found)


@pytest.mark.parametrize("kind", KINDS)
def test_factored_blocks_project_like_dense_ones(kind):
    projector = make(kind, 24, 10, layout={"w": 24})
    block = FactoredBlock(
        "w",
        activations=torch.randn(3, 5, 4, dtype=torch.float64),
        backprops=torch.randn(3, 5, 6, dtype=torch.float64),
    )
    by_hand = torch.einsum("bso,bsi->boi", block.backprops, block.activations).flatten(1)
    out = torch.zeros(3, 10, dtype=torch.float64)
    projector.sink(out, model_id=0)(block)
    torch.testing.assert_close(out, by_hand @ projector.matrix("w", 24, 0).double())


@pytest.mark.parametrize("kind", KINDS)
@given(split=st.integers(1, 8), width=st.integers(3, 60), seed=st.integers(-5, 5))
@settings(max_examples=15, deadline=None)
def test_rows_do_not_depend_on_the_batch_split(kind, split, width, seed):
    grads = torch.randn(8, width, dtype=torch.float64)
    projector = make(kind, width, 9, seed)
    whole = projector.project(grads, model_id=1)
    parts = [projector.project(part, model_id=1) for part in grads.split(split)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_block_size_does_not_matter(kind, monkeypatch):
    grads = torch.randn(3, 500, dtype=torch.float64)
    expected = make(kind, 500, 16).project(grads, model_id=0)
    monkeypatch.setattr("trak.projectors.dense._BLOCK_ENTRIES", 16 * 7)
    monkeypatch.setattr("trak.projectors.sparse._BLOCK_ROWS", 9)
    monkeypatch.setattr("trak.projectors.dense._CACHE_BYTES", 0)
    monkeypatch.setattr("trak.projectors.sparse._CACHE_BYTES", 0)
    found = make(kind, 500, 16).project(grads, model_id=0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_do_not_depend_on_dtype(kind):
    identity = torch.eye(40)
    single = make(kind, 40, 12).project(identity, model_id=0)
    double = make(kind, 40, 12).project(identity.double(), model_id=0)
    assert torch.equal(single.double(), double)


@pytest.mark.parametrize("kind", FACTORED)
def test_seed_checkpoint_and_name_each_give_another_factored_matrix(kind):
    shapes = {"a": (30, 40), "b": (30, 40)}
    options = FACTORED[kind] or {"rank": 8}
    cls = MaskedProjector if kind.startswith("masked") else FactoredProjector

    def matrix(seed, name, model_id):
        return cls(shapes, 20, seed, "cpu", **options).matrix(name, 1200, model_id)

    matrices = [matrix(0, "a", 0), matrix(1, "a", 0), matrix(0, "a", 1), matrix(0, "b", 0)]
    for first, second in itertools.combinations(matrices, 2):
        assert not torch.equal(first, second)
    assert torch.equal(matrix(0, "a", 0), matrices[0])


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_seed_checkpoint_and_name_each_give_another_matrix(kind):
    layout = {"a": 50}
    matrices = [
        make(kind, 50, 20, 0, layout).matrix("a", 50, 0),
        make(kind, 50, 20, 1, layout).matrix("a", 50, 0),
        make(kind, 50, 20, 0, layout).matrix("a", 50, 1),
        make(kind, 50, 20, 0, layout).matrix("b", 50, 0),
    ]
    for j, first in enumerate(matrices):
        for second in matrices[j + 1 :]:
            assert (first != second).float().mean() > 0.05
    again = make(kind, 50, 20, 0, layout)
    again.project(torch.randn(2, 50), model_id=9)
    assert torch.equal(again.matrix("a", 50, 0), matrices[0])


@pytest.mark.parametrize("kind", KINDS)
def test_one_projector_serves_checkpoints_in_turn(kind):
    grads = torch.randn(2, 50)
    projector = make(kind, 50, 20)
    first = [projector.project(grads, model_id=c) for c in (0, 1, 0)]
    projector.free_memory()
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(projector.project(grads, model_id=1), first[1])


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_have_the_promised_mean_and_variance(kind):
    """400 seeds: the mean within 5 standard errors, the variance within 40 %.

    The sample variance of 400 draws has a relative standard error of about 0.08 here
    (kurtosis near 3 to 4), so that 0.4 is five of them: both fail less than once in a
    million.
    """
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 120, dtype=torch.float64, generator=rng)
    y = y + 0.7 * x
    k = 24
    pair = torch.stack([x, y])
    products = []
    for seed in range(400):
        u, v = make(kind, 120, k, seed).project(pair, model_id=0)
        products.append(float(u @ v) / k)
    exact = float(x @ y)
    nonzeros = int(kind.partition("-")[2] or 1)
    variance = float(x @ x * (y @ y) + exact**2)
    if kind != "normal":
        variance -= 2 * float((x**2 * y**2).sum())
    if kind == "hadamard":  # 24 places of 128 without replacement
        variance *= 1 - 24 / 128
    variance /= k
    assert abs(np.mean(products) - exact) < 5 * (variance / 400) ** 0.5
    assert np.var(products) == pytest.approx(variance, rel=0.4)
    assert nonzeros in (1, 3)


def make_factored(kind, proj_dim=20, seed=0, **options):
    cls = MaskedProjector if kind.startswith("masked") else FactoredProjector
    return cls(SHAPES, proj_dim, seed, "cpu", **(FACTORED[kind] | options))


def blocks(dtype=torch.float64):
    """One block of every kind, of the parameters in `SHAPES`."""
    torch.manual_seed(0)
    like = {"dtype": dtype}
    yield FactoredBlock("w", torch.randn(3, 4, 12, **like), torch.randn(3, 4, 9, **like))
    yield DenseBlock("v", torch.randn(3, 30, **like))
    yield DenseBlock("b", torch.randn(3, 7, **like))
    tokens = torch.randint(0, 30, (3, 8))
    yield IndexedBlock("e", tokens, torch.randn(3, 8, 6, **like), 30)
    images, seen = torch.randn(3, 2, 6, 8, **like), torch.randn(3, 10, 2, 3, **like)
    yield ConvolvedBlock("c", images, seen, (3, 3), (2, 2), (1, 1))


@pytest.mark.parametrize("kind", [*KINDS, *FACTORED])
def test_every_block_projects_like_its_dense_form(kind):
    sizes = {name: math.prod(shape) for name, shape in SHAPES.items()}
    if kind in FACTORED:
        projector = make_factored(kind)
    else:
        projector = make(kind, sum(sizes.values()), 20, layout=sizes)
    total = torch.zeros(3, 20, dtype=torch.float64)
    for block in blocks():
        out = torch.zeros(3, 20, dtype=torch.float64)
        projector.sink(out, model_id=2)(block)
        dense = block.dense().gradient
        matrix = projector.matrix(block.name, dense.shape[1], 2).double()
        torch.testing.assert_close(out, dense @ matrix)
        total += out
    gathered = torch.zeros(3, 20, dtype=torch.float64)
    with projector.gathering(gathered, model_id=2) as sink:
        for block in blocks():
            sink(block)
    torch.testing.assert_close(gathered, total)


@pytest.mark.parametrize("kind", FACTORED)
def test_factored_entries_have_mean_0_and_variance_1(kind):
    """Second moments over 300 seeds, within 5 standard errors of their mean."""
    matrices = [
        torch.cat([make_factored(kind, seed=s).matrix(n, math.prod(d), 1)])
        for n, d in SHAPES.items()
        for s in range(60)
    ]
    squares = torch.stack([m.square().mean() for m in matrices])
    means = torch.stack([m.mean() for m in matrices])
    assert abs(squares.mean() - 1) < 5 * squares.std() / len(squares) ** 0.5 + 1e-6
    assert abs(means.mean()) < 5 * means.std() / len(means) ** 0.5


@pytest.mark.parametrize("kind", FACTORED)
def test_factored_inner_products_have_the_right_mean(kind):
    """500 seeds, within 5 standard errors: fails less than once in a million."""
    torch.manual_seed(1)
    x, y = torch.randn(2, 9, 12, dtype=torch.float64)
    pair = torch.stack([x, y + 0.5 * x]).flatten(1)
    exact = float(pair[0] @ pair[1])
    found = []
    for seed in range(500):
        out = torch.zeros(2, 20, dtype=torch.float64)
        make_factored(kind, seed=seed).add(DenseBlock("w", pair), out, 0)
        found.append(float(out[0] @ out[1]) / 20)
    assert abs(np.mean(found) - exact) < 5 * np.std(found) / 500**0.5


def test_the_shorter_side_is_kept_and_small_matrices_are_hashed_whole():
    shapes = {"ffn": (1024, 256), "out": (256, 1024), "head": (2, 256), "norm": (256,)}
    sides = FactoredProjector(shapes, 1024, device="cpu").sides
    assert {name: side.ranks for name, side in sides.items()} == {
        "ffn": (16, None),
        "out": (None, 16),
        "head": (None, None),
        "norm": (None, None),
    }
    # 514 entries of the shorter sides: 128 times these are four for each column
    assert FactoredProjector(shapes, 16384, device="cpu").sides["ffn"].ranks == (128, None)
    wide = {f"{j}": (1024, 256) for j in range(40)}
    assert FactoredProjector(wide, 16384, device="cpu").sides["7"].ranks == (32, None)
    assert FactoredProjector(shapes, 2**17, device="cpu").sides["ffn"].ranks == (None, None)
    both = FactoredProjector(shapes, 64, device="cpu", rank=(8, 300)).sides
    assert both["ffn"].ranks == (8, None)
    assert both["out"].ranks == (8, 300)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, (3,), (3, 0), "8"])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(InputError, match="rank"):
        FactoredProjector({"w": (4, 4)}, 8, device="cpu", rank=rank)


def test_factored_projectors_name_a_parameter_of_another_shape():
    projector = FactoredProjector({"w": (4, 4)}, 8, device="cpu")
    with pytest.raises(InputError, match=r"'w' has 15 scalars.*\(4, 4\)"):
        projector.add(DenseBlock("w", torch.randn(2, 15)), torch.zeros(2, 8), 0)


@pytest.mark.parametrize("nonzeros", [1, 3])
def test_sparse_rows_have_one_entry_in_each_part(nonzeros):
    matrix = SparseProjector(70, 20, 0, device="cpu", nonzeros=nonzeros).matrix("", 70, 0)
    assert ((matrix != 0).sum(1) == nonzeros).all()
    edges = [part * 20 // nonzeros for part in range(nonzeros)] + [20]
    for start, stop in itertools.pairwise(edges):
        part = matrix[:, start:stop]
        assert ((part != 0).sum(1) == 1).all()
        assert torch.allclose(part[part != 0].abs(), torch.tensor((stop - start) ** 0.5))


def test_zero_stretches_are_skipped_without_changing_the_result():
    width = (1 << 16) + 77
    grads = torch.zeros(3, width, dtype=torch.float64)
    grads[:, 100:300] = torch.randn(3, 200, dtype=torch.float64)
    grads[1, -5:] = 1.0
    projector = SparseProjector(width, 32, 0, device="cpu")
    expected = grads @ projector.matrix("", width, 0).double()
    torch.testing.assert_close(projector.project(grads, 0), expected)
    grads[2, 40_000] = torch.nan
    assert torch.isnan(projector.project(grads, 0)[2]).any()


def test_the_default_is_dense_for_small_and_sparse_for_large_models():
    cpu = torch.device("cpu")
    small = make_projector({"a": 1000}, 2048, 0, cpu)
    large = make_projector({"a": 4_000_000}, 1024, 0, cpu)
    layers = make_projector({"a": (2000, 2000)}, 1024, 0, cpu)
    assert small.proj_type == "rademacher"
    assert large.proj_type == "sparse"
    assert layers.proj_type == "factored"


@pytest.mark.parametrize("kind", [k for k in ProjectionType if k.value != "leading"])
def test_projectors_have_names(kind):
    projector = make_projector(
        {"a": (20, 30), "b": 5}, 16, 0, torch.device("cpu"), kind.value
    )
    assert projector.proj_type == kind
    assert projector.settings()["kind"] == kind.value
    assert projector.project(torch.randn(2, 605), model_id=0).shape == (2, 16)


def test_a_projector_name_that_is_not_known_is_refused():
    with pytest.raises(InputError, match=r"'factored'.*got 'fast'"):
        make_projector({"a": 10}, 8, 0, torch.device("cpu"), "fast")


def test_costs_grow_with_what_they_should():
    shapes = {"a": (512, 512), "b": (512,)}
    costs = projection_costs(shapes, 1024, positions=128)
    assert costs["factored"] < costs["sparse"] < costs["rademacher"]
    assert projection_costs(shapes, 2048, positions=128)["sparse"] == costs["sparse"]
    assert set(projection_costs({"b": (512,)}, 1024)) == {"rademacher", "sparse"}


@pytest.mark.parametrize(
    ("width", "proj_dim", "kind"),
    [
        (64, 512, "rademacher"),
        (128, 512, "sparse"),
        (128, 64, "rademacher"),
        (768, 4096, "factored"),
    ],
)
def test_what_nobody_notices_is_chosen_by_quality(width, proj_dim, kind):
    made = make_projector({"w": (width, width)}, proj_dim, 0, torch.device("cpu"))
    assert made.proj_type == kind


@pytest.mark.parametrize("proj_dim", [1, 7, 512, 513, 1000])
def test_any_proj_dim_works(proj_dim):
    for kind in KINDS[:3]:
        assert make(kind, 50, proj_dim).project(torch.randn(2, 50), 0).shape == (
            2,
            proj_dim,
        )


@pytest.mark.parametrize("proj_dim", [0, -3, 2.5, True, "512", None])
def test_impossible_proj_dims_are_refused(proj_dim):
    with pytest.raises(InputError, match="proj_dim"):
        make_projector({"a": 10}, proj_dim, 0, torch.device("cpu"))


def test_wrong_widths_kinds_and_nonzeros_are_refused():
    with pytest.raises(InputError, match="width 50, got 49"):
        make("normal", 50, 8).project(torch.randn(2, 49), model_id=0)
    with pytest.raises(InputError, match="'cauchy'"):
        BasicProjector(50, 8, 0, "cauchy", "cpu")
    for nonzeros in (9, 1.5, 0):
        with pytest.raises(InputError, match="nonzeros must be"):
            SparseProjector(50, 8, 0, device="cpu", nonzeros=nonzeros)
    with pytest.raises(InputError, match="layout"):
        make("normal", 50, 8, layout={"a": 49})


def test_single_block_projector_is_the_same_projection():
    grads = {"w": torch.randn(3, 4, 5), "b": torch.randn(3, 4)}
    one = BasicSingleBlockProjector(24, 6, 0, "normal", "cpu").project(grads, model_id=2)
    other = BasicProjector(24, 6, 0, "normal", "cpu", block_size=5).project(
        grads, model_id=2
    )
    assert torch.equal(one, other)


def test_noop_projector_flattens_and_nothing_else():
    grads = {"w": torch.randn(3, 4, 5), "b": torch.randn(3), "v": torch.randn(3, 2)}
    rows = NoOpProjector().project(grads, model_id=0)
    assert torch.equal(
        rows, torch.cat([grads["w"].flatten(1), grads["b"][:, None], grads["v"]], 1)
    )
    assert torch.equal(NoOpProjector().project(rows, model_id=5), rows)


@pytest.mark.parametrize("batch", [1, 50])
def test_chunks_may_end_anywhere_and_batches_be_of_any_size(batch):
    sizes = [10, 25, 5]
    parts = [BasicProjector(s, 6, seed, "normal", "cpu") for seed, s in enumerate(sizes)]
    chunked = ChunkedCudaProjector(parts, 25, sizes, 8, "cpu", torch.float32)
    grads = {"w": torch.randn(batch, 6, 5), "v": torch.randn(batch, 10)}
    rows = torch.cat([g.flatten(1) for g in grads.values()], 1)
    expected = sum(
        p.project(piece, 3)
        for p, piece in zip(parts, rows.split(sizes, dim=1), strict=True)
    )
    torch.testing.assert_close(chunked.project(grads, model_id=3), expected)
    with pytest.raises(InputError, match="40 scalars"):
        chunked.project(rows[:, 1:], model_id=3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without CUDA")
@pytest.mark.parametrize("device", [None, "cuda", "cpu"])
def test_cuda_projector_says_what_it_needs(device):
    with pytest.raises(InputError, match=r"needs a CUDA device.*BasicProjector"):
        CudaProjector(512, 512, 0, "rademacher", device, max_batch_size=8)


def test_dense_blocks_are_their_own_dense_form():
    block = DenseBlock("w", torch.randn(2, 3))
    assert block.dense() is block
