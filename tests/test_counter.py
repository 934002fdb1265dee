"""The generator against its authors' known answers, and entries against their promises."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

from trak.projectors import counter

CPU = torch.device("cpu")
FULL = 0xFFFFFFFF
# Random123's known-answer file, philox4x32 with 10 rounds
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("words", "key", "answer"), KNOWN)
def test_philox_gives_the_published_answers(words, key, answer):
    first, second = torch.tensor([words[0]]), torch.tensor([words[1]])
    found = counter.philox((first, second, words[2], words[3]), key)
    assert tuple(int(word) for word in found) == answer


@pytest.mark.parametrize("kind", [counter.rademacher, counter.normal])
def test_columns_are_nested_and_rows_do_not_depend_on_blocks(kind):
    source = counter.stream("test", 3, 1, "layer.weight")
    whole = kind(source, (0, 50), 300, CPU)
    assert torch.equal(kind(source, (0, 50), 170, CPU), whole[:, :170])
    assert torch.equal(kind(source, (17, 29), 300, CPU), whole[17:29])


def test_hashes_do_not_depend_on_blocks():
    source = counter.stream("test", 3, 1, "layer.weight")
    buckets, signs = counter.hashes(source, (0, 101), 2, 37, CPU)
    for start, stop in [(0, 1), (3, 50), (99, 101), (50, 53)]:
        some, other = counter.hashes(source, (start, stop), 2, 37, CPU)
        assert torch.equal(some, buckets[start:stop])
        assert torch.equal(other, signs[start:stop])
    assert buckets.min() >= 0
    assert buckets.max() < 37


def test_streams_differ_in_every_argument_and_never_collide_by_arithmetic():
    arguments = [
        ("a", 0, 0, "w"),
        ("b", 0, 0, "w"),
        ("a", 100_000, 0, "w"),
        ("a", 0, 1, "w"),
        ("a", 0, 0, "v"),
        ("a", -1, 0, "w"),
        ("a", 2**70, 0, "w"),
        ("a", 1, 0, "0|w"),
        ("a", 1, 00, "w"),
    ]
    streams = [counter.stream(*each) for each in arguments]
    for first, second in itertools.combinations(streams, 2):
        assert first != second


def test_entries_are_pinned_so_that_stores_stay_readable():
    """If this fails, entries have changed: raise counter.VERSION."""
    source = counter.stream("rademacher", 0, 0, "w")
    signs = counter.rademacher(source, (0, 1), 16, CPU)[0]
    buckets, _ = counter.hashes(counter.stream("sparse", 0, 0, "w"), (0, 8), 0, 1000, CPU)
    normal = counter.normal(counter.stream("normal", 0, 0, "w"), (0, 1), 3, CPU)[0]
    assert "".join("+" if s > 0 else "-" for s in signs) == PINNED_SIGNS
    assert buckets.tolist() == PINNED_BUCKETS
    assert [f"{x:.6f}" for x in normal] == PINNED_NORMAL


PINNED_SIGNS = "+---++--++-+++++"
PINNED_BUCKETS = [627, 808, 617, 317, 381, 147, 10, 201]
PINNED_NORMAL = ["-0.825481", "0.382282", "-1.343946"]


def test_entries_are_the_same_in_another_process():
    code = (
        "import torch; from trak.projectors import counter as c;"
        "s = c.stream('normal', 5, 2, 'x'); d = torch.device('cpu');"
        "print(c.normal(s, (3, 9), 40, d).double().sum().item())"
    )
    run = [sys.executable, "-c", code]
    other = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    here = counter.normal(counter.stream("normal", 5, 2, "x"), (3, 9), 40, CPU)
    assert float(other) == here.double().sum().item()


@pytest.mark.parametrize("kind", [counter.rademacher, counter.normal])
def test_entries_have_mean_zero_and_variance_one(kind):
    # 400,000 entries: the mean's standard error is 0.0016 and the variance's at most
    # 0.0023; five of them fail once in 1.7 million draws
    entries = kind(counter.stream("m", 1, 0, "w"), (0, 400), 1000, CPU).double()
    assert abs(entries.mean()) < 5 * 400_000**-0.5
    assert abs(entries.square().mean() - 1) < 5 * (2 / 400_000) ** 0.5
    # independent across neighbours: correlations of rows and of columns
    assert abs((entries[:, 1:] * entries[:, :-1]).mean()) < 5 * 399_600**-0.5
    assert abs((entries[1:] * entries[:-1]).mean()) < 5 * 399_000**-0.5


def test_buckets_and_signs_are_uniform():
    # chi-square with 99 degrees of freedom: above 180 once in a million draws
    source = counter.stream("m", 1, 0, "w")
    buckets, signs = counter.hashes(source, (0, 100_000), 0, 100, CPU)
    counts = np.bincount(buckets.numpy(), minlength=100)
    assert np.sum((counts - 1000) ** 2 / 1000) < 180
    assert abs(signs.mean()) < 5 * 100_000**-0.5
    assert abs((signs * (buckets - 49.5)).mean()) < 5 * 29 * 100_000**-0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [counter.rademacher, counter.normal])
def test_entries_are_bit_equal_on_the_gpu(kind):
    source = counter.stream("g", 4, 3, "w")
    on_gpu = kind(source, (5, 300), 130, torch.device("cuda")).cpu()
    assert torch.equal(on_gpu, kind(source, (5, 300), 130, CPU))
