"""Rows that another process stored, held against the model as it is now.

Settings and weights are compared by content; the code of a model and of a task is not.
"""

import logging

import numpy as np
from numpy.typing import NDArray
from torch import nn

from trak.batches import Batch
from trak.modes import evaluation_mode
from trak.pipeline.project import RowMaker
from trak.pipeline.rows import narrow
from trak.savers import Rows

logger = logging.getLogger(__name__)

_SAMPLES = 4
_CLOSE, _CLOSE_HALVES = (0.05, 1e-3), (0.3, 0.02)  # relative, absolute


def warn_of_other_code(
    model: nn.Module,
    maker: RowMaker,
    rows: Rows,
    batch: Batch,
    numbers: NDArray[np.int64],
) -> None:
    """Warns where training examples have another loss weight Q than when they were stored.

    Args:
        model: the model, with the checkpoint's weights.
        maker: computes Q.
        rows: of the checkpoint.
        batch: a normalized batch.
        numbers: its samples' row numbers, `[b]`.
    """
    known = np.flatnonzero(rows.done[numbers])[:_SAMPLES]
    if not len(known):
        return
    before = np.asarray(rows.array("out_to_loss")[numbers[known], 0], dtype=np.float64)
    try:
        with evaluation_mode(model):
            found = maker.loss_weights(narrow(batch, known))[:, 0]
        now = found.detach().double().cpu().numpy()
    except Exception:  # what cannot be compared is said where it is needed
        logger.debug("Loss weights of stored rows cannot be compared.", exc_info=True)
        return
    halves = any(p.dtype.itemsize < 4 for p in model.parameters())
    relative, absolute = _CLOSE_HALVES if halves else _CLOSE
    far = np.abs(now - before) > relative * np.abs(before) + absolute
    if len(now) == len(before) and far.any():
        worst = int(np.flatnonzero(far)[0])
        logger.warning(
            "The loss weight Q of the training example in row %d is %.4g, and was %.4g "
            "when its row was stored by this checkpoint: has the code of the model or the "
            "task changed since? Rows that are stored are not computed again; use another "
            "save_dir for other code.",
            numbers[known[worst]],
            now[worst],
            before[worst],
        )
