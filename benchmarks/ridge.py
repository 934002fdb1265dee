"""Is the automatic ridge as good as the best of a sweep?

Bar: on every bank, its LDS is at least 97 % of the best of 25 ridges, for plain TRAK from
k = 128 to 4096, with one checkpoint and with up to ten. Beside the banks, many ways to
train an MLP (`benchmarks.banks.variants`) that differ in what a ridge depends on; some of
them were not looked at when the rule was made. What is known of other banks is kept.
After a change of the rule `--again` measures the automatic ridge and, beside it, the best
one anew, and keeps what the other ridges of each sweep have reached.

    python -m benchmarks.ridge [--bank digits] [--proj-dim 512] [--again] [--small]
    python -m benchmarks.ridge_page
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.banks.bank import Bank, load
from benchmarks.banks.recipes import NAMES, Recipe, recipe, with_data
from benchmarks.banks.variants import VARIANTS, make
from benchmarks.common import RESULTS, Row, environment, write
from benchmarks.lds import lds
from benchmarks.quality_table.ours import stepwise
from trak.evaluation import group_scores

RIDGES = [f"{ridge:.4g}x" for ridge in np.logspace(-2, 3, 25)]
DIMS: list[int | str] = [128, 512, 2048, 4096, "exact"]
VARIANT_DIMS: list[int | str] = [128, 512, "exact"]
COUNTS = (1, 5, 10)
BAR = 0.97
EXACT_UP_TO = 50_000  # parameters
RESULT = RESULTS / "ridge.json"


def measure(
    made: Recipe, bank: Bank, count: int, ridges: Sequence[str] = RIDGES, **options: Any
) -> tuple[float, float, dict[str, float]]:
    """One sweep.

    Args:
        made: data and model.
        bank: ground truth.
        count: checkpoints.
        ridges: to sweep.
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
        for ridge in ridges:  # one after the other: 25 files of scores need room
            swept[ridge] = quality(traker.sweep(["bank"], [ridge])["bank", ridge])
    return auto, chosen, swept


def known_settings(path: Path) -> dict[tuple[str, int | str, int], dict[str, Any]]:
    """What was measured before.

    Args:
        path: the result file, which may not exist yet.

    Returns:
        Details by bank, dimension and checkpoints.
    """
    known = json.loads(path.read_text("utf-8"))["details"] if path.exists() else []
    return {_setting(detail): detail for detail in known}


def _setting(detail: dict[str, Any]) -> tuple[str, int | str, int]:
    return detail["bank"], detail["k"], detail["checkpoints"]


def with_others(details: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Keeps what was measured before in other settings.

    Args:
        details: of this run.
        path: the result file.

    Returns:
        Details of all settings, bank by bank.
    """
    mine = {_setting(d) for d in details}
    kept = [d for place, d in known_settings(path).items() if place not in mine]
    order = [*NAMES, *VARIANTS]
    return sorted([*kept, *details], key=lambda d: order.index(d["bank"]))


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


def judged(
    made: Recipe,
    bank: Bank,
    dim: int | str,
    count: int,
    known: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One setting.

    Args:
        made: data and model.
        bank: ground truth.
        dim: projection dimension.
        count: checkpoints.
        known: the setting as it was measured before, whose sweep is kept; None to sweep.

    Returns:
        The automatic ridge, the best one, and what they reach.
    """
    ridges = RIDGES if known is None else [known["best"]]
    auto, chosen, swept = measure(made, bank, count, ridges, proj_dim=dim)
    if known is not None:
        swept = {**known["sweep"], **swept}
    best = max(swept, key=lambda ridge: swept[ridge])
    return {
        "commit": environment()["commit"],
        "k": dim,
        "checkpoints": count,
        "auto": round(chosen, 3),
        "lds": round(auto, 4),
        "best": best,
        "best lds": round(swept[best], 4),
        "share": round(auto / max(swept[best], auto), 4),
        "sweep": {ridge: round(value, 4) for ridge, value in swept.items()},
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=[*NAMES, *VARIANTS])
    parser.add_argument("--proj-dim", type=int, action="append")
    parser.add_argument("--small", action="store_true", help="one bank, one dimension")
    parser.add_argument("--again", action="store_true", help="keep what sweeps have found")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    banks = options.bank or (["diabetes"] if options.small else [*NAMES, *VARIANTS])
    known = known_settings(options.out or RESULT) if options.again else {}
    details: list[dict[str, Any]] = []
    for name in with_data(banks):
        made, bank = (recipe(name), load(name)) if name in NAMES else make(name)
        width = sum(p.numel() for p in made.make_model().parameters() if p.requires_grad)
        dims = options.proj_dim or (DIMS if name in NAMES else VARIANT_DIMS)
        for dim in dims[1:2] if options.small else dims:
            if width > EXACT_UP_TO if dim == "exact" else width <= dim:
                continue
            for count in COUNTS:
                if count > len(bank.checkpoints):
                    continue
                before = known.get((name, dim, count))
                details.append({"bank": name, **judged(made, bank, dim, count, before)})
                shown = {key: value for key, value in details[-1].items() if key != "sweep"}
                print(shown, flush=True)
        every = with_others(details, options.out or RESULT)
        write("ridge", rows_of(every), every, options.out)


if __name__ == "__main__":
    main()
