"""Writes docs/quality.md from the table's result, and prints the summary.

python -m benchmarks.quality_table.render
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT
from benchmarks.quality_table.bars import best_of, lookup
from benchmarks.quality_table.results import BEST, DEFAULT, read

PAGE = ROOT / "docs" / "quality.md"
HEAD = Path(__file__).resolve().parent / "head.md"
TIMES = RESULTS / "quality_time.json"
ORDER = ("diabetes", "digits", "mnist", "qnli", "cifar2", "language")
# what a row of the summary is called, and side and setting, or what finds the best of many
SUMMARY: tuple[tuple[str, Any], ...] = (
    ("**trak.attribute**, default", ("trak.attribute", DEFAULT)),
    ("**TRAKer**, default", ("TRAKer", DEFAULT)),
    ("TRAKer, best ridge", ("TRAKer", BEST)),
    ("TRAKer, best other method", "methods"),
    ("traker, default", ("traker default", DEFAULT)),
    ("traker, best of k and ridge", "traker"),
    ("kronfluence EK-FAC, default", ("kronfluence EK-FAC", DEFAULT)),
    ("kronfluence EK-FAC, best damping", ("kronfluence EK-FAC", BEST)),
    ("dattri EK-FAC, best damping", ("dattri EK-FAC", BEST)),
    ("dattri TRAK, best of k and ridge", ("dattri TRAK", BEST)),
    ("dattri LoGra, best damping", ("dattri LoGra", BEST)),
)
MARK = "<!-- summary and bars -->"
METHODS = ("dot", "tracin", "cosine", "relatif", "l_relatif", "unit_norm")
MARKS = {True: "met", False: "**not met**"}


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash.

    Args:
        value: the number.
        digits: behind the point.

    Returns:
        Text.
    """
    return "-" if value is None else f"{value:.{digits}f}"


def span(ends: Any, digits: int = 3) -> str:
    """An interval, or a dash.

    Args:
        ends: two numbers, or None.
        digits: behind the point.

    Returns:
        Text.
    """
    return "-" if ends is None else f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table.

    Args:
        head: names of columns.
        rows: cells.

    Returns:
        Markdown.
    """
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "/") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def banks_of(result: dict[str, Any]) -> list[str]:
    """The banks of a result, in the page's order.

    Args:
        result: the table's.

    Returns:
        Names.
    """
    known = [bank for bank in ORDER if bank in result["ceilings"]]
    return known + sorted(set(result["ceilings"]) - set(ORDER))


def counts_of(result: dict[str, Any]) -> list[int]:
    """The numbers of checkpoints.

    Args:
        result: the table's.

    Returns:
        Sorted.
    """
    return sorted({entry["checkpoints"] for entry in result["entries"]})


def shown(found: dict[Any, Any], place: Any) -> str:
    """A cell of the summary.

    Args:
        found: a bank's entries, as `lookup` gives them.
        place: side and setting, or which of many.

    Returns:
        LDS and interval, and what was the best of many; a dash where it did not run.
    """
    name = ""
    if place == "methods":
        methods = [each for each in found if each[0].startswith("TRAKer, method ")]
        place = max(methods, key=lambda each: found[each]["lds"], default=None)
        name = "" if place is None else place[0].removeprefix("TRAKer, method ") + ", "
    elif place == "traker":
        place = best_of(found, "traker")
    if place not in found:
        return "-"
    entry = found[place]
    interval = entry["jointly"] or entry["over_targets"]
    text = f"{entry['lds']:.3f}"
    inside = name + ("" if interval is None else span(interval, 2).replace(" to ", "-"))
    return f"{text} ({inside.removesuffix(', ')})" if inside else text


def summary(result: dict[str, Any], count: int) -> str:
    """Banks as columns, sides as rows.

    Args:
        result: the table's.
        count: checkpoints.

    Returns:
        Markdown.
    """
    banks = banks_of(result)
    found = {bank: lookup(result["entries"], bank, count) for bank in banks}
    rows = [
        [what, *(shown(found[bank], place) for bank in banks)] for what, place in SUMMARY
    ]
    rows.append(["ceiling", *(number(result["ceilings"][bank]) for bank in banks)])
    return table(["", *banks], rows)


def methods(result: dict[str, Any]) -> str:
    """LDS of each method over the same stored rows.

    Args:
        result: the table's.

    Returns:
        Markdown.
    """
    counts, banks = counts_of(result), banks_of(result)

    def cell(bank: str, side: str) -> str:
        entries = [lookup(result["entries"], bank, count) for count in counts]
        found = [entry.get((side, DEFAULT)) for entry in entries]
        return ", ".join("-" if one is None else f"{one['lds']:.3f}" for one in found)

    named = [("TRAK", "TRAKer"), *((name, f"TRAKer, method {name}") for name in METHODS)]
    rows = [[what, *(cell(bank, side) for bank in banks)] for what, side in named]
    return table(["method", *banks], rows)


def verdict(bar: dict[str, Any]) -> list[str]:
    """A row of the table of bars.

    Args:
        bar: of the result.

    Returns:
        Cells.
    """
    if bar["factor"] is None:
        value = f"{bar['value']:+.3f}"
        if bar["interval"] is not None:
            value += f" ({bar['interval'][0]:+.3f} to {bar['interval'][1]:+.3f})"
    else:
        value = "-" if bar["value"] is None else f"{bar['value']:.2f} times"
    mark = MARKS[bar["met"]]
    ends = bar["interval"]
    if ends is not None and ends[0] <= 0 <= ends[1]:
        mark += ", within noise"
    against = f"{bar['other']:.3f} ({bar['against']})"
    return [
        bar["bank"],
        str(bar["checkpoints"]),
        f"{bar['measured']:.3f}",
        against,
        value,
        mark,
    ]


def judged(result: dict[str, Any], times: dict[str, Any] | None) -> str:
    """All bars, with whether each is met.

    Args:
        result: the table's.
        times: of `benchmarks.quality_time`, if it has run.

    Returns:
        Markdown.
    """
    text = ""
    head = ["bank", "checkpoints", "LDS", "against", "difference or ratio", ""]
    names = list(dict.fromkeys(bar["bar"] for bar in result["bars"]))
    place = {bank: number for number, bank in enumerate(banks_of(result))}
    for name in names:
        own = [bar for bar in result["bars"] if bar["bar"] == name]
        own.sort(key=lambda bar: (bar["checkpoints"], place.get(bar["bank"], 99)))
        met = sum(bar["met"] for bar in own)
        text += f"\n{name}: met in {met} of {len(own)}.\n\n"
        text += table(head, [verdict(bar) for bar in own])
    if times is not None:
        rows = [
            [r["what"], r["bar"], r["measured"], MARKS.get(r["passed"], ""), r["how"]]
            for r in times["rows"]
        ]
        text += "\nTime of the one call:\n\n"
        text += table(["", "bar", "measured", "", "how"], rows)
    return text


def line(entry: dict[str, Any]) -> list[str]:
    """A row of a bank's table.

    Args:
        entry: of the result.

    Returns:
        Cells.
    """
    label = "" if entry["label"] == "auto" else entry["label"]
    label += " (edge of the sweep)" if entry["edge"] else ""
    return [
        entry["side"],
        entry["setting"] or "not run",
        label or entry["note"],
        number(entry["lds"]),
        span(entry["jointly"]),
        span(entry["over_targets"]),
        span(entry["over_subsets"]),
        number(entry["seconds_one"], 1),
        number(entry["seconds"], 0),
        number(entry["megabytes"], 0),
        f"{entry['commit'][:9]}, {entry['date']}",
    ]


def long_table(result: dict[str, Any], bank: str, count: int) -> str:
    """Everything on a bank.

    Args:
        result: the table's.
        bank: the bank.
        count: checkpoints.

    Returns:
        Markdown.
    """
    head = ["side", "setting", "", "LDS", "jointly", "over targets", "over subsets"]
    head += ["s, one", "s, all", "MB", "measured"]
    own = [
        entry
        for entry in result["entries"]
        if (entry["bank"], entry["checkpoints"]) == (bank, count)
    ]
    own.sort(key=lambda entry: -2 if entry["lds"] is None else entry["lds"], reverse=True)
    return table(head, [line(entry) for entry in own])


def page(result: dict[str, Any], times: dict[str, Any] | None = None) -> str:
    """The whole page.

    Args:
        result: the table's.
        times: of `benchmarks.quality_time`, if it has run.

    Returns:
        Markdown.
    """
    where = result["environment"]
    text, notes = HEAD.read_text("utf-8").split(MARK)
    text = text.rstrip() + "\n\n## Summary\n"
    for count in counts_of(result):
        text += f"\n### {_checkpoints(count)}\n\n" + summary(result, count)
    text += "\n## Bars\n" + judged(result, times) + "\n" + notes.strip() + "\n"
    counts = " and ".join(map(str, counts_of(result)))
    text += "\n## Methods over the same stored rows\n\n"
    text += (
        f"LDS of `TRAKer`'s methods with {counts} checkpoints, at its default settings.\n\n"
    )
    text += methods(result) + "\n## Every side\n\n"
    text += (
        f"Python {where['python']}, torch {where['versions']['torch']}, {where['cpu']}, "
        f"{where['cores']} cores.\n"
    )
    for bank in banks_of(result):
        for count in counts_of(result):
            text += f"\n### {bank}, {_checkpoints(count)}\n\n"
            text += long_table(result, bank, count)
    return text


def _checkpoints(count: int) -> str:
    return "1 checkpoint" if count == 1 else f"{count} checkpoints"


def main() -> None:
    """Writes the page."""
    result = read()
    times = json.loads(TIMES.read_text("utf-8")) if TIMES.exists() else None
    PAGE.write_text(page(result, times), encoding="utf-8")
    for count in counts_of(result):
        print(f"{_checkpoints(count)}\n\n{summary(result, count)}")
    print(judged(result, times))


if __name__ == "__main__":
    main()
