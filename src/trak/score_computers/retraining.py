"""Retraining without retraining: the linearized model, trained on halves of a sample.

With outputs linear in the features, `f = Phi w`, a model that is trained on some examples
by a regularized loss is a small convex problem in the kernel `Phi Phi^T`. What such models
answer for examples that were left out stands in for the outputs of retrained networks, by
which the linear datamodeling score (Park et al. 2023, Sec. 2) judges scores.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trak.score_computers.flow import Stopped, added_until

SUBSETS = 32
"""Halves that are trained on."""
_STEPS, _HALVINGS, _DOUBLINGS = 100, 20, 4  # Newton's method; shorter, longer steps of it
_CONVERGED = 0.03  # of an output; what is left to do then is about the square of that
_FAR = 0.3  # moves of an output that may be made longer
_LIFT = 4.0  # times what float32 rounds, to the diagonal
_BOX = 0.1  # how far beyond 0 and `1 / lambda` longer steps may take a dual
_ENOUGH, _UNSEEN = 1e-4, 1e-5  # of what a step promises, and of rounded sums
_LEAST = 1e-6  # curvature of an example that is fitted perfectly
_ROUNDING = 1e-6
_AMPLE = 1e-3  # ridges, in units of the mean diagonal, that hide what float32 rounds


@dataclass(frozen=True)
class Halves:
    """Linearized models that were trained on halves of some examples.

    Attributes:
        train: numbers of the examples that halves were drawn from, `[t]`.
        held: numbers of the others, `[h]`.
        masks: which of the former each half holds, `[subsets, t]`, 0 or 1.
        outputs: what its model answers for the latter, `[subsets, h]`.
        flowed: how many models, the last ones, were trained by a flow that was stopped.
        weight: how much these count, 0 to 1.
    """

    train: Tensor
    held: Tensor
    masks: Tensor
    outputs: Tensor
    flowed: int = 0
    weight: float = 0.0

    def agreement(self, predicted: Tensor) -> Tensor:
        """How well something predicts the outputs.

        Args:
            predicted: sums of scores over each half, `[..., subsets, h]`.

        Returns:
            Pearson correlation over halves whose models were trained alike, mean over the
            examples held out, `[...]`.
        """
        sizes = [len(self.masks) - self.flowed, self.flowed]
        parts = zip(predicted.split(sizes, dim=-2), self.outputs.split(sizes), strict=True)
        by_ridge, by_flow = (
            (_standard(part) * _standard(outputs)).sum(dim=-2).mean(dim=-1)
            for part, outputs in parts
        )
        return (1 - self.weight) * by_ridge + self.weight * by_flow


def retrained(
    kernel: Tensor,
    ridge: float,
    answers: Tensor | None = None,
    counts: Tensor | None = None,
    seed: int = 0,
    subsets: int = SUBSETS,
    stopped: Stopped | None = None,
) -> Halves:
    """Trains the linearized model on random halves of three quarters of the examples.

    With a ridge; the second half of the models by gradient flow from zero, without one, if
    it is known when to stop.

    Args:
        kernel: `Phi Phi^T`, `[n, n]`, float64.
        ridge: `lambda` of the objective, the sum of losses over a half plus
            `lambda / 2 |w|^2`.
        answers: of a regression with half the squared error as its loss, `[n]`. If None,
            the loss is logistic, `log(1 + exp(-f))`.
        counts: how much each example's loss counts, `[n]`; None if all count once.
        seed: of the halves.
        subsets: how many halves, at least 4.
        stopped: when flows end, and how much they count.

    Returns:
        The halves and what their models answer for the remaining quarter.
    """
    held, train, chosen = (
        part.to(kernel.device) for part in _divided(len(kernel), seed, subsets)
    )
    masks = kernel.new_zeros(subsets, len(train)).scatter_(1, chosen, 1.0)
    flowed = subsets // 2 if stopped is not None and stopped.weight > 0 else 0
    own = train[chosen[: subsets - flowed]]  # [subsets, half]
    duals = _duals(kernel, own, ridge, answers, counts)
    outputs = torch.einsum("hsi,si->sh", kernel[held][:, own], duals)
    if not flowed or stopped is None:
        return Halves(train, held, masks, outputs)
    others = _flowed(kernel, train, held, masks[-flowed:], counts, stopped.time)
    outputs = torch.cat([outputs, others])
    return Halves(train, held, masks, outputs, flowed, stopped.weight)


def trained_by_flow(
    kernel: Tensor, time: float, counts: Tensor, seed: int = 0, subsets: int = SUBSETS
) -> Halves:
    """Trains as `retrained` does, but without a ridge: all by gradient flow from zero.

    Args:
        kernel: `Phi Phi^T`, `[n, n]`, float64.
        time: how long.
        counts: how much each example's loss counts, `[n]`.
        seed: of the halves.
        subsets: how many halves.

    Returns:
        The halves and what their models answer for the remaining quarter.
    """
    held, train, chosen = (
        part.to(kernel.device) for part in _divided(len(kernel), seed, subsets)
    )
    masks = kernel.new_zeros(subsets, len(train)).scatter_(1, chosen, 1.0)
    return Halves(train, held, masks, _flowed(kernel, train, held, masks, counts, time))


def _divided(size: int, seed: int, subsets: int) -> tuple[Tensor, Tensor, Tensor]:
    # a quarter of the examples, the others, and places among these, [subsets, half]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator, device="cpu")
    held, train = order[: size // 4], order[size // 4 :]
    half = max(1, len(train) // 2)
    chosen = torch.stack([
        torch.randperm(len(train), generator=generator, device="cpu")[:half]
        for _ in range(subsets)
    ])
    return held, train, chosen


def _duals(
    kernel: Tensor,
    own: Tensor,
    ridge: float,
    answers: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    # of models that are trained with a ridge, [subsets, half]
    inside = kernel[own[:, :, None], own[:, None, :]]
    ridges = torch.full_like(inside[:, 0], ridge)
    if counts is not None:
        ridges /= counts.to(ridges)[own]  # an example that counts twice has half of it
    if answers is None:
        return _logistic(*_rounded(_lifted(inside), ridges)).to(kernel.dtype)
    return _solve(inside, ridges, answers[own])


def _flowed(
    kernel: Tensor,
    train: Tensor,
    held: Tensor,
    masks: Tensor,
    counts: Tensor | None,
    time: float,
) -> Tensor:
    # what models of all halves answer for the examples held out, [subsets, h]
    strong = masks if counts is None else masks * counts.to(masks)[train]
    strong, own = strong.T.float(), kernel[:, train].float()
    known = own[train]
    added = added_until(lambda a: known @ (strong * a), strong, time)
    return (own[held] @ (strong * added)).T.to(kernel)


def _lifted(kernels: Tensor) -> Tensor:
    # eigenvalues that should be 0 and were rounded to less, along which the objective would
    # fall without end: what float32 rounds of a matrix grows by the root of its size
    lift = _LIFT * torch.finfo(torch.float32).eps * kernels.shape[1] ** 0.5
    units = kernels.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    kernels.diagonal(dim1=1, dim2=2).add_(lift * units)
    return kernels


def _rounded(kernels: Tensor, ridges: Tensor) -> tuple[Tensor, Tensor]:
    # many small systems take half of the time in float32
    unit = kernels.diagonal(dim1=1, dim2=2).mean()
    if not bool(ridges.min() >= _AMPLE * unit):
        return kernels, ridges
    return kernels.float(), ridges.float()


def _logistic(kernels: Tensor, ridges: Tensor) -> Tensor:
    # those that have converged are left out of further steps
    found = torch.zeros_like(kernels[:, 0])
    places = torch.arange(len(kernels), device=kernels.device)
    duals = outputs = found
    for _ in range(_STEPS):
        duals, outputs, farthest = _stepped(kernels, ridges, duals, outputs)
        done = farthest < _CONVERGED
        if not bool(done.any()):
            continue
        found[places[done]] = duals[done]
        parts = (places, kernels, ridges, duals, outputs)
        places, kernels, ridges, duals, outputs = (part[~done] for part in parts)
        if not len(places):
            return found
    found[places] = duals
    return found


def _stepped(
    kernels: Tensor, ridges: Tensor, duals: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of Newton's method in the dual, along a line that is searched.

    `(K + ridge / c) duals = f + q / c` with `c = q (1 - q)`. A step is cut in half until
    the objective falls, by Armijo's rule (Nocedal and Wright 2006, Sec. 3.1). Such steps
    hardly raise outputs by more than 2, however far away these lie; so where they move far,
    the step is doubled as long as the objective falls further.

    Args:
        kernels: `[b, n, n]`.
        ridges: `[b, n]`.
        duals: `[b, n]`.
        outputs: `K duals`, `[b, n]`.

    Returns:
        Duals and outputs afterwards, and how far an output moved, or would have moved in a
        whole step, `[b]`.
    """
    weights = torch.sigmoid(-outputs)
    curvature = (weights * (1 - weights)).clamp(min=_LEAST)
    wanted = _solve(kernels, ridges / curvature, outputs + weights / curvature) - duals
    moves = (kernels @ wanted[..., None])[..., 0]
    farthest = moves.abs().amax(dim=1)

    def reached(share: Tensor) -> Tensor:
        moved = duals + share[:, None] * wanted, outputs + share[:, None] * moves
        return _objective(ridges, *moved)

    def within(share: Tensor) -> Tensor:
        loss = ridges * (duals + share[:, None] * wanted)
        return ((loss > -_BOX) & (loss < 1 + _BOX)).all(dim=1)

    before = _objective(ridges, duals, outputs)
    share = _doubled(reached, within, farthest)
    promised = _ENOUGH * ((duals - weights / ridges) * moves).sum(dim=1)
    least = before + _UNSEEN * before.abs()
    for _ in range(_HALVINGS):
        enough = reached(share) <= least + share * promised
        if bool(enough.all()):
            break
        share = torch.where(enough, share, share / 2)
    along = share[:, None]
    return duals + along * wanted, outputs + along * moves, farthest


def _doubled(
    reached: Callable[[Tensor], Tensor],
    within: Callable[[Tensor], Tensor],
    farthest: Tensor,
) -> Tensor:
    # how many times a step is made, at least once; not beyond what duals can be, where
    # objectives of rounded kernels fall without end
    share, longer = torch.ones_like(farthest), farthest > _FAR
    if not bool(longer.any()):
        return share
    value = reached(share)
    for _ in range(_DOUBLINGS):
        further = reached(2 * share)
        longer = longer & (further < value) & within(2 * share)
        if not bool(longer.any()):
            break
        share = torch.where(longer, 2 * share, share)
        value = torch.where(longer, further, value)
    return share


def _objective(ridges: Tensor, duals: Tensor, outputs: Tensor) -> Tensor:
    # losses plus `lambda / 2 |w|^2`, divided by lambda, [b]
    losses = torch.nn.functional.softplus(-outputs)
    return (losses / ridges + duals * outputs / 2).sum(dim=1)


def _solve(kernels: Tensor, diagonals: Tensor, right: Tensor) -> Tensor:
    # by Cholesky: torch runs batches of LU in threads, which some LAPACKs do not survive
    systems = kernels.clone()
    systems.diagonal(dim1=1, dim2=2).add_(diagonals)
    lower, failed = torch.linalg.cholesky_ex(systems)
    if int(failed.max()):  # rounding, where the ridge is tiny
        least = _ROUNDING * kernels.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
        systems.diagonal(dim1=1, dim2=2).add_(least)
        lower = torch.linalg.cholesky(systems)
    return torch.cholesky_solve(right[..., None], lower)[..., 0]


def _standard(values: Tensor) -> Tensor:
    # columns of mean 0 and length 1; constant ones are 0
    centred = values - values.mean(dim=-2, keepdim=True)
    lengths = centred.norm(dim=-2, keepdim=True)
    return centred / torch.where(lengths > 0, lengths, torch.inf)
