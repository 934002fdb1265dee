"""Entries of projections, written anew from docs/numerics.md alone, in plain integers."""

import hashlib
import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest

from trak.projectors import (
    BasicProjector,
    FactoredProjector,
    HadamardProjector,
    MaskedProjector,
    SparseProjector,
)

SEED, CHECKPOINT, NAME = 7, 3, "layer.weight"
MULTIPLIERS, WEYL, MASK = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF
LEVELS = np.array([NormalDist().inv_cdf((i + 0.5) / 2**16) for i in range(2**16)])


def philox(counter, key):
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        one, other = MULTIPLIERS[0] * x0, MULTIPLIERS[1] * x2
        x0, x1 = (other >> 32) ^ x1 ^ k0, other & MASK
        x2, x3 = (one >> 32) ^ x3 ^ k1, one & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return x0, x1, x2, x3


def words(kind, row, group, name=NAME):
    label = f"philox4x32-10/1|{kind}|{SEED}|{CHECKPOINT}|{name}".encode()
    digest = hashlib.blake2b(label, digest_size=16).digest()
    d = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return philox((row, group, d[2], d[3]), (d[0], d[1]))


def rademacher(kind, rows, columns):
    def entry(row, c):
        word = words(kind, row, c // 128)[(c % 128) // 32]
        return 1.0 if word >> (c % 32) & 1 else -1.0

    return np.array([[entry(row, c) for c in range(columns)] for row in range(rows)])


def normal(rows, columns):
    def entry(row, c):
        word = words("normal", row, c // 8)[(c % 8) // 2]
        return LEVELS[word >> 16 if c % 2 else word & 0xFFFF]

    found = [[entry(row, c) for c in range(columns)] for row in range(rows)]
    return np.array(found) / math.sqrt((LEVELS**2).mean())


def bucket_and_sign(kind, row, part, width):
    word = words(kind, row // 4, part)[row % 4]
    return ((word >> 1) * width) >> 31, 1.0 if word & 1 else -1.0


def sparse(kind, rows, columns, nonzeros=1):
    edges = [part * columns // nonzeros for part in range(nonzeros + 1)]
    matrix = np.zeros((rows, columns))
    for row in range(rows):
        for part, (start, stop) in enumerate(pairwise(edges)):
            column, sign = bucket_and_sign(kind, row, part, stop - start)
            matrix[row, start + column] = sign * math.sqrt(stop - start)
    return matrix


def places(kind, size, count, name=NAME):
    drawn = [words(kind, row, 0, name) for row in range(size)]
    return sorted(range(size), key=lambda row: (drawn[row][0] << 31) ^ drawn[row][1])[
        :count
    ]


def hadamard(rows, columns, padded):
    signs = [bucket_and_sign("hadamard-signs", row, 0, 2)[1] for row in range(rows)]
    kept = places("hadamard-places", padded, columns, f"0 {NAME}")
    return np.array([
        [s * (-1) ** (j & c).bit_count() for c in kept] for j, s in enumerate(signs)
    ])


def masked(kind, size, rank):
    matrix = np.zeros((size, rank))
    matrix[places(kind, size, rank), range(rank)] = math.sqrt(size)
    return matrix


def two_sided(left, right, columns):
    hashed = sparse("factored-hash", left.shape[1] * right.shape[1], columns)
    return np.kron(left, right) @ hashed / math.sqrt(left.shape[1] * right.shape[1])


def options(rows):
    return {"device": "cpu", "layout": {NAME: rows}}


CASES = {
    "rademacher": (
        lambda: BasicProjector(9, 150, SEED, "rademacher", **options(9)),
        lambda: rademacher("rademacher", 9, 150),
    ),
    "normal": (
        lambda: BasicProjector(9, 20, SEED, "normal", **options(9)),
        lambda: normal(9, 20),
    ),
    "sparse": (
        lambda: SparseProjector(30, 10, SEED, nonzeros=3, **options(30)),
        lambda: sparse("sparse", 30, 10, 3),
    ),
    "hadamard": (
        lambda: HadamardProjector(50, 12, SEED, **options(50)),
        lambda: hadamard(50, 12, 64),
    ),
    "factored": (
        lambda: FactoredProjector({NAME: (6, 8)}, 10, SEED, "cpu", rank=(3, 4)),
        lambda: two_sided(
            rademacher("factored-left", 6, 3), rademacher("factored-right", 8, 4), 10
        ),
    ),
    "masked": (
        lambda: MaskedProjector({NAME: (6, 8)}, 10, SEED, "cpu", rank=(3, 4)),
        lambda: two_sided(masked("masked-left", 6, 3), masked("masked-right", 8, 4), 10),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_entries_are_those_of_the_page(kind):
    make, expected = CASES[kind]
    expected = expected()
    found = make().matrix(NAME, len(expected), CHECKPOINT)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-12)
