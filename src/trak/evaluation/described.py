"""What a bank says about itself in JSON."""

import json
from collections.abc import Mapping
from typing import Any

from trak.errors import InputError, InputTypeError


def check_described(recipe: Any, data: Any, notes: Any) -> None:
    """Refuses what cannot be written into a bank.

    Args:
        recipe: what JSON can hold, by name.
        data: a hash as `data_hash` gives it, or None.
        notes: further entries, by name.

    Raises:
        InputTypeError: if one is of another kind.
    """
    if not isinstance(recipe, Mapping):
        raise InputTypeError(
            f"recipe must be a dict of what training follows from, got {recipe!r}."
        )
    if not isinstance(notes, Mapping):
        raise InputTypeError(f"notes must be a dict of further entries, got {notes!r}.")
    if data is not None and not isinstance(data, str):
        raise InputTypeError(
            f"data must be a hash, as data_hash(...) gives it, got {type(data).__name__}."
        )


def as_text(name: str, value: Any) -> str:
    """Accepts a text.

    Args:
        name: the argument, for the message.
        value: what the user gave.

    Returns:
        The same.

    Raises:
        InputTypeError: if it is none.
    """
    if not isinstance(value, str):
        raise InputTypeError(f"{name} must be a text, got {value!r}.")
    return value


def as_json(name: str, value: Any) -> str:
    """Writes something as JSON.

    Args:
        name: what it is, for messages.
        value: the value.

    Returns:
        The text.

    Raises:
        InputError: if JSON cannot hold it; it has no NaN and no infinity.
    """
    try:
        return json.dumps(value, allow_nan=False, indent=1)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must hold JSON values: {error}.") from error
