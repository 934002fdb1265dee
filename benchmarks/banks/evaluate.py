"""Group scores of many projections on a bank, from one pass of gradients a checkpoint.

`by_traker` asks the public API. `by_pieces` computes the same numbers from the library's
gradient computer, projectors and solver, and reuses each checkpoint's gradients for every
kind, dimension, seed and ridge. The quality benchmark asserts that they agree.

A dense normal projection of many parameters is not multiplied out. With `G` the gradients
and `K = G G^T` their inner products, the columns of `G P` are independent normal vectors
of covariance `K`, so `K^(1/2) Z` with a normal matrix `Z` of few rows has the same
distribution.
"""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from benchmarks.banks.bank import Bank
from benchmarks.banks.recipes import Recipe
from trak import TRAKer
from trak.evaluation import group_scores
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import resolve_task
from trak.projectors import BlockProjector, FactoredProjector, make_projector
from trak.score_computers.factor import factorize, smaller_form
from trak.score_computers.gram import dual_gram, primal_gram

BATCH = 250
EXACT = "exact"  # no projection
DEFAULT = "default"  # what `projector=None` stands for
DRAWN = "drawn"  # what dense normal gives, in distribution, drawn by way of the kernel
RANKED = "factored:"  # with a rank behind it
# entries do not depend on k: the first columns of a wide matrix are the narrow one
PREFIXED = frozenset({"normal", "rademacher", DRAWN})


@dataclass(frozen=True)
class Setting:
    """One way to compute scores.

    Attributes:
        kind: name of a projection, or one of the names above.
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

    @cached_property
    def root(self) -> Tensor:
        """A symmetric matrix whose rows have the inner products of the gradients."""
        parts = (part @ part.T for part in self.by_name.values())
        values, vectors = torch.linalg.eigh(sum(parts, torch.zeros(())).double())
        return ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()

    def rows(
        self, shapes: Mapping[str, Sequence[int]], kind: str, proj_dim: int, seed: int
    ) -> Tensor:
        """Projects.

        Args:
            shapes: of the parameters.
            kind: name of a projection, or one of the names above.
            proj_dim: projection dimension.
            seed: of the projection.

        Returns:
            `[n + m, k]`.
        """
        if kind == EXACT:
            return self.root
        if kind == DRAWN:
            rng = np.random.default_rng([seed, self.model_id])
            drawn = rng.standard_normal((proj_dim, len(self.root)), dtype=np.float32)
            return self.root @ torch.from_numpy(drawn).T
        projector = projector_of(kind, shapes, proj_dim, seed)
        return projector.project(self.by_name, model_id=self.model_id)


def projector_of(
    kind: str, shapes: Mapping[str, Sequence[int]], proj_dim: int, seed: int
) -> BlockProjector:
    """The projector of a name.

    Args:
        kind: name of a projection, `DEFAULT`, or `RANKED` and a rank.
        shapes: of the parameters.
        proj_dim: projection dimension.
        seed: of the projection.

    Returns:
        The projector.
    """
    device = torch.device("cpu")
    if kind.startswith(RANKED):
        rank = int(kind.removeprefix(RANKED))
        return FactoredProjector(shapes, proj_dim, seed, device, rank)
    name = None if kind == DEFAULT else kind
    return make_projector(shapes, proj_dim, seed, device, name)


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
        kinds: names of projections, or of those above.
        dims: projection dimensions.
        seeds: projection seeds.
        ridges: in multiples of the mean squared row norm.

    Returns:
        For each setting, `[subsets, m]` for every projection seed.
    """
    n, count = len(made.train[-1]), len(bank.checkpoints)
    shapes = shapes_of(made)
    weights = torch.as_tensor(bank.masks * _mean_loss_weights(made, bank)) / count
    found: dict[tuple[Setting, int], Tensor] = defaultdict(
        lambda: torch.zeros(len(bank.masks), len(made.targets[-1]), dtype=torch.float64)
    )
    jobs = [(kind, seed) for kind in kinds for seed in range(seeds)]
    jobs = [(kind, seed) for kind, seed in jobs if kind != EXACT or not seed]
    with tqdm(total=len(jobs) * count, desc=str(bank.manifest["name"])) as bar:
        for number in range(count):
            gradients = gradients_of(made, bank, number)
            for kind, seed in jobs:
                for proj_dim, rows in _at_dims(shapes, gradients, kind, dims, seed):
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
    """Group scores of the bank's subsets by `TRAKer`, at a ridge of one row norm.

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
            task=made.objective.task,
            train_set_size=len(made.train[-1]),
            save_dir=folder,
            device="cpu",
            proj_dim=proj_dim,
            projector=None if kind == DEFAULT else kind,
            projector_seed=seed,
            use_half_precision=half,
            lambda_reg="1x",
            logging_level=logging.ERROR,
        )
        states = [made.weights(stored) for stored in bank.checkpoints]
        for number, state in enumerate(states):
            traker.load_checkpoint(state, model_id=number)
            for batch in zip(*(part.split(BATCH) for part in made.train), strict=True):
                traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for number, state in enumerate(states):
            m = len(made.targets[-1])
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


def shapes_of(made: Recipe) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that are attributed.

    Args:
        made: has the model.

    Returns:
        Name to shape.
    """
    named = made.make_model().named_parameters()
    return {name: tuple(p.shape) for name, p in named if p.requires_grad}


def _computer(made: Recipe, bank: Bank, number: int) -> FunctionalGradientComputer:
    model = made.make_model()
    model.load_state_dict(made.weights(bank.checkpoints[number]))
    task = resolve_task(made.objective.task)
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
    shapes: Mapping[str, Sequence[int]],
    gradients: Gradients,
    kind: str,
    dims: Sequence[int],
    seed: int,
) -> Iterator[tuple[int, Tensor]]:
    if kind == EXACT:
        yield 0, gradients.rows(shapes, kind, 0, seed)
    elif kind in PREFIXED:
        wide = gradients.rows(shapes, kind, max(dims), seed)
        yield from ((proj_dim, wide[:, :proj_dim].contiguous()) for proj_dim in dims)
    else:
        for proj_dim in dims:
            yield proj_dim, gradients.rows(shapes, kind, proj_dim, seed)


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
