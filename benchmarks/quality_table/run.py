"""LDS of this library's defaults and methods, and of other libraries, bank by bank.

Every side runs in a process, other libraries in environments of their own
(`make bench-quality` makes them), on the same data and checkpoints. What a side has run
is kept in `benchmarks/quality_table/work` until its worker, its versions or the bank
change (for this library: anything in `src`), and its entries in the result until it runs
again: `--side ours` leaves the others' as they are.

    python -m benchmarks.quality_table.run [--bank digits] [--side kronfluence] [--small]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.banks.bank import FOLDER, load
from benchmarks.banks.recipes import NAMES, recipe, with_data
from benchmarks.common import ROOT, environment
from benchmarks.quality_table import exchange
from benchmarks.quality_table.bars import bars
from benchmarks.quality_table.ours import SIDES
from benchmarks.quality_table.results import (
    RESULT,
    Entry,
    entries,
    keep_ranks,
    kept_ranks,
    merge,
    read,
)
from trak.evaluation import noise_ceiling

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
COUNTS = (1, 3)
LIMIT = 420  # seconds a side may take for each checkpoint
PEERS = {
    "kronfluence": ("EK-FAC",),
    "traker": ("default", "k = 512"),
    "dattri": ("EK-FAC", "TRAK", "LoGra"),
}


def fingerprint(bank: str, library: str) -> str:
    """What a side's figures depend on.

    Args:
        bank: the bank.
        library: `"ours"` or a peer.

    Returns:
        A digest of the worker, of what it runs, and of the bank.
    """
    if library == "ours":
        used = [HERE / "ours.py", *sorted((ROOT / "src" / "trak").rglob("*.py"))]
    else:
        pinned = ROOT / "benchmarks" / "peers" / "requirements" / f"{library}.txt"
        used = [HERE / f"worker_{library}.py", pinned]
    digest = hashlib.sha256()
    for path in [*used, FOLDER / bank / "bank.json"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def launch(
    library: str,
    side: str,
    bank: str,
    count: int,
    threads: int,
    limit: float,
    *,
    alone: bool = False,
) -> Any:
    """Runs a side in its environment.

    Args:
        library: `"ours"` or a peer.
        side: its method.
        bank: the bank, whose problem `prepare` has written.
        count: checkpoints.
        threads: that it may use.
        limit: seconds it may take.
        alone: on the machine; else threads that wait do not spin, since others have work.

    Returns:
        `{"files": [[label, path], ...], "seconds", "megabytes"}`, or `{"error"}`.
    """
    python, module = sys.executable, "benchmarks.quality_table.ours"
    if library != "ours":
        python = str(ROOT / f".venv-bench-{library}" / "bin" / "python")
        module = f"benchmarks.quality_table.worker_{library}"
        if not Path(python).exists():
            return {"error": f"no environment .venv-bench-{library}"}
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    if library == "ours" and "PYTHONPATH" in os.environ:
        keep["PYTHONPATH"] = os.environ["PYTHONPATH"]
    keep |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    keep |= {} if alone else {"OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(
            [python, "-m", module, str(WORK / bank), side, str(count), str(threads), bank],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            timeout=limit,
            env=keep,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} s", "slow": True}
    return understood(done.returncode, done.stdout, done.stderr)


def understood(status: int, said: str, wrong: str) -> Any:
    """What a worker printed.

    Args:
        status: its exit status.
        said: its output.
        wrong: its errors.

    Returns:
        As `launch` gives it.
    """
    lines = said.strip().splitlines()
    if status or not lines:
        last = (wrong.strip().splitlines() or ["it said nothing"])[-1]
        return {"error": last[:200].replace(str(ROOT), ".")}
    files = [line.split("\t") for line in lines if line.count("\t") == 1]
    return {"files": files, **json.loads(lines[-1])}


def run_side(
    bank: str, library: str, side: str, count: int, options: argparse.Namespace
) -> Any:
    """Runs a side, unless it is kept.

    Args:
        bank: the bank.
        library: `"ours"` or a peer.
        side: its method.
        count: checkpoints.
        options: of the command.

    Returns:
        What `launch` gives, with commit, date and threads; None if it would have to run and
        may not.
    """
    kept = WORK / bank / f"{library}-{side}-{count}.json".replace(" ", "-")
    of = fingerprint(bank, library)
    if kept.exists() and not options.fresh:
        found = json.loads(kept.read_text("utf-8"))
        if found.get("of") == of:
            return found
    if options.kept:
        return None
    found = launch(library, side, bank, count, options.threads, LIMIT * count)
    where = environment()
    found |= {"of": of, "threads": options.threads}
    found |= {"commit": where["commit"], "date": where["date"]}
    if "error" not in found or "slow" in found:
        kept.write_text(json.dumps(found), encoding="utf-8")
    return found


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


def run_bank(bank: str, options: argparse.Namespace) -> list[Entry]:
    """Runs the sides on a bank, and writes what each has reached.

    Args:
        bank: the bank.
        options: of the command.

    Returns:
        The entries.
    """
    ceiling, table = prepare(bank), []
    for library, sides in {"ours": tuple(SIDES), **PEERS}.items():
        if options.side and library not in options.side:
            continue
        for side in sides:
            found: dict[str, Any] = {}
            for count in COUNTS[:1] if options.small else COUNTS:
                start = time.perf_counter()
                if "slow" not in found:  # more checkpoints take longer still
                    found = run_side(bank, library, side, count, options)
                if found is None:
                    break
                made, ranks = entries(bank, library, side, count, found)
                table += made
                shown = [(e.side, e.label, e.lds) for e in made]
                took = f"{time.perf_counter() - start:.0f} s"
                print(bank, count, *shown, made[0].note, took, flush=True)
                if not options.small:
                    keep_ranks(bank, library, ranks)
        if not options.small:
            save(bank, ceiling, table)
    return table


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=NAMES)
    parser.add_argument("--side", action="append", choices=("ours", *PEERS))
    parser.add_argument("--small", action="store_true", help="diabetes, one checkpoint")
    parser.add_argument("--fresh", action="store_true", help="run what is kept, too")
    parser.add_argument("--kept", action="store_true", help="run nothing")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    options = parser.parse_args()
    banks = options.bank or (["diabetes"] if options.small else sorted(NAMES, key=str))
    for bank in with_data(banks):
        run_bank(bank, options)


def save(bank: str, ceiling: float, table: list[Entry]) -> None:
    """Writes the result, with what it held of other banks and of sides that did not run.

    Args:
        bank: the bank.
        ceiling: its.
        table: entries of the sides that ran.
    """
    before = read()
    merged = merge(before, table)
    truth, ranks = load(bank).outputs, kept_ranks(bank)
    others = [bar for bar in before.get("bars", []) if bar["bank"] != bank]
    own = [bar for count in COUNTS for bar in bars(merged, bank, count, ranks, truth)]
    result = {
        "environment": environment(),
        "ceilings": before["ceilings"] | {bank: ceiling},
        "entries": merged,
        "bars": others + own,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
