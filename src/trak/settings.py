"""Frozen settings of a run, and the fingerprint that says "the same run".

A store holds projected gradients, which mean nothing beside rows of another projection,
architecture or precision. Everything that shapes a row is listed here, written to the
store when it is created and compared whenever it is used.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trak.errors import InputError

LIBRARY_VERSION = "0.1.0"

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What shapes the rows of a store.

    Attributes:
        train_set_size: number of training examples, `n`.
        architecture: shape of every parameter and buffer, by name.
        grad_wrt: names of the parameters whose gradients are taken, in order.
        projection: the projector's own description (kind, `k`, seed, generator).
        precision: dtype of the stored rows, e.g. `"float16"`.
        task: the model output's class and scalar settings.
        whitening: strength and damping; None if gradients are not whitened.
        sample_weights: the task says how much training examples count.
        library: version of this library.

    Raises:
        InputError: if there is no training example.
    """

    train_set_size: int
    architecture: Mapping[str, tuple[int, ...]]
    grad_wrt: tuple[str, ...]
    projection: Mapping[str, Any]
    precision: str
    task: Mapping[str, Any]
    whitening: Mapping[str, float] | None = None
    sample_weights: bool = False
    library: str = LIBRARY_VERSION

    def __post_init__(self) -> None:
        if self.train_set_size < 1:
            raise InputError(
                f"train_set_size must be at least 1, got {self.train_set_size}."
            )

    def describe(self) -> Json:
        """The settings as plain JSON values.

        Returns:
            A dictionary that survives a round trip through JSON unchanged.
        """
        found = asdict(self)
        if self.whitening is None:  # stores from before there was any stay readable
            del found["whitening"]
        if not self.sample_weights:
            del found["sample_weights"]
        return json.loads(json.dumps(found))

    def fingerprint(self) -> str:
        """One truth about "the same run".

        Returns:
            32 hexadecimal digits, equal exactly when the descriptions are equal.
        """
        canonical = json.dumps(self.describe(), sort_keys=True).encode()
        return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def differences(expected: Any, found: Any, path: str = "") -> list[str]:
    """Lists where two JSON values differ.

    Args:
        expected: what this process wants.
        found: what the store holds.
        path: dotted name of the place, for the messages.

    Returns:
        One sentence a difference, e.g. `projection.seed: the store has 0, this run 1`.

    Example:
        >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
        ['a.b: the store has 2, this run 1']
    """
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        lines: list[str] = []
        for key in sorted({*expected, *found}, key=str):
            inner = f"{path}.{key}" if path else str(key)
            lines += differences(expected.get(key), found.get(key), inner)
        return lines
    if expected == found:
        return []
    return [f"{path}: the store has {_short(found)}, this run {_short(expected)}"]


def _short(value: Any, limit: int = 80) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
