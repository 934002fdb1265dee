"""How well scores from different checkpoints agree, at several strengths of whitening."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.batches import Batch, normalize
from trak.evaluation.ranks import correlations
from trak.gradient_computers.surroundings import normalizes_batches
from trak.loaders import state_of
from trak.modes import evaluation_mode
from trak.pipeline import Pipeline, prepare_task, validate_state
from trak.precision import full_precision
from trak.projectors import LeadingProjector
from trak.projectors.leading import coordinates_holding
from trak.score_computers.auto_ridge import BY_STRENGTH, ridge_of_examples
from trak.score_computers.curvature import roots
from trak.score_computers.gram import dual_gram
from trak.score_computers.losses import losses_beside
from trak.score_computers.products import hides_bfloat16, multiplies_bfloat16
from trak.score_computers.ridge_sample import Situation

COORDINATES, HELD = 16_384, 0.98
"""Of whitened gradients that are compared, those of largest variance: so many at most, and
no more than hold this share of it at the largest strength."""
_BASE = 0.5  # strength by which these are chosen
_CHECKPOINTS = 2
_TOGETHER = 10  # checkpoints beyond which averaging more of them hardly matters
_GROUPS = 100
_TARGETS = 0.25  # of the sample
_PLAYED = 400  # examples that the ridge is told from
Fitting = Callable[[int], Iterable[Any]]


class Trial:
    """Scores of some examples by some checkpoints, at any strength.

    The coordinates of a checkpoint's gradients in the eigenbases of their second moments
    are made once; whitening by another strength only scales them.

    Args:
        pipeline: of a run that whitens.
        sample: the examples.
        states: the checkpoints, as `state_of` takes them; two are used.
        fitting: number of a checkpoint to batches that its whitening is fitted to, unless
            the pipeline's whitener has its sums already. They stay there; of other
            checkpoints than the first up to 256 MiB of each.
        curvature: weigh rows by the curvature of the loss.
        logistic: whether the loss is logistic; None if unknown.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        sample: list[Batch],
        states: Sequence[Any],
        fitting: Fitting,
        *,
        curvature: bool,
        logistic: bool | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.sample = sample
        self.states = states[:_CHECKPOINTS]
        self.fitting = fitting
        self.together = min(len(states), _TOGETHER)
        self.curvature = curvature
        self.logistic = logistic

    def agreements(self, strengths: Sequence[float]) -> list[float]:
        """Of the two checkpoints' scores, averaged over targets.

        Args:
            strengths: of whitening.

        Returns:
            A Spearman correlation for each.
        """
        found: list[list[NDArray[np.float64]]] = [[] for _ in strengths]
        usual = None
        for number, state in enumerate(self.states):
            load(self.pipeline, state)
            fit(self.pipeline, self.fitting(number), number)
            rows, powers, weights = self._coordinates(number, max(strengths))
            usual = usual or self._ridge()
            losses = losses_beside(weights).sized(self.logistic)
            factors = roots(losses, curved=self.curvature)
            for kept, strength in zip(found, strengths, strict=True):
                # played for each strength, the largest ridge would win: it is most
                # reproducible
                ridge = usual * (1 + BY_STRENGTH * strength)
                whitened = torch.empty_like(rows, dtype=_products(rows, ridge))
                torch.mul(rows, powers ** (strength / _BASE - 1), out=whitened)
                kept.append(_solved(whitened, weights[:, :1], ridge, factors))
            if number:
                self.pipeline.whitener.forget_large(number)
        return [_agreement(*scores) for scores in found]

    @full_precision()
    def _coordinates(self, number: int, most: float) -> tuple[Tensor, Tensor, Tensor]:
        # whitened by the base strength, what each was multiplied by for that, and weights
        maker, whitener = self.pipeline.maker, self.pipeline.whitener
        whitening = whitener.foresee(number, _BASE)
        enough = coordinates_holding(whitening.at(most), whitener.shapes, HELD)
        width = max(1, min(COORDINATES, enough))
        projector = LeadingProjector(whitener.shapes, width, maker.device)
        projector.use(projector.basis(whitening, quietly=True), number)
        parts = [maker.rows_by(projector, batch, number) for batch in self.sample]
        rows = torch.cat([part for part, _ in parts])
        weights = torch.cat([each for _, each in parts if each is not None])
        powers = projector.powers(whitening).to(rows)
        return rows[:, : len(powers)], powers, weights

    @full_precision()
    def _ridge(self) -> float:
        # of the first checkpoint without whitening, for no more than the sample
        seen = self.pipeline.whitener.seen(0)
        examples = None if seen is None else seen.alone(_PLAYED)
        situation = Situation(
            checkpoints=self.together,
            loss=None if examples is None else examples.loss,
            counts=None if examples is None else examples.counts,
            logistic=self.logistic,
            words=self.pipeline.losses.words,
            curvature=self.curvature,
            normalizes_batches=normalizes_batches(self.pipeline.model),
        )
        return ridge_of_examples(examples, situation)


def load(pipeline: Pipeline, checkpoint: Any) -> None:
    """Loads a checkpoint's weights, without registering it in a store.

    Args:
        pipeline: of a run.
        checkpoint: as `state_of` takes it.
    """
    state = state_of(checkpoint)
    pipeline.load_weights(state, validate_state(pipeline.model, state))
    prepare_task(pipeline.task, pipeline.model)


def fit(
    pipeline: Pipeline, batches: Iterable[Any], number: int, *, conclude: bool = True
) -> None:
    """Adds up what whitening needs; the sums stay in the pipeline's whitener.

    Nothing is done if they are there already.

    Args:
        pipeline: of a run that whitens, with the checkpoint's weights loaded.
        batches: of training examples, all that it will be fitted to.
        number: of the checkpoint.
        conclude: let go of what only further batches would need.
    """
    whitener = pipeline.whitener
    if number in whitener.sums:
        return
    device = next(pipeline.model.parameters()).device
    with evaluation_mode(pipeline.model):
        for batch in batches:
            whitener.fit(normalize(batch, device), number)
    if conclude:
        whitener.conclude(number)


@full_precision()
def _solved(
    rows: Tensor, loss: Tensor, ridge: float, factors: Tensor | None
) -> NDArray[np.float64]:
    every = torch.arange(len(rows), device=rows.device)
    held = every % round(1 / _TARGETS) == 0
    q = loss[~held].double()
    kernel = dual_gram(rows, dtype=rows.dtype)[~held]
    scales = torch.ones_like(q) if factors is None else factors.to(q)[~held]
    gram = scales * kernel[:, ~held] * scales.T
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solved = torch.cholesky_solve(scales * kernel[:, held], torch.linalg.cholesky(gram))
    return (solved / scales * q).cpu().numpy()


def _products(rows: Tensor, ridge: float) -> torch.dtype:
    cheap = hides_bfloat16(ridge, *rows.shape) and multiplies_bfloat16(rows.device)
    return torch.bfloat16 if cheap else torch.float32


def _agreement(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    size = len(one)
    rng = np.random.default_rng(0)
    groups = np.zeros((_GROUPS, size))
    for group in groups:
        group[rng.permutation(size)[: size // 2]] = 1
    return float(np.nanmean(correlations("spearman", groups @ one, groups @ other)))
