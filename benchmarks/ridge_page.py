"""Writes the tables of docs/ridge.md from the benchmark's result.

python -m benchmarks.ridge_page
"""

from __future__ import annotations

import json
from typing import Any

from benchmarks.banks.variants import UNSEEN
from benchmarks.common import ROOT
from benchmarks.ridge import BAR, COUNTS, DIMS, RESULT

PAGE = ROOT / "docs" / "ridge.md"
BEGIN, END = "<!-- table begin -->\n", "<!-- table end -->\n"


def cell(found: dict[str, Any] | None) -> str:
    """A share, bold where it misses the bar.

    Args:
        found: a setting's detail, if it was measured.

    Returns:
        Markdown.
    """
    if found is None:
        return ""
    text = f"{found['share']:.1%}"
    return text if found["share"] >= BAR else f"**{text}**"


def table(details: list[dict[str, Any]], count: int) -> list[str]:
    """The shares of the best LDS, bank by bank.

    Args:
        details: of all settings.
        count: checkpoints.

    Returns:
        Lines of Markdown.
    """
    known = {(d["bank"], str(d["k"])): d for d in details if d["checkpoints"] == count}
    heads = [str(dim) if dim == "exact" else f"k = {dim}" for dim in DIMS]
    lines = [f"| | {' | '.join(heads)} | chosen |", "| --- " * (len(heads) + 2) + "|"]
    for bank in dict.fromkeys(bank for bank, _ in known):
        own = [d["auto"] for (owner, _), d in known.items() if owner == bank]
        cells = [cell(known.get((bank, str(dim)))) for dim in DIMS]
        name = f"*{bank}*" if bank in UNSEEN else bank
        span = f"{min(own):.2g} to {max(own):.2g}"
        lines.append(f"| {name} | {' | '.join(cells)} | {span} |")
    return lines


def tables(details: list[dict[str, Any]]) -> str:
    """A table for each number of checkpoints, and a summary.

    Args:
        details: of all settings.

    Returns:
        Markdown.
    """
    lines: list[str] = []
    for count in COUNTS:
        some = "One checkpoint" if count == 1 else f"{count} checkpoints"
        lines += [f"{some}:", "", *table(details, count), ""]
    met = sum(d["share"] >= BAR for d in details)
    worst = min(details, key=lambda d: d["share"])
    lines.append(
        f"The bar is met in {met} of {len(details)} settings; the worst is "
        f"{worst['share']:.1%}, {worst['bank']} at k = {worst['k']}, checkpoints: "
        f"{worst['checkpoints']}."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page."""
    details = json.loads(RESULT.read_text("utf-8"))["details"]
    text = PAGE.read_text("utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n" + tables(details) + "\n" + END + after, "utf-8")


if __name__ == "__main__":
    main()
