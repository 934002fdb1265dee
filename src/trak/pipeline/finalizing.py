"""What the store keeps of every checkpoint once its rows are there."""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trak.errors import ModelIDException
from trak.gradient_computers.surroundings import normalizes_batches
from trak.pipeline.describe import describe_rows
from trak.pipeline.losses import LossWatch, tell_of_strays
from trak.pipeline.project import RowMaker
from trak.pipeline.readiness import chosen_ids, current_factor, together
from trak.pipeline.sources import counts_of, loss_sizes, phi_of
from trak.pipeline.whiten import Whitener
from trak.savers import AbstractSaver, Rows
from trak.score_computers import (
    AbstractScoreComputer,
    LinearScoreComputer,
    RidgeScoreComputer,
)
from trak.score_computers.auto_ridge import Choice
from trak.score_computers.linear import Kept
from trak.score_computers.ridge_sample import Outputs, Situation, Wide, drawn
from trak.score_computers.stream import decoded

logger = logging.getLogger(__name__)


def finalize_checkpoints(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    maker: RowMaker,
    whitener: Whitener,
    losses: LossWatch,
    model_ids: Iterable[int] | None,
) -> list[int]:
    """Factors the Gram matrix of every checkpoint that needs it.

    The automatic ridge, the exponent of Q and the share of what Q added up to are medians
    of what the rows of all that are asked for say, so that one of which too little can be
    told does not outweigh the others; with whitening what one of them says, since that
    takes long and is as good (docs/ridge.md). They do not depend on other checkpoints of
    the store, nor on which of these an interrupted call had finalized.

    Args:
        scorer: the score computer.
        saver: the store.
        maker: made the rows.
        whitener: whitened them.
        losses: knows which loss they are of.
        model_ids: the checkpoints; all of the store if None.

    Returns:
        Those that were finalized; others were before.
    """
    saver.refresh()
    chosen = chosen_ids(saver, model_ids)
    wanted: dict[int, Situation] = {}
    found: Choice | None = None
    decided = {"logistic": losses.together(chosen)}
    for model_id in chosen:
        rows = saver.train_rows(model_id)
        _refuse_missing(rows, model_id)
        finalized = saver.model_ids[model_id]["is_finalized"]
        kept = current_factor(scorer, saver, model_id, chosen) if finalized else None
        if kept is not None:
            logger.info("model_id=%s is finalized already.", model_id)
            found = _choice_in(kept)
            continue
        tell_of_strays(loss_sizes(saver, model_id, decided), model_id)
        wanted[model_id] = Situation(
            checkpoints=len(chosen),
            strength=whitener.strength,
            columns=maker.projector.random_dim or None,
            unwhitened=whitener.unwhitened(model_id),
            plain=whitener.plain(model_id),
            normalizes_batches=normalizes_batches(maker.model),
            **decided,
            **_examples(saver, model_id, losses),
        )
    if found is None:
        found = _chosen_together(scorer, saver, wanted, maker.device)
    for model_id, situation in wanted.items():
        settled = replace(situation, **(found._asdict() if found else {}))
        matrix, info = _factored(scorer, saver, model_id, maker.device, settled)
        info = {**info, **decided, "together": together(saver, chosen)}
        saver.save_factor(model_id, matrix, info)
    return list(wanted)


def _refuse_missing(rows: Rows, model_id: int) -> None:
    missing = np.flatnonzero(~rows.refresh())
    if len(missing):
        raise ModelIDException(
            f"model_id={model_id} is not fully featurized: {len(missing)} of "
            f"{len(rows.done)} rows are missing ({describe_rows(missing)}). Featurize "
            "them, or check that train_set_size is the size of the training set."
        )


def _chosen_together(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    situations: dict[int, Situation],
    device: torch.device,
) -> Choice | None:
    if not isinstance(scorer, RidgeScoreComputer) or not situations:
        return None
    asked = _asked(situations)
    found = [scorer.choose(phi_of(saver, i, device), situations[i]) for i in asked]
    multiples, powers, paths = zip(*found, strict=True)
    power, path = float(np.median(powers)), float(np.median(paths))
    if scorer.loss_power is None and (power, path) != (1.0, 0.0):
        logger.info(
            "Scores have loss weights Q to the power of %.3g, times what they added up to "
            "in training to the power of %.3g.",
            power * (1 - path),
            path,
        )
    return Choice(math.exp(np.median(np.log(multiples))), power, path)


def _asked(situations: Mapping[int, Situation]) -> list[int]:
    # with whitening the first of those of which most examples are known
    def known(model_id: int) -> int:
        examples = situations[model_id].unwhitened
        return sum(len(each.loss) for each in examples if bool(each.loss.any()))

    first = max(situations, key=known)
    return [first] if known(first) else list(situations)


def _choice_in(kept: Mapping[str, Any]) -> Choice | None:
    if "auto" not in kept:
        return None
    return Choice(kept["auto"], kept.get("power", 1.0), kept.get("path", 0.0))


def _examples(saver: AbstractSaver, model_id: int, losses: LossWatch) -> dict[str, Any]:
    # what a situation knows of the training examples
    loss = saver.train_rows(model_id).array("out_to_loss")
    return {
        "loss": loss,
        "counts": counts_of(saver, model_id),
        "words": losses.words,
        "wide": _wide(saver, model_id, len(loss)),
        "outputs": _outputs(saver, model_id, losses),
    }


def _wide(saver: AbstractSaver, model_id: int, count: int) -> Wide | None:
    # rows that another version of this library began have none
    files = saver.wide_rows(model_id)
    found = files.read() if files is not None else None
    if found is None or 2 * len(found[0]) < len(drawn(count)):
        return None
    return Wide(*found)


def _outputs(saver: AbstractSaver, model_id: int, losses: LossWatch) -> Outputs | None:
    slope, files = losses.slope(model_id), saver.sample_outputs(model_id)
    if slope is None or files is None:
        return None
    found = files.read()
    return None if found is None else Outputs(*found, slope)


def _factored(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    model_id: int,
    device: torch.device,
    situation: Situation,
) -> Kept:
    # what the store keeps of a checkpoint
    rows = phi_of(saver, model_id, device)
    if isinstance(scorer, RidgeScoreComputer):
        return scorer.finalize(rows, situation)
    if isinstance(scorer, LinearScoreComputer):
        return scorer.finalize(rows)
    # upstream's three methods
    gram = scorer.get_xtx(decoded(rows, torch.float32).to(device))
    matrix = gram.detach().to(torch.float64).cpu().numpy()
    return matrix, {"computer": type(scorer).__name__}
