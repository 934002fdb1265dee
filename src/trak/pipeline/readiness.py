"""Which checkpoints are meant, and what they lack before they can be scored."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import ModelIDException, PhaseError
from trak.pipeline.describe import as_model_ids, describe_rows
from trak.pipeline.solving import ScoreSet, asked_for, factor_in_words
from trak.savers import AbstractSaver
from trak.score_computers import (
    AbstractScoreComputer,
    LinearScoreComputer,
    RidgeScoreComputer,
)
from trak.score_computers.loss_power import WAY

logger = logging.getLogger(__name__)


def chosen_ids(saver: AbstractSaver, model_ids: Iterable[int] | None) -> list[int]:
    """The checkpoints that a call is about.

    Args:
        saver: the store.
        model_ids: what the user gave; all of the store if None.

    Returns:
        Their ids, at least one.

    Raises:
        ModelIDException: if one is unknown or there is none.
    """
    known = saver.model_ids
    chosen = sorted(known) if model_ids is None else as_model_ids(model_ids)
    unknown = [model_id for model_id in chosen if model_id not in known]
    if unknown:
        raise ModelIDException(
            f"Checkpoints {unknown} are not in {saver.save_dir}, which "
            f"holds {sorted(known)}. Register them with load_checkpoint first."
        )
    if not chosen and not known:
        raise ModelIDException(
            f"No checkpoint of {saver.save_dir} is known here, so there is nothing to work "
            "on. Call load_checkpoint and featurize first; is save_dir the right one?"
        )
    if not chosen:
        raise ModelIDException(
            f"model_ids is empty: name some of the checkpoints {sorted(known)} of "
            f"{saver.save_dir}, or leave it out for all of them."
        )
    return chosen


def is_current(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    model_id: int,
    group: Iterable[int] | None = None,
) -> bool:
    """Whether a checkpoint was finalized with the present ridge and score computer.

    Args:
        scorer: the score computer.
        saver: the store.
        model_id: a finalized checkpoint.
        group: checkpoints that an automatic ridge is to be for; any if None.

    Returns:
        False if it must be finalized again, or the score computer cannot tell.
    """
    return current_factor(scorer, saver, model_id, group) is not None


def current_factor(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    model_id: int,
    group: Iterable[int] | None = None,
) -> dict[str, Any] | None:
    """How a checkpoint's factor was made, read once: others may replace it any time.

    Args:
        scorer: the score computer.
        saver: the store.
        model_id: a finalized checkpoint.
        group: as for `is_current`.

    Returns:
        Its description; None if it is not current.
    """
    if not isinstance(scorer, LinearScoreComputer):
        return None
    info = saver.load_factor(model_id)[1]
    grouped = group is not None and isinstance(scorer, RidgeScoreComputer)
    alike = not grouped or info.get("together") == together(saver, group or ())
    return info if alike and scorer.matches(info) else None


def together(saver: AbstractSaver, model_ids: Iterable[int]) -> dict[str, str | None]:
    """Checkpoints for which an automatic ridge is chosen, as the store notes them down.

    Args:
        saver: the store.
        model_ids: the checkpoints.

    Returns:
        Id to content hash of the weights.
    """
    return {str(i): saver.checkpoint_digest(i) for i in sorted(model_ids)}


def what_counts(factor: Mapping[str, Any]) -> dict[str, Any]:
    """What scores depend on, of how a factor was made.

    Args:
        factor: its description.

    Returns:
        The description without arrays and, where a ridge was given, without the automatic
        one, which was not used.
    """
    unused = {WAY}
    if factor.get("lambda_reg") is not None:
        unused |= {"auto", "together"}
    return {name: value for name, value in factor.items() if name not in unused}


def scores_with_record(
    saver: AbstractSaver, exp_name: str
) -> tuple[NDArray[Any], dict[str, Any]]:
    """Scores, and the record that they were written with.

    Args:
        saver: the store.
        exp_name: the experiment.

    Returns:
        Scores `[n, m]` and the experiment's record.
    """
    while True:  # until no other process wrote scores in between
        record = saver.experiment(exp_name)
        scores = saver.load_scores(exp_name)
        if saver.experiment(exp_name) == record:
            return scores, record


def refuse_dropped(saver: AbstractSaver, exp_name: str, model_ids: Iterable[int]) -> None:
    """Refuses scores of checkpoints that somebody took out of the store.

    Args:
        saver: the store.
        exp_name: the experiment.
        model_ids: the checkpoints that its scores are from.

    Raises:
        PhaseError: names those that are gone.
    """
    gone = [i for i in model_ids if saver.checkpoint_digest(i) is None]
    if gone:
        raise PhaseError(
            f"The scores of {exp_name!r} are means over checkpoints {gone}, too, which are "
            f"no longer in {saver.save_dir}. Call finalize_features() and "
            f"finalize_scores(exp_name={exp_name!r}) for scores of those that are left; no "
            "gradient is recomputed."
        )


def not_ready(
    scorer: AbstractScoreComputer, saver: AbstractSaver, wanted: ScoreSet, model_id: int
) -> str | None:
    """What a checkpoint lacks.

    Args:
        scorer: the score computer.
        saver: the store.
        wanted: the experiment and ridge.
        model_id: the checkpoint.

    Returns:
        A sentence; None if it can be scored.
    """
    exp_name = wanted.exp_name
    problem = _not_finalized(saver, model_id)
    if problem is not None:
        return problem
    if not _factor_serves(scorer, saver, wanted, model_id):
        made = factor_in_words(saver.load_factor(model_id)[1])
        return (
            f"model_id={model_id} was finalized with {made}; this run asks for "
            f"{asked_for(scorer)}. Call finalize_features() again (no gradient is "
            "recomputed)."
        )
    if not saver.has_targets(exp_name, model_id):
        return f"Experiment {exp_name!r} has no targets for model_id={model_id}."
    missing = np.flatnonzero(~saver.target_rows(exp_name, model_id).refresh())
    if len(missing):
        return (
            f"Experiment {exp_name!r} lacks {len(missing)} targets for "
            f"model_id={model_id}: {describe_rows(missing)} were never scored."
        )
    return None


def finalized_ids(
    scorer: AbstractScoreComputer, saver: AbstractSaver, model_ids: Iterable[int] | None
) -> list[int]:
    """The checkpoints that a call about training examples alone is about.

    Args:
        scorer: the score computer.
        saver: the store.
        model_ids: what the user gave; all of the store if None.

    Returns:
        Their ids.

    Raises:
        ModelIDException: if one is unknown, or not finalized with the present ridge.
    """
    chosen = chosen_ids(saver, model_ids)
    for model_id in chosen:
        problem = _not_finalized(saver, model_id)
        if problem is None and not is_current(scorer, saver, model_id):
            problem = f"model_id={model_id} was finalized with another ridge."
        if problem is not None:
            raise ModelIDException(f"{problem} Call finalize_features() first.")
    return chosen


def _not_finalized(saver: AbstractSaver, model_id: int) -> str | None:
    state = saver.model_ids[model_id]
    if not state["is_finalized"]:
        return f"model_id={model_id} is not finalized."
    if not state["is_featurized"]:
        return (
            f"model_id={model_id} is finalized, but rows that it was finalized with are "
            "gone; featurize them and call finalize_features() again."
        )
    return None


def _factor_serves(
    scorer: AbstractScoreComputer, saver: AbstractSaver, wanted: ScoreSet, model_id: int
) -> bool:
    if not isinstance(scorer, LinearScoreComputer):
        return True
    if wanted.own:
        return is_current(scorer, saver, model_id)
    info = saver.load_factor(model_id)[1]
    return info["computer"] == type(scorer).__name__


def warn_of_twins(saver: AbstractSaver, model_id: int, digest: str) -> None:
    """Warns if a checkpoint has the weights of another one in the store.

    Args:
        saver: the store.
        model_id: the checkpoint, which is registered.
        digest: content hash of its weights.
    """
    others = [i for i in sorted(saver.model_ids) if i != model_id]
    twins = [i for i in others if saver.checkpoint_digest(i) == digest]
    if twins:
        logger.warning(
            "model_id=%d has the same weights as model_id=%d, which then counts twice. "
            "Is it a state dict of the model that TRAKer loads checkpoints into? Loading "
            "overwrites that: keep copies (copy.deepcopy(model.state_dict())).",
            model_id,
            twins[0],
        )


def warn_of_other_groups(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    sets: Iterable[ScoreSet],
    model_ids: Iterable[int],
) -> None:
    """Warns if an average is over checkpoints that do not share an automatic ridge.

    Args:
        scorer: the run's score computer.
        saver: the store.
        sets: what is scored; at ridges that are given there is nothing to say.
        model_ids: the checkpoints, which are finalized.
    """
    if not isinstance(scorer, RidgeScoreComputer):
        return
    if all((scorer if each.own else each).lambda_reg is not None for each in sets):
        return
    found = {i: saver.load_factor(i)[1] for i in model_ids}
    if len({(str(i.get("together")), i.get("auto")) for i in found.values()}) > 1:
        logger.warning(
            "Checkpoints %s were finalized in several calls, each with an automatic ridge "
            "of its own (%s mean squared row norms). finalize_features(model_ids=%s), once "
            "for all, gives them one that is chosen for their average; no gradient is "
            "recomputed.",
            list(found),
            ", ".join(_automatic_in_words(info) for info in found.values()),
            list(found),
        )


def _automatic_in_words(info: Mapping[str, Any]) -> str:
    # a store from before there was an automatic ridge has none
    return f"{info['auto']:.3g}" if "auto" in info else "unknown"


def warn_of_other_ridge(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    exp_name: str,
    model_ids: Iterable[int],
) -> None:
    """Warns if scores were computed with another ridge than a run is to have.

    Args:
        scorer: the run's score computer.
        saver: the store.
        exp_name: the experiment.
        model_ids: the checkpoints that its scores are from.
    """
    if not isinstance(scorer, LinearScoreComputer):
        return
    others = [i for i in model_ids if not is_current(scorer, saver, i)]
    if others:
        logger.warning(
            "The scores of %r were computed as their checkpoints were finalized (model_id="
            "%d: %s), which is not what this run asks for (%s). Call finalize_features() "
            "and finalize_scores(exp_name=%r) for scores of its own.",
            exp_name,
            others[0],
            factor_in_words(saver.load_factor(others[0])[1]),
            asked_for(scorer),
            exp_name,
        )
