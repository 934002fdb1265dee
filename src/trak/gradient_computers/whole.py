"""A plan against one ordinary backward pass over more samples than it was found on.

Two samples cannot show everything: a model that sorts its samples leaves two that are in
order where they are, and a layer that is called with some samples only may meet the first
of these later. So sums of per-sample gradients, with random weights, are compared with the
gradient of the same sum of outputs, which nobody has to take apart. Weights that differ
from sample to sample show any exchange; signs would hide those between equal ones.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from trak.batches import Batch, batch_size, select
from trak.blocks import Block, DenseBlock
from trak.errors import AttributionError
from trak.gradient_computers.capture import HALVES, asking
from trak.gradient_computers.lengths import Shapes
from trak.gradient_computers.memory import is_out_of_memory
from trak.gradient_computers.plan import EXACT, Anatomy, Plan
from trak.gradient_computers.sweep import Sweep
from trak.precision import without_autocast

_TOLERANCES = {torch.float64: (1e-6, 1e-10), torch.float32: (1e-2, 1e-5)}
_COARSE = (0.2, 1e-2)  # half precision, and autocast


def spread(batch: Batch, most: int) -> Batch:
    """Some samples from all over a batch.

    Args:
        batch: a batch.
        most: how many at most.

    Returns:
        These, in order.
    """
    size = batch_size(batch)
    if size <= most:
        return batch
    return select(batch, [j * size // most for j in range(most)])


def disagreeing(
    anatomy: Anatomy,
    plan: Plan,
    outputs: Callable[[Batch], Tensor],
    samples: Batch,
    sketch: Callable[[Block], Tensor],
    *,
    keep_copies: bool,
    alone: Shapes | None,
) -> set[str]:
    """Looks for parameters whose per-sample gradients do not add up.

    Args:
        anatomy: the model's parameters.
        plan: name to way.
        outputs: runs the model on a batch, `[b]`.
        samples: a batch.
        sketch: makes the gradients of a block small, in a linear way.
        keep_copies: copy layer inputs.
        alone: the lengths that one sample gives.

    Returns:
        Their names; empty where gradients are not finite.
    """
    settings: Any = {"keep_copies": keep_copies, "strict": False, "alone": alone}
    found = _swept(anatomy, plan, outputs, samples, sketch, settings)
    if found is None:  # as for the batch itself, where a parameter cannot be given out
        plan = {n: EXACT if way.changes_shapes else way for n, way in plan.items()}
        found = _swept(anatomy, plan, outputs, samples, sketch, settings)
    if found is None:
        return set()
    rows, sweep = found
    by_rule = {n for n, way in plan.items() if way.kind not in {"exact", "unseen"}}
    names = [n for n in anatomy.parameters if n in by_rule - sweep.refused]
    weights = random_weights(batch_size(samples))
    exact = summed(anatomy, names, lambda: outputs(samples), weights)
    if exact is None:
        return set()
    sizes = {n: float(r.double().square().sum().sqrt()) for n, r in rows.items()}
    largest = max(sizes.values(), default=0.0)
    coarse = sweep.tape.met_halves
    wrong: set[str] = set()
    for name in names:
        gradient = torch.zeros_like(anatomy.parameters[name])
        if (known := exact[name]) is not None:
            gradient = known.to_dense()
        wanted = sketch(DenseBlock(name, gradient.reshape(1, -1)))[0].double()
        added = torch.zeros_like(wanted)
        if name in rows:
            added = weights.to(wanted.device) @ rows[name].double()
        half = coarse or gradient.dtype in HALVES
        relative, floor = _COARSE if half else _TOLERANCES.get(gradient.dtype, _COARSE)
        own = max(sizes.get(name, 0.0), float(wanted.norm()))
        error = float((added - wanted).norm())
        if math.isfinite(error) and error > relative * own + floor * largest:
            wrong.add(name)
    return wrong


def reached(
    anatomy: Anatomy, names: Iterable[str], outputs: Callable[[], Tensor], size: int
) -> set[str]:
    """Tells gradients that are zero from those that cancel, as two labels' biases do.

    Args:
        anatomy: the model's parameters.
        names: parameters whose gradients of a batch add up to zero.
        outputs: runs the model on the batch, `[b]`.
        size: of the batch, `b`.

    Returns:
        The names with a gradient in some sample; all of them where torch cannot tell.
    """
    asked = sorted(names)
    if size < 2 or not asked:
        return set()
    found = summed(anatomy, asked, outputs, random_weights(size))
    if found is None:
        return set(asked)
    return {n for n, g in found.items() if g is not None and bool(g.to_dense().any())}


def _swept(
    anatomy: Anatomy,
    plan: Plan,
    outputs: Callable[[Batch], Tensor],
    samples: Batch,
    sketch: Callable[[Block], Tensor],
    settings: Any,
) -> tuple[dict[str, Tensor], Sweep] | None:
    # sketches of what the plan gives; None if the model fails under it
    rows: dict[str, Tensor] = {}

    def keep(block: Block) -> None:
        found = sketch(block)
        known = rows.get(block.name)
        rows[block.name] = found if known is None else known + found

    sweep = Sweep(anatomy, plan, batch_size(samples), keep, **settings)
    try:
        sweep.run(lambda: outputs(samples))
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, AttributionError) or is_out_of_memory(error):
            raise
        return None
    return rows, sweep


def random_weights(size: int) -> Tensor:
    """Draws weights that no two samples' gradients cancel under.

    Args:
        size: of the batch, `b`.

    Returns:
        The same ones every time, `[b]`, float64.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator, device="cpu").double()


def summed(
    anatomy: Anatomy, names: list[str], outputs: Callable[[], Tensor], weights: Tensor
) -> dict[str, Tensor | None] | None:
    """The gradient of a weighted sum of outputs, by one ordinary backward pass.

    Args:
        anatomy: the model's parameters.
        names: those that are wanted.
        outputs: runs the model, `[b]`.
        weights: of the outputs, `[b]`.

    Returns:
        Name to gradient, None where it is not reached; None if torch cannot compute it.

    Raises:
        RuntimeError: if memory runs out.
    """
    chosen = [anatomy.parameters[name] for name in names]
    if not chosen:
        return {}
    with torch.enable_grad(), asking(anatomy.model.parameters(), chosen):
        total = outputs()
        total = (total * weights.to(total)).sum()
        if not total.requires_grad:
            return dict.fromkeys(names)
        try:
            with without_autocast():
                found = torch.autograd.grad(total, chosen, allow_unused=True)
        except RuntimeError as error:  # as where a layer's input is changed in place
            if is_out_of_memory(error):
                raise
            return None
    return dict(zip(names, found, strict=True))
