"""Other attribution methods, from the same stored rows as TRAK's scores.

Per checkpoint: rows `phi_i`, loss weights `q_i`, targets `psi`, and the ridge system
`K = Phi^T Phi + lambda I` that the checkpoint was finalized with.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.arguments import as_number, is_listed, meant
from trak.encodings import RowSource
from trak.errors import InputError, InputTypeError, NumericalError
from trak.pipeline.pipeline import Pipeline
from trak.pipeline.readiness import finalized_ids
from trak.pipeline.solving import ScoreSet, kept_factor
from trak.pipeline.sources import loss_sizes, phi_of, score_weights, targets_of
from trak.pipeline.systems import System
from trak.savers import AbstractSaver
from trak.score_computers import (
    AbstractScoreComputer,
    RidgeScoreComputer,
    TopScores,
)
from trak.score_computers.running import top_of
from trak.score_computers.stream import rows_per_block, stream
from trak.score_computers.topk import how_many


class Method(NamedTuple):
    """How a method weighs the inner product of a row and a target.

    Attributes:
        solved: whether targets go through the ridge system, `psi -> K^-1 psi`.
        rows: what a row's products are divided by, with the sign of Q: `"norm"`
            (`|phi|`), `"change"` (`|K^-1 phi|`) or `"energy"` (`sqrt(phi^T K^-1 phi)`); or
            `"loss"`, multiplied by Q.
        unit_targets: whether targets are divided by the norm that goes with `rows`.
        summed: whether checkpoints are summed up, not averaged.
    """

    solved: bool
    rows: str
    unit_targets: bool = False
    summed: bool = False


METHODS = {
    "dot": Method(solved=False, rows="loss"),
    "tracin": Method(solved=False, rows="loss", summed=True),
    "cosine": Method(solved=False, rows="norm", unit_targets=True),
    "relatif": Method(solved=True, rows="change"),
    "l_relatif": Method(solved=True, rows="energy"),
    "unit_norm": Method(solved=True, rows="energy", unit_targets=True),
}
NAMES = ("trak", *METHODS)


def is_trak(name: Any) -> bool:
    """Whether TRAK's own scores are meant.

    Args:
        name: a method's.

    Returns:
        False for every other name, and for what is none.
    """
    return isinstance(name, str) and name == "trak"


def method_named(name: Any) -> Method:
    """Looks a method up.

    Args:
        name: one of `METHODS`.

    Returns:
        The method.

    Raises:
        InputError: lists the names there are.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(
            f"method must be one of {sorted(NAMES)}, got {name!r}.{meant(name, NAMES)}"
        )
    return METHODS[name]


def group_matrix(groups: Any, num_targets: int) -> Tensor | None:
    """Averages over groups of targets, as a matrix.

    Args:
        groups: for each group the numbers of its targets; None leaves targets alone.
        num_targets: `m`.

    Returns:
        `[m, groups]`, float64; its columns add up to 1.

    Raises:
        InputError: if a group is empty, repeats a target, or names one that is not there.
        InputTypeError: if groups are no sequence.
    """
    if groups is None:
        return None
    if not is_listed(groups) or not isinstance(groups, Sequence | np.ndarray | Tensor):
        raise InputTypeError(
            "groups must list, for each group, the numbers of its targets, such as "
            f"[[0, 1], [2]]; got {groups!r}."
        )
    matrix = torch.zeros(num_targets, len(groups), dtype=torch.float64, device="cpu")
    if not len(groups):
        raise InputError("groups is empty; leave it out for a score of every target.")
    for column, group in enumerate(groups):
        members = _as_array(group)
        fits = members.ndim == 1 and np.issubdtype(members.dtype, np.integer)
        distinct = fits and len(members) and len(np.unique(members)) == len(members)
        if not distinct or members.min() < 0 or members.max() >= num_targets:
            raise InputError(
                f"Group {column} must list numbers of targets, each once, from 0 to "
                f"{num_targets - 1}; got {group!r}."
            )
        # torch takes uint8 for a mask, and no other small integers
        matrix[torch.from_numpy(members.astype(np.int64)), column] = 1 / len(members)
    return matrix


def _as_array(group: Any) -> NDArray[Any]:
    try:
        return np.asarray(group.cpu() if isinstance(group, Tensor) else group)
    except (TypeError, ValueError):  # lists of other lengths within it, or no numbers
        return np.empty((0, 0))


@dataclass(frozen=True, kw_only=True)
class MethodPass:
    """One pass over the rows of some checkpoints.

    Attributes:
        scorer: made the ridge systems.
        saver: the store.
        model_ids: the checkpoints.
        device: where to compute.
        weights: of the checkpoints; 1 each if None.
    """

    scorer: AbstractScoreComputer
    saver: AbstractSaver
    model_ids: list[int]
    device: torch.device
    weights: Sequence[float] | None = None

    def scores(
        self, exp_name: str, method: Method, groups: Tensor | None
    ) -> NDArray[np.float32]:
        """All scores of an experiment.

        Args:
            exp_name: the experiment.
            method: the method.
            groups: as `group_matrix` makes it.

        Returns:
            `[n, m]`, or `[n, groups]`.
        """
        with closing(self.blocks(exp_name, method, groups)) as blocks:
            parts = [block.to("cpu", torch.float32).numpy() for _, block in blocks]
        return np.concatenate(parts)

    def top(
        self,
        exp_name: str,
        method: Method,
        groups: Tensor | None,
        k: int,
        *,
        helpful: bool,
    ) -> TopScores:
        """The strongest training examples, in memory that has no `n`.

        Args:
            exp_name: the experiment.
            method: the method.
            groups: as `group_matrix` makes it.
            k: how many a target.
            helpful: the largest scores; if False, the smallest.

        Returns:
            Rows and scores, strongest first.
        """
        k = how_many(k, len(self.saver.train_rows(self.model_ids[0]).done))
        with closing(self.blocks(exp_name, method, groups)) as blocks:
            rows, scores = top_of(blocks, k, helpful=helpful)
        return TopScores(rows, scores.astype(np.float32))

    def blocks(
        self, exp_name: str, method: Method, groups: Tensor | None
    ) -> Generator[tuple[int, Tensor]]:
        """Scores in stretches of rows.

        Args:
            exp_name: the experiment.
            method: the method.
            groups: as `group_matrix` makes it.

        Yields:
            First row and finite scores `[rows, m]`, float64.
        """
        shares = self._shares(summed=method.summed)
        systems = [self._system(i, solved=method.solved) for i in self.model_ids]
        columns = [self._columns(s, exp_name, method, groups) for s in systems]
        for start, parts in self._stretches(systems):
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for system, column, share, rows in zip(
                systems, columns, shares, parts, strict=True
            ):
                total = total + share * system.scale(rows, start, method.rows) * (
                    rows @ column
                )
            _refuse_nonfinite(total, f"Scores of {exp_name!r}", start)
            yield start, total

    def self_influence(self) -> NDArray[np.float32]:
        """How much each training example moves its own model output, by TRAK.

        `(mean_c phi_i^T K_c^-1 phi_i) * |mean_c q_i|`: the size of the diagonal of the
        scores with the training set as targets.

        Returns:
            `[n]`, finite.
        """
        systems = [self._system(i, solved=True) for i in self.model_ids]
        found: list[Tensor] = []
        for start, parts in self._stretches(systems):
            pairs = list(zip(systems, parts, strict=True))
            energy = torch.stack([(s.solve(r) * r).sum(dim=1) for s, r in pairs])
            q = torch.stack([s.loss_weights(start, len(r))[:, 0] for s, r in pairs])
            found.append(energy.mean(dim=0) * q.mean(dim=0).abs().to(energy))
            _refuse_nonfinite(found[-1], "Self-influence", start)
        return torch.cat(found).to("cpu", torch.float32).numpy()

    def _shares(self, *, summed: bool) -> list[float]:
        count = len(self.model_ids)
        given = [1.0] * count if self.weights is None else self.weights
        if len(given) != count:
            raise InputError(
                f"checkpoint_weights must be {count} numbers, one a checkpoint "
                f"({self.model_ids}); got {self.weights!r}."
            )
        names = [
            f"checkpoint_weights[{j}] (model_id={i})" for j, i in enumerate(self.model_ids)
        ]
        weights = [as_number(n, w, zero=True) for n, w in zip(names, given, strict=True)]
        total = sum(weights)
        if not total:
            raise InputError("checkpoint_weights are all 0.")
        return weights if summed else [w / total for w in weights]

    def _system(self, model_id: int, *, solved: bool) -> System:
        if solved and not isinstance(self.scorer, RidgeScoreComputer):
            raise InputError(
                "This method solves with RidgeScoreComputer's ridge system, and this run "
                f"has {type(self.scorer).__name__}. Use 'dot', 'tracin' or 'cosine', or a "
                "TRAKer without score_computer, and finalize_features() again."
            )
        source = phi_of(self.saver, model_id, self.device)
        scorer = self.scorer if isinstance(self.scorer, RidgeScoreComputer) else None
        kept = kept_factor(self.scorer, self.saver, model_id) if solved else None
        loss = score_weights(self.saver, model_id, kept[1] if kept else {})
        sizes = loss_sizes(self.saver, model_id, kept[1] if kept else None)
        return System(model_id, source, loss, sizes, scorer, kept)

    def _columns(
        self, system: System, exp_name: str, method: Method, groups: Tensor | None
    ) -> Tensor:
        targets = targets_of(self.saver, exp_name, system.model_id).to(self.device)
        columns = system.solve(targets) if method.solved else targets
        if method.unit_targets:
            columns = columns / system.norms(targets, columns, method.rows)
        columns = columns.T
        return columns if groups is None else columns @ groups.to(columns)

    def _stretches(self, systems: list[System]) -> Generator[tuple[int, list[Tensor]]]:
        sources: list[RowSource] = [system.rows for system in systems]
        size = max(1, rows_per_block(sources[0].shape[1], torch.float64) // len(sources))
        parts: list[Tensor] = []
        blocks = stream(sources, torch.float64, self.device, size)
        for number, start, block in blocks:
            parts.append(block.clone())  # the stream's buffer is used again
            if number == len(sources) - 1:
                yield start, parts
                parts = []


def method_pass(
    pipeline: Pipeline,
    model_ids: Iterable[int] | None,
    exp_name: str | None = None,
    weights: Iterable[float] | None = None,
) -> MethodPass:
    """A pass over the rows of a run's store.

    Args:
        pipeline: the run.
        model_ids: the checkpoints; all of the store if None.
        exp_name: the experiment that they must be ready for; if None, they must be
            finalized.
        weights: of the checkpoints, in the order of `model_ids`, or else of their ids.

    Returns:
        The pass.

    Raises:
        InputTypeError: if the weights are no list of numbers, or checkpoints that they are
            for have no order.
    """
    listed = is_listed(weights) and not isinstance(weights, Mapping | set | frozenset)
    if weights is not None and not listed:
        raise InputTypeError(
            "checkpoint_weights must list one number a checkpoint, in the order of "
            f"model_ids; got {weights!r}."
        )
    if weights is not None and isinstance(model_ids, set | frozenset):
        raise InputTypeError(
            f"model_ids is a set ({model_ids!r}), which has no order: which of "
            "checkpoint_weights is whose is not known. Pass a list."
        )
    if exp_name is None:
        pipeline.verify()
        pipeline.saver.refresh()
        ready = finalized_ids(pipeline.scorer, pipeline.saver, model_ids)
    else:
        ready = pipeline.ready([ScoreSet(exp_name)], model_ids, allow_skip=None)
    return MethodPass(
        scorer=pipeline.scorer,
        saver=pipeline.saver,
        model_ids=ready,
        device=pipeline.maker.device,
        weights=None if weights is None else list(weights),
    )


def _refuse_nonfinite(values: Tensor, what: str, start: int) -> None:
    if not torch.isfinite(values).all():
        raise NumericalError(
            f"{what} from row {start} on are not finite. Use a larger ridge (lambda_reg), "
            "or featurize again if a file is damaged."
        )
