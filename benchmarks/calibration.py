"""Do 90 % intervals of scores cover what they should?

Bar: 85 to 95 %. Two runs with nothing in common have the same expected scores, so the
interval of their difference, `t sqrt(e1^2 + e2^2)`, must hold zero in 90 % of all pairs of
training example and target. For errors over checkpoints the runs have disjoint checkpoints
of a bank; for those over the columns of a sketch, one checkpoint and two projection seeds.

    python -m benchmarks.calibration [--bank digits]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.banks.bank import load
from benchmarks.banks.recipes import recipe
from benchmarks.common import Row, write
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
        **PROJECTIONS[name],
        "lambda_reg": "2x",
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
    degrees = np.clip(ratio * one.degrees, one.degrees, 2 * one.degrees)
    grid = np.arange(one.degrees, 2 * one.degrees + 1)
    reach = np.interp(degrees, grid, [critical(LEVEL, int(d)) for d in grid])
    apart = np.abs(one.scores - other.scores)
    return float((apart <= reach * np.sqrt(squares.sum(0))).mean())


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=BANKS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows, details = [], []
    for bank in options.bank or BANKS:
        pairs = {
            "5 checkpoints": [([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])],
            "3 checkpoints": [([0, 1, 2], [3, 4, 5]), ([4, 5, 6], [7, 8, 9])],
            ONE: [([j], [j]) for j in range(3)],
        }
        cases = itertools.product(PROJECTIONS, pairs.items())
        for name, (kind, runs) in cases:
            if kind == ONE and "leading" in name:  # nothing in it is random
                continue
            found = []
            for number, (first, second) in enumerate(runs):
                one = errors(bank, first, 2 * number, name)
                other = errors(bank, second, 2 * number + 1, name)
                found.append(coverage(one, other))
            mean = float(np.mean(found))
            print(bank, name, kind, found, flush=True)
            details.append({
                "bank": bank,
                "projection": name,
                "kind": kind,
                "coverage": found,
            })
            rows.append(
                Row(
                    f"coverage of 90 % intervals, {bank}, {name}, {kind}",
                    f"{LOW:.0%} to {HIGH:.0%}",
                    f"{mean:.1%}",
                    LOW <= mean <= HIGH,
                    f"k = {DIM}, {len(runs)} pairs of runs",
                )
            )
    write("calibration", rows, details, options.out)


if __name__ == "__main__":
    main()
