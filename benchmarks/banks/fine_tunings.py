"""Small banks of networks that were trained on another task before, and some beside them.

`TUNED` were looked at when the ridge of fine-tunings was told from what is left of Q
(`trak.score_computers.decay`), but for the first seven, which were made to judge a rule
before. `JUDGING` were made to judge it, and it was in their sight that the share of surely
wrong examples became one of what is left; six of these are no fine-tunings, but trained
with few wrong labels, or briefly.
"""

from __future__ import annotations

from sklearn.datasets import make_moons
from torch import nn

from benchmarks.banks.small_data import (
    blobs,
    digits,
    fractions,
    merged,
    mistaken,
    pairs,
    relabelled,
    some,
    table,
)
from benchmarks.banks.variant import Variant


def _pairs(*widths: int, activation: type[nn.Module] = nn.ReLU) -> Variant:
    # digits, two of them in a class
    return Variant((*widths, 5), pairs, 30, 0.05, 1e-3, activation)


def _eight(
    *widths: int, first: int = 600, activation: type[nn.Module] = nn.ReLU
) -> Variant:
    # all of eight classes
    return Variant(
        (30, *widths, 8),
        lambda: merged(2000 - first, 8, first=first),
        30,
        0.05,
        1e-3,
        activation,
    )


PAIRS = _pairs(64, 96, 48)
TUNED = {
    "tuned": Variant((64, 96, 48, 10), lambda: digits(600), 5, 0.05, 1e-4, start=PAIRS),
    "tuned, brief": Variant(
        (64, 96, 48, 10), lambda: digits(600), 2, 0.05, 1e-4, start=PAIRS
    ),
    "tuned, long": Variant(
        (64, 96, 48, 10), lambda: digits(600), 20, 0.05, 1e-4, start=PAIRS
    ),
    "tuned, 20 % wrong": Variant(
        (64, 96, 48, 10), lambda: digits(600, 0.2), 5, 0.05, 1e-4, start=PAIRS
    ),
    "tuned, two": Variant(
        (64, 96, 48, 2), lambda: digits(600, binary=True), 5, 0.05, 1e-4, start=PAIRS
    ),
    "tuned blobs": Variant(
        (30, 96, 64, 4),
        lambda: merged(600, 4),
        5,
        0.03,
        1e-4,
        start=_eight(96, 64),
    ),
    "tuned blobs, two": Variant(
        (30, 96, 64, 2),
        lambda: merged(600, 2),
        5,
        0.03,
        1e-4,
        start=_eight(96, 64),
    ),
    "tuned GELU": Variant(
        (64, 128, 10),
        lambda: digits(500),
        8,
        0.03,
        0.0,
        nn.GELU,
        start=Variant((64, 128, 2), lambda: digits(binary=True), 30, 0.05, 1e-3, nn.GELU),
    ),
    "tuned tanh": Variant(
        (64, 96, 48, 10),
        lambda: digits(700),
        4,
        0.05,
        1e-3,
        nn.Tanh,
        start=_pairs(64, 96, 48, activation=nn.Tanh),
    ),
    "tuned six blobs": Variant(
        (30, 64, 64, 6),
        lambda: merged(800, 6),
        6,
        0.03,
        1e-4,
        start=_eight(64, 64, first=800),
    ),
    "tuned, 1000": Variant(
        (64, 96, 48, 10), lambda: digits(1000), 10, 0.02, 1e-4, start=PAIRS
    ),
    "tuned, eight or not": Variant(
        (64, 96, 48, 1),
        lambda: relabelled(digits(600), lambda _, y: (y == 8).float()),
        6,
        0.05,
        1e-4,
        task="one_logit",
        start=PAIRS,
    ),
    "tuned, 300": Variant((64, 96, 48, 10), lambda: digits(300), 3, 0.1, 0.0, start=PAIRS),
    "tuned blobs, longer": Variant(
        (30, 96, 64, 4), lambda: merged(600, 4), 12, 0.03, 1e-4, start=_eight(96, 64)
    ),
    "tuned deep": Variant(
        (64, 64, 64, 64, 10),
        lambda: digits(600),
        5,
        0.03,
        1e-3,
        start=_pairs(64, 64, 64, 64),
    ),
    "tuned blobs, 10 % wrong": Variant(
        (30, 96, 64, 4),
        lambda: mistaken(merged(600, 4), 0.1),
        5,
        0.03,
        1e-4,
        start=_eight(96, 64),
    ),
    "tuned, three or eight": Variant(
        (64, 96, 48, 2), lambda: some(digits(1600), 3, 8), 5, 0.05, 1e-4, start=PAIRS
    ),
    "tuned SiLU, long": Variant(
        (64, 64, 64, 10),
        lambda: digits(500),
        15,
        0.05,
        1e-3,
        nn.SiLU,
        start=_pairs(64, 64, 64, activation=nn.SiLU),
    ),
    "tuned blobs, one logit": Variant(
        (30, 96, 64, 1),
        lambda: relabelled(merged(700, 2), fractions),
        6,
        0.03,
        1e-4,
        task="one_logit",
        start=_eight(96, 64),
    ),
}
JUDGING = {
    "tuned GELU, 400": Variant(
        (64, 96, 64, 10),
        lambda: digits(400),
        6,
        0.05,
        1e-4,
        nn.GELU,
        start=_pairs(64, 96, 64, activation=nn.GELU),
    ),
    "tuned tanh, blobs": Variant(
        (30, 64, 48, 3),
        lambda: merged(500, 3),
        7,
        0.05,
        1e-4,
        nn.Tanh,
        start=_eight(64, 48, activation=nn.Tanh),
    ),
    "tuned, four or nine": Variant(
        (64, 96, 48, 2), lambda: some(digits(1600), 4, 9), 3, 0.05, 1e-4, start=PAIRS
    ),
    "tuned, 10 % wrong": Variant(
        (64, 96, 48, 10), lambda: digits(800, 0.1), 6, 0.05, 1e-4, start=PAIRS
    ),
    "tuned deep, tanh": Variant(
        (64, 64, 64, 64, 64, 10),
        lambda: digits(500),
        8,
        0.03,
        1e-4,
        nn.Tanh,
        start=_pairs(64, 64, 64, 64, 64, activation=nn.Tanh),
    ),
    "tuned shallow": Variant(
        (64, 96, 10), lambda: digits(600), 4, 0.1, 0.0, start=_pairs(64, 96)
    ),
    "6 % wrong": Variant((64, 96, 64, 10), lambda: digits(1000, 0.06), 25, 0.1, 1e-3),
    "10 % wrong, long": Variant((64, 96, 10), lambda: digits(800, 0.1), 50, 0.1, 1e-3),
    "five blobs": Variant((25, 64, 5), lambda: blobs(1000, 25, 5, 0.08), 25, 0.05, 1e-3),
    "four blobs, brief": Variant(
        (20, 48, 48, 4), lambda: blobs(1800, 20, 4, 0.02), 15, 0.05, 1e-4
    ),
    "GELU, brief": Variant((64, 96, 64, 10), lambda: digits(800), 6, 0.05, 1e-4, nn.GELU),
    "moons, 20 epochs": Variant(
        (2, 64, 64, 2),
        lambda: table(lambda: make_moons(750, noise=0.25, random_state=3), 600),
        20,
        0.1,
        1e-3,
    ),
}
