"""Peak memory of featurizing, against the plain training step on the same batch.

Each side runs in a process of its own, three times, and reports how far its resident
memory rose above what it was with the model and the batch made (`VmHWM`, reset there, less
`VmRSS`), over three calls, the first with the engine's comparison with exact gradients
among them. The step's weight gradients live until the next step, as in a training loop.

    python -m benchmarks.memory [--small] [--case bert-mini]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.common import ROOT, Row, write
from benchmarks.step import traker_of

CASES = [("bert-mini", 16), ("bert-small", 16), ("bert-base", 8), ("resnet18", 32)]
PROJ_DIM = 1024
BAR = 1.1
CALLS = 3


def status(name: str) -> int:
    """A line of this process's status.

    Args:
        name: `"VmRSS"`, memory now, or `"VmHWM"`, its peak.

    Returns:
        Bytes.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (each for each in lines if each.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def one_side(side: str, name: str, batch_size: int) -> int:
    """Runs one side in this process.

    Args:
        side: `"step"` or `"featurize"`.
        name: the model.
        batch_size: examples a batch.

    Returns:
        Peak above the start, in bytes.
    """
    torch.set_num_threads(2)
    case = models.make(name, batch_size)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far
    before = status("VmRSS")
    if side == "step":
        for _ in range(CALLS):
            case.model.zero_grad(set_to_none=True)
            case.loss(case.model, case.batch).backward()
    else:
        with tempfile.TemporaryDirectory() as folder:
            n = batch_size * CALLS
            traker = traker_of(case, PROJ_DIM, folder, n, check_examples=False)
            for first in range(0, n, batch_size):
                traker.featurize(case.batch, inds=range(first, first + batch_size))
    return status("VmHWM") - before


def measure(name: str, batch_size: int, rounds: int) -> dict[str, list[int]]:
    """Runs both sides in turns.

    Args:
        name: the model.
        batch_size: examples a batch.
        rounds: processes a side.

    Returns:
        Side to bytes of each process.
    """
    found: dict[str, list[int]] = {"step": [], "featurize": []}
    for _ in range(rounds):
        for side, values in found.items():
            run = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.memory",
                    "--side",
                    side,
                    name,
                    str(batch_size),
                ],
                capture_output=True,
                text=True,
                check=True,
                cwd=ROOT,
            )
            values.append(json.loads(run.stdout.splitlines()[-1]))
    return found


def main() -> None:
    """Runs the benchmark, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one model")
    parser.add_argument("--case", action="append", help="only these models")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.side:
        side, name, batch_size = options.side
        print(one_side(side, name, int(batch_size)))
        return
    rows, details = [], []
    for name, batch_size in CASES[:1] if options.small else CASES:
        if options.case and name not in options.case:
            continue
        found = measure(name, batch_size, rounds=3)
        step, featurize = (min(found[side]) for side in ("step", "featurize"))
        details.append({"model": name, "batch": batch_size, "bytes": found})
        rows.append(
            Row(
                f"peak memory, featurize / step, {name} x {batch_size}, k = {PROJ_DIM}",
                f"at most {BAR}",
                f"{featurize / step:.2f}",
                featurize <= BAR * step,
                f"{featurize >> 20} MiB against {step >> 20} MiB above the model",
            )
        )
    write("memory", rows, details, options.out)


if __name__ == "__main__":
    main()
