"""Writes the tables of docs/compression.md from the result of `benchmarks.compression`.

python -m benchmarks.compression_page
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.choices_page import between
from benchmarks.common import RESULTS, ROOT
from benchmarks.compression import COUNTS, DIMS, STRENGTHS
from benchmarks.compression_bars import (
    AUTO,
    AUTOMATIC,
    BEST,
    EXACT,
    chosen,
    kept_by_itself,
)
from benchmarks.sketches import DERIVED, PREDICTED, RANDOM

PAGE = ROOT / "docs" / "compression.md"
KINDS = (EXACT, AUTO, *RANDOM, *DERIVED)
CHOOSABLE = ("rademacher", "sparse", "factored", PREDICTED)  # whose costs are counted


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def qualities(detail: dict[str, Any], strength: float) -> str:
    """LDS at the best ridge, and at the automatic one.

    Args:
        detail: of one bank.
        strength: of whitening.

    Returns:
        Markdown.
    """
    columns = [(count, k) for count in COUNTS for k in DIMS]
    header = ["", *(f"{count} x {k}" for count, k in columns)]
    lines = []
    for kind in KINDS:
        cells = []
        for count, k in columns:
            entries = chosen(detail, strength, count)
            entry = entries.get((kind, k))
            if kind in (EXACT, AUTO) and k == DIMS[0]:
                own = [e for (name, _), e in entries.items() if name == kind]
                entry = own[0] if own else None
            if entry is None:
                cells.append("")
                continue
            mark = (
                "**" if detail["default"].get(f"{entry['k']}, {strength:g}") == kind else ""
            )
            width = f" (k = {entry['k']})" if kind == AUTO else ""
            pair = f"{entry[BEST]:.3f}, {entry[AUTOMATIC]:.3f}"
            cells.append(f"{mark}{pair}{mark}{width}")
        if any(cells):
            lines.append([kind, *cells])
    return _table(header, lines)


def differences(detail: dict[str, Any], ridge: str) -> str:
    """The default less every other kind.

    Args:
        detail: of one bank.
        ridge: `BEST` or `AUTOMATIC`.

    Returns:
        Markdown.
    """
    key = f"default - this, {ridge}"
    columns = [(s, count) for s in STRENGTHS for count in COUNTS]
    header = ["", "k", *(f"strength {s:g}, {count}" for s, count in columns)]
    lines = []
    for k in DIMS:
        for kind in (*RANDOM, *DERIVED):
            cells = []
            for strength, count in columns:
                entry = chosen(detail, strength, count).get((kind, k), {})
                found = entry.get(key)
                cells.append(_difference(found) if found else "")
            if any(cells):
                lines.append([kind, str(k), *cells])
    return _table(header, lines)


def _difference(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    mark = "**" if high < 0 else ""
    return f"{mark}{found['difference']:+.3f}{mark} ({low:+.3f} to {high:+.3f})"


def equal_cost(details: Sequence[dict[str, Any]]) -> str:
    """The widest of each kind that costs no more than dense rows of the least width.

    Args:
        details: one entry a bank.

    Returns:
        Markdown.
    """
    lines = []
    for detail in details:
        costs = detail["operations a sample"]
        budget = costs[str(DIMS[0])]["rademacher"]
        for kind in CHOOSABLE:
            known = [k for k in DIMS if kind in costs.get(str(k), {})]
            fits = [k for k in known if costs[str(k)][kind] <= budget]
            most = max(entry["checkpoints"] for entry in detail["entries"])
            entries = [chosen(detail, s, most) for s in STRENGTHS]
            fits = [k for k in fits if (kind, k) in entries[0]]
            if fits:
                k = fits[-1]
                found = [f"{own[kind, k][BEST]:.3f}" for own in entries]
                cost = f"{costs[str(k)][kind]:.2g}"
                lines.append([detail["bank"], kind, str(k), cost, *found])
    header = ["", "kind", "k", "operations a sample", *(f"LDS, {s:g}" for s in STRENGTHS)]
    return _table(header, lines)


def summary(details: Sequence[dict[str, Any]]) -> str:
    """How often the default is worse than another kind.

    Args:
        details: one entry a bank.

    Returns:
        Markdown.
    """
    key = f"default - this, {BEST}"
    lines = []
    for kind in (*RANDOM, *DERIVED):
        cells = []
        for detail in details:
            own = [e[key] for e in detail["entries"] if e["kind"] == kind and key in e]
            if not own:
                cells.append("")
                continue
            lost = sum(found["interval"][1] < 0 for found in own)
            won = sum(found["interval"][0] > 0 for found in own)
            mean = sum(found["difference"] for found in own) / len(own)
            cells.append(f"{lost}, {won} of {len(own)}; {mean:+.3f}")
        lines.append([kind, *cells])
    return _table(["", *(detail["bank"] for detail in details)], lines)


def left_to_itself(details: Sequence[dict[str, Any]]) -> str:
    """What `proj_dim="auto"` keeps against the best of all compressions.

    Args:
        details: one entry a bank.

    Returns:
        Markdown.
    """
    lines = [
        [
            detail["bank"],
            f"{kept.strength:g}",
            str(kept.checkpoints),
            EXACT if kept.own["kind"] == EXACT else f"k = {kept.own['k']}",
            f"{kept.own[BEST]:.3f}",
            f"{kept.best[BEST]:.3f}",
            f"{kept.best['kind']}, k = {kept.best['k']}",
            f"{kept.difference:+.4f}",
        ]
        for detail in details
        for kept in kept_by_itself(detail)
    ]
    names = ("bank", "strength", "checkpoints", "kept", "LDS", "best other", "", "less it")
    return _table(names, lines)


def tables(details: Sequence[dict[str, Any]]) -> str:
    """Everything between the markers.

    Args:
        details: one entry a bank.

    Returns:
        Markdown.
    """
    text = (
        '\n## `proj_dim="auto"`\n\n'
        "What is kept where nobody gives a `k`, against the best of all compressions to "
        f"{DIMS[0]} to {DIMS[-1]} numbers, at best ridges.\n\n"
    )
    text += left_to_itself(details)
    text += (
        "\n## Where the default for a given k loses\n\n"
        "In how many settings the default is worse, better, by more than the interval; "
        "mean difference.\n\n"
    )
    text += summary(details)
    for detail in details:
        kinds = ", ".join(
            f"{kind} ({key})"
            for key, kind in detail["default"].items()
            if kind != PREDICTED
        )
        text += f"\n{detail['bank']}: without whitening the default is {kinds}.\n"
    text += (
        "\n## At equal cost\n\n"
        f"The widest that costs no more than dense rows of {DIMS[0]}, "
        f"up to {DIMS[-1]} (operations as the library counts them where it chooses), "
        "with the most checkpoints measured, best ridges, without whitening and with.\n\n"
    )
    text += equal_cost(details)
    for detail in details:
        text += f"\n## {detail['bank']}\n"
        for strength in STRENGTHS:
            words = f"whitened, strength {strength:g}" if strength else "not whitened"
            text += f"\nLDS at the best ridge, and at the automatic one; {words}; "
            text += "checkpoints x k. The default is bold.\n\n"
            text += qualities(detail, strength)
        for ridge, words in ((BEST, "best ridges"), (AUTOMATIC, "automatic ridges")):
            text += f"\nThe default less the other, {words}:\n\n"
            text += differences(detail, ridge)
    where = details[-1]["ran"]
    return text + (
        f"\nMeasured with Python {where['python']}, torch {where['versions']['torch']}, "
        f"{where['cpu']}; commits, dates and best ridges are in "
        "`benchmarks/results/compression.json`.\n\n"
    )


def main() -> None:
    """Writes the page."""
    result = json.loads((RESULTS / "compression.json").read_text("utf-8"))
    text = between(PAGE.read_text("utf-8"), tables(result["details"]))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
