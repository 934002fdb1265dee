"""This library's sides of the table, through its public API."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # noqa: F401 - the first vmap imports it; time is without imports
from numpy.typing import NDArray

import trak
from benchmarks.banks.bank import load
from benchmarks.banks.recipes import Recipe, recipe
from benchmarks.quality_table.exchange import BATCH, peak_megabytes
from trak import TRAKer

METHODS = ("dot", "tracin", "cosine", "relatif", "l_relatif", "unit_norm")
RIDGES = ("0.1x", "0.3x", "1x", "3x", "10x", "30x", "100x")

Scores = dict[str, NDArray[Any]]


def batches(examples: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
    """Cuts examples into batches.

    Args:
        examples: tensors of one length.

    Returns:
        Batches of 100.
    """
    return list(zip(*(part.split(BATCH) for part in examples), strict=True))


def stepwise(made: Recipe, states: list[Any], folder: str, **options: Any) -> TRAKer:
    """A finished run of `TRAKer`.

    Args:
        made: data and model.
        states: the checkpoints.
        folder: the store's.
        options: of `TRAKer`, beyond its defaults.

    Returns:
        The run, whose experiment is called `bank`.
    """
    traker = TRAKer(
        made.make_model(),
        made.objective.task,
        len(made.train[-1]),
        folder,
        device="cpu",
        logging_level=logging.ERROR,
        **options,
    )
    for number, state in enumerate(states):
        traker.load_checkpoint(state, model_id=number)
        if not traker.whitening_is_fitted:
            for batch in batches(made.train):
                traker.fit_whitening(batch=batch)
        for batch in batches(made.train):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for number, state in enumerate(states):
        traker.start_scoring_checkpoint("bank", state, number, len(made.targets[-1]))
        for batch in batches(made.targets):
            traker.score(batch=batch, num_samples=len(batch[0]))
    return traker


def default(made: Recipe, states: list[Any], **options: Any) -> Scores:
    """`TRAKer` with its defaults.

    Args:
        made: data and model.
        states: the checkpoints.
        options: others than the defaults.

    Returns:
        Scores by label.
    """
    with tempfile.TemporaryDirectory() as folder:
        traker = stepwise(made, states, folder, **options)
        return {"auto": np.array(traker.finalize_scores("bank"))}


def everything(made: Recipe, states: list[Any]) -> Scores:
    """`TRAKer` with its defaults, at other ridges, and by other methods, from one run.

    Args:
        made: data and model.
        states: the checkpoints.

    Returns:
        Scores by label: `auto`, `ridge 1x`, `method dot` and the like.
    """
    with tempfile.TemporaryDirectory() as folder:
        traker = stepwise(made, states, folder)
        found = {"auto": np.array(traker.finalize_scores("bank"))}
        for (_, ridge), scores in traker.sweep(["bank"], RIDGES).items():
            found[f"ridge {ridge}"] = np.array(scores)
        for name in METHODS:
            found[f"method {name}"] = traker.scores("bank", method=name)
        return found


def one_call(made: Recipe, states: list[Any]) -> Scores:
    """`trak.attribute` with its defaults.

    Args:
        made: data and model.
        states: the checkpoints.

    Returns:
        Scores by label.
    """
    with tempfile.TemporaryDirectory() as folder:
        scores = trak.attribute(
            made.make_model(),
            task=made.objective.task,
            train=batches(made.train),
            targets=batches(made.targets),
            checkpoints=states,
            save_dir=folder,
            progress=False,
            logging_level=logging.ERROR,
        )
        return {"auto": np.array(scores)}


SIDES: dict[str, Callable[[Recipe, list[Any]], Scores]] = {
    "trak.attribute": one_call,
    "TRAKer": everything,
}


def main() -> None:
    """Runs one side in a process of its own, as the other libraries' are run."""
    folder, side, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(int(sys.argv[4]))
    name = sys.argv[5]
    made, bank = recipe(name), load(name)
    states = [made.weights(stored) for stored in bank.checkpoints[:count]]
    start = time.perf_counter()
    found = SIDES[side](made, states)
    seconds = time.perf_counter() - start
    peak = peak_megabytes()
    for j, (label, scores) in enumerate(found.items()):
        path = folder / f"ours-{side.replace(' ', '-')}-{count}-{j}.npy"
        np.save(path, scores)
        print(f"{label}\t{path}")
    figures = {"seconds": seconds, "megabytes": peak}
    if len(found) == 1:
        figures["seconds_one"] = seconds
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
