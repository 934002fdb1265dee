"""Can one ridge suit two trainings that end with the same checkpoint?

A network is trained from random layers, and for one more epoch. Whoever asks which examples
made it what it is may mean all of that training, or the last epoch only: models are
retrained on halves from random layers, or from the weights that came before the last
epoch. Both retrainings, given all examples, lead to the same checkpoint, bit by bit. So
nothing that a rule could be told by a checkpoint and its rows differs, and it has to choose
the same ridge for both. Bar: some ridge has at least 97 % of the best LDS in both.

    python -m benchmarks.same_checkpoint [--small] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_wine
from torch import Tensor, nn

from benchmarks import ridge
from benchmarks.banks.bank import Bank
from benchmarks.banks.recipes import Recipe, train_together
from benchmarks.banks.recipes import outputs as evaluate
from benchmarks.banks.small_data import blobs, cancer, digits, mistaken, table
from benchmarks.banks.variant import Variant
from benchmarks.banks.variants import halves, recipe_of
from benchmarks.common import Row, write
from benchmarks.one_call import quality
from benchmarks.quality_table.ours import one_call, stepwise

MLP = (64, 96, 64, 10)
TRAININGS = {
    "digits": Variant(MLP, digits, 15, 0.05, 0.0),
    "digits, decay": Variant(MLP, digits, 30, 0.1, 1e-3),
    "digits, 20 % wrong": Variant(MLP, lambda: digits(wrong=0.2), 20, 0.1, 5e-3),
    "digits, AdamW": Variant(MLP, digits, 20, 3e-3, 1e-2, optimizer="adamw"),
    "cancer, tanh": Variant((30, 64, 2), cancer, 30, 0.05, 5e-3, nn.Tanh),
    "five blobs": Variant((20, 64, 5), lambda: blobs(800, 20, 5, 0.02), 30, 0.05, 1e-3),
    "wine, 10 % wrong": Variant(
        (13, 32, 3),
        lambda: mistaken(table(lambda: load_wine(return_X_y=True), 120), 0.1),
        50,
        0.05,
        1e-3,
    ),
}
COUNTS = (1, 4)
SLOWER = 5.0  # the last epoch's learning rate is so many times lower
BAR = 0.97


def last_epoch(first: Recipe, models: Sequence[nn.Module]) -> Recipe:
    """How training goes on.

    Args:
        first: how it began.
        models: that it goes on with, each of which begins one training.

    Returns:
        A recipe of one epoch, for as many trainings as there are models, once.
    """
    return replace(
        first,
        make_model=map(copy.deepcopy, models).__next__,
        epochs=1,
        learning_rate=first.learning_rate / SLOWER,
    )


def two_banks(variant: Variant) -> tuple[Recipe, dict[str, Bank]]:
    """Trains checkpoints, and retrains on halves in both ways.

    Args:
        variant: how training begins.

    Returns:
        Data and model, and what models answer that were retrained from random layers
        ("all of it") and from the checkpoints' weights before the last epoch ("last
        epoch"); both banks have the same checkpoints.
    """
    made = recipe_of(variant)
    size, masks = len(made.train[1]), halves(len(made.train[1]))
    every = [torch.arange(size)] * max(COUNTS)
    seeds = [9000 + j for j in range(len(every))]
    before = train_together(made, every, seeds)
    whole = train_together(last_epoch(made, before), every, seeds)
    states = [dict(model.state_dict()) for model in whole]
    answers = {
        name: np.zeros((len(masks), len(before), len(made.targets[1])))
        for name in ("all of it", "last epoch")
    }
    for j, mask in enumerate(masks):
        half = [torch.tensor(np.flatnonzero(mask))] * len(before)
        own = [seed * len(masks) + j for seed in range(len(before))]
        begun = {"all of it": train_together(made, half, own), "last epoch": before}
        for name, models in begun.items():
            ended = train_together(last_epoch(made, models), half, own)
            answers[name][j] = _answers(made, ended)
    return made, {name: Bank(masks, found, states, {}) for name, found in answers.items()}


def _answers(made: Recipe, models: Sequence[nn.Module]) -> Any:
    outputs: list[Tensor] = [evaluate(made, model, made.targets) for model in models]
    return torch.stack(outputs).numpy()


def compared(made: Recipe, banks: dict[str, Bank], count: int) -> dict[str, Any]:
    """One setting.

    Args:
        made: data and model.
        banks: as `two_banks` makes them.
        count: checkpoints.

    Returns:
        What ridges, the one call and gradient dot products reach in both, the ridge whose
        lower share of the best LDS is largest, and this share.
    """
    found = {name: ridge.judged(made, bank, "exact", count) for name, bank in banks.items()}
    shares = np.array([
        [value / entry["best lds"] for value in entry["sweep"].values()]
        for entry in found.values()
    ])
    lower = shares.min(axis=0)
    scores = _scores(made, next(iter(banks.values())).checkpoints[:count])
    for (name, entry), own in zip(found.items(), shares, strict=True):
        entry |= {key: round(quality(each, banks[name]), 4) for key, each in scores.items()}
        entry["met by"] = list(np.array(ridge.RIDGES)[own >= BAR][[0, -1]].tolist())
    return {
        "checkpoints": count,
        "both": ridge.RIDGES[int(lower.argmax())],
        "share of both": round(float(lower.max()), 4),
        **found,
    }


def _scores(made: Recipe, stored: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    # they know nothing of the bank they are for
    states = [made.weights(each) for each in stored]
    with tempfile.TemporaryDirectory() as folder:
        traker = stepwise(made, states, folder, proj_dim="exact")
        dot = traker.scores("bank", method="dot")
    return {"one call": one_call(made, states)["auto"], "dot product": dot}


def rows_of(details: list[dict[str, Any]]) -> list[Row]:
    """Lines of the page.

    Args:
        details: one entry a setting.

    Returns:
        One a training.
    """
    rows = []
    for name in dict.fromkeys(entry["training"] for entry in details):
        own = [entry for entry in details if entry["training"] == name]
        worst = min(own, key=lambda entry: entry["share of both"])
        all_of_it, last = (worst[key] for key in ("all of it", "last epoch"))
        rows.append(
            Row(
                f"one ridge for two trainings that end alike, {name}",
                f"one of {len(ridge.RIDGES)} has {BAR:.0%} of the best LDS in both",
                f"{worst['share of both']:.1%} in the worse one at best; {BAR:.0%} needs "
                f"{' to '.join(all_of_it['met by'])} where all of the training is meant, "
                f"{' to '.join(last['met by'])} where the last epoch is",
                worst["share of both"] >= BAR,
                f"{worst['checkpoints']} checkpoints, the same bit by bit",
            )
        )
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one training, one checkpoint")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    details: list[dict[str, Any]] = []
    for name, variant in list(TRAININGS.items())[-1 if options.small else 0 :]:
        made, banks = two_banks(variant)
        for count in COUNTS[:1] if options.small else COUNTS:
            details.append({"training": name, **compared(made, banks, count)})
            print(details[-1], flush=True)
    if options.out or not options.small:
        write("same_checkpoint", rows_of(details), details, options.out)


if __name__ == "__main__":
    main()
