"""LDS of every projection on the ground-truth banks, at the same k and ridge.

The bar: the default projection's linear datamodeling score (Park et al. 2023, Sec. 2) is
within 0.01 of dense normal's. Scores come from `TRAKer` as a user calls it, once for each
projection seed.

    python -m benchmarks.quality [--small] [--bank digits] [--proj-dim 512]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from benchmarks.banks.bank import Bank, load
from benchmarks.banks.recipes import Recipe, recipe
from benchmarks.common import Row, write
from trak import TRAKer

BANKS = ("digits", "mnist")
KINDS = ("normal", "rademacher", "sparse", "hadamard", "masked", "default")
REFERENCE = "normal"
BATCH = 250
TOLERANCE = 0.01


def lds(
    scores: NDArray[Any], bank: Bank, outputs: NDArray[Any] | None = None
) -> NDArray[Any]:
    """The linear datamodeling score of each target.

    Args:
        scores: `[n, m]`.
        bank: ground truth.
        outputs: `[subsets, m]`; the mean over seeds if None.

    Returns:
        Spearman correlations, `[m]`.
    """
    truth = bank.outputs.mean(axis=1) if outputs is None else outputs
    predicted = bank.masks.astype(np.float64) @ np.asarray(scores, dtype=np.float64)
    return spearman(predicted, truth)


def spearman(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    """Spearman correlation of each column.

    Args:
        a: `[subsets, m]`.
        b: `[subsets, m]`.

    Returns:
        `[m]`.
    """
    ranks = [rankdata(x, axis=0) for x in (a, b)]
    a, b = (r - r.mean(axis=0) for r in ranks)
    return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))


def ceiling(bank: Bank) -> float:
    """What a perfect predictor would reach, given the noise of the truth.

    Two halves of the seeds correlate by `r`; by Spearman and Brown, the mean of all seeds
    has reliability `2 r / (1 + r)`, whose root bounds the correlation with it.

    Args:
        bank: ground truth.

    Returns:
        The bound on the mean over targets.
    """
    seeds = bank.outputs.shape[1]
    found = []
    for shift in range(seeds):
        order = np.roll(np.arange(seeds), shift)
        halves = [bank.outputs[:, part].mean(axis=1) for part in np.array_split(order, 2)]
        found.append(spearman(*halves).mean())
    r = max(0.0, float(np.mean(found)))
    return float(np.sqrt(2 * r / (1 + r)))


def scores_of(
    made: Recipe, bank: Bank, kind: str, proj_dim: int, seed: int
) -> NDArray[Any]:
    """TRAK scores of a bank's targets.

    Args:
        made: data and model.
        bank: its checkpoints are averaged over.
        kind: name of a projection, or `"default"`.
        proj_dim: projection dimension.
        seed: of the projection.

    Returns:
        `[n, m]`.
    """
    model = made.make_model()
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=model,
            task="image_classification",
            train_set_size=len(made.train[1]),
            save_dir=folder,
            device="cpu",
            proj_dim=proj_dim,
            projector=None if kind == "default" else kind,
            projector_seed=seed,
            logging_level=logging.ERROR,
        )
        for number, state in enumerate(bank.checkpoints):
            traker.load_checkpoint(state, model_id=number)
            for batch in zip(*(part.split(BATCH) for part in made.train), strict=True):
                traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        m = len(made.targets[1])
        for number, state in enumerate(bank.checkpoints):
            traker.start_scoring_checkpoint("bank", state, number, num_targets=m)
            for batch in zip(*(part.split(BATCH) for part in made.targets), strict=True):
                traker.score(batch, num_samples=len(batch[0]))
        return np.array(traker.finalize_scores("bank"))


def compare(name: str, proj_dim: int, seeds: int, checkpoints: int) -> dict[str, Any]:
    """LDS of every projection on one bank.

    Args:
        name: the bank.
        proj_dim: projection dimension.
        seeds: projection seeds.
        checkpoints: how many to average over.

    Returns:
        Mean, standard error over projection seeds, and all values, by kind.
    """
    made, whole = recipe(name), load(name)
    bank = Bank(whole.masks, whole.outputs, whole.checkpoints[:checkpoints], whole.manifest)
    found: dict[str, Any] = {}
    for kind in KINDS:
        each = [
            lds(scores_of(made, bank, kind, proj_dim, seed), bank) for seed in range(seeds)
        ]
        values = [float(one.mean()) for one in each]
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        over_targets = np.mean(each, axis=0)
        found[kind] = {
            "lds": statistics.fmean(values),
            "standard error over projection seeds": error,
            "standard error over targets": float(
                over_targets.std() / len(over_targets) ** 0.5
            ),
            "values": values,
        }
        print(name, proj_dim, kind, f"{found[kind]['lds']:.4f}", flush=True)
    return {
        "bank": name,
        "proj_dim": proj_dim,
        "checkpoints": checkpoints,
        "ceiling": ceiling(bank),
        "lds": found,
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one bank, k and seed")
    parser.add_argument("--bank", action="append", choices=BANKS)
    parser.add_argument("--proj-dim", type=int, action="append")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    banks = options.bank or (BANKS[:1] if options.small else BANKS)
    dims = options.proj_dim or ([512] if options.small else [512, 2048])
    seeds = min(options.seeds, 2) if options.small else options.seeds
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows, details = [], []
    for name in banks:
        for proj_dim in dims:
            found = compare(name, proj_dim, seeds, options.checkpoints)
            details.append(found)
            default, reference = (
                found["lds"][kind]["lds"] for kind in ("default", REFERENCE)
            )
            rows.append(
                Row(
                    f"LDS of the default projection, {name}, k = {proj_dim}",
                    f"at least dense normal's - {TOLERANCE}",
                    f"{default:.3f} against {reference:.3f}",
                    default >= reference - TOLERANCE,
                    f"{options.checkpoints} checkpoints, {seeds} projection seeds; "
                    f"ceiling {found['ceiling']:.2f}",
                )
            )
    write("quality", rows, details, options.out)


if __name__ == "__main__":
    main()
