"""Runs the benchmarks one after the other, and makes the page.

python -m benchmarks [--small] [--only step]
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

from benchmarks import render
from benchmarks.common import ROOT

NAMES = (
    "step",
    "memory",
    "streaming",
    "row_dtypes",
    "kernel",
    "quality",
    "choices",
    "compression",
)


def main() -> None:
    """Runs what is there; one that fails does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="minutes in all")
    parser.add_argument("--only", action="append", choices=NAMES)
    given = parser.parse_args()
    failed = []
    for name in given.only or NAMES:
        if importlib.util.find_spec(f"benchmarks.{name}") is None:
            continue
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        command += ["--small"] * given.small
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    render.main()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
