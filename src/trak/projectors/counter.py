"""Random entries as a function of their place, by the Philox4x32-10 counter generator.

Every entry of every projection is a function of (seed, checkpoint, parameter name, row,
column) and of nothing else: not of the device, dtype, batch split, block size or number
of processes. `torch.Generator` gives none of this (same seed, other dtype or device:
other numbers), and seed arithmetic such as `seed + 1e4 * model_id` collides.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC 2011, Sec. 3.3 and Table 2. The tests hold this file against the known answers that
its authors publish.

`VERSION` is part of every store's fingerprint: raise it whenever an entry changes.
"""

import functools
import hashlib
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from trak.errors import InputError

VERSION = "philox4x32-10/1"

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_WORDS = 4
_BITS = 32
_NORMAL_LEVELS = 1 << 16


@dataclass(frozen=True, slots=True)
class Stream:
    """The key and the upper half of the counter: one independent stream of numbers.

    Attributes:
        key: two 32-bit words.
        nonce: the counter's two upper words.
    """

    key: tuple[int, int]
    nonce: tuple[int, int]


def stream(purpose: str, seed: int, checkpoint: int, name: str) -> Stream:
    """Derives a stream from what identifies it, by hashing.

    Args:
        purpose: what the numbers are for, e.g. `"rademacher"`.
        seed: the user's seed; any integer.
        checkpoint: the checkpoint's id; any integer.
        name: the parameter's name.

    Returns:
        A stream; two different arguments share one with probability 2^-128.
    """
    label = f"{VERSION}|{purpose}|{int(seed)}|{int(checkpoint)}|{name}".encode()
    digest = hashlib.blake2b(label, digest_size=16).digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return Stream((words[0], words[1]), (words[2], words[3]))


def philox(
    counter: tuple[Tensor, Tensor, int, int], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on 64-bit integers that hold 32-bit words.

    Args:
        counter: four words; the first two are int64 tensors of one shape.
        key: two words.

    Returns:
        Four int64 tensors of that shape with values in `[0, 2^32)`.
    """
    x0, x1 = counter[0], counter[1]
    x2 = torch.full_like(x0, counter[2])
    x3 = torch.full_like(x0, counter[3])
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], x0)
        high1, low1 = _multiply(_MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    # the 64-bit product of two 32-bit words, as its upper and lower word
    # constant * word may pass 2^63, so the constant is split: no partial product does
    low = (constant & 0xFFFF) * word
    high = (constant >> 16) * word + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def words(
    source: Stream, rows: tuple[int, int], groups: int, device: torch.device
) -> Tensor:
    """Random 32-bit words addressed by (row, group).

    Args:
        source: the stream.
        rows: first row and end row.
        groups: how many groups of four words a row has.
        device: where to compute.

    Returns:
        int64, `[rows, 4 * groups]`, values in `[0, 2^32)`.

    Raises:
        InputError: if a row is 2^32 or more.
    """
    if rows[1] > 1 << _BITS:
        raise InputError(f"A parameter has {rows[1]} entries; at most 2^32 can be.")
    row = torch.arange(*rows, dtype=torch.int64, device=device)[:, None]
    group = torch.arange(groups, dtype=torch.int64, device=device)[None, :]
    shape = (rows[1] - rows[0], groups)
    counter = (row.expand(shape), group.expand(shape), *source.nonce)
    return torch.stack(philox(counter, source.key), dim=-1).flatten(start_dim=1)


def rademacher(
    source: Stream, rows: tuple[int, int], num_columns: int, device: torch.device
) -> Tensor:
    """Entries +1 or -1 with equal probability: mean 0, variance 1.

    The first `k` columns are the same for every `num_columns >= k`.

    Args:
        source: the stream.
        rows: first row and end row.
        num_columns: number of columns.
        device: where to compute.

    Returns:
        float32, `[rows, num_columns]`.
    """
    groups = -(-num_columns // (_WORDS * _BITS))
    word = words(source, rows, groups, device)  # [rows, 4 * groups]
    needed = word[:, : -(-num_columns // _BITS), None]
    shifts = torch.arange(min(_BITS, num_columns), dtype=torch.int64, device=device)
    bits = ((needed >> shifts) & 1).flatten(start_dim=1)
    return bits[:, :num_columns].to(torch.float32).mul_(2).sub_(1)


def normal(
    source: Stream, rows: tuple[int, int], num_columns: int, device: torch.device
) -> Tensor:
    """Entries from the standard normal distribution, on 2^16 equally likely levels.

    A level's value is the quantile at its middle, rescaled so that the variance is 1
    exactly. Looking values up keeps entries bit-equal on every device, which computing
    logarithms there would not. The first `k` columns are the same for every
    `num_columns >= k`.

    Args:
        source: the stream.
        rows: first row and end row.
        num_columns: number of columns.
        device: where to compute.

    Returns:
        float32, `[rows, num_columns]`.
    """
    groups = -(-num_columns // (_WORDS * 2))
    word = words(source, rows, groups, device)
    halves = torch.stack((word & 0xFFFF, word >> 16), dim=-1).flatten(start_dim=1)
    return _normal_levels().to(device)[halves[:, :num_columns]]


@functools.cache
def _normal_levels() -> Tensor:
    quantile = statistics.NormalDist().inv_cdf
    half = _NORMAL_LEVELS // 2
    upper = [quantile((half + i + 0.5) / _NORMAL_LEVELS) for i in range(half)]
    levels = torch.tensor(
        [-x for x in reversed(upper)] + upper, dtype=torch.float64, device="cpu"
    )
    return (levels / levels.square().mean().sqrt()).to(torch.float32)


def hashes(
    source: Stream,
    rows: tuple[int, int],
    part: int,
    num_buckets: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """A uniform bucket and an independent sign for each row.

    Four rows share one generator call: row `r` takes word `r % 4` of counter
    `(r // 4, part)`.

    Args:
        source: the stream.
        rows: first row and end row.
        part: number of the hash function.
        num_buckets: buckets to choose from, below 2^31.
        device: where to compute.

    Returns:
        Buckets (int64, in `[0, num_buckets)`) and signs (float32, +1 or -1), both
        `[rows]`. A bucket's probability is off by less than 2^-31.
    """
    first, end = rows[0] // _WORDS, -(-rows[1] // _WORDS)
    counter = torch.arange(first, end, dtype=torch.int64, device=device)
    part_word = torch.full_like(counter, part)
    word = torch.stack(philox((counter, part_word, *source.nonce), source.key), dim=-1)
    word = word.flatten()[rows[0] - first * _WORDS : rows[1] - first * _WORDS]
    sign = (word & 1).to(torch.float32).mul_(2).sub_(1)
    return ((word >> 1) * num_buckets) >> (_BITS - 1), sign


def sample(source: Stream, size: int, count: int, device: torch.device) -> Tensor:
    """Draws numbers below `size` without replacement.

    Args:
        source: the stream.
        size: how many numbers there are.
        count: how many to draw, at most `size`.
        device: where to compute.

    Returns:
        int64, `[count]`, in random order.
    """
    # two words a number: ties are too rare to matter, and broken the same way everywhere
    word = words(source, (0, size), 1, device)
    order = (word[:, 0] << (_BITS - 1)) ^ word[:, 1]
    return torch.sort(order, stable=True).indices[:count]
