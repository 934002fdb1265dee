"""Counterfactual removal: what happens without the examples that scores point at?"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from trak.arguments import as_flag, as_integer, as_number, is_listed
from trak.errors import InputError
from trak.evaluation.arrays import Floats, as_floats, as_outputs, check_length
from trak.evaluation.functions import check_functions
from trak.evaluation.intervals import CONTROLS, TARGETS, Bootstrap

Side = Literal["top", "bottom", "random"]
SIDES: tuple[Side, ...] = get_args(Side)
Progress = Callable[[int, int], None]
_Plan = dict[Side, list[list[list[NDArray[np.int64]]]]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class RemovalEffect:
    """What removing some examples does.

    Attributes:
        change: output without them less output with all, mean over seeds, `[fractions, m]`.
        mean: over targets, `[fractions]`.
        low: lower ends of the intervals of `mean`, over targets, `[fractions]`.
        high: upper ends, `[fractions]`.
    """

    change: Floats
    mean: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False, kw_only=True)
class RemovalCurve:
    """Change of the targets' outputs against the fraction removed.

    Attributes:
        fractions: of the training set, `[fractions]`.
        top: without the examples of the largest scores: negative where scores are right.
        bottom: without those of the smallest scores, or None.
        random: without as many drawn at random, the control, or None.
        level: nominal coverage of the intervals.
    """

    fractions: Floats
    top: RemovalEffect
    bottom: RemovalEffect | None
    random: RemovalEffect | None
    level: float


def removal_curve(
    scores: Any,
    train: Callable[[NDArray[np.int64], int], Any],
    evaluate: Callable[[Any], Any],
    fractions: Any,
    *,
    seeds: int = 1,
    sides: Sequence[Side] = SIDES,
    together: bool = False,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> RemovalCurve:
    """Retrains without the examples that scores point at, and measures the outputs.

    Every target has a ranking of its own, so there are `seeds * (1 + fractions * (2 m
    + 1))` trainings; with `together`, `seeds * (1 + 3 fractions)`. The seeds are the same
    for all, so that what a seed does to a target cancels in part.

    Args:
        scores: `[n, m]`.
        train: `train(indices, seed)` gives a model trained on these examples, ascending.
        evaluate: `evaluate(model)` gives the targets' outputs, `[m]`.
        fractions: of the training set to remove, between 0 and 1, `[fractions]`.
        seeds: trainings of each kind; they get the seeds `0` to `seeds - 1`.
        sides: which examples to remove; `"top"` must be among them.
        together: remove the same examples for all targets, by the sum of their scores.
        level: nominal coverage of the intervals.
        draws: bootstrap resamples.
        seed: of the bootstrap and of the random removals: those of repetition `r` are
            `removed_indices(..., "random", seed=[seed, r])`.
        progress: called with the trainings done and those to do.

    Returns:
        The curve.
    """
    Bootstrap.of(level, draws, seed)  # refused before anything is trained
    check_functions(train, evaluate, progress)
    at_once = as_flag("together", together)
    numbers = as_floats("scores", scores, axes=("training example", "target"))
    repeats = as_integer("seeds", seeds, least=1)
    ranked = numbers.sum(axis=1, keepdims=True) if at_once else numbers
    plan = _plan(ranked, fractions, sides, repeats, seed)
    runs = _Runs(train, evaluate, len(numbers), numbers.shape[1], progress)
    runs.total = repeats + sum(
        len(sets) for side in plan.values() for part in side for sets in part
    )
    _log.info("A removal curve of %d trainings.", runs.total)
    full = np.stack([runs.without(np.zeros(0, np.int64), r) for r in range(repeats)])
    found: dict[Side, Floats] = {
        side: np.stack([
            np.stack([runs.each(sets, r) for r, sets in enumerate(part)]) for part in parts
        ])
        for side, parts in plan.items()
    }
    return removal_curve_from_outputs(
        fractions, full, **found, level=level, draws=draws, seed=seed
    )


def removal_curve_from_outputs(
    fractions: Any,
    full: Any,
    top: Any,
    bottom: Any = None,
    random: Any = None,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> RemovalCurve:
    """The curve of outputs that were measured elsewhere (see `removed_indices`).

    Args:
        fractions: of the training set that were removed, `[fractions]`.
        full: outputs after training on everything, `[seeds, m]`.
        top: outputs without the examples of the largest scores, `[fractions, m]` or
            `[fractions, seeds, m]`.
        bottom: the same without those of the smallest, or None.
        random: the same without random ones, or None.
        level: nominal coverage of the intervals.
        draws: bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        The curve.

    Raises:
        InputError: if there is no `top`, or the arrays do not fit.
    """
    how = Bootstrap.of(level, draws, seed)
    parts = _as_fractions(fractions)
    base = as_floats("full", full, axes=("seed", "target")).mean(axis=0)
    given: dict[Side, Any] = {"top": top, "bottom": bottom, "random": random}
    found = {
        side: None if outputs is None else _effect(side, outputs, len(parts), base, how)
        for side, outputs in given.items()
    }
    first = found.pop("top")
    if first is None:
        raise InputError("top must be given: it is what the curve is about.")
    return RemovalCurve(fractions=parts, top=first, **found, level=how.level)


def removed_indices(
    scores: Any, fraction: float, side: Side, *, seed: Any = 0
) -> list[NDArray[np.int64]]:
    """Which examples to train without.

    Args:
        scores: `[n, m]`.
        fraction: of the training set, rounded to a number of examples.
        side: the largest scores, the smallest, or random ones.
        seed: of the random ones; a number of at least 0, or several.

    Returns:
        Indices, ascending, for each target; only one set for `"random"`, which serves all.
        Of equal scores the first examples are taken.

    Raises:
        InputError: if nothing or everything would be removed, or there is no such side.
    """
    asked: Any = side
    if not isinstance(asked, str) or asked not in SIDES:
        raise InputError(f"side must be one of {SIDES}, got {side!r}.")
    numbers = as_floats("scores", scores, axes=("training example", "target"))
    n = len(numbers)
    count = round(as_number("fraction", fraction, zero=True) * n)
    if not 0 < count < n:
        raise InputError(
            f"A fraction of {fraction} removes {count} of {n} examples; it must leave some "
            "and remove some."
        )
    if side == "random":
        several = isinstance(seed, Sequence | np.ndarray) and is_listed(seed)
        given = seed if several else [seed]
        words = [as_integer("seed", word, least=0) for word in given]
        rng = np.random.default_rng([*words, CONTROLS, count])
        return [np.sort(rng.permutation(n)[:count])]
    sign = -1.0 if side == "top" else 1.0
    order = np.argsort(sign * numbers, axis=0, kind="stable")
    return [np.sort(column[:count]) for column in order.T]


def _plan(scores: Floats, fractions: Any, sides: Any, seeds: int, seed: int) -> _Plan:
    given = list(sides) if is_listed(sides) else []
    wanted: list[Side] = [side for side in SIDES if side in map(str, given)]
    if "top" not in wanted or not {str(side) for side in given} <= {*SIDES}:
        raise InputError(f"sides must be some of {SIDES}, with 'top', got {sides!r}.")
    return {
        side: [
            [removed_indices(scores, part, side, seed=[seed, r]) for r in range(seeds)]
            for part in _as_fractions(fractions)
        ]
        for side in wanted
    }


def _as_fractions(fractions: Any) -> Floats:
    parts = as_floats("fractions", fractions, axes=("fraction",))
    bad = np.flatnonzero((parts < 0) | (parts > 1))
    if len(bad):
        raise InputError(
            f"fractions of the training set must be between 0 and 1, got "
            f"{parts[bad[0]]:g} at fraction {bad[0]}."
        )
    return parts


def _effect(
    name: Side, outputs: Any, parts: int, base: Floats, how: Bootstrap
) -> RemovalEffect:
    without = as_outputs(name, outputs, "fraction").mean(axis=1)
    check_length(len(without), parts, f"The rows of {name}", "fractions")
    check_length(without.shape[1], len(base), f"The columns of {name}", "full")
    change = without - base
    mean = change.mean(axis=1)
    drawn = how.counts(len(base), TARGETS) / len(base) @ change.T
    ends = [
        how.interval(value, drawn[:, j], (-np.inf, np.inf))
        for j, value in enumerate(mean.tolist())
    ]
    low, high = np.asarray(ends).T
    return RemovalEffect(change=change, mean=mean, low=low, high=high)


class _Runs:
    """Trains, and counts.

    Args:
        train: the user's.
        evaluate: the user's.
        n: training examples.
        m: targets.
        progress: the user's, or None.
    """

    def __init__(
        self,
        train: Callable[[NDArray[np.int64], int], Any],
        evaluate: Callable[[Any], Any],
        n: int,
        m: int,
        progress: Progress | None,
    ) -> None:
        self.total = 0
        self._train, self._evaluate = train, evaluate
        self._n, self._m = n, m
        self._progress = progress
        self._done = 0

    def without(self, removed: NDArray[np.int64], seed: int) -> Floats:
        """Outputs `[m]` of a model that was trained without some examples."""  # noqa: DOC201
        indices = np.delete(np.arange(self._n), removed)
        outputs = self._evaluate(self._train(indices, seed))
        found = as_floats("What evaluate returned", outputs, axes=("target",))
        check_length(len(found), self._m, "Its length", "the columns of scores")
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self.total)
        return found

    def each(self, sets: list[NDArray[np.int64]], seed: int) -> Floats:
        """Outputs `[m]`, each target's without its own set, or all without the only."""  # noqa: DOC201
        if len(sets) == 1:
            return self.without(sets[0], seed)
        found: Iterator[Floats] = (self.without(removed, seed) for removed in sets)
        return np.asarray([outputs[j] for j, outputs in enumerate(found)])
