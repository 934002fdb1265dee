"""Does the default projection keep the scores' quality?

Bar: on every bank, at the same dimension `k` and the same ridge, the default projection's
linear datamodeling score (`benchmarks.lds`) is within 0.01 of dense normal's, on average
over projection seeds.

    python -m benchmarks.quality [--small] [--bank digits] [--proj-dim 512] [--kind sparse]
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.banks.bank import Bank, load
from benchmarks.banks.evaluate import (
    DEFAULT,
    DRAWN,
    EXACT,
    Predictions,
    Setting,
    by_pieces,
    by_traker,
    projector_of,
    shapes_of,
)
from benchmarks.banks.recipes import NAMES, Recipe, recipe, with_data
from benchmarks.common import Row, write
from benchmarks.lds import lds, over_subsets, over_targets
from trak.errors import InputError
from trak.evaluation import noise_ceiling
from trak.projectors import ProjectionType

KINDS = [kind.value for kind in ProjectionType]
DENSE = ("normal", "rademacher")
DENSE_UP_TO = 100_000  # parameters; beyond, dense normal is drawn, see `evaluate`
DIMS = [512, 1024, 2048]
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
DEFAULT_RIDGE = 1.0
TOLERANCE = 0.01
USUALLY = 0.98  # of the targets agree to rounding


@dataclass(frozen=True)
class Figure:
    """An LDS for each projection seed.

    Attributes:
        values: the LDS, one a seed.
    """

    values: list[float]

    @property
    def mean(self) -> float:
        """Mean over projection seeds."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """Standard error over projection seeds; NaN with one seed."""
        count = len(self.values)
        return statistics.stdev(self.values) / math.sqrt(count) if count > 1 else math.nan

    def __str__(self) -> str:
        return f"{self.mean:.4f} +- {self.error:.4f}"


class Found:
    """What was found on one bank.

    Args:
        name: the bank.
        bank: its ground truth.
        reference: what the default projection is held against.
        predictions: group scores in every setting.
    """

    def __init__(
        self, name: str, bank: Bank, reference: str, predictions: Predictions
    ) -> None:
        self.name = name
        self.reference = reference
        self.outputs = bank.outputs
        self.predictions = predictions
        # [projection seeds, targets]
        self.each = {
            setting: np.stack([lds(p, bank.outputs) for p in predicted])
            for setting, predicted in predictions.items()
        }
        self.figures = {
            setting: Figure(each.mean(axis=1).tolist())
            for setting, each in self.each.items()
        }

    def at(self, kind: str, proj_dim: int, ridge: float) -> Figure:
        """The figure of a setting.

        Args:
            kind: of projection.
            proj_dim: projection dimension.
            ridge: relative.

        Returns:
            The figure.
        """
        return self.figures[Setting(kind, proj_dim, ridge)]

    def best(self, kind: str, proj_dim: int) -> float:
        """The ridge of the sweep with the largest LDS.

        Args:
            kind: of projection.
            proj_dim: projection dimension.

        Returns:
            The ridge.
        """
        return max(RIDGES, key=lambda ridge: self.at(kind, proj_dim, ridge).mean)

    def row(self, proj_dim: int, how: str, *, best: bool) -> Row:
        """The default projection against the reference.

        Args:
            proj_dim: projection dimension.
            how: settings in words.
            best: at the best ridge of each instead of the library's default.

        Returns:
            A line of the page.
        """
        ridges = [
            self.best(kind, proj_dim) if best else DEFAULT_RIDGE
            for kind in (DEFAULT, self.reference)
        ]
        default = self.at(DEFAULT, proj_dim, ridges[0])
        reference = self.at(self.reference, proj_dim, ridges[1])
        difference = default.mean - reference.mean
        error = math.hypot(default.error, reference.error)
        words = f"best ridges {ridges[0]}x, {ridges[1]}x" if best else "default ridge"
        return Row(
            f"LDS of the default projection, {self.name}, k = {proj_dim}, {words}",
            f"at least dense normal's - {TOLERANCE}",
            f"{default.mean:.3f} against {reference.mean:.3f}: "
            f"{difference:+.4f} +- {error:.4f}",
            difference >= -TOLERANCE,
            how,
        )

    def intervals(self, proj_dim: int) -> dict[str, Any]:
        """Bootstrap intervals at the default ridge.

        Args:
            proj_dim: projection dimension.

        Returns:
            Of the default's LDS and of its difference to the reference's.
        """
        pair = (DEFAULT, self.reference)
        mine, other = (
            self.predictions[Setting(kind, proj_dim, DEFAULT_RIDGE)] for kind in pair
        )
        each = self.each[Setting(DEFAULT, proj_dim, DEFAULT_RIDGE)].mean(axis=0)
        return {
            "lds": {
                "over targets": over_targets(each),
                "over subsets": over_subsets(mine, self.outputs),
            },
            "difference": {
                "over targets": self.difference(DEFAULT, proj_dim, DEFAULT_RIDGE)[1],
                "over subsets": over_subsets(mine, self.outputs, other),
            },
        }

    def difference(
        self, kind: str, proj_dim: int, ridge: float
    ) -> tuple[float, tuple[float, float]]:
        """A kind's LDS minus the reference's, at the same dimension and ridge.

        Args:
            kind: of projection.
            proj_dim: projection dimension.
            ridge: relative.

        Returns:
            The mean, and its bootstrap interval over targets, which both sides share.
        """
        mine, other = (
            self.each[Setting(name, proj_dim, ridge)].mean(axis=0)
            for name in (kind, self.reference)
        )
        return float((mine - other).mean()), over_targets(mine - other)

    def table(self) -> list[dict[str, Any]]:
        """All figures.

        Returns:
            One entry a setting.
        """
        entries = []
        for setting, figure in self.figures.items():
            entry: dict[str, Any] = {
                "kind": setting.kind,
                "proj_dim": setting.proj_dim or None,
                "ridge": setting.ridge,
                "lds": round(figure.mean, 5),
                "standard error over projection seeds": _number(figure.error),
                "values": [round(value, 5) for value in figure.values],
            }
            if setting.kind not in (EXACT, self.reference):
                mean, interval = self.difference(
                    setting.kind, setting.proj_dim, setting.ridge
                )
                entry["minus reference"] = round(mean, 5)
                entry["interval over targets"] = [round(end, 5) for end in interval]
            entries.append(entry)
        return entries


def check(made: Recipe, bank: Bank, found: Found, proj_dim: int) -> dict[str, Any]:
    """Holds the reused gradients against `TRAKer` as a user calls it.

    Args:
        made: data and model.
        bank: ground truth.
        found: what the reused gradients gave.
        proj_dim: projection dimension.

    Returns:
        Differences with float32 rows, relative to the spread of the group scores, and
        the LDS of `TRAKer` with all its defaults.
    """
    ours = found.predictions[Setting(DEFAULT, proj_dim, DEFAULT_RIDGE)][0]
    exact = by_traker(made, bank, DEFAULT, proj_dim, seed=0, half=False)
    apart = np.abs(exact - ours).max(axis=0) / ours.std(axis=0).mean()
    # where a ReLU's input is a rounding error away from zero, two ways to compute a
    # gradient may take different slopes: 2 of 8,750 gradients of the CNN
    usually = float(np.quantile(apart, USUALLY))
    assert usually < 1e-3, f"{found.name}: TRAKer's scores differ by {usually:.2g}"
    usual = by_traker(made, bank, DEFAULT, proj_dim, seed=0)
    return {
        "proj_dim": proj_dim,
        f"difference of {USUALLY:.0%} of the targets": usually,
        "largest difference": float(apart.max()),
        "lds of TRAKer, seed 0": round(float(lds(usual, bank.outputs).mean()), 5),
        "lds by pieces, seed 0": round(float(lds(ours, bank.outputs).mean()), 5),
    }


def known(kinds: Sequence[str], made: Recipe) -> list[str]:
    """Leaves out names that the library does not know, with a note.

    Args:
        kinds: names of projections.
        made: gives the model.

    Returns:
        Those that there are.
    """
    shapes = shapes_of(made)
    found = []
    for kind in kinds:
        try:
            if kind != DRAWN:
                projector_of(kind, shapes, 8, seed=0)
        except InputError as error:
            print(f"{kind} is left out: {error}", flush=True)
        else:
            found.append(kind)
    return found


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 5)


def run(name: str, options: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Measures one bank.

    Args:
        name: the bank.
        options: of the command line.

    Returns:
        Lines of the page, and details.
    """
    made, whole = recipe(name), load(name)
    states = whole.checkpoints[: options.checkpoints]
    bank = Bank(whole.masks, whole.outputs, states, whole.manifest)
    shapes = shapes_of(made)
    small = sum(map(math.prod, shapes.values())) <= DENSE_UP_TO
    reference = "normal" if small else DRAWN
    others = [kind for kind in options.kind if small or kind not in DENSE]
    kinds = [EXACT, DEFAULT, *dict.fromkeys([reference, *known(others, made)])]
    dims, seeds = sorted(options.proj_dim), options.seeds
    predictions = by_pieces(made, bank, kinds, dims, seeds, RIDGES)
    found = Found(name, bank, reference, predictions)
    for setting, figure in found.figures.items():
        at = f"{setting.kind} k={setting.proj_dim} ridge={setting.ridge}x"
        print(f"{name} {at}: {figure}", flush=True)
    limit = noise_ceiling(bank.outputs)
    how = f"{len(states)} checkpoints, {seeds} projection seeds; ceiling {limit:.2f}"
    rows = [found.row(k, how, best=best) for k in dims for best in (False, True)]
    default = {str(k): projector_of(DEFAULT, shapes, k, seed=0).settings() for k in dims}
    return rows, {
        "bank": name,
        "checkpoints": len(states),
        "projection seeds": seeds,
        "ceiling": round(limit, 4),
        "reference": reference,
        "default": default,
        "public API": check(made, bank, found, dims[0]),
        "intervals of 95 %": {str(k): found.intervals(k) for k in dims},
        "lds": found.table(),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one bank, k and kind")
    parser.add_argument("--bank", action="append", choices=NAMES)
    parser.add_argument("--kind", action="append", help="any name of a projection")
    parser.add_argument("--proj-dim", type=int, action="append")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--checkpoints", type=int, help="the first ones; all by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    small = options.small
    options.kind = options.kind or ([] if small else KINDS)
    options.proj_dim = options.proj_dim or (DIMS[:1] if small else DIMS)
    options.seeds = options.seeds or (2 if small else 5)
    options.checkpoints = options.checkpoints or (3 if small else None)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    banks = options.bank or (NAMES[:1] if small else NAMES)
    rows, details = [], []
    for name in with_data(banks):
        lines, detail = run(name, options)
        rows += lines
        details.append(detail)
    write("quality", rows, details, options.out)


if __name__ == "__main__":
    main()
