"""Are ridge and one call right after trainings that nobody chose?

Bars, on small classification banks drawn by lot (`benchmarks.banks.drawn`): unprojected
plain TRAK at the automatic ridge has at least 97 % of the LDS of the best of 25, and
`trak.attribute` at least that LDS, with one checkpoint and with five. Banks whose best LDS
is below 0.15 are left out: what so few retrained models say of them is mostly chance.

    python -m benchmarks.drawn [--group judging] [--small] [--out FILE]

`--part 0 --parts 2 --out FILE` runs every second bank, `--part 1 --parts 2 --add FILE` the
others, and puts both together.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ridge
from benchmarks.banks.bank import Bank
from benchmarks.banks.drawn import JUDGING, LOOKED_AT
from benchmarks.banks.recipes import Recipe
from benchmarks.banks.variants import made_from
from benchmarks.common import Row, write
from benchmarks.one_call import quality
from benchmarks.quality_table.ours import one_call

COUNTS = (1, 5)
LEAST, BAR, ALIKE = 0.15, 0.97, 0.0005
GROUPS = {"looked at": LOOKED_AT, "judging": JUDGING}


def judged(made: Recipe, bank: Bank, count: int) -> dict[str, Any]:
    """One setting.

    Args:
        made: data and model.
        bank: ground truth.
        count: checkpoints.

    Returns:
        The ridges, and the LDS of plain TRAK at both and of the one call.
    """
    found = ridge.judged(made, bank, "exact", count)
    states = [made.weights(stored) for stored in bank.checkpoints[:count]]
    reached = quality(one_call(made, states)["auto"], bank)
    kept = {name: value for name, value in found.items() if name not in ("k", "sweep")}
    return {**kept, "one call": round(reached, 4)}


def rows_of(group: str, details: list[dict[str, Any]]) -> list[Row]:
    """Lines of the page.

    Args:
        group: of banks.
        details: of all groups.

    Returns:
        One for the ridge, one for the call.
    """
    own = [d for d in details if d["group"] == group and d["best lds"] >= LEAST]
    shares = np.array([entry["share"] for entry in own])
    gains = np.array([entry["one call"] - entry["best lds"] for entry in own])
    met, ahead = int((shares >= BAR).sum()), int((gains >= -ALIKE).sum())
    left = sum(d["group"] == group for d in details) - len(own)
    note = f"{left} settings left out"
    return [
        Row(
            f"automatic ridge, drawn by lot, {group}",
            f"at least {BAR:.0%} of the best of 25, in all settings",
            f"in {met} of {len(own)}; {shares.mean():.1%} on average, "
            f"{int((shares < 0.9).sum())} below 90 %, {shares.min():.1%} at worst",
            met == len(own),
            note,
        ),
        Row(
            f"one call against the best plain TRAK, drawn by lot, {group}",
            "at least as good in all settings",
            f"in {ahead} of {len(own)}; {gains.mean():+.3f} on average, "
            f"{gains.min():+.3f} at worst",
            ahead == len(own),
            note,
        ),
    ]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--group", action="append", choices=GROUPS)
    parser.add_argument("--part", type=int, default=0, help="of --parts, to run several")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--add", type=Path, help="result of another part")
    parser.add_argument("--small", action="store_true", help="one bank, one checkpoint")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    groups = options.group or list(GROUPS)
    known = json.loads(options.add.read_text("utf-8"))["details"] if options.add else []
    details: list[dict[str, Any]] = known
    for group in groups[:1] if options.small else groups:
        banks = list(GROUPS[group].items())[options.part :: options.parts]
        for name, variant in banks[1:2] if options.small else banks:
            made, bank = made_from(variant, name)
            for count in COUNTS[:1] if options.small else COUNTS:
                found = {"group": group, "bank": name}
                details.append({**found, **judged(made, bank, count)})
                print(details[-1], flush=True)
    measured = dict.fromkeys(entry["group"] for entry in details)
    rows = [row for group in measured for row in rows_of(group, details)]
    if options.out or not (options.small or options.group):
        write("drawn", rows, details, options.out)


if __name__ == "__main__":
    main()
