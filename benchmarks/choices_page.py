"""Writes docs/choices.md from the result of `benchmarks.choices`.

python -m benchmarks.choices_page
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.choice_variants import CHOICES
from benchmarks.choices import COUNTS, SETTINGS, verdicts
from benchmarks.common import RESULTS, ROOT

PAGE = ROOT / "docs" / "choices.md"
BEGIN, END = "<!-- tables begin -->", "<!-- tables end -->"


def cell(entry: dict[str, Any] | None) -> str:
    """A difference with its interval.

    Args:
        entry: of the result, or None where there is none.

    Returns:
        Markdown; bold where the interval does not hold 0.
    """
    if entry is None:
        return "-"
    if "difference" not in entry:
        return f"{entry['lds']:.3f}"
    low, high = entry["interval"]
    value = f"{entry['difference']:+.4f}"
    value = f"**{value}**" if low > 0 or high < 0 else value
    return f"{value} ({low:+.4f} to {high:+.4f})"


def table(details: Sequence[dict[str, Any]], setting: str, count: int) -> str:
    """All choices in one setting.

    Args:
        details: one entry a bank.
        setting: name of the setting.
        count: checkpoints.

    Returns:
        Markdown.
    """
    banks = [detail["bank"] for detail in details]
    found = {
        (detail["bank"], entry["choice"]): entry
        for detail in details
        for entry in detail["entries"]
        if (entry["setting"], entry["checkpoints"]) == (setting, count)
    }
    lines = ["| | " + " | ".join(banks) + " |", "| --- " * (len(banks) + 1) + "|"]
    for name in CHOICES:
        entries = [found.get((bank, name)) for bank in banks]
        if any(entries):
            lines.append(f"| {name} | " + " | ".join(map(cell, entries)) + " |")
    return "\n".join(lines) + "\n"


def summary(details: Sequence[dict[str, Any]]) -> str:
    """How often each choice is better or worse.

    Args:
        details: one entry a bank.

    Returns:
        Markdown.
    """
    names = list(SETTINGS)
    found = {name: verdicts(details, name) for name in names}
    lines = [
        "| choice | " + " | ".join(f"{n}: better, worse, of" for n in names) + " |",
        "| --- " * (len(names) + 1) + "|",
    ]
    for choice in CHOICES:
        cells = []
        for name in names:
            v = found[name].get(choice)
            cells.append(f"{v['better']}, {v['worse']}, {v['compared']}" if v else "-")
        if set(cells) != {"-"}:
            lines.append(f"| {choice} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tables(details: Sequence[dict[str, Any]]) -> str:
    """Everything between the markers.

    Args:
        details: one entry a bank.

    Returns:
        Markdown.
    """
    text = "\n## In how many cases\n\n" + summary(details)
    for setting in SETTINGS:
        for count in COUNTS:
            words = "one checkpoint" if count == 1 else f"{count} checkpoints"
            text += f"\n## {setting.capitalize()}, {words}\n\n"
            text += table(details, setting, count)
    where = details[-1]["ran"]
    version = where["versions"]["torch"]
    return text + (
        f"\nMeasured with Python {where['python']}, torch {version}, {where['cpu']}; every "
        "bank's commit, date and best ridges are in `benchmarks/results/choices.json`.\n\n"
    )


def between(text: str, made: str) -> str:
    """Replaces what is between the markers.

    Args:
        text: of the page.
        made: what comes there.

    Returns:
        The new page.
    """
    head, rest = text.split(BEGIN)
    return head + BEGIN + "\n" + made + END + rest.split(END)[1]


def main() -> None:
    """Writes the page."""
    result = json.loads((RESULTS / "choices.json").read_text("utf-8"))
    text = between(PAGE.read_text("utf-8"), tables(result["details"]))
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
