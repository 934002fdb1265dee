"""Writes docs/quality.md from the table's result.

python -m benchmarks.quality_table.render
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.quality_table.run import RESULT

PAGE = ROOT / "docs" / "quality.md"
HEAD = Path(__file__).resolve().parent / "head.md"


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash.

    Args:
        value: the number.
        digits: behind the point.

    Returns:
        Text.
    """
    return "-" if value is None else f"{value:.{digits}f}"


def line(entry: dict[str, Any]) -> str:
    """A row of a table.

    Args:
        entry: of the result.

    Returns:
        Markdown.
    """
    spans = [
        "-" if span is None else f"{span[0]:.3f} to {span[1]:.3f}"
        for span in (entry["over_targets"], entry["over_subsets"])
    ]
    cells = [
        f"{entry['side']}",
        entry["setting"] or "not run",
        str(entry["checkpoints"]),
        number(entry["lds"]),
        *spans,
        number(entry["seconds"], 0),
        number(entry["megabytes"], 0),
        entry["note"].replace("|", "/"),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Writes the page."""
    result = json.loads(RESULT.read_text("utf-8"))
    where = result["environment"]
    text = HEAD.read_text("utf-8") + (
        f"\nMeasured at commit `{where['commit'][:9]}`, Python {where['python']}, torch "
        f"{where['versions']['torch']}.\n"
    )
    for bank, ceiling in result["ceilings"].items():
        text += f"\n## {bank}\n\nCeiling {ceiling:.3f}.\n\n"
        text += (
            "| side | setting | checkpoints | LDS | over targets | over subsets | s | MB "
            "| |\n" + "| --- " * 9 + "|\n"
        )
        own = [entry for entry in result["entries"] if entry["bank"] == bank]
        own.sort(key=lambda e: (e["checkpoints"], -(e["lds"] or -1)))
        text += "\n".join(map(line, own)) + "\n"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
