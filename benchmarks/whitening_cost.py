"""What whitening costs: the fit, and featurizing afterwards, against a training step.

Bars: the fit takes at most 2.5 training steps over the examples that it sees, featurizing
at most 1.0. First, whitened rows of the fast path are held against rows of exact gradients
that were multiplied by the same matrices and then projected, or, by default, against the
same coordinates of exact gradients.

    python -m benchmarks.whitening_cost [--small] [--case bert-mini] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.common import Row, paired_seconds, ratio, write
from benchmarks.step import PROJ_DIMS, finished, training_step, traker_of
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import LeadingProjector

CASES = [
    ("bert-mini", 16),
    ("bert-small", 16),
    ("bert-base", 8),
    ("resnet18", 32),
    ("gpt2-4x256", 16),
]
SMALL = ("bert-mini",)
STRENGTH = 0.4
FIT, FEATURIZE = 2.5, 1.0


def check(name: str, proj_dim: int, device: str = "cpu") -> float:
    """Asserts that whitened rows are right, in float32.

    Args:
        name: the model.
        proj_dim: projection dimension.
        device: where to compute.

    Returns:
        The largest distance between a row and the exact one, relative to its norm.

    Raises:
        AssertionError: if one is above 1e-3.
    """
    case = models.make(name, 2, device=device)
    with tempfile.TemporaryDirectory() as folder:
        traker = traker_of(
            case, proj_dim, folder, 2, whitening=STRENGTH, use_half_precision=False
        )
        traker.fit_whitening(case.batch)
        traker.featurize(case.batch, num_samples=2)
        found = torch.tensor(traker.saver.train_rows(0).array("grads"), device=device)
        whitening = traker.pipeline.maker.whitenings[0]
        exact = FunctionalGradientComputer(case.model, traker.task)
        exact.load_model_params(case.model)
        gradients: Any = exact.compute_per_sample_grad(case.batch)
        if not isinstance(traker.projector, LeadingProjector):  # it whitens by itself
            gradients = whitening.whole(gradients, traker.pipeline.maker.layout)
        rows = traker.projector.project(gradients, model_id=0) / traker.pipeline.maker.scale
    error = float(((found - rows).norm(dim=1) / rows.norm(dim=1)).max())
    if not error < 1e-3:
        raise AssertionError(f"{name}: whitened rows differ by {error:.1e}.")
    return error


def measure(
    name: str, batch_size: int, proj_dim: int, rounds: int, device: str = "cpu"
) -> dict[str, Any]:
    """Times one case.

    Args:
        name: the model.
        batch_size: examples a batch.
        proj_dim: projection dimension.
        rounds: timed repetitions.
        device: where to compute.

    Returns:
        Configuration, raw seconds and ratios.
    """
    case = models.make(name, batch_size, device=device)
    turn = iter(range(rounds + 1))
    count = batch_size * (rounds + 1)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        options: dict[str, Any] = {"whitening": STRENGTH, "check_examples": False}
        fitted = traker_of(case, proj_dim, folder, count, **options)
        fitted.fit_whitening(case.batch)
        again = models.make(
            name, batch_size, device=device
        )  # a run watches its model's weights
        fitting = traker_of(again, proj_dim, other, count, **options)

        def featurize() -> None:
            first = next(turn) * batch_size
            fitted.featurize(case.batch, inds=range(first, first + batch_size))

        sides = {
            "step": training_step(case, with_adamw=False),
            "fit": lambda: fitting.fit_whitening(again.batch),
            "featurize": featurize,
        }
        sides = {name: finished(side, device) for name, side in sides.items()}
        seconds = paired_seconds(sides, rounds, time.perf_counter)
    return {
        "model": name,
        "batch": batch_size,
        "proj_dim": proj_dim,
        "seconds": seconds,
        "medians": {side: statistics.median(each) for side, each in seconds.items()},
        "fit / step": ratio(seconds, "fit", "step"),
        "featurize / step": ratio(seconds, "featurize", "step"),
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one model")
    parser.add_argument("--case", action="append", help="only these models")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows, details = [], []
    for name, batch_size in CASES:
        if name not in (given.case or (SMALL if given.small else models.NAMES)):
            continue
        for k in PROJ_DIMS[:1] if given.small else PROJ_DIMS:
            rounds = min(given.rounds, 3 if given.small or name == "bert-base" else 99)
            error = check(name, k)
            found = measure(name, batch_size, k, rounds)
            details.append(found | {"largest relative error, float32": error})
            for side, bar in (("fit", FIT), ("featurize", FEATURIZE)):
                value = found[f"{side} / step"]
                medians = found["medians"]
                rows.append(
                    Row(
                        f"{side}, whitened / step, {name} x {batch_size}, k = {k}",
                        f"at most {bar}",
                        f"{value:.2f}",
                        value <= bar,
                        f"{medians[side]:.3f} s against {medians['step']:.3f} s",
                        "steps",
                    )
                )
                print(rows[-1].what, rows[-1].measured, flush=True)
    write("whitening_cost", rows, details, given.out)


if __name__ == "__main__":
    main()
