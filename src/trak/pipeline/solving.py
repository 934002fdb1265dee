"""What a checkpoint's targets are solved to, for every set of scores of a pass."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trak.arguments import Ridge, as_ridge, is_listed
from trak.encodings import RowSource
from trak.errors import InputError, InputTypeError, PhaseError
from trak.pipeline.sources import loss_sizes, targets_of
from trak.savers import AbstractSaver
from trak.score_computers import (
    AbstractScoreComputer,
    LinearScoreComputer,
    RidgeScoreComputer,
)
from trak.score_computers.linear import BlockScorer, Kept, Weighted, blocks_of
from trak.score_computers.stream import decoded


class ScoreSet(NamedTuple):
    """The scores of one experiment at one ridge.

    Attributes:
        exp_name: the experiment.
        lambda_reg: the ridge, as a score computer takes it.
        own: whether it is the ridge that the checkpoints were finalized with.
    """

    exp_name: str
    lambda_reg: Ridge = None
    own: bool = True


def score_sets(
    scorer: AbstractScoreComputer,
    exp_names: Iterable[str],
    lambda_regs: Any,
) -> list[ScoreSet]:
    """Every experiment at every ridge.

    Args:
        scorer: the score computer.
        exp_names: the experiments.
        lambda_regs: the ridges; the score computer's own if None.

    Returns:
        The sets, each once.

    Raises:
        InputError: if there is nothing to do, or the score computer has no ridges.
        InputTypeError: if experiments or ridges are not listed.
    """
    if not isinstance(exp_names, str) and not is_listed(exp_names):
        raise InputTypeError(
            f"exp_names must list experiments, such as ['test']; got {exp_names!r}."
        )
    names = [exp_names] if isinstance(exp_names, str) else list(exp_names)
    if not all(isinstance(name, str) for name in names):
        raise InputTypeError(f"exp_names must list names of experiments, got {names!r}.")
    own = getattr(scorer, "lambda_reg", None)
    regs = [own]
    if lambda_regs is not None and not is_listed(lambda_regs):
        raise InputTypeError(
            f"lambda_regs must list ridges, such as [None, '3x', 0.1]; got {lambda_regs!r}."
        )
    if lambda_regs is not None:
        regs = [as_ridge(reg) for reg in lambda_regs]
    if not names or not regs:
        raise InputError(f"Nothing to score: experiments {names}, ridges {regs}.")
    if lambda_regs is not None and not isinstance(scorer, LinearScoreComputer):
        raise InputError(
            f"{type(scorer).__name__} cannot score at several ridges; leave lambda_regs "
            "out, or use RidgeScoreComputer."
        )
    sets = [ScoreSet(name, reg, reg == own) for reg in regs for name in names]
    return list(dict.fromkeys(sets))


def ridge_name(wanted: ScoreSet) -> str | None:
    """What a further ridge is called in a store.

    Args:
        wanted: a set of scores.

    Returns:
        None for the ridge that the checkpoints were finalized with.
    """
    if wanted.own:
        return None
    reg = wanted.lambda_reg
    return reg if isinstance(reg, str) else "default" if reg is None else repr(float(reg))


def factor_in_words(info: Mapping[str, Any]) -> str:
    """What users set of how a factor was made, for messages.

    Args:
        info: its description.

    Returns:
        Arguments of `TRAKer`, and the ridge that came of them.
    """
    parts = [f"score_computer={info.get('computer')}"]
    if "lambda_reg" in info:
        reg = info["lambda_reg"]
        parts.append(f"lambda_reg={'auto' if reg is None else reg!r}")
    if info.get("curvature"):
        parts.append("curvature=True")
    power = info.get("loss_power", 1.0)
    if power != 1:
        parts.append(f"loss_power={'auto' if power is None else power!r}")
    if "ridge" in info:
        parts.append(f"which is a ridge of {info['ridge']:.3g}")
    return ", ".join(parts)


def asked_for(scorer: AbstractScoreComputer) -> str:
    """What users set of the score computer of a run, for messages.

    Args:
        scorer: its score computer.

    Returns:
        Arguments of `TRAKer`.
    """
    names = [n for n in ("lambda_reg", "curvature", "loss_power") if hasattr(scorer, n)]
    known = {name: getattr(scorer, name) for name in names}
    return factor_in_words({"computer": type(scorer).__name__, **known})


def kept_factor(scorer: AbstractScoreComputer, saver: AbstractSaver, model_id: int) -> Kept:
    """What a checkpoint is solved with, if it is of the ridge that was asked for.

    Args:
        scorer: the score computer.
        saver: the store.
        model_id: the checkpoint, which was ready.

    Returns:
        The matrix and its description, which belong together whatever other processes do.

    Raises:
        PhaseError: if another process finalized the checkpoint with another ridge.
    """
    kept = saver.load_factor(model_id)
    if isinstance(scorer, LinearScoreComputer) and not scorer.matches(kept[1]):
        raise PhaseError(
            f"Another process finalized model_id={model_id} of {saver.save_dir} meanwhile, "
            f"with {factor_in_words(kept[1])}; this run asks for {asked_for(scorer)}. Call "
            "finalize_features() and this again (no gradient is recomputed), and let one "
            "process at a time finalize with a ridge of its own; sweep(lambda_regs=...) "
            "scores at several."
        )
    return kept


def solve(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    sets: list[ScoreSet],
    model_id: int,
    rows: RowSource,
    kept: Kept,
) -> Tensor | list[BlockScorer]:
    """Solves for the targets of all sets.

    Args:
        scorer: the score computer.
        saver: the store.
        sets: whose targets, at which ridges.
        model_id: the checkpoint.
        rows: its Phi, `[n, k]`.
        kept: its factor and how it was made.

    Returns:
        Weights `[k, m]` by which rows are multiplied, the sets' columns side by side; or,
        where there are none, a function of first and end row for each set.
    """
    targets = {
        name: targets_of(saver, name, model_id)
        for name in dict.fromkeys(s.exp_name for s in sets)
    }
    if not isinstance(scorer, LinearScoreComputer):
        return [_bare(scorer, kept, rows, targets[s.exp_name]) for s in sets]
    loss = _loss_of(scorer, saver, model_id, kept)
    others = _other_ridges(scorer, sets, kept, rows, loss)
    cases = [(kept if s.own else others[s.lambda_reg], targets[s.exp_name]) for s in sets]
    weights = [scorer.weights(case, rows, aims) for case, aims in cases]
    found = [w for w in weights if w is not None]
    if len(found) == len(sets):
        return torch.cat(found, dim=1)
    return [scorer.scorer(case, rows, aims, **loss) for case, aims in cases]


def block_scorer(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    model_id: int,
    rows: RowSource,
    targets: Tensor,
    kept: Kept,
) -> BlockScorer:
    """Solves for any targets of a checkpoint, at its own ridge.

    Args:
        scorer: the score computer.
        saver: the store.
        model_id: the checkpoint.
        rows: its Phi, `[n, k]`.
        targets: `[m, k]`, float64.
        kept: its factor and how it was made.

    Returns:
        A function of first and end row that gives scores before Q, `[rows, m]`, float64.
    """
    if not isinstance(scorer, LinearScoreComputer):
        return _bare(scorer, kept, rows, targets)
    weights = scorer.weights(kept, rows, targets)
    if weights is None:
        loss = _loss_of(scorer, saver, model_id, kept)
        return scorer.scorer(kept, rows, targets, **loss)
    return Weighted(blocks_of(rows, weights.dtype, weights.device), weights)


def features_of(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    model_id: int,
    rows: RowSource,
    kept: Kept,
) -> Tensor:
    """Upstream's features of a checkpoint.

    Args:
        scorer: the score computer.
        saver: the store.
        model_id: the checkpoint.
        rows: its Phi, `[n, k]`.
        kept: its factor and how it was made.

    Returns:
        `[n, k]`.
    """
    if not isinstance(scorer, LinearScoreComputer):
        return _bare_features(scorer, kept, rows)
    return scorer.features(kept, rows, **_loss_of(scorer, saver, model_id, kept))


def _loss_of(
    scorer: LinearScoreComputer, saver: AbstractSaver, model_id: int, kept: Kept
) -> dict[str, Any]:
    if isinstance(scorer, RidgeScoreComputer):
        return {"loss": loss_sizes(saver, model_id, kept[1])}
    return {}


def _other_ridges(
    scorer: LinearScoreComputer,
    sets: list[ScoreSet],
    kept: Kept,
    rows: RowSource,
    loss: Mapping[str, Any],
) -> dict[Ridge, Kept]:
    ridges = list(dict.fromkeys(s.lambda_reg for s in sets if not s.own))
    if not ridges:
        return {}
    return dict(zip(ridges, scorer.at_ridges(kept, rows, ridges, **loss), strict=True))


def _bare(
    scorer: AbstractScoreComputer, kept: Kept, rows: RowSource, targets: Tensor
) -> BlockScorer:
    # upstream's three methods, with all features in memory
    features = _bare_features(scorer, kept, rows)
    scores = torch.zeros(rows.shape[0], len(targets), device="cpu")
    scorer.get_scores(features, targets.to(features), accumulator=scores)
    return lambda start, stop: scores[start:stop].to(torch.float64)


def _bare_features(scorer: AbstractScoreComputer, kept: Kept, rows: RowSource) -> Tensor:
    phi = decoded(rows, torch.float32).to(scorer.device)
    return scorer.get_x_xtx_inv(phi, torch.as_tensor(kept[0], device="cpu").to(phi))
