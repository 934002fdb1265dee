"""Is the automatic ridge as good as the best of a sweep?

Bar: on every bank, its LDS is at least 97 % of the best of 25 ridges, for plain TRAK from
k = 128 to 4096, with one checkpoint and with several. Beside the banks, many ways to train
an MLP (`benchmarks.banks.variants`) that differ in what a ridge depends on; some of them were
not looked at when the rule was made. Banks that are not named keep what was measured before.

    python -m benchmarks.ridge [--bank digits] [--proj-dim 512] [--small]
    python -m benchmarks.ridge_page
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.banks.bank import Bank, load
from benchmarks.banks.recipes import NAMES, Recipe, recipe, with_data
from benchmarks.banks.variants import VARIANTS, make
from benchmarks.common import Row, write
from benchmarks.lds import lds
from benchmarks.quality_table.ours import stepwise
from trak.evaluation import group_scores

RIDGES = [f"{ridge:.4g}x" for ridge in np.logspace(-2, 3, 25)]
DIMS: list[int | str] = [128, 512, 2048, 4096, "exact"]
COUNTS = (1, 5)
BAR = 0.97
EXACT_UP_TO = 50_000  # parameters


def measure(
    made: Recipe, bank: Bank, count: int, **options: Any
) -> tuple[float, float, dict[str, float]]:
    """One sweep.

    Args:
        made: data and model.
        bank: ground truth.
        count: checkpoints.
        options: of `TRAKer`.

    Returns:
        The LDS of the automatic ridge, what it was, and the LDS of all others.
    """
    states = [made.weights(stored) for stored in bank.checkpoints[:count]]
    with tempfile.TemporaryDirectory() as folder:
        traker = stepwise(made, states, folder, **options)
        chosen = float(traker.saver.load_factor(0)[1]["auto"])

        def quality(scores: Any) -> float:
            return float(lds(group_scores(scores, bank.masks), bank.outputs).mean())

        auto = quality(traker.finalize_scores("bank"))
        swept = {}
        for ridge in RIDGES:  # one after the other: 25 files of scores need room
            swept[ridge] = quality(traker.sweep(["bank"], [ridge])["bank", ridge])
    return auto, chosen, swept


def rows_of(details: list[dict[str, Any]]) -> list[Row]:
    """Lines of the page, one a bank.

    Args:
        details: one entry a setting.

    Returns:
        The lines.
    """
    rows = []
    for name in dict.fromkeys(entry["bank"] for entry in details):
        own = [entry for entry in details if entry["bank"] == name]
        worst = min(own, key=lambda entry: entry["share"])
        where = f"k = {worst['k']}, {worst['checkpoints']} checkpoints"
        rows.append(
            Row(
                f"automatic ridge, {name}",
                f"at least {BAR:.0%} of the best of {len(RIDGES)}",
                f"{np.mean([e['share'] for e in own]):.1%} on average, "
                f"{worst['share']:.1%} at worst ({where})",
                worst["share"] >= BAR,
                f"{len(own)} settings",
            )
        )
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=[*NAMES, *VARIANTS])
    parser.add_argument("--proj-dim", type=int, action="append")
    parser.add_argument("--curvature", action="store_true", help="and rows weighted by it")
    parser.add_argument("--small", action="store_true", help="one bank, one dimension")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    banks = options.bank or (["diabetes"] if options.small else [*NAMES, *VARIANTS])
    dims = options.proj_dim or (DIMS[1:2] if options.small else DIMS)
    details: list[dict[str, Any]] = []
    for name in with_data(banks):
        made, bank = (recipe(name), load(name)) if name in NAMES else make(name)
        width = sum(p.numel() for p in made.make_model().parameters() if p.requires_grad)
        for dim in dims:
            if isinstance(dim, int) and dim >= width:
                continue
            if dim == "exact" and width > EXACT_UP_TO:
                continue
            for count in COUNTS:
                extra: dict[str, Any] = {"curvature": True} if options.curvature else {}
                auto, chosen, swept = measure(made, bank, count, proj_dim=dim, **extra)
                best = max(swept, key=lambda ridge: swept[ridge])
                share = auto / max(swept[best], auto)
                details.append({
                    "bank": name,
                    "k": dim,
                    "checkpoints": count,
                    "auto": round(chosen, 3),
                    "lds": round(auto, 4),
                    "best": best,
                    "best lds": round(swept[best], 4),
                    "share": round(share, 4),
                    "sweep": {ridge: round(value, 4) for ridge, value in swept.items()},
                })
                shown = {key: value for key, value in details[-1].items() if key != "sweep"}
                print(shown, flush=True)
        write("ridge", rows_of(details), details, options.out)


if __name__ == "__main__":
    main()
