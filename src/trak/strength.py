"""How much to whiten, from what the rows have in common and how well checkpoints agree.

Where growth of all outputs is a large part of the rows and nothing holds it back, as in
many classifiers of two classes, a little is best. Elsewhere the LDS of scores and the
agreement of scores from different checkpoints rise and fall together as the strength
changes, at the ridge that belongs to each (docs/whitening.md). Neither needs retraining.
"""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trak.batches import Batch, batch_size, normalize
from trak.errors import InputTypeError
from trak.evaluation.ranks import correlations
from trak.modes import evaluation_mode
from trak.pipeline import Pipeline, check_state, prepare_task
from trak.precision import full_precision
from trak.projectors import LeadingProjector, NoOpProjector
from trak.savers.filesystem import read_object
from trak.score_computers.auto_ridge import (
    BY_STRENGTH,
    relative_ridge,
    stiffness,
)
from trak.score_computers.curvature import roots, weighted
from trak.score_computers.losses import losses_beside
from trak.score_computers.ridge_sample import Situation
from trak.whitening import Moments
from trak.whitening.whitening import STRENGTH

logger = logging.getLogger(__name__)

STRENGTHS = (0.25, 0.5, 0.75)
WORTH = 0.005
"""A step up must raise the agreement by so much, since whitening can also do harm."""
SAMPLE = 600
_DIGITS = 3
_FIRST = 2  # strengths that are tried in any case
_MOST_WRONG, _ALIKE = 0.5, 0.1
_CHECKPOINTS = 3
_TOGETHER = 10  # checkpoints beyond which averaging more of them hardly matters
_GROUPS = 100
_FEWEST = 40  # examples that agreement can be told from
_TARGETS = 0.25  # of the sample


def choose_strength(
    pipeline: Pipeline,
    states: Sequence[Any],
    batches: Iterable[Any],
    fitted: Iterable[Any],
    count: int,
    *,
    curvature: bool = True,
) -> float:
    """The smallest strength beyond which checkpoints hardly agree better.

    Up to 600 examples are taken, a quarter of them as targets. Each of up to three
    checkpoints scores them at several strengths; the agreement is the Spearman
    correlation of the scores' sums over random halves of the rest, averaged over targets
    and pairs of checkpoints.

    The first checkpoint is fitted before that, and its sums stay in the pipeline's
    whitener, unless whitening is of no use or the loss is not logistic. Where growth of all
    outputs turns out to be freer than other changes, down to a fifth of their stiffness,
    the strength is as much smaller than 0.4.

    Args:
        pipeline: of a run that whitens; its model ends up with another state's weights.
        states: as `state_of` takes them.
        batches: of training examples, spread over the training set.
        fitted: batches that the whitening of the first checkpoint is fitted to.
        count: training examples that there are, `n`.
        curvature: weigh rows by the curvature of the loss.

    Returns:
        One of `STRENGTHS`. For a single checkpoint, which has none to agree with,
        `trak.whitening.whitening.STRENGTH`. Less than any of these where growth is free.
        0 where loss weights are no probabilities, as of the squared loss, and where a
        classifier gets most examples about equally wrong, so that training has hardly
        begun: both were best without.
    """
    device = next(pipeline.model.parameters()).device
    sample = [normalize(batch, device) for batch in batches]
    enough = sum(batch_size(batch) for batch in sample) >= _FEWEST
    _load(pipeline, states[0])
    weights = _finite_weights(pipeline, sample)
    logistic = pipeline.losses.tell(sample, weights)
    losses = losses_beside(torch.cat(weights)).sized(logistic)
    useful = _is_useful(losses.own, logistic)
    strength = STRENGTH if useful else 0.0
    if useful and enough and logistic is not False:
        free = _fitted_stiffness(pipeline, fitted, count, logistic)
        strength = round(STRENGTH * min(1.0, free), _DIGITS)
    if len(states) < 2 or not enough or strength < STRENGTHS[0]:
        logger.info("whitening='auto' stands for %g.", strength)
        return strength
    return _by_agreement(
        Trial(pipeline, sample, states, curvature=curvature, logistic=logistic)
    )


def _finite_weights(pipeline: Pipeline, sample: list[Batch]) -> list[Tensor]:
    found: list[Tensor] = []
    for place, batch in enumerate(sample):
        which = f"of batch {place} (of {len(sample)} batches spread over train)"
        numbers = [f"{j} {which}" for j in range(batch_size(batch))]
        found.append(pipeline.maker.finite_weights(batch, numbers))
    return found


def _by_agreement(trial: "Trial") -> float:
    agreements: list[float] = []
    chosen = 0
    for stage in (STRENGTHS[:_FIRST], STRENGTHS[_FIRST:]):
        agreements += trial.agreements(stage)
        while chosen + 1 < len(agreements) and (
            agreements[chosen + 1] >= agreements[chosen] + WORTH
        ):
            chosen += 1
        if chosen + 1 < len(agreements):
            break
    logger.info(
        "whitening='auto' stands for %g: scores of %d checkpoints agree by %s.",
        STRENGTHS[chosen],
        len(trial.states),
        ", ".join(f"{a:.3f} ({s:g})" for s, a in zip(STRENGTHS, agreements, strict=False)),
    )
    return STRENGTHS[chosen]


def _fitted_stiffness(
    pipeline: Pipeline, batches: Iterable[Any], count: int, logistic: bool | None
) -> float:
    _fit(pipeline, batches)
    examples = pipeline.whitener.seen(0)
    return 1.0 if examples is None else stiffness(examples, count, logistic)


def fit_first(pipeline: Pipeline, state: Any, batches: Iterable[Any]) -> None:
    """Fits the whitening of the first checkpoint, whose sums stay in the whitener.

    Args:
        pipeline: of a run that whitens.
        state: the checkpoint, as `state_of` takes it.
        batches: of training examples.
    """
    _load(pipeline, state)
    _fit(pipeline, batches)


def _fit(pipeline: Pipeline, batches: Iterable[Any]) -> None:
    device = next(pipeline.model.parameters()).device
    with evaluation_mode(pipeline.model):
        for batch in batches:
            pipeline.whitener.fit(normalize(batch, device), 0)


def _is_useful(loss: Tensor, logistic: bool | None) -> bool:
    probable = bool(((loss >= 0) & (loss <= 1)).all())
    loss = loss.double()
    wrong = bool(loss.median() > _MOST_WRONG)
    alike = len(loss) > 1 and bool(loss.std() < _ALIKE * loss.mean())
    return probable and not (logistic and wrong and alike)


def known_strength(folder: Path) -> float | None:
    """The strength that a store was begun with.

    Args:
        folder: the store's.

    Returns:
        0 for none; None if there is no store yet.
    """
    known = begun_with(folder)
    if known is None:
        return None
    found = known.get("whitening")
    return float(found["strength"]) if found else 0.0


def begun_with(folder: Path) -> dict[str, Any] | None:
    """The settings that a store was begun with.

    Args:
        folder: the store's.

    Returns:
        Its metadata; None if there is no store yet.
    """
    path = folder / "metadata.json"
    return read_object(path) if path.exists() else None


def state_of(checkpoint: Any) -> Mapping[str, Any]:
    """The weights that a checkpoint stands for.

    Args:
        checkpoint: a state dict, a model, or a function that returns a state dict.

    Returns:
        The state dict.

    Raises:
        InputTypeError: if it is something else.
    """
    if isinstance(checkpoint, nn.Module):
        return checkpoint.state_dict()
    found = checkpoint() if callable(checkpoint) else checkpoint
    if not isinstance(found, Mapping):
        raise InputTypeError(
            "checkpoints must hold state dicts, models, or functions that return a state "
            f"dict; got {found!r:.80}. Load files first, without unpickling code: "
            "safetensors.torch.load_file(path), or torch.load(path, weights_only=True)."
        )
    return found


def _load(pipeline: Pipeline, checkpoint: Any) -> None:
    state = state_of(checkpoint)
    check_state(pipeline.model, state)
    pipeline.load_weights(state)
    prepare_task(pipeline.task, pipeline.model)


class Trial:
    """Scores of some examples by some checkpoints, at any strength.

    Args:
        pipeline: of a run that whitens.
        sample: the examples.
        states: the checkpoints, as `state_of` takes them; up to three are used.
        curvature: weigh rows by the curvature of the loss.
        logistic: whether the loss is logistic; None if unknown.

    Attributes:
        whole: rows are whole gradients, so that one pass over the sample serves all
            strengths.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        sample: list[Batch],
        states: Sequence[Any],
        *,
        curvature: bool,
        logistic: bool | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.sample = sample
        self.states = states[:_CHECKPOINTS]
        self.together = min(len(states), _TOGETHER)
        self.curvature = curvature
        self.logistic = logistic
        self.moments: dict[int, Moments] = {}
        self.plain: float | None = None
        self.whole = type(pipeline.maker.projector) is NoOpProjector

    def agreements(self, strengths: Sequence[float]) -> list[float]:
        """Of the checkpoints' scores, averaged over targets and pairs.

        Args:
            strengths: of whitening.

        Returns:
            A Spearman correlation for each.
        """
        found: list[list[NDArray[np.float64]]] = [[] for _ in strengths]
        for number, state in enumerate(self.states):
            _load(self.pipeline, state)
            plain = self._gradients(number) if self.whole else None
            if self.plain is None:
                self.plain = self._ridge(*(plain or self._made(number, 0.0)))
            for kept, strength in zip(found, strengths, strict=True):
                if plain is None:
                    rows, loss = self._made(number, strength)
                else:
                    rows, loss = self._whitened(plain[0], number, strength), plain[1]
                # played for each strength, the largest ridge would win: it is most
                # reproducible
                ridge = self.plain * (1 + BY_STRENGTH * strength)
                losses = losses_beside(loss).sized(self.logistic)
                r = roots(losses, curved=self.curvature)
                kept.append(_solved(rows, loss[:, :1], ridge, r))
        self.pipeline.maker.whitenings.clear()
        return [_agreement(scores) for scores in found]

    def _gradients(self, number: int) -> tuple[Tensor, Tensor]:
        # gradients and loss weights; moments in the same pass, unless they are known
        if number in self.moments:
            return self._made(number, 0.0)
        maker, projector = self.pipeline.maker, self.pipeline.maker.projector
        total, parts = Moments(), []
        for batch in self.sample:
            moments, rows = maker.moments_and_rows(batch, number, projector)
            if not bool(torch.isfinite(rows).all()):  # this one says where
                maker.rows(batch, number, list(range(len(rows))), with_weights=True)
            total.merge(moments)
            parts.append(rows)
        self.moments[number] = total
        return maker.parted(torch.cat(parts))

    @full_precision()
    def _whitened(self, rows: Tensor, number: int, strength: float) -> Tensor:
        if not strength:
            return rows
        whitening = self.pipeline.whitener.made(self._moments(number), strength)
        found = whitening.whole(rows, self.pipeline.maker.layout)
        assert isinstance(found, Tensor)  # noqa: S101 - as the rows are
        return found

    def _made(self, number: int, strength: float) -> tuple[Tensor, Tensor]:
        # rows and loss weights
        maker, whitener = self.pipeline.maker, self.pipeline.whitener
        maker.whitenings.clear()
        if strength or isinstance(maker.projector, LeadingProjector):
            maker.whiten(number, whitener.made(self._moments(number), strength))
        parts = [
            maker.rows(batch, number, list(range(batch_size(batch))), with_weights=True)
            for batch in self.sample
        ]
        rows = torch.cat([part for part, _ in parts])
        return rows, torch.cat([weights for _, weights in parts if weights is not None])

    def _moments(self, number: int) -> Moments:
        if number not in self.moments:
            self.moments[number] = Moments()
            for batch in self.sample:
                self.moments[number].merge(self.pipeline.maker.moments(batch))
        return self.moments[number]

    @full_precision()
    def _ridge(self, rows: Tensor, weights: Tensor) -> float:
        loss, *counts = weights.double().cpu().T
        situation = Situation(
            checkpoints=self.together,
            columns=self.pipeline.maker.projector.random_dim or None,
            loss=loss,
            counts=counts[0] if counts else None,
            logistic=self.logistic,
            words=self.pipeline.losses.words,
            curvature=self.curvature,
        )
        factors = roots(situation.losses, curved=self.curvature)
        return relative_ridge(weighted(rows, factors), situation)


@full_precision()
def _solved(
    rows: Tensor, loss: Tensor, ridge: float, factors: Tensor | None
) -> NDArray[np.float64]:
    every = torch.arange(len(rows), device=rows.device)
    held = every % round(1 / _TARGETS) == 0
    q = loss[~held].double()
    kernel = (rows[~held] @ rows.T).double()
    scales = torch.ones_like(q) if factors is None else factors.to(q)[~held]
    gram = scales * kernel[:, ~held] * scales.T
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    solved = torch.cholesky_solve(scales * kernel[:, held], torch.linalg.cholesky(gram))
    return (solved / scales * q).cpu().numpy()


def _agreement(scores: list[NDArray[np.float64]]) -> float:
    size = len(scores[0])
    rng = np.random.default_rng(0)
    groups = np.zeros((_GROUPS, size))
    for group in groups:
        group[rng.permutation(size)[: size // 2]] = 1
    sums = [groups @ one for one in scores]
    pairs = itertools.combinations(sums, 2)
    each = [np.nanmean(correlations("spearman", one, other)) for one, other in pairs]
    return float(np.mean(each))
