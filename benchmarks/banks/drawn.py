"""Small classification banks whose settings are drawn by lot.

Those of `benchmarks.banks.variants` were chosen by people who had the rule of the automatic
ridge in mind. Here data, network, optimizer and length of training are drawn from lists,
all combinations of them, sensible or not. `LOOKED_AT` were looked at when the ridge was
first held near that of a flow (`trak.score_computers.duration`) and when powers of loss
weights were made simpler; `JUDGING` were drawn when all that was settled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.datasets import load_wine, make_moons
from torch import nn

from benchmarks.banks.small_data import (
    blobs,
    blurred,
    cancer,
    digits,
    merged,
    mistaken,
    pairs,
    relabelled,
    some,
    table,
)
from benchmarks.banks.variant import Variant

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
HIDDEN = ((), (32,), (64,), (128,), (64, 48), (96, 64), (64, 64, 64), (48, 48, 48, 48))
RATES = {"sgd": (0.02, 0.05, 0.1), "adamw": (1e-3, 3e-3, 1e-2)}
DECAYS = {"sgd": (0.0, 1e-4, 1e-3, 5e-3), "adamw": (0.0, 1e-2, 0.1)}
EPOCHS = {"scratch": (3, 6, 12, 25, 50, 80), "tuned": (2, 4, 8, 16)}
LEAST_STEPS = 20  # of a training
DATA = (
    "digits",
    "two digits",
    "odd digits",
    "one digit",
    "blurred",
    "cancer",
    "wine",
    "moons",
    "blobs",
    "blobs",
)


class _Lots:
    """A source of choices."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.RandomState(seed)

    def one_of(self, values: Any) -> Any:
        """Draws.

        Args:
            values: a sequence.

        Returns:
            One of them.
        """
        return values[self.rng.randint(len(values))]


def drawn(count: int, seed: int, *, normalized: bool = False) -> dict[str, Variant]:
    """Banks whose settings are drawn by lot.

    Args:
        count: how many.
        seed: of the lots.
        normalized: with layer normalization.

    Returns:
        The banks by what they are.
    """
    lots, found = _Lots(seed), {}
    while len(found) < count:
        tuned = lots.one_of((False, False, True))
        name, variant = _tuned(lots) if tuned else _scratch(lots)
        size = len(variant.data()[0][1]) // 2
        if variant.epochs * -(-size // 50) >= LEAST_STEPS or tuned:
            found[name] = variant
    return (
        {f"{n}, normalized": _normalized(v) for n, v in found.items()}
        if normalized
        else found
    )


def _normalized(variant: Variant) -> Variant:
    start = None if variant.start is None else _normalized(variant.start)
    return replace(variant, normalized=True, start=start)


def _how(lots: _Lots, kind: str) -> tuple[str, str, float, float, int]:
    optimizer = lots.one_of(("sgd", "adamw"))
    rate, decay = lots.one_of(RATES[optimizer]), lots.one_of(DECAYS[optimizer])
    epochs = lots.one_of(EPOCHS[kind])
    said = f"{optimizer} {rate:g}, decay {decay:g}, {epochs} epochs"
    return said, optimizer, rate, decay, epochs


def _scratch(lots: _Lots) -> tuple[str, Variant]:
    what, data, inputs, classes = _data(lots)
    wrong = lots.one_of((0.0, 0.0, 0.0, 0.1, 0.3))
    hidden, activation = lots.one_of(HIDDEN), lots.one_of(list(ACTIVATIONS))
    said, optimizer, rate, decay, epochs = _how(lots, "scratch")
    if classes == 1:  # whose labels are fractions
        wrong = 0.0
    variant = Variant(
        (inputs, *hidden, classes),
        (lambda: mistaken(data(), wrong)) if wrong else data,
        epochs,
        rate,
        decay,
        ACTIVATIONS[activation],
        task="one_logit" if classes == 1 else "",
        optimizer=optimizer,
    )
    net = "x".join(map(str, hidden)) or "linear"
    return f"{what}, {wrong:.0%} wrong, {net} {activation}, {said}", variant


def _tuned(lots: _Lots) -> tuple[str, Variant]:
    hidden, activation = lots.one_of(HIDDEN[1:]), lots.one_of(list(ACTIVATIONS))
    before = _how(lots, "scratch")[1:]
    what, data, inputs, classes, start = _second(lots)
    said, optimizer, rate, decay, epochs = _how(lots, "tuned")
    first, many = start
    earlier = Variant(
        (inputs, *hidden, many),
        first,
        max(12, before[3]),
        before[1],
        before[2],
        ACTIVATIONS[activation],
        optimizer=before[0],
    )
    variant = Variant(
        (inputs, *hidden, classes),
        data,
        epochs,
        rate,
        decay,
        ACTIVATIONS[activation],
        task="one_logit" if classes == 1 else "",
        start=earlier,
        optimizer=optimizer,
    )
    net = "x".join(map(str, hidden))
    return f"tuned {what}, {net} {activation}, {said}", variant


def _data(lots: _Lots) -> tuple[str, Callable[[], Any], int, int]:
    # what, the examples, how many inputs, how many classes
    kind, count = lots.one_of(DATA), lots.one_of((200, 300, 500, 800, 1000))
    first, second = sorted(lots.rng.permutation(10)[:2].tolist())
    features, classes = lots.one_of((10, 20, 30)), lots.one_of((2, 3, 5, 8))
    flip, apart = lots.one_of((0.0, 0.02, 0.1)), lots.one_of((0.8, 1.2, 2.0))
    spread = lots.one_of((0.4, 0.8))
    if kind == "digits":
        return f"digits {count}", lambda: digits(count), 64, 10
    if kind == "two digits":
        title = f"digits {first} and {second}"
        return title, lambda: some(digits(1600), first, second), 64, 2
    if kind == "odd digits":
        return f"odd digits {count}", lambda: digits(count, binary=True), 64, 2
    if kind == "one digit":
        return f"digit {first} or not {count}", lambda: _one(digits(count), first), 64, 1
    if kind == "blurred":
        return f"blurred {count} by {spread}", lambda: blurred(count, spread), 64, 10
    if kind == "cancer":
        return f"cancer {min(count, 400)}", lambda: cancer(min(count, 400)), 30, 2
    if kind == "wine":
        return "wine", lambda: table(lambda: load_wine(return_X_y=True), 120), 13, 3
    if kind == "moons":
        noise = 0.15 + spread / 4
        made = lambda: make_moons(count + 150, noise=noise, random_state=0)  # noqa: E731
        return f"moons {count} by {noise:g}", lambda: table(made, count), 2, 2
    return (
        f"{classes} blobs {count}, {features} features, {apart} apart, {flip} flipped",
        lambda: blobs(count, features, classes, flip, class_sep=apart),
        features,
        classes,
    )


def _one(data: Any, digit: int) -> Any:
    return relabelled(data, lambda _, y: (y == digit).float())


def _second(
    lots: _Lots,
) -> tuple[str, Callable[[], Any], int, int, tuple[Callable[[], Any], int]]:
    # as `_data`, and what the network was trained on before, with its classes
    kind = lots.one_of(("digits", "two digits", "one digit", "odd digits", "blobs"))
    count, wrong = lots.one_of((200, 400, 700)), lots.one_of((0.0, 0.0, 0.1))
    classes = lots.one_of((2, 3, 4, 6))
    first, second = sorted(lots.rng.permutation(10)[:2].tolist())
    if kind == "blobs":
        earlier = lambda: merged(2000 - count, 8, first=count)  # noqa: E731
        title = f"{classes} blobs {count}, {wrong:.0%} wrong"
        return (
            title,
            lambda: mistaken(merged(count, classes), wrong),
            30,
            classes,
            (earlier, 8),
        )
    if kind == "digits":
        title = f"digits {count}, {wrong:.0%} wrong"
        return title, lambda: digits(count, wrong), 64, 10, (pairs, 5)
    if kind == "odd digits":
        title = f"odd digits {count}, {wrong:.0%} wrong"
        return title, lambda: digits(count, wrong, binary=True), 64, 2, (pairs, 5)
    if kind == "one digit":
        title = f"digit {first} or not {count}"
        return title, lambda: _one(digits(count), first), 64, 1, (pairs, 5)
    title = f"digits {first} and {second}"
    return title, lambda: some(digits(1600), first, second), 64, 2, (pairs, 5)


LOOKED_AT = drawn(48, 1) | drawn(64, 2) | drawn(56, 3, normalized=True)
JUDGING = drawn(32, 2027) | drawn(16, 2028, normalized=True)
