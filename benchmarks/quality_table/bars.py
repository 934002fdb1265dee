"""The bars of the table, from its figures: who is held against whom, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality_table.results import BEST, DEFAULT, DRAWS, key
from trak.errors import InputError
from trak.evaluation import lds_difference

TIMES = 1.5
SHARE = 0.97

Entries = list[dict[str, Any]]
Place = tuple[str, str]


def lookup(entries: Entries, bank: str, count: int) -> dict[Place, dict[str, Any]]:
    """The entries of a bank that have a figure.

    Args:
        entries: of the result.
        bank: the bank.
        count: checkpoints.

    Returns:
        By side and setting.
    """
    return {
        (entry["side"], entry["setting"]): entry
        for entry in entries
        if (entry["bank"], entry["checkpoints"]) == (bank, count)
        and entry["lds"] is not None
    }


def best_of(found: Mapping[Place, Any], prefix: str, word: str = "") -> Place | None:
    """The tuned side with the highest LDS.

    Args:
        found: as `lookup` gives it.
        prefix: of the side's name.
        word: that the side's name holds.

    Returns:
        Side and setting; None if there is none.
    """
    places = [
        place
        for place in found
        if place[1] == BEST and place[0].startswith(prefix) and word in place[0]
    ]
    return max(places, key=lambda place: found[place]["lds"], default=None)


def bars(
    entries: Entries,
    bank: str,
    count: int,
    ranks: Mapping[str, NDArray[Any]],
    truth: NDArray[Any],
) -> list[dict[str, Any]]:
    """All bars on a bank.

    Args:
        entries: of the result.
        bank: the bank.
        count: checkpoints.
        ranks: that are kept, by `key`.
        truth: outputs of retrained models, `[subsets, seeds, m]`.

    Returns:
        One each with `bar`, `measured`, `against`, `other`, `value`, `interval` and `met`;
        those whose sides have not run are left out.
    """
    found = lookup(entries, bank, count)
    ours, tuned = ("TRAKer", DEFAULT), ("TRAKer", BEST)
    rivals = [tuned, best_of(found, "", "EK-FAC")]
    known = [place for place in rivals if place in found]
    strongest = max(known, key=lambda place: found[place]["lds"], default=None)
    wanted: list[tuple[str, Place, Place | None, float | None]] = [
        (f"TRAKer's default, {TIMES} x traker's", ours, ("traker default", DEFAULT), TIMES),
        ("TRAKer's default, tuned traker", ours, best_of(found, "traker"), None),
        (f"TRAKer's default, {SHARE:.0%} of its best ridge", ours, tuned, SHARE),
        (
            "trak.attribute, better of tuned TRAKer and tuned EK-FAC",
            ("trak.attribute", DEFAULT),
            strongest,
            None,
        ),
    ]
    made = []
    for bar, place, other, factor in wanted:
        if other is None or place not in found or other not in found:
            continue
        mine, theirs = found[place]["lds"], found[other]["lds"]
        compared = {"value": round(mine - theirs, 4), "interval": None}
        if factor is not None:
            compared["value"] = round(mine / theirs, 3) if theirs > 0 else None
            met = mine >= factor * theirs
        else:
            compared["interval"] = interval(place, other, count, ranks, truth)
            met = mine >= theirs
        made.append({
            "bank": bank,
            "checkpoints": count,
            "bar": bar,
            "measured": mine,
            "against": f"{other[0]}, {found[other]['label']}",
            "other": theirs,
            "factor": factor,
            **compared,
            "met": met,
        })
    return made


def interval(
    place: Place,
    other: Place,
    count: int,
    ranks: Mapping[str, NDArray[Any]],
    truth: NDArray[Any],
) -> list[float] | None:
    """The 95 % interval, over targets and subsets jointly, of a difference of two LDS.

    Args:
        place: side and setting.
        other: those that are subtracted.
        count: checkpoints.
        ranks: that are kept, by `key`.
        truth: outputs of retrained models.

    Returns:
        Its ends; None if ranks are not at hand.
    """
    names = [key(*each, count) for each in (place, other)]
    if not all(name in ranks for name in names):
        return None
    one, two = (ranks[name].astype(np.float64) for name in names)
    try:
        found = lds_difference(one, two, np.eye(len(one)), truth, draws=DRAWS)
    except InputError:
        return None
    return [round(end, 4) for end in found.jointly]
