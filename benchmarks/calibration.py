"""Do 90 % intervals of scores cover what they should?

Bar: 85 to 95 %. Two runs with nothing in common have the same expected scores, so the
interval of their difference, `t sqrt(e1^2 + e2^2)`, must hold zero in 90 % of all pairs of
training example and target. For errors over checkpoints the runs have disjoint checkpoints
of a bank; for those over the columns of a sketch, one checkpoint and two projection seeds.

    python -m benchmarks.calibration [--bank digits] [--projection sparse]
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.banks.bank import load
from benchmarks.banks.recipes import recipe
from benchmarks.common import RESULTS, Row, write
from benchmarks.quality_table.ours import stepwise
from trak import ScoresWithError
from trak.pipeline.ranks_of_scores import critical

BANKS = ("digits", "mnist", "diabetes")
DIM = 512
PROJECTIONS: dict[str, dict[str, Any]] = {
    "rademacher": {"projector": "rademacher"},
    "sparse": {"projector": "sparse"},
    "factored": {"projector": "factored"},
    "whitened, leading": {"projector": "leading", "whitening": 0.4, "curvature": True},
    "rademacher, automatic ridge": {"projector": "rademacher", "lambda_reg": "auto"},
}
ONE = "one sketch"
LEVEL, LOW, HIGH = 0.9, 0.85, 0.95


def errors(bank: str, numbers: list[int], seed: int, name: str) -> ScoresWithError:
    """Scores with errors from some of a bank's checkpoints.

    Args:
        bank: the bank.
        numbers: its checkpoints.
        seed: of the projection.
        name: one of `PROJECTIONS`.

    Returns:
        Scores and errors.
    """
    made, whole = recipe(bank), load(bank)
    states = [made.weights(whole.checkpoints[j]) for j in numbers]
    options: dict[str, Any] = {
        "proj_dim": DIM,
        "projector_seed": seed,
        "lambda_reg": "2x",
        **PROJECTIONS[name],
    }
    with tempfile.TemporaryDirectory() as folder:
        traker = stepwise(made, states, folder, **options)
        return traker.scores("bank", with_error=True)


def coverage(one: ScoresWithError, other: ScoresWithError) -> float:
    """How often the interval of the difference holds zero.

    Args:
        one: a run.
        other: an independent one of the same kind.

    Returns:
        A share of all scores.
    """
    # degrees of freedom of a difference: Welch 1947
    squares = np.square([one.errors, other.errors]).astype(np.float64)
    ratio = squares.sum(0) ** 2 / np.maximum((squares**2).sum(0), 1e-300)
    least = min(one.degrees, other.degrees)
    degrees = np.clip(ratio * least, least, 2 * least)
    grid = np.linspace(least, 2 * least, 9)
    reach = np.interp(degrees, grid, [critical(LEVEL, d) for d in grid])
    apart = np.abs(one.scores - other.scores)
    return float((apart <= reach * np.sqrt(squares.sum(0))).mean())


def measured(bank: str, name: str) -> list[dict[str, Any]]:
    """Coverage on one bank, by one projection.

    Args:
        bank: the bank.
        name: one of `PROJECTIONS`.

    Returns:
        One entry for each kind of error.
    """
    pairs = {
        "5 checkpoints": [([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])],
        "3 checkpoints": [([0, 1, 2], [3, 4, 5]), ([4, 5, 6], [7, 8, 9])],
        "2 checkpoints": [([0, 1], [2, 3]), ([4, 5], [6, 7])],
        ONE: [([j], [j]) for j in range(3)],
    }
    entries = []
    for kind, runs in pairs.items():
        if kind == ONE and "leading" in name:  # nothing in it is random
            continue
        found = []
        for number, (first, second) in enumerate(runs):
            one = errors(bank, first, 2 * number, name)
            other = errors(bank, second, 2 * number + 1, name)
            found.append(coverage(one, other))
        print(bank, name, kind, found, flush=True)
        entries.append({"bank": bank, "projection": name, "kind": kind, "coverage": found})
    return entries


def row_of(entry: dict[str, Any]) -> Row:
    """A line of the page.

    Args:
        entry: as `measured` gives it.

    Returns:
        The mean coverage against the bar.
    """
    mean = float(np.mean(entry["coverage"]))
    return Row(
        "coverage of 90 % intervals, {bank}, {projection}, {kind}".format(**entry),
        f"{LOW:.0%} to {HIGH:.0%}",
        f"{mean:.1%}",
        LOW <= mean <= HIGH,
        f"k = {DIM}, {len(entry['coverage'])} pairs of runs",
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=BANKS)
    parser.add_argument("--projection", action="append", choices=PROJECTIONS)
    parser.add_argument("--out", type=Path, help="another file; what is in it is kept")
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    path = options.out or RESULTS / "calibration.json"
    kept = json.loads(path.read_text("utf-8"))["details"] if path.exists() else []
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in kept:
        found.setdefault((entry["bank"], entry["projection"]), []).append(entry)
    banks, names = options.bank or BANKS, options.projection or PROJECTIONS
    for key in itertools.product(banks, names):
        found[key] = measured(*key)
    every = itertools.product(BANKS, PROJECTIONS)
    details = [entry for key in every for entry in found.get(key, [])]
    write("calibration", [row_of(entry) for entry in details], details, options.out)


if __name__ == "__main__":
    main()
