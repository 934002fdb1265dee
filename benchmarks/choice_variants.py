"""The choices of TRAK as options of one function of kernels and loss weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.systems import (
    RULES,
    Checkpoint,
    Gradients,
    System,
    curvatures,
    kernel_of,
    leave_one_out_loss,
)
from trak.encodings import ENCODINGS
from trak.projectors import make_projector

DTYPES = ("float32", "float16", "bfloat16", "int8")
EXACT_UP_TO = 50_000  # parameters whose rows are stored unprojected in the dtype group
PROJECTED = 4096  # columns otherwise
ALL = "all"


@dataclass(frozen=True)
class Choice:
    """One way to compute scores; the defaults are the library's.

    Attributes:
        kernel: which rows, a name of `kernels` or `reshaped`.
        q: loss weights: `"mean"` over checkpoints apart from the rest, `"own"` of each
            checkpoint, or `"none"`.
        power: of the loss weights, where they are probabilities.
        average: over checkpoints: `"mean"` or `"median"` of scores; `"kernels"` averages
            the kernels before the solve, `"equal kernels"` after giving each the same
            mean squared row norm.
        leave_out: divide scores by `1 - h`.
        corrected: loss weights of leave-one-out outputs.
        curved_by_corrected: and R from them.
        targets: gradients of the targets' `"margin"`, of their `"loss"`, or margins of
            `"unit"` norm.
        weights: R, one of `benchmarks.systems.RULES`; empty for that of the setting.
        against: the choice that this one is compared with.
        group: heading of the table.
    """

    kernel: str = ALL
    q: str = "mean"
    power: float = 1.0
    average: str = "mean"
    leave_out: bool = False
    corrected: bool = False
    curved_by_corrected: bool = False
    targets: str = "margin"
    weights: str = ""
    against: str = "default"
    group: str = ""


def _choices() -> dict[str, Choice]:
    leverage, average = "Leverage and Q", "Checkpoints and Q"
    rows, layers, stored = "Rows", "Layers", "Storage"
    listed = {
        "default": Choice(),
        "scores / (1 - h)": Choice(leave_out=True, group=leverage),
        "Q of leave-one-out outputs": Choice(corrected=True, group=leverage),
        "both": Choice(leave_out=True, corrected=True, group=leverage),
        "both, R of leave-one-out outputs too": Choice(
            leave_out=True, corrected=True, curved_by_corrected=True, group=leverage
        ),
        "Q and R of leave-one-out outputs": Choice(
            corrected=True, curved_by_corrected=True, group=leverage
        ),
        "no Q": Choice(q="none", group=leverage),
        "Q to the power of 3/4": Choice(power=0.75, group=leverage),
        "Q to the power of 1/2": Choice(power=0.5, group=leverage),
        "Q to the power of 1/4": Choice(power=0.25, group=leverage),
        "each score with its own Q": Choice(q="own", group=average),
        "median of scores": Choice(average="median", group=average),
        "median, each with its own Q": Choice(average="median", q="own", group=average),
        "mean of kernels": Choice(average="kernels", group=average),
        "mean of kernels of equal norm": Choice(average="equal kernels", group=average),
        "targets of unit norm": Choice(targets="unit", group=rows),
        "targets' loss instead of margin": Choice(targets="loss", group=rows),
        "layers of equal norm": Choice(kernel="layers", group=layers),
        "layers half way to equal norm": Choice(kernel="half layers", group=layers),
        "without biases": Choice(kernel="no biases", group=layers),
        "without normalization layers": Choice(kernel="no norms", group=layers),
        "weight matrices only": Choice(kernel="matrices", group=layers),
    }
    shapes = {
        "training rows centred": "centred",
        "training rows and targets centred": "centred both",
        "training rows of unit norm": "unit",
        "Gram matrix of unit rows": "unit gram",
    }
    for name, kernel in shapes.items():
        listed[name] = Choice(kernel=kernel, group=rows)
    for rule in RULES:
        listed[f"R = {rule}"] = Choice(weights=rule, group="Curvature")
    listed["training rows and targets of unit norm"] = Choice(
        kernel="unit", targets="unit", group=rows
    )
    listed["rows in float32"] = Choice(kernel="float32", group=stored)
    for dtype in DTYPES[1:]:
        listed[f"rows in {dtype}"] = Choice(
            kernel=dtype, against="rows in float32", group=stored
        )
    return listed


CHOICES = _choices()


def kernels(
    found: Checkpoint, gradients: Gradients, norm_layers: frozenset[str]
) -> dict[str, Tensor]:
    """Kernels of the ways to choose, weigh and store the columns.

    Args:
        found: the checkpoint.
        gradients: its gradients, or whitened ones.
        norm_layers: names of modules that normalize.

    Returns:
        Name to `[n, n + m]`.
    """
    n = found.n
    by_layer: dict[str, Tensor] = {}
    biases, norms, matrices = (torch.zeros(()) for _ in range(3))
    for name, rows in gradients.items():
        own = kernel_of([rows], n)
        layer, _, kind = name.rpartition(".")
        by_layer[layer] = by_layer.get(layer, torch.zeros(())) + own
        if kind == "bias":
            biases = biases + own
        if layer in norm_layers:
            norms = norms + own
        if len(found.shapes[name]) > 1:
            matrices = matrices + own
    total = torch.stack(list(by_layer.values())).sum(0)
    sizes = {layer: own[:, :n].trace() for layer, own in by_layer.items()}
    made = {ALL: total, "no biases": total - biases}
    for key, power in (("layers", 1.0), ("half layers", 0.5)):
        scaled = [own / sizes[j] ** power for j, own in by_layer.items() if sizes[j]]
        made[key] = torch.stack(scaled).sum(0)
    if norms.ndim:
        made |= {"no norms": total - norms, "matrices": matrices}
    return made | stored_kernels(found, gradients)


def stored_kernels(found: Checkpoint, gradients: Gradients) -> dict[str, Tensor]:
    """Kernels of rows that were stored in each dtype.

    Args:
        found: the checkpoint.
        gradients: its gradients, or whitened ones.

    Returns:
        Dtype to `[n, n + m]`.
    """
    width = sum(rows.shape[1] for rows in gradients.values())
    if width <= EXACT_UP_TO:
        rows = torch.cat(list(gradients.values()), dim=1)
    else:
        device = torch.device("cpu")
        projector = make_projector(found.shapes, PROJECTED, 0, device)
        rows = projector.project(gradients, model_id=found.model_id)
    rows = rows / math.sqrt(width)
    made = {}
    for dtype in DTYPES:
        encoding = ENCODINGS[dtype]
        kept = encoding.decode(*encoding.encode(rows), torch.float32)
        made[dtype] = kernel_of([kept], found.n)
    return made


def reshaped(kernel: Tensor, name: str) -> Tensor:
    """Kernels of rows that were centred or normalized.

    Args:
        kernel: `[n, n + m]`.
        name: what to do; others leave the kernel alone.

    Returns:
        `[n, n + m]`.
    """
    n = len(kernel)
    if name == "centred":
        mean = kernel.mean(dim=0, keepdim=True)
        changed = kernel - mean
        changed[:, :n] -= changed[:, :n].mean(dim=1, keepdim=True)
        return changed
    if name == "centred both":
        changed = kernel - kernel[:, :n].mean(dim=1, keepdim=True)
        return changed - changed.mean(dim=0, keepdim=True)
    if name == "unit":
        scale = _inverse_norms(kernel)
        changed = kernel * scale[:, None]
        changed[:, :n] *= scale
        return changed
    return kernel


def _inverse_norms(kernel: Tensor) -> Tensor:
    return kernel[:, : len(kernel)].diagonal().clamp(min=1e-20).rsqrt()


class Part:
    """One checkpoint as the choices see it.

    Args:
        made: kernels by name.
        loss: Q of training examples and targets, `[n + m]`.
        sizes: squared norms of the targets' rows, `[m]`.
        curvature: weigh rows by it.
    """

    def __init__(
        self, made: Mapping[str, Tensor], loss: Tensor, sizes: Tensor, *, curvature: bool
    ) -> None:
        self.made = dict(made)
        self.n = len(made[ALL])
        self.loss, self.target_loss = loss[: self.n], loss[self.n :]
        self.sizes = sizes
        self.curvature = curvature
        self.systems: dict[tuple[str, str], System] = {}
        self.corrected: dict[tuple[str, float], System] = {}

    @cached_property
    def weights(self) -> Tensor | None:
        """R, or None for ones."""
        return curvatures(self.loss) if self.curvature else None

    def kernel(self, name: str) -> Tensor:
        """A kernel by the name that `Choice` has.

        Args:
            name: of the kernel.

        Returns:
            `[n, n + m]`.
        """
        return self.made[name] if name in self.made else reshaped(self.made[ALL], name)

    def system(self, name: str, rule: str = "") -> System:
        """The system of a kernel.

        Args:
            name: of the kernel.
            rule: of its weights; empty for those of the setting.

        Returns:
            The same one every time.
        """
        if (name, rule) not in self.systems:
            kernel, weights = self.kernel(name), self.weights
            if rule:
                weights = curvatures(self.loss, rule)
            if name == "unit gram":
                inverse = _inverse_norms(kernel).double().square()
                weights = inverse if weights is None else inverse * weights
            self.systems[name, rule] = System(kernel, weights)
        return self.systems[name, rule]

    def corrected_system(self, name: str, ridge: float) -> System:
        """The system with R of leave-one-out outputs.

        Args:
            name: of the kernel.
            ridge: at which outputs are corrected.

        Returns:
            The system.
        """
        key = (name, ridge)
        if key not in self.corrected:
            first = self.system(name)
            loss = leave_one_out_loss(self.loss, first.leverage(ridge), first.weights)
            self.corrected[key] = System(self.kernel(name), curvatures(loss))
        return self.corrected[key]


def merged(parts: Sequence[Part], *, equal: bool) -> Part:
    """The mean of kernels as one part, with the mean loss weights.

    Args:
        parts: the checkpoints.
        equal: give each kernel the same mean squared row norm first.

    Returns:
        The part.
    """
    scales = [
        1 / float(part.made[ALL].diagonal().sum()) if equal else 1.0 for part in parts
    ]
    total = sum(s * p.made[ALL].double() for s, p in zip(scales, parts, strict=True))
    loss = torch.stack([torch.cat([p.loss, p.target_loss]) for p in parts]).mean(0)
    sizes = torch.stack([part.sizes for part in parts]).mean(0)
    return Part({ALL: torch.as_tensor(total)}, loss, sizes, curvature=parts[0].curvature)


def scores(choice: Choice, parts: Sequence[Part], ridge: float) -> Tensor:
    """Scores of several checkpoints.

    Args:
        choice: how; one whose `average` is of kernels wants `merged` parts.
        parts: the checkpoints.
        ridge: in units of each system's mean squared row norm.

    Returns:
        `[n, m]`.
    """
    taus, losses = [], []
    for part in parts:
        system = part.system(choice.kernel, choice.weights)
        loss = part.loss
        if choice.corrected:
            loss = leave_one_out_loss(loss, system.leverage(ridge), system.weights)
        if choice.curved_by_corrected and part.weights is not None:
            system = part.corrected_system(choice.kernel, ridge)
        tau = system.tau(ridge)
        if choice.leave_out:
            tau = tau / (1 - system.leverage(ridge)).clamp(min=1e-6)[:, None]
        if choice.targets == "loss":
            tau = tau * part.target_loss
        if choice.targets == "unit":
            tau = tau * part.sizes.clamp(min=1e-20).rsqrt()
        taus.append(tau)
        flat = torch.ones_like(loss) if choice.q == "none" else loss
        losses.append(flat if choice.power == 1 else flat**choice.power)
    stacked, weights = torch.stack(taus), torch.stack(losses)[:, :, None]
    if choice.q == "own":
        stacked, weights = stacked * weights, torch.ones_like(weights)
    if choice.average == "median":
        return stacked.quantile(0.5, dim=0) * weights.mean(0)
    return stacked.mean(0) * weights.mean(0)


def without_changes(choice: Choice) -> Choice:
    """The choice that a part of merged kernels is asked for.

    Args:
        choice: one of `CHOICES`.

    Returns:
        The same, averaging over what it is given.
    """
    return replace(choice, average="mean")
