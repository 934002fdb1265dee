"""Does the one call take at most half of the time of EK-FAC influence functions?

Bar: at most 0.5. `trak.attribute` with its defaults against `kronfluence`'s EK-FAC, with
one damping and with the sweep that its best LDS comes from, of one checkpoint of a bank or
of several, all targets against all training examples. Each run is a process of its own
that times the work without imports and loading, with nothing else on the machine and
torch's own way of waiting for threads, and all that was written before on the disk; the
sides take turns, and the median of the ratios
of neighbours counts.

    python -m benchmarks.quality_time [--bank digits] [--rounds 5] [--checkpoints 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.banks.recipes import NAMES, with_data
from benchmarks.common import RESULTS, Row, ratio, write
from benchmarks.quality_table.run import launch, prepare

SIDES = {
    "trak.attribute": ("ours", "trak.attribute"),
    "kronfluence": ("kronfluence", "EK-FAC one damping"),
    "kronfluence tuned": ("kronfluence", "EK-FAC"),
}
RIVALS = {"kronfluence": "EK-FAC", "kronfluence tuned": "EK-FAC, tuned"}
BAR = 0.5
LIMIT = 600  # seconds
COUNTS = (1, 3)
RESULT = RESULTS / "quality_time.json"


def measure(
    bank: str, count: int, rounds: int, threads: int, sides: Sequence[str] = tuple(SIDES)
) -> dict[str, Any]:
    """Times both sides in turns.

    Args:
        bank: the bank.
        count: checkpoints.
        rounds: how often each is timed.
        threads: of each.
        sides: which of `SIDES`.

    Returns:
        `seconds` and `megabytes` of each run by side, or `error`.
    """
    prepare(bank)
    entry = {"bank": bank, "checkpoints": count}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    megabytes: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        # each but the middle one comes first equally often
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            library, side = SIDES[name]
            os.sync()  # the first file would wait for what the run before left unwritten
            found = launch(library, side, bank, count, threads, LIMIT, alone=True)
            if "error" in found:
                return {**entry, "error": f"{name}: {found['error']}"}
            seconds[name].append(round(found["seconds"], 3))
            megabytes[name].append(round(found["megabytes"]))
            print(bank, count, turn, name, seconds[name][-1], "s", flush=True)
    return {**entry, "threads": threads, "seconds": seconds, "megabytes": megabytes}


def row_of(found: dict[str, Any], rival: str) -> Row:
    """A line of the page.

    Args:
        found: as `measure` gives it.
        rival: the other side.

    Returns:
        The median of the paired ratios against the bar.
    """
    count = found["checkpoints"]
    several = "one checkpoint" if count == 1 else f"{count} checkpoints"
    what = f"trak.attribute / kronfluence's {RIVALS[rival]}, {found['bank']}, {several}"
    if "error" in found:
        return Row(what, f"at most {BAR}", "did not run", None, found["error"])
    seconds = found["seconds"]
    measured = ratio(seconds, "trak.attribute", rival)
    medians = ", ".join(
        f"{name} {statistics.median(each):.1f} s, "
        f"{statistics.median(found['megabytes'][name]):.0f} MB"
        for name, each in seconds.items()
        if name in ("trak.attribute", rival)
    )
    rounds = len(seconds[rival])
    how = f"median of {rounds} pairs, {found['threads']} threads; {medians}"
    return Row(what, f"at most {BAR}", f"{measured:.2f}", measured <= BAR, how)


def with_others(details: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Keeps what was measured before on other banks.

    Args:
        details: of this run.
        path: the result file.

    Returns:
        Details of all banks and numbers of checkpoints.
    """
    known = json.loads(path.read_text("utf-8"))["details"] if path.exists() else []
    mine = {(found["bank"], found["checkpoints"]) for found in details}
    kept = [found for found in known if (found["bank"], found["checkpoints"]) not in mine]
    place = {name: number for number, name in enumerate(NAMES)}
    return sorted(
        [*kept, *details], key=lambda found: (found["checkpoints"], place[found["bank"]])
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=NAMES)
    parser.add_argument("--checkpoints", action="append", type=int)
    parser.add_argument("--untuned", action="store_true", help="without EK-FAC's sweep")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    sides = [name for name in SIDES if not (options.untuned and "tuned" in name)]
    details = [
        measure(bank, count, options.rounds, options.threads, sides)
        for count in options.checkpoints or COUNTS
        for bank in with_data(options.bank or NAMES)
    ]
    every = with_others(details, options.out or RESULT)
    rows = [
        row_of(found, rival)
        for rival in RIVALS
        for found in every
        if "error" in found or rival in found["seconds"]
    ]
    write("quality_time", rows, every, options.out)


if __name__ == "__main__":
    main()
