"""Rows to scores: what is kept of a checkpoint, and the mean over checkpoints."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.errors import NumericalError
from trak.savers import AbstractSaver
from trak.score_computers import AbstractScoreComputer, LinearScoreComputer

_BLOCK_ROWS = 4096


def finalize_rows(
    scorer: AbstractScoreComputer, rows: Tensor, device: torch.device
) -> tuple[NDArray[np.float64], dict[str, object]]:
    """Makes the square matrix that the store keeps of a checkpoint.

    Args:
        scorer: the score computer; one with upstream's three methods only gets its
            `get_xtx` kept.
        rows: Phi, `[n, k]`.
        device: where to compute.

    Returns:
        The matrix and how it was made.
    """
    if isinstance(scorer, LinearScoreComputer):
        return scorer.finalize(_on(rows, device))
    gram = scorer.get_xtx(rows.to(device, torch.float32))
    matrix = gram.detach().to(torch.float64).cpu().numpy()
    return matrix, {"computer": type(scorer).__name__}


def score_blocks(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    exp_name: str,
    model_ids: list[int],
    device: torch.device,
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Scores in stretches of rows, averaged over checkpoints.

    `(mean_c Phi_c K_c^-1 phi_c^T) * (mean_c Q_c)`: Park et al. 2023, Sec. 3.2, Step 4,
    with the averages taken apart as upstream does.

    Args:
        scorer: the score computer.
        saver: the store.
        exp_name: the experiment.
        model_ids: the checkpoints.
        device: where to compute.

    Yields:
        First row and scores `[rows, m]`.

    Raises:
        NumericalError: if a score is not finite.
    """
    scorers = [_scorer(scorer, saver, exp_name, i, device) for i in model_ids]
    weights = [saver.train_rows(i).array("out_to_loss") for i in model_ids]
    num_rows = len(weights[0])
    for start in range(0, num_rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, num_rows)
        scores = torch.stack([score(start, stop) for score in scorers]).mean(dim=0)
        q = np.mean([w[start:stop] for w in weights], axis=0, dtype=np.float64)
        block = scores.cpu().numpy() * q
        if not np.isfinite(block).all():
            row, target = np.argwhere(~np.isfinite(block))[0]
            raise NumericalError(
                f"The score of training example {start + row} for target {target} is "
                f"not finite (checkpoints {model_ids}). Use a larger ridge "
                "(lambda_reg), or leave it out."
            )
        yield start, block


def _scorer(
    scorer: AbstractScoreComputer,
    saver: AbstractSaver,
    exp_name: str,
    model_id: int,
    device: torch.device,
) -> Callable[[int, int], Tensor]:
    rows = torch.from_numpy(saver.train_rows(model_id).array("grads"))
    targets = torch.from_numpy(saver.target_rows(exp_name, model_id).array("grads"))
    kept = saver.load_factor(model_id)
    if isinstance(scorer, LinearScoreComputer):
        return scorer.scorer(kept, _on(rows, device), targets.to(device))
    phi = rows.to(device, torch.float32)
    features = scorer.get_x_xtx_inv(phi, torch.as_tensor(kept[0]).to(phi))
    scores = torch.zeros(len(rows), len(targets))
    scorer.get_scores(features, targets.to(features), accumulator=scores)
    return lambda start, stop: scores[start:stop].to(torch.float64)


def _on(rows: Tensor, device: torch.device) -> Tensor:
    # file-backed rows stay where they are on a CPU
    return rows if device.type == "cpu" else rows.to(device)
