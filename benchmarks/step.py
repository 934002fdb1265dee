"""Featurizing a batch, against the plain training step on the same batch.

The step is what an ordinary training loop does, without the optimizer: forward, mean
loss, backward into fresh gradients. Featurizing is `TRAKer.featurize` as a user calls it:
gradients, projection, loss weights Q, checks, and rows safe on disk.

    python -m benchmarks.step [--small] [--case bert-mini] [--rounds 15]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks import models
from benchmarks.common import Row, paired_seconds, ratio, write
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [  # model, batch size, dtype, bar
    ("bert-mini", 16, "float32", 0.85),
    ("bert-small", 16, "float32", 0.85),
    ("bert-base", 8, "float32", 0.85),
    ("bert-mini", 16, "bfloat16", 0.95),
    ("bert-small", 16, "bfloat16", 0.95),
    ("bert-base", 8, "bfloat16", 0.95),
    ("resnet18", 32, "float32", 1.0),
    ("gpt2-4x256", 16, "float32", 1.0),
    ("gpt2-6x384", 16, "float32", 1.0),
]
PROJ_DIMS = (1024, 4096)


def traker_of(
    case: models.Case, proj_dim: int, folder: str, n: int, **options: Any
) -> TRAKer:
    """A TRAKer with the library's defaults, ready to featurize.

    Args:
        case: model, task and batch.
        proj_dim: projection dimension.
        folder: the store's.
        n: size of the training set.
        options: further arguments.

    Returns:
        The TRAKer.
    """
    traker = TRAKer(
        model=case.model,
        task=case.task,
        train_set_size=n,
        save_dir=folder,
        device="cpu",
        proj_dim=proj_dim,
        logging_level=logging.WARNING,
        **options,
    )
    traker.load_checkpoint(case.model.state_dict(), model_id=0)
    return traker


def check(name: str, proj_dim: int) -> float:
    """Asserts that the fast rows are those of exact gradients, in float32.

    Args:
        name: the model.
        proj_dim: projection dimension.

    Returns:
        The smallest cosine between a row and the exact one.

    Raises:
        AssertionError: if one is below 0.99999.
    """
    case = models.make(name, 2)
    rows = []
    for options in ({}, {"gradient_computer": FunctionalGradientComputer}):
        with tempfile.TemporaryDirectory() as folder:
            traker = traker_of(case, proj_dim, folder, 2, **options)
            traker.featurize(case.batch, num_samples=2)
            traker.saver.load_current_store(0)
            stored = traker.saver.current_store["grads"]
            rows.append(torch.as_tensor(stored[:]).float())
    cosine = float(functional.cosine_similarity(*rows).min())
    if cosine < 0.99999:
        raise AssertionError(f"{name}: rows differ from the exact ones, cosine {cosine}.")
    return cosine


def measure(
    name: str, batch_size: int, dtype: str, proj_dim: int, rounds: int, clock: Any
) -> dict[str, Any]:
    """Times one case.

    Args:
        name: the model.
        batch_size: examples a batch.
        dtype: of the model.
        proj_dim: projection dimension.
        rounds: timed repetitions.
        clock: see `paired_seconds`.

    Returns:
        Configuration, raw seconds and ratios.
    """
    case = models.make(name, batch_size, DTYPES[dtype])
    turn = iter(range(rounds + 1))

    def step() -> None:
        case.model.zero_grad(set_to_none=True)
        case.loss(case.model, case.batch).backward()

    with tempfile.TemporaryDirectory() as folder:
        # another batch each time: the store refuses examples that it has seen
        traker = traker_of(
            case, proj_dim, folder, batch_size * (rounds + 1), check_examples=False
        )

        def featurize() -> None:
            first = next(turn) * batch_size
            traker.featurize(case.batch, inds=range(first, first + batch_size))

        def rows_alone() -> None:
            out = torch.zeros(batch_size, proj_dim)
            with traker.projector.gathering(out, 0) as sink:
                traker.gradient_computer.run(case.batch, sink, {})

        case.model.zero_grad(set_to_none=True)
        sides = {"step": step, "featurize": featurize, "rows alone": rows_alone}
        seconds = paired_seconds(sides, rounds, clock)
        settings = traker.projector.settings()
    return {
        "model": name,
        "parameters": models.num_parameters(case.model),
        "batch": batch_size,
        "dtype": dtype,
        "proj_dim": proj_dim,
        "projection": settings,
        "seconds": seconds,
        "featurize / step": ratio(seconds, "featurize", "step"),
        "rows alone / step": ratio(seconds, "rows alone", "step"),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="fewer models and rounds")
    parser.add_argument("--case", action="append", help="only these models")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="for busy machines")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows, details = [], []
    checked: dict[tuple[str, int], float] = {}
    for name, batch_size, dtype, bar in CASES:
        if options.case and name not in options.case:
            continue
        if options.small and name in {"bert-base", "gpt2-6x384"}:
            continue
        rounds = min(options.rounds, 5 if options.small or name == "bert-base" else 99)
        for proj_dim in PROJ_DIMS:
            if (name, proj_dim) not in checked:
                checked[name, proj_dim] = check(name, proj_dim)
            found = measure(name, batch_size, dtype, proj_dim, rounds, clock)
            found["cosine with exact rows"] = checked[name, proj_dim]
            details.append(found)
            value = found["featurize / step"]
            rows.append(
                Row(
                    f"featurize / step, {name} x {batch_size}, {dtype}, k = {proj_dim}",
                    f"at most {bar}",
                    f"{value:.2f}",
                    value <= bar,
                    f"rows alone {found['rows alone / step']:.2f}",
                )
            )
            print(rows[-1].what, rows[-1].measured, flush=True)
    write("step", rows, details, options.out)


if __name__ == "__main__":
    main()
