"""Is the automatic ridge of squared losses right where nobody has tuned it?

On small regressions (`benchmarks.banks.regressions`), some of which were trained after the
rule was made: LDS of plain TRAK at the automatic ridge, divided by the best of 25, and the
same for the ridge that is chosen where outputs of training examples are not known, whose
training's ridge is a constant.

    python -m benchmarks.regressions [--small] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.banks.objectives import Regression as Task
from benchmarks.banks.regressions import (
    CHOSEN,
    JUDGED,
    LATER,
    Regression,
    Trained,
    make,
)
from benchmarks.common import Row, write
from benchmarks.lds import lds
from trak import TRAKer
from trak.evaluation import group_scores
from trak.projectors import NoOpProjector
from trak.savers import AbstractSaver, MmapSaver

BAR = 0.97
RIDGES = [f"{ridge:.4g}x" for ridge in np.logspace(-2, 3, 25)]
DIMS, COUNTS = ("exact", 512, 128), (1, 3)
LEAST = 0.1  # LDS of the best ridge; below it the truth is noise


class Forgetful(MmapSaver):
    """Keeps no outputs of training examples."""

    sample_outputs = AbstractSaver.sample_outputs


def run(
    trained: Trained, dim: int | str, count: int, folder: str, **options: Any
) -> TRAKer:
    """Featurizes and scores.

    Args:
        trained: the regression.
        dim: projection dimension; `"exact"` for none.
        count: checkpoints.
        folder: the store's.
        options: of `TRAKer`.

    Returns:
        The run, whose experiment is called `bank`.
    """
    size, aims = len(trained.train[0]), len(trained.targets[0])
    plain = {"projector": NoOpProjector(), "row_dtype": "float32"}
    traker = TRAKer(
        copy.deepcopy(trained.models[0]),  # which gets other weights
        Task,
        size,
        folder,
        device="cpu",
        logging_level=logging.ERROR,
        **(plain if dim == "exact" else {"proj_dim": dim}),
        **options,
    )
    states = [model.state_dict() for model in trained.models[:count]]
    for number, state in enumerate(states):
        traker.load_checkpoint(state, model_id=number)
        traker.featurize(batch=trained.train, num_samples=size)
    traker.finalize_features()
    for number, state in enumerate(states):
        traker.start_scoring_checkpoint("bank", state, number, aims)
        traker.score(batch=trained.targets, num_samples=aims)
    return traker


def judged(trained: Trained, dim: int | str, count: int) -> dict[str, Any]:
    """One setting.

    Args:
        trained: the regression.
        dim: projection dimension.
        count: checkpoints.

    Returns:
        What the automatic ridge, a constant training's and the best one reach.
    """

    def quality(scores: Any) -> float:
        sums = group_scores(np.array(scores), trained.masks)
        return float(np.nanmean(lds(sums, trained.outputs)))

    def chosen(traker: TRAKer) -> float:
        return float(traker.saver.load_factor(0)[1]["auto"])

    with tempfile.TemporaryDirectory() as folder:
        traker = run(trained, dim, count, folder)
        auto = chosen(traker), quality(traker.finalize_scores("bank"))
        swept = [
            quality(traker.sweep(["bank"], [ridge])["bank", ridge]) for ridge in RIDGES
        ]
    with tempfile.TemporaryDirectory() as folder:
        traker = run(trained, dim, count, folder, saver=Forgetful)
        usual = chosen(traker), quality(traker.finalize_scores("bank"))
    best = max(*swept, auto[1], usual[1])
    return {
        "k": dim,
        "checkpoints": count,
        "auto": round(auto[0], 3),
        "constant": round(usual[0], 3),
        "best": RIDGES[int(np.argmax(swept))],
        "best lds": round(best, 4),
        "share": round(auto[1] / best, 4),
        "constant share": round(usual[1] / best, 4),
    }


def row_of(group: str, details: list[dict[str, Any]]) -> Row:
    """A line of the page.

    Args:
        group: of regressions.
        details: of all groups.

    Returns:
        The line.
    """
    own = [d for d in details if d["group"] == group and d["best lds"] >= LEAST]
    shares, before = (
        np.array([entry[name] for entry in own]) for name in ("share", "constant share")
    )
    met, usual = int((shares >= BAR).sum()), int((before >= BAR).sum())
    found = f"{shares.mean():.1%} on average, {shares.min():.1%} at worst"
    return Row(
        f"automatic ridge, small regressions, {group}",
        f"at least {BAR:.0%} of the best of {len(RIDGES)}, in all settings",
        f"in {met} of {len(own)}; {found}",
        met == len(own),
        f"without outputs of training examples: in {usual}, {before.mean():.1%}, "
        f"{before.min():.1%}",
    )


def _checked(trained: Trained) -> None:
    # the models' gradients and the truth go together
    def outputs(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(trained.targets[0])[:, 0]

    found = torch.stack([outputs(model) for model in trained.models]).mean(0)
    halves = torch.from_numpy(trained.outputs).mean((0, 1))
    assert float(torch.corrcoef(torch.stack([found, halves]))[0, 1]) > 0.5


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one regression, exact")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    groups: dict[str, list[Regression]] = {
        "looked at while it was made": CHOSEN,
        "made to judge it": JUDGED,
        "made later": LATER,
    }
    if options.small:
        groups = {"looked at while it was made": CHOSEN[4:5]}
    details: list[dict[str, Any]] = []
    for group, regressions in groups.items():
        for regression in regressions:
            trained = make(regression)
            _checked(trained)
            for dim in DIMS[:1] if options.small else DIMS:
                for count in COUNTS:
                    found = {"group": group, "bank": regression.name}
                    details.append({**found, **judged(trained, dim, count)})
                    print(details[-1], flush=True)
    rows = [row_of(group, details) for group in groups]
    if options.out or not options.small:
        write("regressions", rows, details, options.out)


if __name__ == "__main__":
    main()
