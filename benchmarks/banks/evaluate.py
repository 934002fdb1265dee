"""Group scores of many projections on a bank, from one pass of gradients a checkpoint.

`by_traker` asks the public API. `by_pieces` computes the same numbers from the library's
gradient computer, projectors and solver, and reuses each checkpoint's gradients for every
kind, dimension, seed and ridge. The quality benchmark asserts that they agree.
"""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from benchmarks.banks.bank import Bank
from benchmarks.banks.recipes import Recipe
from benchmarks.lds import group_scores
from trak import TRAKer
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import resolve_task
from trak.projectors import make_projector
from trak.score_computers.factor import factorize, smaller_form
from trak.score_computers.gram import dual_gram, primal_gram

BATCH = 250
EXACT = "exact"  # no projection
DEFAULT = "default"  # what `projector=None` stands for
# entries do not depend on k: the first columns of a wide matrix are the narrow one
PREFIXED = frozenset({"normal", "rademacher"})


@dataclass(frozen=True)
class Setting:
    """One way to compute scores.

    Attributes:
        kind: name of a projection, `DEFAULT` or `EXACT`.
        proj_dim: projection dimension; 0 for `EXACT`.
        ridge: in multiples of the mean squared row norm.
    """

    kind: str
    proj_dim: int
    ridge: float


Predictions = dict[Setting, list[NDArray[np.float64]]]


@dataclass(frozen=True)
class Gradients:
    """One checkpoint's gradients of the training examples and, after them, the targets.

    Attributes:
        by_name: parameter to `[n + m, p]`.
        model_id: the checkpoint.
    """

    by_name: dict[str, Tensor]
    model_id: int

    def rows(self, made: Recipe, kind: str, proj_dim: int, seed: int) -> Tensor:
        """Projects.

        Args:
            made: the recipe whose model these gradients are of.
            kind: name of a projection, `DEFAULT` or `EXACT`.
            proj_dim: projection dimension.
            seed: of the projection.

        Returns:
            `[n + m, k]`.
        """
        if kind == EXACT:
            return torch.cat(list(self.by_name.values()), dim=1)
        shapes = {n: tuple(p.shape) for n, p in made.make_model().named_parameters()}
        name = None if kind == DEFAULT else kind
        projector = make_projector(shapes, proj_dim, seed, torch.device("cpu"), name)
        return projector.project(self.by_name, model_id=self.model_id)


def by_pieces(
    made: Recipe,
    bank: Bank,
    kinds: Sequence[str],
    dims: Sequence[int],
    seeds: int,
    ridges: Sequence[float],
) -> Predictions:
    """Group scores of the bank's subsets in every setting.

    Args:
        made: data and model.
        bank: its checkpoints are averaged over.
        kinds: names of projections, `DEFAULT` or `EXACT`.
        dims: projection dimensions.
        seeds: projection seeds.
        ridges: in multiples of the mean squared row norm.

    Returns:
        For each setting, `[subsets, m]` for every projection seed.
    """
    n, count = len(made.train[0]), len(bank.checkpoints)
    weights = torch.as_tensor(bank.masks * _mean_loss_weights(made, bank)) / count
    found: dict[tuple[Setting, int], Tensor] = defaultdict(
        lambda: torch.zeros(len(bank.masks), len(made.targets[0]), dtype=torch.float64)
    )
    jobs = [(kind, seed) for kind in kinds for seed in range(seeds)]
    jobs = [(kind, seed) for kind, seed in jobs if kind != EXACT or not seed]
    with tqdm(total=len(jobs) * count, desc=str(bank.manifest["name"])) as bar:
        for number in range(count):
            gradients = gradients_of(made, bank, number)
            for kind, seed in jobs:
                for proj_dim, rows in _at_dims(made, gradients, kind, dims, seed):
                    parts = _predict(rows[:n], rows[n:], weights, ridges)
                    for ridge, part in zip(ridges, parts, strict=True):
                        found[Setting(kind, proj_dim, ridge), seed] += part
                bar.update()
    result: Predictions = defaultdict(list)
    for (setting, _), predicted in sorted(found.items(), key=lambda item: item[0][1]):
        result[setting].append(predicted.numpy())
    return dict(result)


def by_traker(
    made: Recipe, bank: Bank, kind: str, proj_dim: int, seed: int, *, half: bool = True
) -> NDArray[np.float64]:
    """Group scores of the bank's subsets by `TRAKer` as a user calls it.

    Args:
        made: data and model.
        bank: its checkpoints are averaged over.
        kind: name of a projection, or `DEFAULT`.
        proj_dim: projection dimension.
        seed: of the projection.
        half: store rows in float16, as by default.

    Returns:
        `[subsets, m]`.
    """
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=made.make_model(),
            task=made.task,
            train_set_size=len(made.train[0]),
            save_dir=folder,
            device="cpu",
            proj_dim=proj_dim,
            projector=None if kind == DEFAULT else kind,
            projector_seed=seed,
            use_half_precision=half,
            logging_level=logging.ERROR,
        )
        for number, state in enumerate(bank.checkpoints):
            traker.load_checkpoint(state, model_id=number)
            for batch in zip(*(part.split(BATCH) for part in made.train), strict=True):
                traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for number, state in enumerate(bank.checkpoints):
            m = len(made.targets[0])
            traker.start_scoring_checkpoint("bank", state, number, num_targets=m)
            for batch in zip(*(part.split(BATCH) for part in made.targets), strict=True):
                traker.score(batch, num_samples=len(batch[0]))
        return group_scores(traker.finalize_scores("bank"), bank.masks)


def gradients_of(made: Recipe, bank: Bank, number: int) -> Gradients:
    """Exact gradients of one checkpoint.

    Args:
        made: data and model.
        bank: has the checkpoint.
        number: of the checkpoint.

    Returns:
        The gradients of training examples and targets.
    """
    computer = _computer(made, bank, number)
    parts = [
        computer.compute_per_sample_grad(batch)
        for examples in (made.train, made.targets)
        for batch in zip(*(part.split(BATCH) for part in examples), strict=True)
    ]
    names = list(parts[0])
    flat = {name: [part[name].flatten(start_dim=1) for part in parts] for name in names}
    return Gradients({name: torch.cat(found) for name, found in flat.items()}, number)


def _computer(made: Recipe, bank: Bank, number: int) -> FunctionalGradientComputer:
    model = made.make_model()
    model.load_state_dict(bank.checkpoints[number])
    task = resolve_task(made.task)
    computer = FunctionalGradientComputer(model=model.eval(), task=task, device="cpu")
    computer.load_model_params(model)
    return computer


def _mean_loss_weights(made: Recipe, bank: Bank) -> NDArray[np.float64]:
    # Q, averaged over checkpoints apart from the rest, as TRAK does
    found = [
        _computer(made, bank, number).compute_loss_grad(made.train).flatten()
        for number in range(len(bank.checkpoints))
    ]
    return torch.stack(found).to(torch.float64).mean(dim=0).numpy()


def _at_dims(
    made: Recipe, gradients: Gradients, kind: str, dims: Sequence[int], seed: int
) -> list[tuple[int, Tensor]]:
    if kind == EXACT:
        return [(0, gradients.rows(made, kind, 0, seed))]
    if kind in PREFIXED:
        wide = gradients.rows(made, kind, max(dims), seed)
        return [(proj_dim, wide[:, :proj_dim].contiguous()) for proj_dim in dims]
    return [(proj_dim, gradients.rows(made, kind, proj_dim, seed)) for proj_dim in dims]


def _predict(
    phi: Tensor, targets: Tensor, weights: Tensor, ridges: Sequence[float]
) -> list[Tensor]:
    # weights @ scores, without the scores: [subsets, m] for each ridge
    form = smaller_form(*phi.shape)
    gram = primal_gram(phi) if form == "primal" else dual_gram(phi)
    unit = float(gram.trace()) / len(phi)
    right = targets.to(torch.float64).T
    left = weights
    if form == "primal":
        left = weights @ phi.to(torch.float64)
    else:
        right = phi.to(torch.float64) @ right
    factors = (
        factorize(gram, form=form, ridge=ridge * unit, num_rows=len(phi))
        for ridge in ridges
    )
    return [left @ factor.solve(right) for factor in factors]
