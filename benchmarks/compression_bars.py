"""What the default compressions are held to, from results of `benchmarks.compression`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.common import Row

EXACT, AUTO = "no projection", "proj_dim='auto'"
BEST, AUTOMATIC = "best", "auto"
CLOSE = 0.001

Entries = Mapping[tuple[str, int], dict[str, Any]]


class Kept(NamedTuple):
    """What `proj_dim="auto"` keeps in one setting, and the best compression.

    Attributes:
        strength: of whitening.
        checkpoints: how many.
        own: the entry of what is kept.
        best: that of the best of all compressions to a given width.
    """

    strength: float
    checkpoints: int
    own: dict[str, Any]
    best: dict[str, Any]

    @property
    def difference(self) -> float:
        """Of their LDS at best ridges."""
        return self.own[BEST] - self.best[BEST]


def chosen(detail: dict[str, Any], strength: float, count: int) -> Entries:
    """The entries of one setting.

    Args:
        detail: of one bank.
        strength: of whitening.
        count: checkpoints.

    Returns:
        Kind and columns to entry.
    """
    return {
        (entry["kind"], entry["k"]): entry
        for entry in detail["entries"]
        if (entry["strength"], entry["checkpoints"]) == (strength, count)
    }


def kept_by_itself(detail: dict[str, Any]) -> Iterator[Kept]:
    """What is kept where nobody gives a width.

    Args:
        detail: of one bank.

    Yields:
        One for each strength and number of checkpoints.
    """
    entries = detail["entries"]
    strengths = sorted({entry["strength"] for entry in entries})
    counts = sorted({entry["checkpoints"] for entry in entries})
    for strength, count in itertools.product(strengths, counts):
        found = {}
        others = []
        for (kind, _), entry in chosen(detail, strength, count).items():
            if kind in (EXACT, AUTO):
                found[kind] = entry
            else:
                others.append(entry)
        own = found.get(AUTO, found.get(EXACT))
        if own is not None and others:
            best = max(others, key=lambda entry: entry[BEST])
            yield Kept(strength, count, own, best)


def losses_of(detail: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Where the default is worse by more than the interval, at the best ridges.

    Args:
        detail: of one bank.

    Returns:
        Entries that beat it, and the differences.
    """
    key = f"default - this, {BEST}"
    compared = [(entry, entry[key]) for entry in detail["entries"] if key in entry]
    return [(entry, d) for entry, d in compared if d["interval"][1] < 0]


def rows_of(details: Sequence[dict[str, Any]]) -> list[Row]:
    """Lines of the page, one a bank.

    Args:
        details: one entry a bank.

    Returns:
        The lines.
    """
    rows = []
    for detail in details:
        lost = losses_of(detail)
        compared = sum(f"default - this, {BEST}" in entry for entry in detail["entries"])
        words = f"loses in {len(lost)} of {compared}"
        if lost:
            entry, worst = min(lost, key=lambda pair: pair[1]["difference"])
            words += (
                f"; at worst {worst['difference']:+.4f} against {entry['kind']}, "
                f"k = {entry['k']}, strength {entry['strength']:g}, "
                f"{entry['checkpoints']} checkpoints"
            )
        rows.append(
            Row(
                f"default projection against others of its width, {detail['bank']}",
                "loses to none by more than the interval",
                words,
                not lost,
                "best ridges, two projection seeds",
            )
        )
    return [*rows, *(_by_itself(detail) for detail in details)]


def _by_itself(detail: dict[str, Any]) -> Row:
    # squared losses are never whitened by themselves
    squared = detail["bank"] == "diabetes"
    kept = [k for k in kept_by_itself(detail) if not (k.strength and squared)]
    worst = min(kept, key=lambda k: k.difference)
    return Row(
        f"proj_dim='auto' against all compressions, {detail['bank']}",
        f"at most {CLOSE} below the best",
        f"{worst.difference:+.4f} at worst",
        worst.difference >= -CLOSE,
        f"{len(kept)} settings; there against {worst.best['kind']}, k = "
        f"{worst.best['k']}, strength {worst.strength:g}; best ridges",
    )
