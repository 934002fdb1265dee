"""Gradients of a bank's checkpoints, their kernels, and systems for all ridges at once.

With `K = Phi Phi^T` and `U S U^T` its eigendecomposition, scores at any ridge are
`U (S + ridge)^-1 U^T K_targets`: one decomposition serves a sweep, and projections, weights
and corrections are changes of a matrix of the size of the training set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.banks.bank import Bank
from benchmarks.banks.evaluate import BATCH, shapes_of
from benchmarks.banks.recipes import Recipe
from benchmarks.lds import lds
from trak.evaluation import group_scores
from trak.gradient_computers import FunctionalGradientComputer, HookGradientComputer
from trak.modelout_functions import resolve_task
from trak.score_computers.curvature import FLOOR, RULE
from trak.whitening import Moments, Whitening

RIDGES = tuple(float(f"{ridge:.4g}") for ridge in np.logspace(-1, 2.5, 15))
"""Of every sweep, in units of the mean squared row norm: 0.1 to 316."""
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    RULE: lambda q: q * (1 - q / 2),
    "q (1 - q)": lambda q: q * (1 - q),
    "q": lambda q: q,
    "q^2": lambda q: q * q,
    "1": torch.ones_like,
}
"""What R may be."""
Gradients = dict[str, Tensor]
Computer = TypeVar("Computer", FunctionalGradientComputer, HookGradientComputer)


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint gives.

    Attributes:
        gradients: parameter to `[n + m, p]`, training examples and then targets.
        loss: the loss weights Q of both, `[n + m]`.
        moments: what whitening needs, of the training examples.
        shapes: of the parameters.
        n: training examples.
        model_id: number of the checkpoint.
    """

    gradients: Gradients
    loss: Tensor
    moments: Moments
    shapes: Mapping[str, tuple[int, ...]]
    n: int
    model_id: int

    def whitening(self, strength: float) -> Whitening:
        """The library's whitening of this checkpoint.

        Args:
            strength: alpha.

        Returns:
            The matrices.
        """
        return Whitening(self.moments, self.shapes, strength)

    def whitened(self, strength: float) -> Gradients:
        """The gradients after whitening.

        Args:
            strength: alpha; 0 leaves them alone.

        Returns:
            Parameter to `[n + m, p]`.
        """
        if not strength:
            return self.gradients
        whole = self.whitening(strength).whole(
            {
                name: gradient.unflatten(1, self.shapes[name])
                for name, gradient in self.gradients.items()
            },
            {},
        )
        assert isinstance(whole, dict)
        return {name: gradient.flatten(1) for name, gradient in whole.items()}


def checkpoint(made: Recipe, bank: Bank, number: int) -> Checkpoint:
    """Computes the exact gradients of one checkpoint.

    Args:
        made: data and model.
        bank: has the checkpoint.
        number: of the checkpoint.

    Returns:
        Gradients, loss weights and moments.
    """
    exact = _computer(made, bank, number, FunctionalGradientComputer)
    parts, weights = [], []
    for examples in (made.train, made.targets):
        for batch in zip(*(part.split(BATCH) for part in examples), strict=True):
            parts.append(exact.compute_per_sample_grad(batch))
            weights.append(exact.compute_loss_grad(batch).flatten())
    gradients = {
        name: torch.cat([part[name].detach().flatten(1) for part in parts])
        for name in parts[0]
    }
    loss, moments = torch.cat(weights).detach().double(), moments_of(made, bank, number)
    n = len(made.train[-1])
    return Checkpoint(gradients, loss, moments, shapes_of(made), n, number)


def moments_of(made: Recipe, bank: Bank, number: int) -> Moments:
    """What whitening needs to know of the training examples.

    Args:
        made: data and model.
        bank: has the checkpoint.
        number: of the checkpoint.

    Returns:
        Sums over the training set.
    """
    hooks, moments = _computer(made, bank, number, HookGradientComputer), Moments()
    for batch in zip(*(part.split(BATCH) for part in made.train), strict=True):
        with moments.adding(len(batch[0])) as sink:
            hooks.run(batch, sink, {})
    return moments


def _computer(made: Recipe, bank: Bank, number: int, kind: type[Computer]) -> Computer:
    model = made.make_model()
    model.load_state_dict(made.weights(bank.checkpoints[number]))
    model.eval()
    task = resolve_task(made.objective.task)
    computer = kind(model=model, task=task, device="cpu")
    computer.load_model_params(model)
    return computer


def loss_weights(made: Recipe, bank: Bank, number: int) -> Tensor:
    """The loss weights of one checkpoint, without its gradients.

    Args:
        made: data and model.
        bank: has the checkpoint.
        number: of the checkpoint.

    Returns:
        Q of training examples and targets, `[n + m]`.
    """
    computer = _computer(made, bank, number, FunctionalGradientComputer)
    parts = [computer.compute_loss_grad(each) for each in (made.train, made.targets)]
    return torch.cat([part.flatten() for part in parts]).detach().double()


def kernel_of(rows: Sequence[Tensor], n: int) -> Tensor:
    """Inner products of training rows with all rows.

    Args:
        rows: parts of the columns, each `[n + m, p]`.
        n: training examples.

    Returns:
        `[n, n + m]`, float32.
    """
    total = torch.zeros(n, len(rows[0]))
    for part in rows:
        total.addmm_(part[:n], part.T)
    return total


def curvatures(loss: Tensor, rule: str = RULE) -> Tensor | None:
    """The R of the Gram matrix.

    Args:
        loss: Q, `[n]`.
        rule: one of `RULES`; the library's by default.

    Returns:
        At least the library's floor, `[n]`; None where Q is no probability.
    """
    if not bool(((loss >= 0) & (loss <= 1)).all()):
        return None
    return RULES[rule](loss).clamp(min=FLOOR)


class System:
    """`(R^(1/2) K R^(1/2) + ridge)^-1` for every ridge.

    Args:
        kernel: inner products of training rows with all rows, `[n, n + m]`.
        weights: R, `[n]`; None for ones.
    """

    def __init__(self, kernel: Tensor, weights: Tensor | None = None) -> None:
        n = len(kernel)
        self.weights = torch.ones(n).double() if weights is None else weights.double()
        self.roots = self.weights.sqrt()[:, None]
        own = self.roots * kernel[:, :n].double() * self.roots.T
        self.unit = float(own.trace()) / n
        values, self.vectors = torch.linalg.eigh(own)
        self.values = values.clamp(min=0)
        self.right = self.vectors.T @ (self.roots * kernel[:, n:].double())

    def tau(self, ridge: float) -> Tensor:
        """Scores without loss weights.

        Args:
            ridge: in units of the mean squared row norm.

        Returns:
            `Phi (Phi^T R Phi + ridge)^-1 Phi_targets^T`, `[n, m]`.
        """
        scaled = self.right / (self.values + ridge * self.unit)[:, None]
        return (self.vectors @ scaled) / self.roots

    def leverage(self, ridge: float) -> Tensor:
        """How far each example determines its own output.

        Args:
            ridge: in units of the mean squared row norm.

        Returns:
            `h_ii = r_i phi_i^T (Phi^T R Phi + ridge)^-1 phi_i`, `[n]`.
        """
        return self.vectors.square() @ (self.values / (self.values + ridge * self.unit))


def leave_one_out_loss(loss: Tensor, leverage: Tensor, weights: Tensor) -> Tensor:
    """The loss weight of each example in a model that was trained without it.

    One Newton step takes the example's own part from its output: `f - a q / (1 - a r)`
    with `a = h / r`. For the squared loss, `q = y - f`, this is the exact `q / (1 - h)` of
    a ridge regression.

    Args:
        loss: Q, `[n]`.
        leverage: `h`, `[n]`.
        weights: `r`, `[n]`.

    Returns:
        `[n]`.
    """
    own = leverage / weights * loss / (1 - leverage).clamp(min=1e-6)
    if curvatures(loss) is None:
        return loss + own
    return torch.sigmoid(own - torch.logit(loss, eps=1e-12).neg())


@dataclass(frozen=True)
class Swept:
    """A sweep over ridges.

    Attributes:
        qualities: LDS at each of `RIDGES`.
        best: the ridge of the largest.
        scores: at that ridge, `[n, m]`.
    """

    qualities: list[float]
    best: float
    scores: NDArray[np.float64]

    @property
    def lds(self) -> float:
        """The largest LDS."""
        return max(self.qualities)


def quality(scores: Any, bank: Bank) -> float:
    """The LDS of scores.

    Args:
        scores: `[n, m]`.
        bank: ground truth.

    Returns:
        Mean over targets.
    """
    return float(lds(group_scores(scores, bank.masks), bank.outputs).mean())


def sweep(scores_at: Callable[[float], Tensor], bank: Bank) -> Swept:
    """Scores at the best ridge.

    Args:
        scores_at: ridge to scores.
        bank: ground truth.

    Returns:
        What was found.
    """
    qualities: list[float] = []
    best, kept = RIDGES[0], None
    for ridge in RIDGES:
        scores = scores_at(ridge).numpy()
        qualities.append(quality(scores, bank))
        if kept is None or qualities[-1] >= max(qualities):
            best, kept = ridge, scores
    assert kept is not None
    return Swept(qualities, best, kept)
