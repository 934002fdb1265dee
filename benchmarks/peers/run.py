"""This library against others: seconds that a batch of training examples takes.

Every library runs in an environment of its own (`make bench-peers` makes them), in
processes that alternate with processes of ours. First each shows that it computes the
same: inner products of its unprojected per-sample gradients equal those of ours for the
parameters that it covers.

    python -m benchmarks.peers.run [--small] [--only dattri] [--cpu-time]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.common import ROOT, Row, write
from benchmarks.peers import problem as work
from trak import TRAKer
from trak.projectors import NoOpProjector

PROJ_DIM, BATCH, TIMED = 512, 16, 5
CHECKED = {"bert": ("bert-tiny", 4), "gpt2": ("gpt2-4x256", 3)}
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Peer:
    """A library to compare with.

    Attributes:
        model: what it runs, a name in `benchmarks.models`.
        bar: how many times faster ours is to be.
        caveat: what is not alike, in words.
        batches: timed batches a process, and those before that are not timed.
        rounds: processes.
    """

    model: str
    bar: float
    caveat: str
    batches: tuple[int, int] = (TIMED, 1)
    rounds: int = 3


PEERS = {
    "traker": Peer("bert-mini", 150, "the same rows; eager attention", (1, 0), rounds=2),
    "dattri": Peer("bert-mini", 2, "linear layers only; rows stay in memory"),
    "kronfluence": Peer("bert-mini", 2, "linear layers only; no rows are kept"),
    "bergson": Peer("gpt2-4x256", 2, "weights inside the blocks only"),
}


class WorkerError(Exception):
    """A worker ended without its line."""


def call(name: str, folder: Path, mode: str) -> dict[str, Any]:
    """Runs a worker.

    Args:
        name: a peer, or `"ours"`.
        folder: the problem's.
        mode: `"check"` or `"time"`.

    Returns:
        Its report.

    Raises:
        WorkerError: with the end of what it said.
    """
    python = sys.executable
    if name != "ours":
        python = str(ROOT / f".venv-bench-{name}" / "bin" / "python")
        if not Path(python).exists():
            raise WorkerError(f"no environment .venv-bench-{name}; `make bench-peers`")
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    if name == "ours" and "PYTHONPATH" in os.environ:
        keep["PYTHONPATH"] = os.environ["PYTHONPATH"]
    done = subprocess.run(
        [python, "-m", f"benchmarks.peers.worker_{name}", str(folder), mode],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=keep | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise WorkerError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_problem(folder: Path, name: str, count: int, **settings: Any) -> work.Problem:
    """Writes a problem with random weights and data.

    Args:
        folder: where to.
        name: the model.
        count: how many examples.
        settings: fields of the problem.

    Returns:
        The problem.
    """
    case = models.make(name, count)
    kind = name[:4]
    problem = work.Problem(str(folder), kind, PROJ_DIM, **settings)
    if kind == "bert":
        parts = ("input_ids", "token_type_ids", "attention_mask", "labels")
        data: dict[str, Any] = dict(zip(parts, case.batch, strict=True))
        work.write(problem, case.model.model, data)
    else:
        work.write(problem, case.model, {"input_ids": case.batch[0]})
    return problem


def our_gram(problem: work.Problem, covered: list[str]) -> np.ndarray[Any, Any]:
    """Inner products of our unprojected gradients, from the default engine.

    Args:
        problem: the problem.
        covered: names of the parameters to take.

    Returns:
        `[n, n]`.
    """
    model = problem.model()
    (batch,) = problem.batches()
    task: Any = "text_classification"
    parts: Any = batch
    if problem.kind == "gpt2":
        task, parts = models.LanguageModelOutput(), (batch["input_ids"],)
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=model,
            task=task,
            train_set_size=problem.batch_size,
            save_dir=folder,
            device="cpu",
            projector=NoOpProjector(),
            use_half_precision=False,
            grad_wrt=covered,
            logging_level=30,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize(parts, num_samples=problem.batch_size)
        traker.saver.load_current_store(0)
        rows = np.array(traker.saver.current_store["grads"]).astype(np.float64)
    return rows @ rows.T * traker.num_params_for_grad


def check(name: str, folder: Path) -> dict[str, Any]:
    """Asserts that a peer's gradients are ours.

    Args:
        name: the peer.
        folder: an empty one.

    Returns:
        How far the inner products are apart, and how many parameters it covers.
    """
    kind = PEERS[name].model[:4]
    small, count = CHECKED[kind]
    settings = {"batch_size": count, "warmup": 0, "threads": 1}
    problem = make_problem(folder, small, count, **settings)
    covered = call(name, folder, "check")["check"]["covered"]
    theirs = np.load(folder / "gram.npy")
    ours = our_gram(problem, covered)
    error = float(abs(theirs - ours).max() / abs(ours).max())
    assert error < TOLERANCE, f"{name}: inner products differ by {error:.1e}"
    named = dict(problem.model().named_parameters())
    share = sum(named[one].numel() for one in covered) / sum(
        p.numel() for p in named.values()
    )
    return {"model": small, "relative error": error, "parameters covered": share}


def race(name: str, folder: Path, rounds: int, **settings: Any) -> dict[str, Any]:
    """Times a peer and ours in turns.

    Args:
        name: the peer.
        folder: an empty one.
        rounds: processes a side.
        settings: threads and clock.

    Returns:
        Both sides' reports, medians and ratios.
    """
    peer = PEERS[name]
    timed, warmup = peer.batches
    found: dict[str, list[dict[str, Any]]] = {"ours": [], name: []}
    problems = {
        # one batch more: a peer's batch ends where the next one begins
        "ours": make_problem(
            folder / "ours",
            peer.model,
            BATCH * (TIMED + 1),
            batch_size=BATCH,
            warmup=1,
            **settings,
        ),
        name: make_problem(
            folder / name,
            peer.model,
            BATCH * (timed + warmup + (warmup > 0)),
            batch_size=BATCH,
            warmup=warmup,
            **settings,
        ),
    }
    for turn in range(rounds):
        for side in list(found) if turn % 2 else reversed(list(found)):
            found[side].append(call(side, Path(problems[side].folder), "time"))
    medians = {
        side: [statistics.median(one["seconds_per_batch"]) for one in reports]
        for side, reports in found.items()
    }
    ratios = [a / b for a, b in zip(medians[name], medians["ours"], strict=True)]
    return {
        "seconds a batch": {
            side: statistics.median(each) for side, each in medians.items()
        },
        "their seconds / ours": statistics.median(ratios),
        "ratio of medians": statistics.median(medians[name])
        / statistics.median(medians["ours"]),
        "reports": found,
    }


def compare(name: str, small: bool, **settings: Any) -> tuple[Row, dict[str, Any]]:
    """Checks and races one peer.

    Args:
        name: the peer.
        small: one round.
        settings: threads and clock.

    Returns:
        A line of the page, and the details.
    """
    peer = PEERS[name]
    what = f"{name} / ours, seconds a batch: {peer.model} x {BATCH}, k = {PROJ_DIM}"
    bar = f"at least {peer.bar:g}"
    details: dict[str, Any] = {"peer": name, "model": peer.model, "batch": BATCH}
    try:
        with tempfile.TemporaryDirectory() as folder:
            details["check"] = check(name, Path(folder))
        with tempfile.TemporaryDirectory() as folder:
            rounds = 1 if small else peer.rounds
            details |= race(name, Path(folder), rounds, **settings)
    except WorkerError as error:
        details["error"] = str(error)
        return Row(what, bar, "did not run", None, str(error), ""), details
    report = details["reports"][name][0]
    seconds = details["seconds a batch"]
    value = details["their seconds / ours"]
    how = (
        f"{name} {report['versions'][name]}: {report['check']['ran']}; {peer.caveat}; "
        f"{seconds[name]:.2f} s against {seconds['ours']:.2f} s"
    )
    return Row(what, bar, f"{value:.2f}", value >= peer.bar, how, "times"), details


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one round")
    parser.add_argument("--only", action="append", choices=list(PEERS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cpu-time", action="store_true", help="for busy machines")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows, details = [], []
    for name in given.only or PEERS:
        row, found = compare(
            name, given.small, threads=given.threads, cpu_time=given.cpu_time
        )
        rows.append(row)
        details.append(found)
        print(row.what, row.measured, flush=True)
    write("peers", rows, details, given.out)


if __name__ == "__main__":
    main()
