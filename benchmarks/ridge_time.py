"""Does the automatic ridge take no longer than one more factorisation?

Bar: choosing the ridge of a checkpoint takes at most as long as what is done with it, the
Gram matrix of the rows and its factor. Rows are float16, of a logistic model that was
trained by a few gradient steps on features whose sizes fall off; both sides take turns in
one process, medians of ratios count. Before anything is timed, the automatic ridge must be
one that was told from rows.

    python -m benchmarks.ridge_time [--small] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common import Row, paired_seconds, ratio, write
from trak.score_computers import RidgeScoreComputer
from trak.score_computers.ridge_sample import Situation

SIZES = ((300, 2048), (1500, 4096), (6000, 4096), (20_000, 4096), (50_000, 4096))
STEPS, RATE = 30, 0.5
ROUNDS = 5
BAR = 1.0


def trained(n: int, k: int) -> tuple[Tensor, NDArray[np.float32]]:
    """Rows of a logistic model, and what it lacks.

    Args:
        n: examples.
        k: columns.

    Returns:
        Rows as they are stored, and Q, `[n, 1]`.
    """
    lots = torch.Generator().manual_seed(0)
    sizes = torch.arange(1, k + 1).float() ** -0.6
    phi = torch.randn(n, k, generator=lots) * sizes
    truth = torch.randn(k, generator=lots)
    noise = torch.randn(n, generator=lots)
    signs = torch.sign(phi @ truth + 0.5 * noise * (phi @ truth).std())
    phi = phi * signs[:, None]
    weights = torch.zeros(k)
    scale = RATE / float(phi.square().sum(dim=1).mean())
    for _ in range(STEPS):
        weights += scale * phi.T @ torch.sigmoid(-phi @ weights)
    loss = torch.sigmoid(-phi @ weights)
    return phi.half(), loss[:, None].numpy()


def situation_of(rows: Tensor, loss: NDArray[np.float32]) -> Situation:
    """What the ridge is told from, beside the rows.

    Args:
        rows: as they are stored.
        loss: Q.

    Returns:
        One checkpoint of a logistic loss.
    """
    return Situation(checkpoints=1, columns=rows.shape[1], loss=loss, logistic=True)


def measure(n: int, k: int, rounds: int) -> dict[str, Any]:
    """One size.

    Args:
        n: examples.
        k: columns.
        rounds: how often each side is timed.

    Returns:
        Seconds of both sides, and the median of their ratios.

    Raises:
        RuntimeError: if the ridge was not told from rows.
    """
    rows, loss = trained(n, k)
    scorer, situation = RidgeScoreComputer(), situation_of(rows, loss)
    told = scorer.choose(rows, situation).multiple
    usual = scorer.choose(rows, situation_of(rows, 0 * loss)).multiple
    if told == usual:
        raise RuntimeError(f"the ridge of {n} x {k} rows is {told}, as of any")
    known = replace(situation, multiple=told)
    seconds = paired_seconds(
        {
            "choose": lambda: scorer.choose(rows, situation),
            "factor": lambda: scorer.finalize(rows, known),
        },
        rounds,
        time.perf_counter,
    )
    return {
        "n": n,
        "k": k,
        "auto": told,
        "seconds": seconds,
        "ratio": ratio(seconds, "choose", "factor"),
    }


def row_of(found: dict[str, Any]) -> Row:
    """A line of the page.

    Args:
        found: as `measure` gives it.

    Returns:
        The line.
    """
    own, factor = (statistics.median(each) for each in found["seconds"].values())
    return Row(
        f"choosing the ridge / Gram matrix and factor, n = {found['n']:,}, "
        f"k = {found['k']:,}",
        f"at most {BAR:g}",
        f"{found['ratio']:.2f}",
        found["ratio"] <= BAR,
        f"{own:.2f} s against {factor:.2f} s",
    )


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="300 rows, once")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    sizes, rounds = (SIZES[:1], 1) if options.small else (SIZES, ROUNDS)
    details = []
    for n, k in sizes:
        details.append(measure(n, k, rounds))
        print(details[-1], flush=True)
    if options.out or not options.small:
        write("ridge_time", [row_of(found) for found in details], details, options.out)


if __name__ == "__main__":
    main()
