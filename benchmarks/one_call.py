"""Is the one call as good as plain TRAK at its best ridge, on many small banks?

Bar: `trak.attribute` with its defaults has at least the LDS of unprojected plain TRAK at
the best of 25 ridges, on every bank of `benchmarks.banks.variants`, with one checkpoint and
with five. What is known of other banks is kept.

    python -m benchmarks.one_call [--bank noisy] [--small] [--side ours]

`--side ours` takes plain TRAK's sweep from the result file, which has the commit that it
was measured at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.banks.bank import Bank
from benchmarks.banks.recipes import Recipe
from benchmarks.banks.variants import UNSEEN, VARIANTS, make
from benchmarks.common import RESULTS, Row, environment, write
from benchmarks.lds import lds
from benchmarks.quality_table.ours import one_call
from benchmarks.ridge import measure, with_others
from trak.evaluation import group_scores

COUNTS = (1, 5)
RESULT = RESULTS / "one_call.json"


def judged(
    made: Recipe, bank: Bank, count: int, known: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Both sides on one bank.

    Args:
        made: data and model.
        bank: ground truth.
        count: checkpoints.
        known: an earlier result, from which plain TRAK's is taken.

    Returns:
        Their LDS, and the ridge that was best.
    """
    now = environment()["commit"]
    if known is None:
        _, _, swept = measure(made, bank, count, proj_dim="exact")
        best = max(swept, key=lambda ridge: swept[ridge])
        plain = {"best": best, "best plain": round(swept[best], 4), "plain commit": now}
    else:
        plain = {name: known[name] for name in ("best", "best plain")}
        plain["plain commit"] = known.get("plain commit", known["commit"])
    states = [made.weights(stored) for stored in bank.checkpoints[:count]]
    scores = one_call(made, states)["auto"]
    quality = float(lds(group_scores(scores, bank.masks), bank.outputs).mean())
    return {
        "commit": now,
        "k": "exact",
        "checkpoints": count,
        "one call": round(quality, 4),
        **plain,
    }


def row_of(name: str, details: list[dict[str, Any]]) -> Row:
    """A line of the page.

    Args:
        name: the bank.
        details: of its settings.

    Returns:
        The line.
    """
    gains = [entry["one call"] - entry["best plain"] for entry in details]
    counts = " and ".join(str(entry["checkpoints"]) for entry in details)
    quality = ", ".join(
        f"{entry['one call']:.3f} against {entry['best plain']:.3f} ({entry['best']})"
        for entry in details
    )
    how = "not among those that the ridge's constants were set on; "
    seen = how if name in UNSEEN else ""
    return Row(
        f"LDS of the one call, less tuned plain TRAK's, {name}",
        "at least 0",
        ", ".join(f"{gain:+.3f}" for gain in gains),
        min(gains) >= 0,
        f"{seen}{counts} checkpoints: {quality}",
    )


def _known() -> dict[tuple[str, int], dict[str, Any]]:
    details = json.loads(RESULT.read_text("utf-8"))["details"]
    return {(found["bank"], found["checkpoints"]): found for found in details}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=VARIANTS)
    parser.add_argument("--small", action="store_true", help="one bank")
    parser.add_argument("--side", choices=["both", "ours"], default="both")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    details: list[dict[str, Any]] = []
    known = _known() if options.side == "ours" else {}
    for name in options.bank or (["few"] if options.small else VARIANTS):
        made, bank = make(name)
        for count in COUNTS:
            found = judged(made, bank, count, known.get((name, count)))
            details.append({"bank": name, **found})
            print(details[-1], flush=True)
        every = with_others(details, options.out or RESULT)
        banks = dict.fromkeys(entry["bank"] for entry in every)
        rows = [row_of(b, [e for e in every if e["bank"] == b]) for b in banks]
        write("one_call", rows, every, options.out)


if __name__ == "__main__":
    main()
