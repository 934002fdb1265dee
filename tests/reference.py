"""The oracle: slow and obvious. Every engine, projection and score is held against it.

Autograd one sample at a time, projection matrices written out, float64 linear algebra.
Nothing here uses the library, except that a projection is asked for its matrix.
"""

import numpy as np
import torch
from torch import Tensor, nn


def model_output(model: nn.Module, sample) -> Tensor:
    """log(p / (1 - p)) of one sample of (inputs..., label) with a batch axis of 1."""
    *inputs, label = sample
    logits = model(*inputs)
    probabilities = logits.double().softmax(-1)[0]
    others = [p for j, p in enumerate(probabilities) if j != int(label)]
    return torch.log(probabilities[int(label)]) - torch.log(sum(others))


def gradient_rows(model: nn.Module, batch, names=None) -> dict[str, Tensor]:
    """Per-sample gradients of `model_output`, one backward pass each, float64."""
    model.eval()
    named = dict(model.named_parameters())
    names = list(named) if names is None else list(names)
    rows = {name: [] for name in names}
    for j in range(len(batch[0])):
        sample = [part[j : j + 1] for part in batch]
        with torch.enable_grad():
            output = model_output(model, sample)
            found = torch.autograd.grad(
                output, [named[n] for n in names], allow_unused=True
            )
        for name, gradient in zip(names, found, strict=True):
            gradient = torch.zeros_like(named[name]) if gradient is None else gradient
            rows[name].append(gradient.detach().double().flatten())
    return {name: torch.stack(parts) for name, parts in rows.items()}


def loss_weights(model: nn.Module, batch) -> Tensor:
    """Q = 1 - p of every sample, float64, [n, 1]."""
    *inputs, labels = batch
    with torch.no_grad():
        probability = model.eval()(*inputs).double().softmax(-1)
    return 1 - probability.gather(1, labels[:, None])


def projected_rows(gradients: dict[str, Tensor], projector, model_id: int) -> Tensor:
    """P^T g / sqrt(p), with every parameter's matrix written out."""
    width = sum(rows.shape[1] for rows in gradients.values())
    total = sum(
        rows @ projector.matrix(name, rows.shape[1], model_id).double()
        for name, rows in gradients.items()
    )
    return total / width**0.5


def flat_rows(gradients: dict[str, Tensor]) -> Tensor:
    """g / sqrt(p), not projected."""
    rows = torch.cat(list(gradients.values()), dim=1)
    return rows / rows.shape[1] ** 0.5


def scores_before_q(phi: Tensor, targets: Tensor, ridge: float | None = None) -> Tensor:
    """Phi (Phi^T Phi + ridge I)^-1 targets^T by an explicit inverse, [n, m].

    Without a ridge given: the mean squared row norm.
    """
    gram = phi.T @ phi
    if ridge is None:
        ridge = float(phi.square().sum(1).mean())
    inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return phi @ inverse @ targets.T


def trak_scores(per_checkpoint, ridge: float | None = None) -> np.ndarray:
    """(mean over checkpoints of scores) * (mean of Q); items are (Phi, targets, Q)."""
    scores = [scores_before_q(phi, targets, ridge) for phi, targets, _ in per_checkpoint]
    weights = [q for _, _, q in per_checkpoint]
    return (torch.stack(scores).mean(0) * torch.stack(weights).mean(0)).numpy()
