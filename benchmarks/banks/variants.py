"""Small banks that are trained when they are asked for.

They differ in what a ridge depends on: how long and how strongly regularized training was,
how much noise is in the labels, width, depth, number of examples, data and loss. The rule
of the automatic ridge was made with those above `UNSEEN` and with most fine-tunings
(`benchmarks.banks.fine_tunings`); the rest was kept for judging it.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import (
    load_iris,
    load_wine,
    make_friedman1,
    make_friedman2,
    make_moons,
)
from torch import Tensor, nn

from benchmarks.banks import losses  # noqa: F401 - adds objectives
from benchmarks.banks.bank import Bank
from benchmarks.banks.build import draw_halves
from benchmarks.banks.fine_tunings import JUDGING, TUNED
from benchmarks.banks.recipes import Recipe, train_together
from benchmarks.banks.recipes import outputs as evaluate
from benchmarks.banks.small_data import (
    bits,
    blobs,
    blurred,
    cancer,
    digits,
    fractions,
    friedman,
    mistaken,
    relabelled,
    some,
    table,
)
from benchmarks.banks.variant import Variant

SUBSETS, SEEDS, CHECKPOINTS, TOGETHER = 64, 4, 10, 32
MASK_SEED = 5

MLP = (64, 96, 64, 10)
VARIANTS = {
    "no decay": Variant(MLP, digits, 15, 0.05, 0.0),
    "long": Variant(MLP, digits, 60, 0.1, 0.0),
    "few": Variant(MLP, lambda: digits(300), 40, 0.1, 5e-3),
    "wide": Variant((64, 256, 10), digits, 20, 0.1, 1e-3),
    "noisy": Variant(MLP, lambda: digits(wrong=0.2), 20, 0.1, 5e-3),
    "brief": Variant(MLP, digits, 3, 0.05, 0.0),
    "linear": Variant((64, 10), digits, 30, 0.1, 1e-3),
    "cancer": Variant((30, 64, 2), cancer, 30, 0.05, 5e-3),
    "deep": Variant((64, 64, 64, 64, 64, 10), digits, 25, 0.05, 2e-3),
    "150": Variant((64, 64, 10), lambda: digits(150), 40, 0.1, 5e-3),
    "half wrong": Variant((64, 64, 10), lambda: digits(wrong=0.5), 15, 0.05, 1e-3),
    "odd": Variant((64, 64, 2), lambda: digits(binary=True), 20, 0.1, 1e-3),
    "slow": Variant(MLP, digits, 6, 0.02, 0.0),
    "gelu": Variant((64, 128, 10), lambda: digits(800), 40, 0.1, 0.0, nn.GELU),
    "blobs": Variant((20, 64, 64, 3), lambda: blobs(1200, 20, 3, 0.05), 30, 0.05, 1e-3),
    "friedman": Variant(
        (10, 64, 64, 1), lambda: friedman(make_friedman1, 600, 1.0), 60, 0.02, 1e-3
    ),
    "blurred, long": Variant((64, 64, 10), lambda: blurred(1000, 0.8), 60, 0.1, 1e-3),
    "20 classes": Variant(
        (40, 96, 20),
        lambda: blobs(1200, 40, 20, 0.3, n_informative=12, n_clusters_per_class=1),
        25,
        0.05,
        1e-3,
    ),
    "eight blobs": Variant((20, 64, 8), lambda: blobs(900, 20, 8, 0.5), 80, 0.1, 1e-4),
    "cancer, tanh": Variant((30, 48, 2), cancer, 40, 0.05, 2e-3, nn.Tanh),
    "cancer, long": Variant((30, 64, 64, 2), cancer, 80, 0.05, 0.0),
    "cancer, few": Variant((30, 32, 2), lambda: cancer(120), 50, 0.05, 2e-3),
    "cancer, linear": Variant((30, 2), cancer, 40, 0.05, 1e-3),
    "three or eight": Variant((64, 64, 2), lambda: some(digits(1600), 3, 8), 30, 0.1, 1e-3),
    "three clusters": Variant(
        (10, 48, 3),
        lambda: blobs(500, 10, 3, 0.02, n_clusters_per_class=1, class_sep=2.0),
        40,
        0.05,
        1e-3,
    ),
    "rare, 1000": Variant(
        (20, 48, 1),
        lambda: relabelled(blobs(1000, 20, 2, 0.01, weights=[0.95]), fractions),
        30,
        0.05,
        1e-3,
        task="one_logit",
    ),
}
UNSEEN = {
    "wine": Variant(
        (13, 32, 3), lambda: table(lambda: load_wine(return_X_y=True), 120), 60, 0.05, 1e-3
    ),
    "tanh, 20 % wrong": Variant(
        (64, 96, 10), lambda: digits(500, 0.2), 30, 0.1, 1e-2, nn.Tanh
    ),
    "many blobs": Variant((30, 64, 5), lambda: blobs(2500, 30, 5, 0.0), 20, 0.05, 1e-3),
    "binary blobs": Variant((15, 48, 2), lambda: blobs(500, 15, 2, 0.02), 40, 0.05, 2e-3),
    "friedman 2": Variant(
        (4, 64, 64, 1), lambda: friedman(make_friedman2, 500, 50.0), 60, 0.02, 1e-3
    ),
    "silu, long": Variant((64, 64, 64, 10), lambda: digits(700), 80, 0.1, 1e-4, nn.SiLU),
    "40 % wrong": Variant((64, 64, 10), lambda: digits(wrong=0.4), 15, 0.05, 1e-3),
    "70 % wrong": Variant((64, 64, 10), lambda: digits(wrong=0.7), 15, 0.05, 1e-3),
    "tanh, half wrong": Variant(
        (64, 96, 10), lambda: digits(600, 0.5), 40, 0.1, 3e-3, nn.Tanh
    ),
    "half wrong, long": Variant((64, 64, 10), lambda: digits(wrong=0.5), 60, 0.1, 0.0),
    "moons": Variant(
        (2, 64, 64, 2),
        lambda: table(lambda: make_moons(950, noise=0.3, random_state=0), 800),
        60,
        0.05,
        1e-3,
    ),
    "iris": Variant(
        (4, 16, 3), lambda: table(lambda: load_iris(return_X_y=True), 100), 100, 0.05, 1e-3
    ),
    "ten blobs": Variant((40, 128, 10), lambda: blobs(1500, 40, 10, 0.1), 30, 0.05, 1e-3),
    "one logit": Variant(
        (64, 64, 1),
        lambda: relabelled(digits(500, binary=True), fractions),
        25,
        0.1,
        1e-3,
        task="one_logit",
    ),
    "one logit, rare": Variant(
        (15, 48, 1),
        lambda: relabelled(blobs(500, 15, 2, 0.02, weights=[0.93]), fractions),
        40,
        0.05,
        2e-3,
        task="one_logit",
    ),
    "several labels": Variant(
        (64, 64, 4),
        lambda: relabelled(digits(500), bits),
        25,
        0.05,
        1e-3,
        task="several_labels",
    ),
    "hinge": Variant(
        (15, 48, 1),
        lambda: relabelled(blobs(500, 15, 2, 0.1), fractions),
        40,
        0.05,
        2e-3,
        task="hinge",
    ),
    "reconstruction": Variant(
        (64, 32, 64),
        lambda: relabelled(digits(400), lambda x, _: x),
        60,
        0.5,
        1e-4,
        nn.Tanh,
        task="reconstruction",
    ),
    "one or seven": Variant((64, 48, 2), lambda: some(digits(1600), 1, 7), 40, 0.1, 5e-4),
    "four or nine, tanh": Variant(
        (64, 64, 2), lambda: some(digits(1600), 4, 9), 30, 0.1, 3e-3, nn.Tanh
    ),
    "cancer, 15 % wrong": Variant(
        (30, 48, 2), lambda: mistaken(cancer(), 0.15), 60, 0.05, 1e-3
    ),
    "cancer, one logit": Variant(
        (30, 48, 1),
        lambda: relabelled(cancer(350), fractions),
        50,
        0.05,
        1e-3,
        nn.Tanh,
        task="one_logit",
    ),
    "moons, clean": Variant(
        (2, 48, 2),
        lambda: table(lambda: make_moons(650, noise=0.12, random_state=4), 500),
        60,
        0.1,
        1e-3,
    ),
    "eight or not": Variant(
        (64, 48, 1),
        lambda: relabelled(digits(800), lambda _, y: (y == 8).float()),
        25,
        0.1,
        1e-3,
        task="one_logit",
    ),
    "class weights": Variant(
        (15, 48, 3),
        lambda: blobs(700, 15, 3, 0.02, weights=[0.85, 0.1], class_sep=1.2),
        30,
        0.05,
        1e-3,
        task="weights of three",
    ),
    "class weights, two": Variant(
        (15, 48, 2),
        lambda: blobs(600, 15, 2, 0.02, weights=[0.88], class_sep=1.2),
        60,
        0.05,
        1e-4,
        task="weights of two",
    ),
    "positive weight": Variant(
        (20, 48, 1),
        lambda: blobs(800, 20, 2, 0.03, weights=[0.9]),
        30,
        0.05,
        1e-3,
        task="positive weight",
    ),
    "30 features": Variant((30, 64, 64, 2), lambda: blobs(900, 30, 2, 0.0), 60, 0.1, 0.0),
}
VARIANTS |= UNSEEN | JUDGING | TUNED


def make(name: str) -> tuple[Recipe, Bank]:
    """Trains a bank; about half a minute.

    Args:
        name: of the variant.

    Returns:
        Data and model, and the ground truth.
    """
    return made_from(VARIANTS[name], name)


def made_from(variant: Variant, name: str) -> tuple[Recipe, Bank]:
    """Trains a bank that has no name in `VARIANTS`.

    Args:
        variant: how.
        name: of the bank.

    Returns:
        Data and model, and the ground truth.
    """
    made = recipe_of(variant)
    targets, count = made.targets, len(made.train[1])
    masks = halves(count)
    outputs = np.zeros((SUBSETS, SEEDS, len(targets[1])))
    jobs = [(j, seed) for j in range(SUBSETS) for seed in range(SEEDS)]
    for start in range(0, len(jobs), TOGETHER):
        part = jobs[start : start + TOGETHER]
        chosen = [torch.tensor(np.flatnonzero(masks[j])) for j, _ in part]
        models = train_together(made, chosen, [seed * SUBSETS + j for j, seed in part])
        for (j, seed), model in zip(part, models, strict=True):
            outputs[j, seed] = evaluate(made, model, targets).numpy()
    every: list[Any] = [torch.arange(count)] * CHECKPOINTS
    whole = train_together(made, every, [9000 + j for j in range(CHECKPOINTS)])
    states = [dict(model.state_dict()) for model in whole]
    return made, Bank(masks, outputs, states, {"name": name})


def halves(count: int) -> NDArray[np.bool_]:
    """The halves of a training set on which models are retrained.

    Args:
        count: how many examples there are.

    Returns:
        Which of them each holds, `[64, count]`.
    """
    return draw_halves(SUBSETS, count, MASK_SEED)


def recipe_of(variant: Variant) -> Recipe:
    """Data, model and training.

    Args:
        variant: what it is trained by.

    Returns:
        The recipe.
    """
    train, targets = variant.data()
    usual = "regression" if train[1].is_floating_point() else "image_classification"
    begun = None if variant.start is None else _trained(variant.start)

    def make_model() -> nn.Module:
        model = _mlp(variant)
        if begun is not None:
            own = model.state_dict()
            *_, last = (name.partition(".")[0] for name in own)
            kept = {k: v for k, v in own.items() if k.partition(".")[0] == last}
            model.load_state_dict({**begun, **kept})
        return model

    return Recipe(
        train=train,
        targets=targets,
        make_model=make_model,
        epochs=variant.epochs,
        batch_size=50,
        learning_rate=variant.rate,
        weight_decay=variant.decay,
        subsets=SUBSETS,
        seeds=SEEDS,
        checkpoints=CHECKPOINTS,
        together=TOGETHER,
        task=variant.task or usual,
        optimizer=variant.optimizer,
    )


def _trained(variant: Variant) -> dict[str, Tensor]:
    made = recipe_of(variant)
    (model,) = train_together(made, [torch.arange(len(made.train[1]))], [8000])
    return dict(model.state_dict())


def _mlp(variant: Variant) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(variant.widths):
        layers.append(nn.Linear(before, after))
        if variant.normalized:
            layers.append(nn.LayerNorm(after))
        layers.append(variant.activation())
    return nn.Sequential(*layers[: -2 if variant.normalized else -1])
