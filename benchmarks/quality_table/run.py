"""LDS of this library's defaults and methods, and of other libraries, bank by bank.

Every side runs in a process, other libraries in environments of their own
(`make bench-quality` makes them), on the same data and checkpoints. What a side has run
is kept in `benchmarks/quality_table/work` until the library or the bank changes.

    python -m benchmarks.quality_table.run [--bank digits] [--side kronfluence] [--small]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.banks.bank import load
from benchmarks.banks.recipes import NAMES, recipe, with_data
from benchmarks.common import ROOT, environment
from benchmarks.lds import lds, over_subsets, over_targets
from benchmarks.quality_table import exchange
from benchmarks.quality_table.ours import SIDES
from trak.evaluation import group_scores, noise_ceiling

WORK = Path(__file__).resolve().parent / "work"
RESULT = ROOT / "benchmarks" / "results" / "quality_table.json"
COUNTS = (1, 3)
LIMIT = 200  # seconds a side may take for each checkpoint
PEERS = {
    "kronfluence": ("EK-FAC",),
    "traker": ("default", "k = 512"),
    "dattri": ("EK-FAC", "LoGra", "TRAK"),
}
DEFAULTS = ("auto", "ridge 0.0", "damping 1e-08", "damping default", "k = 512, ridge 0.0")


@dataclass(frozen=True)
class Entry:
    """One side on one bank.

    Attributes:
        bank: the bank.
        side: library and method.
        checkpoints: averaged over.
        setting: the library's default, or the best one of a sweep.
        lds: mean over targets; None if it did not run.
        over_targets: 95 % bootstrap interval.
        over_subsets: 95 % bootstrap interval.
        seconds: for all settings together.
        megabytes: peak of the process.
        note: why it did not run, or which setting was the best.
    """

    bank: str
    side: str
    checkpoints: int
    setting: str
    lds: float | None
    over_targets: tuple[float, float] | None
    over_subsets: tuple[float, float] | None
    seconds: float | None
    megabytes: float | None
    note: str


def run_side(bank: str, library: str, side: str, count: int, *, fresh: bool) -> Any:
    """Runs a side, unless it is kept.

    Args:
        bank: the bank.
        library: `"ours"` or a peer.
        side: its method.
        count: checkpoints.
        fresh: run it again.

    Returns:
        `{"files": [[label, path], ...], "seconds", "megabytes"}`, or `{"error"}`.
    """
    folder = WORK / bank
    kept = folder / f"{library}-{side}-{count}.json".replace(" ", "-")
    if kept.exists() and not fresh:
        return json.loads(kept.read_text("utf-8"))
    python, module = sys.executable, "benchmarks.quality_table.ours"
    if library != "ours":
        python = str(ROOT / f".venv-bench-{library}" / "bin" / "python")
        module = f"benchmarks.quality_table.worker_{library}"
        if not Path(python).exists():
            return {"error": f"no environment .venv-bench-{library}"}
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    if library == "ours" and "PYTHONPATH" in os.environ:
        keep["PYTHONPATH"] = os.environ["PYTHONPATH"]
    try:
        done = subprocess.run(
            [python, "-m", module, str(folder), side, str(count), "2", bank],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            timeout=LIMIT * count,
            env=keep | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    except subprocess.TimeoutExpired:
        found: dict[str, Any] = {"error": f"not done after {LIMIT * count} s", "slow": True}
    else:
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            return {"error": said[-1][:200].replace(str(ROOT), ".")}
        files = [line.split("\t") for line in lines if line.count("\t") == 1]
        found = {"files": files, **json.loads(lines[-1])}
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def entries(bank: str, library: str, side: str, count: int, found: Any) -> list[Entry]:
    """What a side reached.

    Args:
        bank: the bank.
        library: `"ours"` or a peer.
        side: its method.
        count: checkpoints.
        found: what `run_side` gave.

    Returns:
        Its default, and the best of its sweep if it has one.
    """
    name = side if library == "ours" else f"{library} {side}"
    if "error" in found:
        why = found["error"]
        return [Entry(bank, name, count, "", None, None, None, None, None, why)]
    whole = load(bank)
    measured: dict[str, tuple[Any, Any]] = {}
    for label, path in found["files"]:
        scores = np.nan_to_num(np.load(path).astype(np.float64))
        predicted = group_scores(scores, whole.masks)
        measured[label] = predicted, lds(predicted, whole.outputs)
    methods = [label for label in measured if label.startswith("method ")]
    swept = [label for label in measured if label not in methods]
    best = max(swept, key=lambda label: measured[label][1].mean())
    default = next((label for label in DEFAULTS if label in measured), None)
    chosen = [(name, "default", default), (name, "best of its sweep", best)]
    if len(swept) == 1:
        chosen = [(name, "default", best)]
    chosen += [(f"{name}, {label}", "default ridge", label) for label in methods]
    made = []
    for shown, setting, label in chosen:
        if label is None:
            continue
        predicted, each = measured[label]
        made.append(
            Entry(
                bank,
                shown,
                count,
                setting,
                round(float(each.mean()), 4),
                over_targets(each),
                over_subsets([predicted], whole.outputs, draws=100),
                round(found["seconds"], 1),
                round(found["megabytes"]),
                "" if label == "auto" or label in methods else label,
            )
        )
    return made


def prepare(bank: str) -> float:
    """Writes a bank's problem for other environments.

    Args:
        bank: the bank.

    Returns:
        Its ceiling.
    """
    made, whole = recipe(bank), load(bank)
    states = [made.weights(stored) for stored in whole.checkpoints[: max(COUNTS)]]
    exchange.write(
        WORK / bank,
        made.make_model(),
        states,
        made.train,
        made.targets,
        regression=made.task == "regression",
        outputs=made.objective.output,
    )
    return round(noise_ceiling(whole.outputs), 4)


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=NAMES)
    parser.add_argument("--side", action="append", help="ours, traker, ...")
    parser.add_argument("--small", action="store_true", help="diabetes, one checkpoint")
    parser.add_argument("--fresh", action="store_true", help="run what is kept, too")
    options = parser.parse_args()
    banks = options.bank or (["diabetes"] if options.small else sorted(NAMES, key=str))
    counts = COUNTS[:1] if options.small else COUNTS
    wanted = {"ours": tuple(SIDES), **PEERS}
    ceilings, table = {}, []
    for bank in with_data(banks):
        ceilings[bank] = prepare(bank)
        for library, sides in wanted.items():
            if options.side and library not in options.side:
                continue
            for side in sides:
                found: dict[str, Any] = {}
                for count in counts:
                    start = time.perf_counter()
                    if "slow" not in found:  # more checkpoints take longer still
                        found = run_side(bank, library, side, count, fresh=options.fresh)
                    made = entries(bank, library, side, count, found)
                    table += made
                    shown = [(e.side, e.setting, e.lds) for e in made]
                    took = f"{time.perf_counter() - start:.0f} s"
                    print(bank, count, *shown, made[0].note, took, flush=True)
    if not (options.small or options.side):
        save(ceilings, table)


def save(ceilings: dict[str, float], table: list[Entry]) -> None:
    """Writes the result, with what it held of other banks.

    Args:
        ceilings: of the banks that ran.
        table: their entries.
    """
    before: dict[str, Any] = {"ceilings": {}, "entries": []}
    if RESULT.exists():
        before = json.loads(RESULT.read_text("utf-8"))
    others = [entry for entry in before["entries"] if entry["bank"] not in ceilings]
    result = {
        "environment": environment(),
        "ceilings": before["ceilings"] | ceilings,
        "entries": others + [asdict(entry) for entry in table],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
