"""What whitening and the curvature of the loss do for the LDS, bank by bank.

Every strength of whitening, with and without rows weighted by the loss's curvature, at the
automatic ridge and at the best of a sweep, and how well two checkpoints' scores agree.

    python -m benchmarks.whitening [--bank digits]
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
from benchmarks.banks.recipes import NAMES, recipe, with_data
from benchmarks.common import Row, write
from benchmarks.lds import lds
from benchmarks.quality_table.ours import stepwise
from trak.evaluation import group_scores

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
RIDGES = ("0.3x", "1x", "2x", "4x", "8x", "16x", "32x", "64x")
COUNTS = (1, 3)
EXACT_UP_TO = 50_000  # parameters


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=NAMES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    banks = with_data(options.bank or NAMES)
    details: list[dict[str, Any]] = []
    for bank in banks:
        made, whole = recipe(bank), load(bank)
        width = sum(p.numel() for p in made.make_model().parameters() if p.requires_grad)
        dim = "exact" if width <= EXACT_UP_TO else "auto"
        cases = itertools.product(COUNTS, (False, True), STRENGTHS)
        for count, curvature, strength in cases:
            states = [made.weights(c) for c in whole.checkpoints[:count]]
            extra: dict[str, Any] = {"curvature": True} if curvature else {}
            with tempfile.TemporaryDirectory() as folder:
                traker = stepwise(
                    made, states, folder, proj_dim=dim, whitening=strength, **extra
                )
                found = {"auto": np.array(traker.finalize_scores("bank"))}
                for ridge in RIDGES:
                    found[ridge] = traker.sweep(["bank"], [ridge])["bank", ridge]
            quality = {
                ridge: float(lds(group_scores(s, whole.masks), whole.outputs).mean())
                for ridge, s in found.items()
            }
            best = max(RIDGES, key=lambda ridge: quality[ridge])
            details.append({
                "bank": bank,
                "checkpoints": count,
                "curvature": curvature,
                "strength": strength,
                "lds": round(quality["auto"], 4),
                "best": best,
                "best lds": round(quality[best], 4),
            })
            print(details[-1], flush=True)
    rows = []
    for bank in banks:
        own = [d for d in details if d["bank"] == bank and d["checkpoints"] == COUNTS[-1]]
        top = max(own, key=lambda entry: entry["best lds"])
        plain = next(d for d in own if not (d["strength"] or d["curvature"]))
        rows.append(
            Row(
                f"whitening and curvature, {bank}",
                "above plain TRAK",
                f"{top['best lds']:.3f} against {plain['best lds']:.3f}: strength "
                f"{top['strength']:g}, {'with' if top['curvature'] else 'no'} curvature",
                top["best lds"] >= plain["best lds"],
                f"{COUNTS[-1]} checkpoints, best ridges",
            )
        )
    write("whitening", rows, details, options.out)


if __name__ == "__main__":
    main()
