"""Featurizing a batch, against the plain training step on the same batch.

The step is what an ordinary training loop does, without the optimizer: forward, mean
loss, backward into fresh gradients. Featurizing is `TRAKer.featurize` as a user calls it:
gradients, projection, loss weights Q, checks, and rows safe on disk.

For information, the step is also timed with AdamW's update, on a copy of the model.

    python -m benchmarks.step [--small] [--case bert-mini] [--rounds 15]
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.common import Row, paired_seconds, ratio, write
from trak import TRAKer
from trak.gradient_computers import (
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
)
from trak.projectors import ProjectionType

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
SMALL = ("bert-mini", "resnet18", "gpt2-4x256")
ENGINES = {
    "hooks": HookGradientComputer,
    "functional": FunctionalGradientComputer,
    "iterative": IterativeGradientComputer,
}


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
        device=next(case.model.parameters()).device,
        proj_dim=proj_dim,
        logging_level=logging.WARNING,
        **options,
    )
    traker.load_checkpoint(case.model.state_dict(), model_id=0)
    return traker


def check(name: str, proj_dim: int, device: str = "cpu", **options: Any) -> float:
    """Asserts that the fast rows are those of exact gradients, in float32.

    Args:
        name: the model.
        proj_dim: projection dimension.
        device: where to compute.
        options: further arguments of `TRAKer`.

    Returns:
        The largest distance between a row and the exact one, relative to its norm.

    Raises:
        AssertionError: if one is above 1e-3.
    """
    case = models.make(name, 2, device=device)
    exact = options | {"gradient_computer": FunctionalGradientComputer}
    found, expected = (
        _stored(case, proj_dim, use_half_precision=False, **each)
        for each in (options, exact)
    )
    error = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())
    if not error < 1e-3:
        raise AssertionError(f"{name}: rows differ from the exact ones by {error:.1e}.")
    return error


def _stored(case: models.Case, proj_dim: int, **options: Any) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        traker = traker_of(case, proj_dim, folder, 2, **options)
        traker.featurize(case.batch, num_samples=2)
        traker.saver.load_current_store(0)
        return torch.tensor(traker.saver.current_store["grads"][:])


def finished(side: Callable[[], None], device: str) -> Callable[[], None]:
    """Waits for the device, which works through its queue while Python goes on.

    Args:
        side: what is timed.
        device: where it computes.

    Returns:
        The same, and the wait.
    """
    if device != "cuda":
        return side

    def run() -> None:
        side()
        torch.cuda.synchronize()

    return run


def training_step(case: models.Case, *, with_adamw: bool) -> Callable[[], None]:
    """The step of an ordinary training loop.

    Args:
        case: model and batch.
        with_adamw: update weights too, of a copy of the model.

    Returns:
        A function that does one.
    """
    model = copy.deepcopy(case.model) if with_adamw else case.model
    optimizer = torch.optim.AdamW(model.parameters()) if with_adamw else None

    def step() -> None:
        model.zero_grad(set_to_none=True)
        case.loss(model, case.batch).backward()
        if optimizer is not None:
            optimizer.step()

    return step


def measure(
    name: str,
    batch_size: int,
    dtype: str,
    proj_dim: int,
    rounds: int,
    clock: Any,
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Times one case.

    Args:
        name: the model.
        batch_size: examples a batch.
        dtype: of the model.
        proj_dim: projection dimension.
        rounds: timed repetitions.
        clock: see `paired_seconds`.
        device: where to compute.
        options: further arguments of `TRAKer`.

    Returns:
        Configuration, raw seconds and ratios.
    """
    case = models.make(name, batch_size, DTYPES[dtype], device)
    turn = iter(range(rounds + 1))
    with tempfile.TemporaryDirectory() as folder:
        # another batch each time: the store refuses examples that it has seen
        traker = traker_of(
            case,
            proj_dim,
            folder,
            batch_size * (rounds + 1),
            check_examples=False,
            **options,
        )

        def featurize() -> None:
            first = next(turn) * batch_size
            traker.featurize(case.batch, inds=range(first, first + batch_size))

        def rows_alone() -> None:
            out = torch.zeros(batch_size, proj_dim, device=device)
            with traker.projector.gathering(out, 0) as sink:
                traker.gradient_computer.run(case.batch, sink, {})

        sides = {
            "step": training_step(case, with_adamw=False),
            "step with AdamW": training_step(case, with_adamw=True),
            "featurize": featurize,
            "rows alone": rows_alone,
        }
        sides = {name: finished(side, device) for name, side in sides.items()}
        seconds = paired_seconds(sides, rounds, clock)
        settings = traker.projector.settings()
    return {
        "model": name,
        "parameters": models.num_parameters(case.model),
        "batch": batch_size,
        "dtype": dtype,
        "proj_dim": proj_dim,
        "projection": settings,
        "computer": type(traker.gradient_computer).__name__,
        "seconds": seconds,
        "medians": {side: statistics.median(each) for side, each in seconds.items()},
        **{
            f"{side} / {base}": ratio(seconds, side, base)
            for side, base in (
                ("featurize", "step"),
                ("rows alone", "step"),
                ("featurize", "step with AdamW"),
            )
        },
    }


def row_of(found: dict[str, Any], bar: float) -> Row:
    """A case's line of the page.

    Args:
        found: as `measure` gives it.
        bar: the largest ratio that is good.

    Returns:
        The line.
    """
    value = found["featurize / step"]
    medians = found["medians"]
    what = "{model} x {batch}, {dtype}, k = {proj_dim}".format(**found)
    how = (
        f"{medians['featurize']:.3f} s against {medians['step']:.3f} s; rows alone "
        f"{found['rows alone / step']:.2f}; against a step with AdamW "
        f"{found['featurize / step with AdamW']:.2f}"
    )
    return Row(
        f"featurize / step, {what}",
        f"at most {bar}",
        f"{value:.2f}",
        value <= bar,
        how,
        "steps",
    )


def arguments() -> argparse.Namespace:
    """Reads the command line.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="fewer models and rounds")
    parser.add_argument("--case", action="append", help="only these models")
    parser.add_argument("--proj-dim", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="for busy machines")
    parser.add_argument("--engine", choices=ENGINES, help="instead of the default")
    parser.add_argument("--projector", choices=[one.value for one in ProjectionType])
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Runs the benchmark."""
    given = arguments()
    torch.set_num_threads(given.threads)
    clock = time.process_time if given.cpu_time else time.perf_counter
    options: dict[str, Any] = {"projector": given.projector}
    if given.engine:
        options["gradient_computer"] = ENGINES[given.engine]
    dims = given.proj_dim or (PROJ_DIMS[:1] if given.small else PROJ_DIMS)
    rows, details = [], []
    checked: dict[tuple[str, int], float] = {}
    for name, batch_size, dtype, bar in CASES:
        if name not in (given.case or (SMALL if given.small else models.NAMES)):
            continue
        rounds = min(given.rounds, 5 if given.small or name == "bert-base" else 99)
        for k in dims:
            if (name, k) not in checked:
                checked[name, k] = check(name, k, **options)
            found = measure(name, batch_size, dtype, k, rounds, clock, **options)
            found["largest relative error, float32"] = checked[name, k]
            details.append(found | {"clock": clock.__name__})
            rows.append(row_of(found, bar))
            print(rows[-1].what, rows[-1].measured, flush=True)
    write("step", rows, details, given.out)


if __name__ == "__main__":
    main()
