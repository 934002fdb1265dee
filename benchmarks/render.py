"""Makes docs/benchmarks.md of the JSON files in benchmarks/results.

python -m benchmarks.render
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
NOTES = Path(__file__).resolve().parent / "notes.md"
ORDER = ("step", "memory", "peers", "streaming", "quality", "row_dtypes")
TITLES = {
    "step": "Featurizing against a training step",
    "memory": "Memory",
    "peers": "Other libraries",
    "streaming": "Gram matrix and scores of a large store",
    "quality": "Quality of the projections",
    "row_dtypes": "Precision of stored rows",
}
MARKS = {True: "met", False: "**not met**", None: ""}


def section(found: dict[str, Any]) -> str:
    """One benchmark as a table.

    Args:
        found: content of its JSON file.

    Returns:
        Markdown.
    """
    lines = [
        f"## {TITLES.get(found['name'], found['name'])}",
        "",
        "| what | bar | measured | | how |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        cells = (row["what"], row["bar"], str(row["measured"]), MARKS[row["passed"]])
        lines.append("| " + " | ".join((*cells, row["how"])) + " |")
    where = found["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v)
    lines += [
        "",
        f"{where['date']}, commit `{where['commit'][:12]}`, {where['cpu']}, "
        f"{where['cores']} cores, load average {where['load_average']:.1f}; {versions}. "
        f"Raw figures: `benchmarks/results/{found['name']}.json`.",
        "",
    ]
    return "\n".join(lines)


def page(folder: Path = RESULTS) -> str:
    """The whole page.

    Args:
        folder: with the JSON files.

    Returns:
        Markdown.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    found.sort(key=lambda one: (ORDER.index(one["name"]), one["name"]))
    parts = [NOTES.read_text(encoding="utf-8"), *(section(one) for one in found)]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
