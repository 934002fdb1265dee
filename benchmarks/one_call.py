"""Is the one call as good as tuned plain TRAK and tuned EK-FAC, on many small banks?

Bar: `trak.attribute` with its defaults has at least the LDS of unprojected plain TRAK at
the best of 25 ridges, and of EK-FAC influence functions (`kronfluence`) at the best of 14
dampings (fewer where the result says `dampings`), on every bank of
`benchmarks.banks.variants`, with one checkpoint and with five. EK-FAC runs on those that
are trained by cross entropy or the squared loss.

    python -m benchmarks.one_call [--bank noisy] [--small] [--side ours] [--side ...]

Sides are `ours`, `plain` and `kronfluence`; without `--side` the first two run. What does
not run is taken from the result file, which has the commit that it was measured at; so is
what is known of other banks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.banks.bank import Bank
from benchmarks.banks.recipes import Recipe
from benchmarks.banks.variants import UNSEEN, VARIANTS, make
from benchmarks.common import RESULTS, Row, environment, write
from benchmarks.lds import lds
from benchmarks.quality_table import exchange
from benchmarks.quality_table.ours import one_call
from benchmarks.quality_table.run import LIMIT, WORK, launch
from benchmarks.ridge import measure, with_others
from trak.evaluation import group_scores

COUNTS = (1, 5)
RESULT = RESULTS / "one_call.json"
SIDES = ("ours", "plain", "kronfluence")
RIVALS = {"best plain": ("plain TRAK", "best"), "best EK-FAC": ("EK-FAC", "damping")}
TASKS = ("image_classification", "regression")  # that the other environment knows


def judged(
    name: str,
    made: Recipe,
    bank: Bank,
    count: int,
    sides: Sequence[str],
    known: dict[str, Any],
) -> dict[str, Any]:
    """All sides on one bank.

    Args:
        name: of the bank.
        made: data and model.
        bank: ground truth.
        count: checkpoints.
        sides: of `SIDES`, which are to run.
        known: an earlier result, from which the others are taken.

    Returns:
        Their LDS, and the ridge and damping that were best.
    """
    now = environment()["commit"]
    found = {"k": "exact", "checkpoints": count, **known}
    if "plain" in sides:
        _, _, swept = measure(made, bank, count, proj_dim="exact")
        best = max(swept, key=lambda ridge: swept[ridge])
        found |= {"best": best, "best plain": round(swept[best], 4), "plain commit": now}
    if "ours" in sides:
        states = [made.weights(stored) for stored in bank.checkpoints[:count]]
        reached = quality(one_call(made, states)["auto"], bank)
        found |= {"commit": now, "one call": round(reached, 4)}
    if "kronfluence" in sides and made.task in TASKS:
        found.pop("dampings", None)  # of a run that tried fewer
        found |= {**influence(name, made, bank, count), "EK-FAC commit": now}
    return found


def quality(scores: Any, bank: Bank) -> float:
    """Mean LDS of scores.

    Args:
        scores: `[n, m]`.
        bank: ground truth.

    Returns:
        The mean over targets.
    """
    return float(lds(group_scores(scores, bank.masks), bank.outputs).mean())


def influence(name: str, made: Recipe, bank: Bank, count: int) -> dict[str, Any]:
    """EK-FAC influence functions at the damping that suits them best.

    Args:
        name: of the bank.
        made: data and model.
        bank: ground truth.
        count: checkpoints.

    Returns:
        The LDS, and the damping.

    Raises:
        RuntimeError: if they did not run.
    """
    folder = "".join(c if c.isalnum() else "-" for c in name)
    exchange.write(
        WORK / folder,
        made.make_model(),
        [made.weights(stored) for stored in bank.checkpoints[:count]],
        made.train,
        made.targets,
        regression=made.task == "regression",
        outputs=made.objective.output,
    )
    threads = torch.get_num_threads()
    found = launch("kronfluence", "EK-FAC", folder, count, threads, LIMIT * count)
    if "error" in found:
        raise RuntimeError(f"EK-FAC did not run on {name}: {found['error']}")
    every = {label: np.load(path) for label, path in found["files"]}
    reached = {
        label: quality(scores, bank)
        for label, scores in every.items()
        if np.isfinite(scores).all()
    }
    best = max(reached, key=lambda label: reached[label])
    return {"best EK-FAC": round(reached[best], 4), "damping": best}


def rows_of(name: str, details: list[dict[str, Any]]) -> list[Row]:
    """Lines of the page, one for each rival.

    Args:
        name: the bank.
        details: of its settings.

    Returns:
        The lines.
    """
    rows = []
    for rival, (title, setting) in RIVALS.items():
        own = [entry for entry in details if rival in entry]
        if not own:
            continue
        gains = [entry["one call"] - entry[rival] for entry in own]
        counts = " and ".join(str(entry["checkpoints"]) for entry in own)
        reached = ", ".join(
            f"{entry['one call']:.3f} against {entry[rival]:.3f} ({entry[setting]})"
            for entry in own
        )
        how = "not among those that the ridge's constants were set on; "
        seen = how if name in UNSEEN else ""
        row = Row(
            f"LDS of the one call, less tuned {title}'s, {name}",
            "at least 0",
            ", ".join(f"{gain:+.3f}" for gain in gains),
            min(gains) >= 0,
            f"{seen}{counts} checkpoints: {reached}",
        )
        rows.append(row)
    return rows


def _known() -> dict[tuple[str, int], dict[str, Any]]:
    if not RESULT.exists():
        return {}
    details = json.loads(RESULT.read_text("utf-8"))["details"]
    return {(found["bank"], found["checkpoints"]): found for found in details}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=VARIANTS)
    parser.add_argument("--small", action="store_true", help="one bank")
    parser.add_argument("--side", action="append", choices=SIDES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    details: list[dict[str, Any]] = []
    known, sides = _known(), options.side or SIDES[:2]
    for name in options.bank or (["few"] if options.small else VARIANTS):
        made, bank = make(name)
        for count in COUNTS:
            before = known.get((name, count), {"bank": name})
            details.append(judged(name, made, bank, count, sides, before))
            print(details[-1], flush=True)
        every = with_others(details, options.out or RESULT)
        banks = dict.fromkeys(entry["bank"] for entry in every)
        rows = [
            row
            for bank_name in banks
            for row in rows_of(bank_name, [e for e in every if e["bank"] == bank_name])
        ]
        write("one_call", rows, every, options.out)


if __name__ == "__main__":
    main()
