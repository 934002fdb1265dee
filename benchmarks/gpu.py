"""On a CUDA device: featurizing against a training step, whitening, memory, the store.

The comparisons of `step`, `whitening_cost` and `streaming`, with batches that fill a GPU.
Rows of the fast path are first held against exact ones, with TF32 off; the figures are
for torch's usual settings, and, with `--tf32`, for float32 products in TF32.

    python -m benchmarks.gpu [--small] [--tf32] [--only step] [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import models, step, streaming, whitening_cost
from benchmarks.common import RESULTS, ROOT, Row, paired_seconds, ratio, write
from trak.pipeline.scoring import ScorePass
from trak.pipeline.solving import ScoreSet
from trak.score_computers import RidgeScoreComputer

GPU = "cuda"
UPSTREAM = "TRAKER"  # variable with the folder where traker and fast_jl are installed
CASES = [  # model, batch size, dtype, bar; small batches are bound by the host
    ("bert-mini", 64, "float32", 0.85),
    ("bert-base", 32, "float32", 0.85),
    ("bert-base", 128, "float32", 0.85),
    ("bert-large", 64, "float32", 0.85),
    ("bert-base", 256, "bfloat16", 0.95),
    ("bert-large", 128, "bfloat16", 0.95),
    ("resnet18", 256, "float32", 1.0),
    ("resnet18", 1024, "float32", 1.0),
    ("gpt2-12x768", 64, "float32", 1.0),
]
SMALL = ("bert-mini", "resnet18")
WHITENED = [("bert-base", 128), ("resnet18", 1024), ("gpt2-12x768", 64)]
PROJ_DIM = 4096
MEMORY_BAR = 1.1
STORE = {"n": 1_000_000, "k": 512, "m": 1000, "top": 10, "rounds": 7}
SMALL_STORE = {"n": 40_000, "k": 64, "m": 50, "top": 10, "rounds": 3}


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Runs a block without TF32, which torch uses for convolutions unless told not to.

    Yields:
        Nothing.
    """
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def peak(call: Callable[[], Any]) -> int:
    """Device memory that a call needs beyond what is there before it.

    Args:
        call: what to run.

    Returns:
        Bytes.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def memory_of(name: str, batch_size: int, dtype: str) -> dict[str, int]:
    """Peak memory of a training step and of featurizing, after a batch of each.

    Args:
        name: the model.
        batch_size: examples a batch.
        dtype: of the model.

    Returns:
        Side to bytes.
    """
    case = models.make(name, batch_size, step.DTYPES[dtype], GPU)
    run = step.training_step(case, with_adamw=False)
    run()
    case.model.zero_grad(set_to_none=True)
    found = {"step": peak(run)}
    case.model.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory() as folder:
        traker = step.traker_of(
            case, PROJ_DIM, folder, 2 * batch_size, check_examples=False
        )
        traker.featurize(case.batch, inds=range(batch_size))
        last = range(batch_size, 2 * batch_size)
        found["featurize"] = peak(lambda: traker.featurize(case.batch, inds=last))
    return found


def steps(small: bool, rounds: int) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Featurizing against a training step.

    Args:
        small: fewer models.
        rounds: timed repetitions.

    Yields:
        A line and its raw figures.
    """
    for name, batch_size, dtype, bar in CASES:
        if small and name not in SMALL:
            continue
        with exact_convolutions():
            error = step.check(name, PROJ_DIM, GPU)
        case = name, batch_size, dtype, PROJ_DIM, rounds, time.perf_counter
        found = step.measure(*case, device=GPU)
        found["largest relative error, float32"] = error
        yield step.row_of(found, bar), found
        sizes = memory_of(name, batch_size, dtype)
        share = sizes["featurize"] / sizes["step"]
        row = Row(
            f"peak device memory, featurize / step, {name} x {batch_size}, {dtype}",
            f"at most {MEMORY_BAR}",
            f"{share:.2f}",
            share <= MEMORY_BAR,
            "{featurize} MiB against {step} MiB, weights apart".format(**{
                side: size >> 20 for side, size in sizes.items()
            }),
        )
        yield row, {"model": name, "batch": batch_size, "dtype": dtype, "bytes": sizes}


def whitening(small: bool, rounds: int) -> Iterator[tuple[Row, dict[str, Any]]]:
    """What whitening costs.

    Args:
        small: one model.
        rounds: timed repetitions.

    Yields:
        A line and its raw figures.
    """
    for name, batch_size in WHITENED[:1] if small else WHITENED:
        with exact_convolutions():
            error = whitening_cost.check(name, PROJ_DIM, GPU)
        found = whitening_cost.measure(name, batch_size, PROJ_DIM, rounds, GPU)
        found["largest relative error, float32"] = error
        bars = ("fit", whitening_cost.FIT), ("featurize", whitening_cost.FEATURIZE)
        for side, bar in bars:
            value, medians = found[f"{side} / step"], found["medians"]
            row = Row(
                f"{side}, whitened / step, {name} x {batch_size}, k = {PROJ_DIM}",
                f"at most {bar}",
                f"{value:.2f}",
                value <= bar,
                f"{medians[side]:.3f} s against {medians['step']:.3f} s",
            )
            yield row, found


def store(small: bool, rounds: int) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Gram matrix and top lists of a large store against the bare products.

    Args:
        small: a small store.
        rounds: timed repetitions.

    Yields:
        A line and its raw figures.
    """
    config = SMALL_STORE if small else STORE
    with tempfile.TemporaryDirectory() as folder:
        saver = streaming.make_store(folder, config)
        checked, weights = streaming.check(saver, config)
        weights = weights.to(GPU)
        device = torch.device(GPU)

        def blocks() -> Iterator[torch.Tensor]:
            rows = streaming.fresh_map(saver)
            for start in range(0, len(rows), streaming.BLOCK):
                yield rows[start : start + streaming.BLOCK].to(GPU).float()

        def bare_gram() -> None:
            gram = torch.zeros(config["k"], config["k"], device=GPU)
            for block in blocks():
                gram += block.T @ block

        def bare_product() -> None:
            for block in blocks():
                block @ weights

        def gram() -> None:
            RidgeScoreComputer(device=device).finalize(saver.train_rows(0).encoded())

        def top() -> None:
            scorer = RidgeScoreComputer(device=device)
            one = ScorePass(
                scorer=scorer,
                saver=saver,
                sets=[ScoreSet("exp")],
                model_ids=[0],
                device=device,
            )
            one.top(config["top"], helpful=True)

        pairs = {
            "Gram matrix and factor": (bare_gram, gram),
            "top lists": (bare_product, top),
        }
        for what, (bare, own) in pairs.items():
            sides = {
                "bare product": step.finished(bare, GPU),
                "library": step.finished(own, GPU),
            }
            seconds = paired_seconds(
                sides, min(rounds, config["rounds"]), time.perf_counter
            )
            share = ratio(seconds, "library", "bare product")
            medians = {side: statistics.median(each) for side, each in seconds.items()}
            size = f"n = {config['n']:,}, k = {config['k']}, {config['m']:,} targets"
            row = Row(
                f"{what} / bare product, {size}, float16",
                "at most 1.3",
                f"{share:.2f}",
                share <= 1.3,
                f"{medians['library']:.2f} s against {medians['bare product']:.2f} s",
            )
            yield row, {"config": config, "correctness": checked, "seconds": seconds}


def upstream(small: bool, rounds: int) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The reference implementation on the same batches, in processes of its own.

    Args:
        small: smaller batches.
        rounds: not used.

    Yields:
        A line and its raw figures.
    """
    del rounds
    places = {"traker": os.environ.get(UPSTREAM, ""), "library": str(ROOT / "src")}
    if not places["traker"]:
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in places}
    grams = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            for name, path in places.items():
                out = Path(folder) / f"{name}.npy"
                command = [sys.executable, "-m", "benchmarks.peers.worker_gpu", str(out)]
                command += ["--batch", "64" if small else "256"]
                paths = path, str(ROOT), os.environ["PYTHONPATH"]
                run = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    check=False,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                )
                if run.returncode:
                    raise RuntimeError(f"{name} failed:\n{run.stderr[-2000:]}")
                found[name].append(json.loads(run.stdout.splitlines()[-1]))
                grams[name] = np.load(out)
    agreement = float(
        np.corrcoef(*(g[np.triu_indices_from(g, 1)] for g in grams.values()))[0, 1]
    )
    if agreement < 0.9:
        raise AssertionError(f"inner products of rows correlate by {agreement:.2f} only")
    medians = {
        name: statistics.median(s for one in each for s in one["seconds"])
        for name, each in found.items()
    }
    times = medians["traker"] / medians["library"]
    row = Row(
        "traker 0.3.2 / library, featurize, ResNet-9 x 256, k = 2048",
        "",
        f"{times:.1f}",
        None,
        f"{medians['traker']:.3f} s against {medians['library']:.3f} s a batch; traker's "
        f"{found['traker'][0]['projector']} with its compiled kernel; inner products of "
        f"rows correlate by {agreement:.3f}",
    )
    yield row, {"runs": found, "agreement": agreement}


PARTS = {"step": steps, "whitening": whitening, "store": store, "upstream": upstream}


def _others(path: Path, parts: list[str]) -> tuple[list[Row], list[dict[str, Any]]]:
    # what other parts measured before
    if not path.exists():
        return [], []
    known = json.loads(path.read_text(encoding="utf-8"))
    pairs = zip(known["rows"], known["details"], strict=True)
    kept = [(Row(**row), found) for row, found in pairs if found["part"] not in parts]
    return [row for row, _ in kept], [found for _, found in kept]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="fewer models")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--tf32", action="store_true", help="float32 products in TF32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.tf32:
        torch.set_float32_matmul_precision("high")
    name = "gpu_tf32" if given.tf32 else "gpu"
    parts = given.only or list(PARTS)
    rows, details = _others(given.out or RESULTS / f"{name}.json", parts)
    for part in parts:
        for row, found in PARTS[part](given.small, given.rounds):
            rows.append(row)
            details.append({"part": part, **found})
            # after each, since the time on such a machine may end
            write(name, rows, details, given.out, say=False)
            print(row.what, row.measured, row.how, flush=True)


if __name__ == "__main__":
    main()
