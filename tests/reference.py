"""The oracle: slow and obvious. Every engine, projection and score is held against it.

Autograd one sample at a time, projection matrices written out, float64 linear algebra.
Nothing here uses the library, except that a projection is asked for its matrix.
"""

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import digamma, polygamma
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


def moderated(scores, squares, peers, d):
    """Variances of all but the last columns, which are the peers', and degrees of freedom.

    Empirical Bayes (Smyth 2004) around each example's, target's and size's usual one.
    """
    n, p = len(scores), len(peers)
    m = scores.shape[1] - p
    logs = np.log(squares) + np.log(d / 2) - digamma(d / 2)
    used = np.array([[i != peers[j] for j in range(p)] for i in range(n)])
    levels = [np.mean([logs[i, m + j] for i in range(n) if used[i, j]]) for j in range(p)]
    apart = logs[:, m:] - levels
    effect = [np.mean([apart[i, j] for j in range(p) if used[i, j]]) for i in range(n)]
    inside = sum(
        (apart[i, j] - effect[i]) ** 2 for i in range(n) for j in range(p) if used[i, j]
    ) / sum(used[i].sum() - 1 for i in range(n))
    size = used.sum(axis=1).mean()
    chance = polygamma(1, d / 2)
    common = max(0.0, chance - inside)
    between = max(0.0, np.var(effect, ddof=1) - inside / size - common)
    part, whole = (between / (between + common + inside / c) for c in (size - 1, size))
    points, rest = [], []
    for i in range(n):
        for j in range(p):
            if used[i, j]:
                others = [apart[i, h] for h in range(p) if used[i, h] and h != j]
                base = part * np.mean(others)
                points.append(np.log(abs(scores[i, m + j])) - (base + levels[j]) / 2)
                rest.append(apart[i, j] - base)
    points, rest = np.array(points), np.array(rest)
    bins = np.digitize(points, np.linspace(-6, 6, 25), right=True)
    full = [b for b in np.unique(bins) if (bins == b).sum() >= 50]
    centres = [points[bins == b].mean() for b in full]
    bends = [rest[bins == b].mean() for b in full]
    prior = abs(np.var(rest - np.interp(points, centres, bends), ddof=1) - chance)
    d0 = 100.0
    if prior > polygamma(1, d0 / 2):
        d0 = brentq(lambda x: polygamma(1, x / 2) - prior, 1e-2, d0)
    found = np.empty((n, m))
    for j in range(m):
        base = whole * np.array(effect)
        level = np.mean(logs[:, j] - base)
        for last in (False, False, False, True):
            at = np.log(np.abs(scores[:, j])) - (base + level) / 2
            trend = np.interp(at, centres, bends)
            if not last:
                level = np.mean(logs[:, j] - base - trend)
        usual = np.exp(base + level + trend + digamma(d0 / 2) - np.log(d0 / 2))
        found[:, j] = (d0 * usual + d * squares[:, j]) / (d0 + d)
    return found, d + d0
