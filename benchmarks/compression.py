"""Which compression to `k` columns keeps the LDS, bank by bank?

Random projections (dense, hashed, Hadamard, two-sided, masked), leading eigenvectors
(layer by layer in the K-FAC eigenbases, or of the training rows' Gram matrix) and half of
each, at equal `k`, with and without whitening. Bar: what the library takes by itself
(leading coordinates with whitening) loses to none by more than the interval of the
difference.

    python -m benchmarks.compression [--bank digits] [--small]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.banks.bank import Bank, load
from benchmarks.banks.recipes import NAMES, recipe
from benchmarks.choices import merge
from benchmarks.common import RESULTS, environment, write
from benchmarks.compression_bars import AUTO, AUTOMATIC, BEST, EXACT, rows_of
from benchmarks.lds import lds
from benchmarks.sketches import (
    DERIVED,
    FIXED,
    PREDICTED,
    RANDOM,
    Source,
    compress,
    leading_cost,
    predicted_variances,
)
from benchmarks.systems import RIDGES, Checkpoint, checkpoint, loss_weights, moments_of
from trak.evaluation import lds_difference
from trak.projectors.choice import make_projector, projection_costs
from trak.projectors.dimension import chosen_dimension
from trak.score_computers.auto_ridge import relative_ridge
from trak.score_computers.ridge_sample import Situation
from trak.score_computers.unwhitened import Chosen, Unwhitened

DIMS = (512, 2048, 4096)
KINDS = (*RANDOM, *DERIVED)
STRENGTHS = (0.0, 0.5)
COUNTS = (1, 3)
SEEDS = 2
DRAWS = 200
POSITIONS = 64  # as the library assumes where it chooses
PIECE = 256  # examples
HALF = 2  # bytes of a stored number, by default
Predictions = NDArray[np.float64]


@dataclass(frozen=True, order=True)
class Setting:
    """What is compared.

    Attributes:
        strength: of whitening.
        checkpoints: averaged over.
        kind: of compression.
        k: columns; 0 for `EXACT`.
    """

    strength: float
    checkpoints: int
    kind: str
    k: int


@dataclass
class Sums:
    """Group scores `[subsets, m]`, added over checkpoints.

    Attributes:
        at: one array for every ridge, and one for the automatic one.
    """

    at: list[Predictions] = field(default_factory=list)

    def add(self, found: list[Predictions]) -> None:
        """Adds a checkpoint's.

        Args:
            found: one array a ridge.
        """
        self.at = [a + b for a, b in zip(self.at, found, strict=True)] if self.at else found


def predict(
    rows: Tensor, n: int, left: Predictions, situation: Situation
) -> list[Predictions]:
    """Group scores of one checkpoint at all ridges.

    Args:
        rows: of training examples and targets, `[n + m, k]`.
        n: training examples.
        left: subsets times loss weights, `[subsets, n]`.
        situation: what the automatic ridge depends on.

    Returns:
        `[subsets, m]` for each of `RIDGES`, and for the automatic ridge.
    """
    phi, targets = rows[:n].double(), rows[n:].double()
    unit = float(phi.square().sum()) / n
    weights = torch.as_tensor(left)
    if rows.shape[1] < n:
        gram = phi.T @ phi
        values, vectors = torch.linalg.eigh(gram)
        mine, right = weights @ (phi @ vectors), vectors.T @ targets.T
    else:
        gram = phi @ phi.T
        values, vectors = torch.linalg.eigh(gram)
        mine, right = weights @ vectors, vectors.T @ (phi @ targets.T)
    auto = relative_ridge(phi, situation)
    values = values.clamp(min=0)
    return [((mine / (values + ridge * unit)) @ right).numpy() for ridge in (*RIDGES, auto)]


def every_job(
    source: Source, dims: Sequence[int], kinds: Sequence[str]
) -> Iterator[tuple[str, int, int]]:
    """Everything that is to be projected.

    Args:
        source: gradients.
        dims: columns.
        kinds: of compression.

    Yields:
        Kind, columns and seed.
    """
    yield EXACT, 0, 0
    for k in (k for k in dims if k < source.width):
        for kind in kinds:
            seeds = 1 if kind in FIXED else SEEDS
            yield from ((kind, k, seed) for seed in range(seeds))
    wide = chosen_dimension("auto", source.found.n, source.width, HALF)
    if wide is not None:
        yield from ((AUTO, wide, seed) for seed in range(SEEDS))


def rows_for(source: Source, kind: str, k: int, seed: int) -> Tensor | None:
    """Compressed rows, or those of no projection and of the automatic dimension.

    Args:
        source: gradients.
        kind: of compression.
        k: columns.
        seed: of the random part.

    Returns:
        `[n + m, k]`; None where the kind is nothing else than no projection.
    """
    if kind == EXACT:
        return source.root
    if kind == AUTO:
        kind = default_kind(source.found.shapes, k, source.strength)
    return compress(source, kind, k, seed)


def collect(
    name: str, dims: Sequence[int], counts: Sequence[int], kinds: Sequence[str]
) -> dict[Setting, list[Sums]]:
    """Group scores in every setting.

    Args:
        name: the bank.
        dims: columns.
        counts: of checkpoints.
        kinds: of compression.

    Returns:
        Setting to the sums of each seed.
    """
    made, bank = recipe(name), load(name)
    n, number_of = len(made.train[-1]), max(counts)
    losses = [loss_weights(made, bank, number)[:n] for number in range(number_of)]
    left = {c: bank.masks * torch.stack(losses[:c]).mean(0).numpy() for c in counts}
    found: dict[Setting, dict[int, Sums]] = {}
    for number in range(number_of):
        one = checkpoint(made, bank, number)
        examples = unwhitened(one, losses[number])
        for strength in STRENGTHS:
            source = Source(one, one.whitened(strength), strength, max(dims))
            for kind, k, seed in every_job(source, dims, kinds):
                rows = rows_for(source, kind, k, seed)
                for count in (c for c in counts if number < c and rows is not None):
                    fixed = kind in FIXED or (kind == AUTO and strength > 0)
                    situation = Situation(
                        checkpoints=count,
                        strength=strength,
                        columns=None if fixed else k or None,
                        loss=losses[number],
                        unwhitened=[examples],
                    )
                    setting = Setting(strength, count, kind, k)
                    sums = found.setdefault(setting, {}).setdefault(seed, Sums())
                    sums.add(predict(rows, n, left[count], situation))
            print(name, "checkpoint", number, "strength", strength, flush=True)
    return {key: [sums[s] for s in sorted(sums)] for key, sums in found.items()}


def unwhitened(one: Checkpoint, loss: Tensor) -> Unwhitened:
    """What `fit_whitening` keeps of a checkpoint's examples as they are.

    Args:
        one: the checkpoint.
        loss: its loss weights Q, `[n]`.

    Returns:
        A sample of the training examples.
    """
    kept = Chosen()
    rows = torch.cat([part[: one.n] for part in one.gradients.values()], dim=1)
    for start in range(0, one.n, PIECE):
        kept.add(rows[start : start + PIECE], loss[start : start + PIECE, None])
    found = kept.found()
    assert found is not None
    return found


def default_kind(shapes: Mapping[str, tuple[int, ...]], k: int, strength: float) -> str:
    """What the library compresses with.

    Args:
        shapes: of the parameters.
        k: columns.
        strength: of whitening.

    Returns:
        A kind.
    """
    if strength:
        return PREDICTED
    return make_projector(shapes, k, 0, torch.device("cpu")).proj_type.value


class Judged:
    """The settings of one bank against its ground truth.

    Args:
        bank: ground truth.
        found: what `collect` gave.
    """

    def __init__(self, bank: Bank, found: dict[Setting, list[Sums]]) -> None:
        self.bank, self.found = bank, found
        # [seeds, ridges]
        self.qualities = {
            setting: np.array([
                [lds(p, bank.outputs).mean() for p in sums.at] for sums in many
            ])
            for setting, many in found.items()
        }

    def place(self, setting: Setting, ridge: str) -> int:
        """Where the arrays at a ridge are.

        Args:
            setting: the setting.
            ridge: `BEST` of the sweep, for the mean over seeds, or `AUTOMATIC`.

        Returns:
            The index.
        """
        swept = self.qualities[setting].mean(0)[:-1]
        return int(swept.argmax()) if ridge == BEST else len(RIDGES)

    def quality(self, setting: Setting, ridge: str) -> float:
        """The LDS, averaged over seeds.

        Args:
            setting: the setting.
            ridge: `BEST` or `AUTOMATIC`.

        Returns:
            The LDS.
        """
        return float(self.qualities[setting][:, self.place(setting, ridge)].mean())

    def difference(self, mine: Setting, other: Setting, ridge: str) -> dict[str, Any]:
        """LDS of one setting less another's, averaged over seeds.

        Args:
            mine: a setting.
            other: another.
            ridge: `BEST` or `AUTOMATIC`, of each.

        Returns:
            The difference and its interval: value and ends are means over seeds.
        """
        ours, theirs = (
            [sums.at[self.place(setting, ridge)] for sums in self.found[setting]]
            for setting in (mine, other)
        )
        pairs = max(len(ours), len(theirs))
        subsets = np.eye(len(self.bank.masks), dtype=bool)  # scores are summed already
        each = [
            lds_difference(
                ours[j % len(ours)],
                theirs[j % len(theirs)],
                subsets,
                self.bank.outputs,
                draws=DRAWS,
            )
            for j in range(pairs)
        ]
        ends = [(d.jointly.low, d.jointly.high) for d in each]
        low, high = np.mean(ends, axis=0)
        return {
            "difference": round(float(np.mean([d.value for d in each])), 4),
            "interval": [round(float(low), 4), round(float(high), 4)],
        }


def measure(
    name: str, dims: Sequence[int], counts: Sequence[int], kinds: Sequence[str]
) -> dict[str, Any]:
    """Everything on one bank.

    Args:
        name: the bank.
        dims: columns.
        counts: of checkpoints.
        kinds: of compression.

    Returns:
        Details of the result.
    """
    found = collect(name, dims, counts, kinds)
    judged = Judged(load(name), found)
    shapes = shapes_for(name)
    default = {(k, s): default_kind(shapes, k, s) for k in dims for s in STRENGTHS}
    entries = []
    for setting in found:
        place = judged.place(setting, BEST)
        entry: dict[str, Any] = {
            "strength": setting.strength,
            "checkpoints": setting.checkpoints,
            "kind": setting.kind,
            "k": setting.k,
            "ridge": RIDGES[place],
            BEST: round(judged.quality(setting, BEST), 4),
            AUTOMATIC: round(judged.quality(setting, AUTOMATIC), 4),
        }
        own = default.get((setting.k, setting.strength), setting.kind)
        if own != setting.kind:
            mine = Setting(setting.strength, setting.checkpoints, own, setting.k)
            for ridge in (BEST, AUTOMATIC):
                entry[f"default - this, {ridge}"] = judged.difference(mine, setting, ridge)
        entries.append(entry)
        print(name, entry, flush=True)
    return {
        "bank": name,
        "default": {f"{k}, {s:g}": kind for (k, s), kind in default.items()},
        "operations a sample": costs_of(name, dims),
        "entries": entries,
        "ran": environment(),
    }


def costs_of(name: str, dims: Sequence[int]) -> dict[str, dict[str, float]]:
    """Operations a sample, as the library counts them.

    Args:
        name: the bank.
        dims: columns.

    Returns:
        Columns to kind to operations; leading coordinates those of whitened rows.
    """
    made, bank, shapes = recipe(name), load(name), shapes_for(name)
    moments = moments_of(made, bank, 0)
    width = sum(math.prod(shape) for shape in shapes.values())
    names = {key: torch.empty(0, math.prod(shape)) for key, shape in shapes.items()}
    one = Checkpoint(names, torch.empty(0), moments, shapes, len(made.train[-1]), 0)
    order = predicted_variances(one, names, STRENGTHS[-1]).argsort(descending=True)
    found = {}
    for k in (k for k in dims if k < width):
        leading = leading_cost(shapes, order[:k], POSITIONS)
        found[str(k)] = {**projection_costs(shapes, k, POSITIONS), PREDICTED: leading}
    return found


def shapes_for(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a bank's attributed parameters.

    Args:
        name: the bank.

    Returns:
        Parameter to shape.
    """
    named = recipe(name).make_model().named_parameters()
    return {key: tuple(p.shape) for key, p in named if p.requires_grad}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=NAMES)
    parser.add_argument("--small", action="store_true", help="one bank, k and checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoints", type=int, action="append", help="averaged over")
    parser.add_argument("--proj-dim", type=int, action="append")
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--costs", action="store_true", help="count operations anew only")
    parser.add_argument("--out", type=Path, help="another file; banks in it are kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    banks = options.bank or (["diabetes"] if options.small else NAMES)
    dims, counts = (DIMS[:1], COUNTS[:1]) if options.small else (DIMS, COUNTS)
    dims, counts = options.proj_dim or dims, options.checkpoints or counts
    details: list[dict[str, Any]] = []
    path = options.out or RESULTS / "compression.json"
    for name in banks:
        if options.costs:
            known = json.loads(path.read_text("utf-8"))["details"]
            detail = next(d for d in known if d["bank"] == name)
            details.append({**detail, "operations a sample": costs_of(name, dims)})
        else:
            details.append(measure(name, dims, counts, options.kind or KINDS))
        every = details if options.small else merge(details, banks, path)
        write("compression", rows_of(every), every, options.out)


if __name__ == "__main__":
    main()
