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
ORDER = (
    "step",
    "memory",
    "peers",
    "streaming",
    "quality",
    "quality_time",
    "one_call",
    "ridge",
    "drawn",
    "same_checkpoint",
    "ridge_time",
    "regressions",
    "whitening",
    "whitening_cost",
    "calibration",
    "row_dtypes",
    "kernel",
    "gpu",
    "gpu_tf32",
    "choices",
    "compression",
)
TITLES = {
    "step": "Featurizing against a training step",
    "memory": "Memory",
    "peers": "Other libraries",
    "streaming": "Gram matrix and scores of a large store",
    "quality": "Quality of the projections",
    "quality_time": "Time of the one call against EK-FAC",
    "one_call": "The one call on many small banks",
    "ridge": "The automatic ridge",
    "drawn": "The automatic ridge and the one call, trainings drawn by lot",
    "ridge_time": "What the automatic ridge costs",
    "same_checkpoint": "One checkpoint, two trainings, two best ridges",
    "regressions": "The automatic ridge of regressions",
    "whitening": "Whitening and curvature",
    "whitening_cost": "What whitening costs",
    "calibration": "Errors of scores",
    "row_dtypes": "Precision of stored rows",
    "kernel": "The exact kernel",
    "gpu": "On a GPU",
    "gpu_tf32": "On a GPU, float32 products in TF32",
    "choices": "Choices inside TRAK",
    "compression": "Compression compared",
}
MARKS = {True: "met", False: "**not met**", None: ""}
COMMON = {"name", "rows", "environment"}


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
        measured = f"{row['measured']} {row.get('unit', '')}".strip()
        cells = (row["what"], row["bar"], measured, MARKS[row["passed"]], row["how"])
        lines.append("| " + " | ".join(_cell(each) for each in cells) + " |")
    where = found["environment"]
    command = found.get("command", f"python -m benchmarks.{found['name']}")
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v)
    lines += [
        "",
        f"`{command}`: {where['date']}, commit "
        f"`{where['commit'][:12]}`, {_hardware(where)}, {where['cores']} cores, load "
        f"average {where['load_average']:.1f} at the end; Python {where['python']}, "
        f"{versions}. Raw figures: `benchmarks/results/{found['name']}.json`.",
        "",
    ]
    return "\n".join(lines)


def page(folder: Path = RESULTS) -> str:
    """The whole page.

    Args:
        folder: with the JSON files; those without the common fields are left out.

    Returns:
        Markdown.
    """
    read = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    found = [one for one in read if set(one) >= COMMON]
    place = {name: number for number, name in enumerate(ORDER)}
    found.sort(key=lambda one: (place.get(one["name"], len(ORDER)), one["name"]))
    parts = [NOTES.read_text(encoding="utf-8"), *(section(one) for one in found)]
    return "\n".join(parts).rstrip() + "\n"


def _hardware(where: dict[str, Any]) -> str:
    return " and ".join(str(where[kind]) for kind in ("gpu", "cpu") if where.get(kind))


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
