"""What every benchmark needs: where it ran, paired timing, and results as JSON."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "transformers", "trak-attribution")


@dataclass(frozen=True)
class Row:
    """One line of the benchmark page.

    Attributes:
        what: what was measured.
        bar: the bar, in words.
        measured: the figure that is held against the bar.
        passed: whether it meets the bar; None where there is none.
        how: how it was measured, in a few words.
        unit: of `measured`.
    """

    what: str
    bar: str
    measured: str
    passed: bool | None
    how: str
    unit: str = ""


def environment() -> dict[str, Any]:
    """Commit, versions and hardware of this run.

    Returns:
        JSON values.
    """
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "src"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        # a copy on another machine may have an older repository, or none
        "commit": os.environ.get("COMMIT") or commit + ("+changes" if changed else ""),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def paired_seconds(
    sides: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Times several functions in turns, so that a noisy neighbour meets all of them.

    Args:
        sides: name to function.
        rounds: how often each is timed, after one call that is not.
        clock: `time.perf_counter`, or `time.process_time` on a busy machine.

    Returns:
        Name to seconds of each call.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for function in sides.values():
        function()
    names = list(sides)
    for turn in range(rounds):
        # every side comes first equally often: the first finds the coldest caches
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            sides[name]()
            found[name].append(clock() - start)
    return found


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """The median of the ratios of paired runs.

    Args:
        seconds: as `paired_seconds` gives them.
        name: numerator.
        base: denominator.

    Returns:
        The ratio.
    """
    pairs = zip(seconds[name], seconds[base], strict=True)
    return statistics.median(a / b for a, b in pairs)


def write(
    name: str,
    rows: list[Row],
    details: Any,
    out: Path | None = None,
    *,
    say: bool = True,
) -> None:
    """Writes a benchmark's results, which `benchmarks.render` makes a page of.

    Args:
        name: the benchmark; its file is `benchmarks/results/{name}.json`.
        rows: lines of the page.
        details: configuration and raw figures.
        out: another file.
        say: print the lines, too.
    """
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "name": name,
        "rows": [asdict(row) for row in rows],
        "environment": environment(),
        "command": _command(name),
        "details": details,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for row in rows if say else ():
        mark = {True: "ok ", False: "NO ", None: "   "}[row.passed]
        print(f"{mark} {row.what}: {row.measured} (bar: {row.bar})", flush=True)


def _command(name: str) -> str:
    # without --out and its value, which say nothing about the figures
    main = sys.modules["__main__"].__spec__
    module = main.name if main else f"benchmarks.{name}"
    given = sys.argv[1:]
    if "--out" in given:
        place = given.index("--out")
        given = given[:place] + given[place + 2 :]
    return shlex.join(["python", "-m", module, *given])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
