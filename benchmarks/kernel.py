"""The exact kernel against rows of unprojected gradients: time, bytes, and the same scores.

Also what the precision of the rows does to scores, since rows are computed from rows.
First, scores by the kernel's factor must equal scores by unprojected rows; then both ways
featurize a training set and score targets in turns.

    python -m benchmarks.kernel [--small] [--case mlp] [--rounds 5]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.common import Row, paired_seconds, ratio, write
from trak import TRAKer
from trak.encodings import encoding_of
from trak.pipeline.kernel import smallest_pivot
from trak.projectors import KernelProjector, NoOpProjector
from trak.projectors.cholesky import forward, lower_factor

WIDTH = 1024
TARGETS = 16
CLOSE = 1e-3


@dataclass(frozen=True)
class Work:
    """What is attributed.

    Attributes:
        model: the model.
        task: the task.
        batches: of the training set.
        targets: one batch.
    """

    model: nn.Module
    task: Any
    batches: list[tuple[Tensor, ...]]
    targets: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Training examples."""
        return sum(len(batch[0]) for batch in self.batches)


def mlp(num_rows: int, batch_size: int) -> Work:
    """Two hidden layers of 1,024 on random vectors."""
    torch.manual_seed(0)
    sizes = (WIDTH, WIDTH, WIDTH, 10)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).eval()

    def batch(size: int) -> tuple[Tensor, Tensor]:
        return torch.randn(size, WIDTH), torch.randint(0, 10, (size,))

    batches = [batch(batch_size) for _ in range(num_rows // batch_size)]
    return Work(model, "image_classification", batches, batch(TARGETS))


def bert(num_rows: int, batch_size: int) -> Work:
    """BERT-tiny on random texts of 128 tokens."""
    case = models.make("bert-tiny", num_rows + TARGETS)
    parts = [part.split(batch_size) for part in (p[:num_rows] for p in case.batch)]
    batches: Any = list(zip(*parts, strict=True))
    return Work(case.model, case.task, batches, tuple(p[num_rows:] for p in case.batch))


CASES: dict[str, tuple[Callable[[int, int], Work], int, int]] = {
    "mlp": (mlp, 256, 64),
    "bert-tiny": (bert, 64, 32),
}
SMALL = {"mlp": (128, 64), "bert-tiny": (32, 16)}
SIDES = {
    "kernel": lambda size: KernelProjector(size, "cpu"),
    "rows": lambda _: NoOpProjector(device="cpu"),
}


def run(work: Work, side: str, folder: str) -> np.ndarray:
    """Featurizes, finalizes and scores.

    Args:
        work: what is attributed.
        side: `"kernel"` or `"rows"`.
        folder: of the store.

    Returns:
        Scores.
    """
    traker = TRAKer(
        work.model,
        work.task,
        work.size,
        folder,
        device="cpu",
        projector=SIDES[side](work.size),
        use_half_precision=False,
        check_examples=False,
    )
    state = {name: value.clone() for name, value in work.model.state_dict().items()}
    traker.load_checkpoint(state, model_id=0)
    for batch in work.batches:
        traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    traker.start_scoring_checkpoint("exp", state, 0, TARGETS)
    traker.score(work.targets, num_samples=TARGETS)
    return np.array(traker.finalize_scores("exp"))


def stored(folder: str) -> dict[str, int]:
    """Bytes of the training examples' files.

    Args:
        folder: of the store.

    Returns:
        Those of rows and of gradients.
    """
    checkpoint = Path(folder) / "0"
    gradients = sum(path.stat().st_size for path in checkpoint.glob("kernel/*.npz"))
    return {"rows": (checkpoint / "grads.mmap").stat().st_size, "gradients": gradients}


def measure(name: str, rounds: int, *, small: bool) -> dict[str, Any]:
    """Checks and times one case.

    Args:
        name: the case.
        rounds: timed repetitions.
        small: few examples.

    Returns:
        Configuration, raw seconds and bytes.

    Raises:
        AssertionError: if the two ways differ.
    """
    make, *sizes = CASES[name]
    num_rows, batch_size = SMALL[name] if small else sizes
    work = make(num_rows, batch_size)
    scores, files = {}, {}
    for side in SIDES:
        with tempfile.TemporaryDirectory() as folder:
            scores[side] = run(work, side, folder)
            files[side] = stored(folder)
    scale = np.abs(scores["rows"]).max()
    error = float(np.abs(scores["kernel"] - scores["rows"]).max() / scale)
    if not error < CLOSE:
        raise AssertionError(f"{name}: scores of the two ways differ by {error:.1e}.")

    def once(side: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run(work, side, folder)

    sides = {side: lambda side=side: once(side) for side in SIDES}
    seconds = paired_seconds(sides, rounds, time.perf_counter)
    return {
        "case": name,
        "parameters": models.num_parameters(work.model),
        "examples": num_rows,
        "batch": batch_size,
        "targets": TARGETS,
        "largest difference of scores": error,
        "bytes": files,
        "seconds": seconds,
        "medians": {side: statistics.median(each) for side, each in seconds.items()},
        "kernel / rows": ratio(seconds, "kernel", "rows"),
    }


def rows_of(found: dict[str, Any]) -> list[Row]:
    """Lines of the page.

    Args:
        found: as `measure` gives it.

    Returns:
        Bytes and time of one case.
    """
    what = f"{found['case']}, {found['examples']} examples, p = {found['parameters']:,}"
    totals = {side: sum(files.values()) for side, files in found["bytes"].items()}
    medians = found["medians"]
    return [
        Row(
            f"bytes, kernel / unprojected rows, {what}",
            "at most 1",
            f"{totals['kernel'] / totals['rows']:.3f}",
            totals["kernel"] <= totals["rows"],
            f"{totals['kernel'] / 2**20:.0f} MiB against {totals['rows'] / 2**20:.0f} MiB",
        ),
        Row(
            f"time, kernel / unprojected rows, {what}",
            "",
            f"{found['kernel / rows']:.2f}",
            None,
            f"featurize in batches of {found['batch']}, finalize, score {TARGETS}: "
            f"{medians['kernel']:.1f} s against {medians['rows']:.1f} s; scores differ by "
            f"{found['largest difference of scores']:.0e} of the largest",
        ),
    ]


def grown(gram: Tensor, dtype: torch.dtype, batch_size: int = 32) -> Tensor:
    """The factor as the store would hold it, with rows rounded as they come.

    Args:
        gram: `[n, n]`.
        dtype: of the rows.
        batch_size: rows that come at once.

    Returns:
        `[n, n]`, float64.
    """
    encoding = encoding_of(dtype)
    found = torch.zeros_like(gram)
    for start in range(0, len(gram), batch_size):
        part = slice(start, min(start + batch_size, len(gram)))
        strips = [found[:start, :start]] if start else []
        across = forward(strips, gram[:start, part])
        own = gram[part, part]
        schur = own - across.T @ across
        lower = lower_factor(schur, own.diagonal(), smallest_pivot(dtype))
        found[part, : part.stop] = torch.cat([across.T, lower], dim=1)
        found[part] = encoding.decode(*encoding.encode(found[part]), torch.float64)
    return found


def precision(dtype: torch.dtype, kind: str) -> dict[str, float]:
    """What rounding of rows does to scores, at a ridge of the mean squared row norm.

    Args:
        dtype: of the rows.
        kind: `"independent"` gradients; `"copies"`, half of which differ from the other
            half by a thousandth; or `"dependent"`, six times as many as directions.

    Returns:
        Rms errors over the rms of the scores, by the factor and by rows of gradients.
    """
    torch.manual_seed(0)
    width = 50 if kind == "dependent" else 3000
    scales = torch.linspace(1, 30, width, dtype=torch.float64) ** -1.0
    g = torch.randn(300, width, dtype=torch.float64) * scales
    if kind == "copies":
        g[150:] = g[:150] + 1e-3 * g[150:]
    h = torch.randn(20, width, dtype=torch.float64) * scales
    encoding = encoding_of(dtype)

    def solved(inside: Tensor, across: Tensor) -> Tensor:
        ridge = inside.diagonal().mean() * torch.eye(len(inside), dtype=inside.dtype)
        return torch.linalg.solve(inside + ridge, across)

    exact = solved(g @ g.T, g @ h.T)
    phi = grown(g @ g.T, dtype)
    psi = encoding.decode(*encoding.encode(forward([phi], g @ h.T).T), torch.float64)
    rows, targets = (encoding.decode(*encoding.encode(x), torch.float64) for x in (g, h))
    ways = {"factor": (phi, psi), "gradients": (rows, targets)}
    return {
        way: float((solved(a @ a.T, a @ b.T) - exact).norm() / exact.norm())
        for way, (a, b) in ways.items()
    }


def precisions() -> tuple[list[Row], dict[str, Any]]:
    """Lines of the page on precision, and all figures.

    Returns:
        Both.
    """
    kinds = ("independent", "copies", "dependent")
    found = {
        name: {kind: precision(getattr(torch, name), kind) for kind in kinds}
        for name in ("float64", "float32", "float16", "bfloat16", "int8")
    }
    rows = [
        Row(
            f"scores from {name} rows of the factor, against exact ones",
            "",
            f"{max(each['factor'] for each in by_kind.values()):.1e}",
            None,
            "rms error over the rms of the scores, largest of three; "
            + ", ".join(
                f"{kind} {each['factor']:.1e} (rows of gradients {each['gradients']:.1e})"
                for kind, each in by_kind.items()
            ),
        )
        for name, by_kind in found.items()
    ]
    return rows, found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="few examples")
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    details = [
        measure(name, given.rounds, small=given.small) for name in given.case or CASES
    ]
    rows, figures = precisions()
    rows = [row for each in details for row in rows_of(each)] + rows
    write("kernel", rows, {"cases": details, "precision": figures}, given.out)


if __name__ == "__main__":
    main()
