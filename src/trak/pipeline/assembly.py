"""Makes the parts that the facade hands to each other."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from trak.gradient_computers import AbstractGradientComputer, choose_computer
from trak.pipeline.choices import float_dtype
from trak.pipeline.describe import describe_run, store_metadata
from trak.pipeline.kept_outputs import OutputKeeper
from trak.pipeline.kernel import KernelMaker
from trak.pipeline.lengths import Trimmer
from trak.pipeline.losses import LossWatch
from trak.pipeline.pipeline import Pipeline
from trak.pipeline.project import RowMaker, by_blocks
from trak.pipeline.sampled import SamplingMaker
from trak.pipeline.whiten import Whitener
from trak.projectors import (
    AbstractProjector,
    KernelProjector,
    LeadingProjector,
    NoOpProjector,
    make_projector,
)
from trak.projectors.choice import projection_costs
from trak.savers import AbstractSaver, MmapSaver
from trak.score_computers import AbstractScoreComputer, RidgeScoreComputer
from trak.score_computers.ridge_sample import drawn
from trak.settings import RunSettings

WIDE = 2048
"""Columns of the wide rows that a ridge of narrow ones is told from."""
_NARROW = 4  # times as wide as the rows, at least
_WIDE_SEED = 104_729  # of no relation to the rows' own
_WIDEST_SKETCH = 65_536  # numbers of one example


class Parts(Protocol):
    """The attributes of a `TRAKer` that a pipeline is made of."""

    model: nn.Module
    task: Any
    train_set_size: int
    device: torch.device
    dtype: torch.dtype
    gradient_computer: AbstractGradientComputer
    projector: AbstractProjector
    proj_dim: int
    score_computer: AbstractScoreComputer
    save_dir: Path
    saver: AbstractSaver
    whitening: float


def make_computer(
    given: Any, parts: Parts, chosen: Mapping[str, nn.Parameter]
) -> AbstractGradientComputer:
    """Makes the gradient computer.

    Args:
        given: a class, or None for the fastest that the task allows.
        parts: what the run is made of, of which model, task, dtype and device are used.
        chosen: the selected parameters by name.

    Returns:
        An instance.
    """
    trainable = {n for n, p in parts.model.named_parameters() if p.requires_grad}
    everything = len(chosen) == sum(1 for _ in parts.model.parameters())
    make: Any = given or choose_computer(parts.task)
    return make(
        model=parts.model,
        task=parts.task,
        grad_dim=sum(p.numel() for p in chosen.values()),
        dtype=float_dtype(parts.dtype),
        device=parts.device,
        grad_wrt=None if everything and trainable == {*chosen} else list(chosen),
    )


def make_saver(
    given: Any, parts: Parts, layout: Mapping[str, int], **options: Any
) -> AbstractSaver:
    """Opens or creates the store.

    Args:
        given: a class, or None for `MmapSaver`.
        parts: what the run is made of, but for the store itself.
        layout: name to number of scalars of the selected parameters.
        options: handed to the class.

    Returns:
        An instance.
    """
    make: Any = given or MmapSaver
    return make(
        save_dir=parts.save_dir,
        metadata=store_metadata(_settings(parts, layout)),
        train_set_size=parts.train_set_size,
        proj_dim=parts.proj_dim,
        **options,
    )


def make_pipeline(
    parts: Parts, shapes: Mapping[str, tuple[int, ...]], *, examples_are_checked: bool
) -> Pipeline:
    """Wires the parts together.

    Args:
        parts: what the run is made of.
        shapes: name to shape of the selected parameters.
        examples_are_checked: refuse other examples in rows seen before.

    Returns:
        The pipeline.
    """
    layout = {name: math.prod(shape) for name, shape in shapes.items()}
    maker = _make_maker(parts, layout, shapes)
    whitener = Whitener(
        maker=maker,
        saver=parts.saver,
        shapes=shapes,
        strength=parts.whitening,
        dtype=torch.promote_types(float_dtype(parts.dtype), torch.float32),
        sketch=_make_sketch(parts, shapes) if parts.whitening else NoOpProjector(),
    )
    return Pipeline(
        model=parts.model,
        task=parts.task,
        maker=maker,
        saver=parts.saver,
        scorer=parts.score_computer,
        whitener=whitener,
        settings=lambda: _settings(parts, layout),
        dtype=parts.dtype,
        examples_are_checked=examples_are_checked,
    )


def _make_maker(
    parts: Parts,
    layout: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
) -> RowMaker:
    common: dict[str, Any] = {
        "model": parts.model,
        "computer": parts.gradient_computer,
        "projector": parts.projector,
        "layout": layout,
        "scale": math.sqrt(sum(layout.values())),
        "device": parts.device,
        "losses": LossWatch(
            task=parts.task,
            computer=parts.gradient_computer,
            saver=parts.saver,
            keeper=OutputKeeper(
                computer=parts.gradient_computer,
                saver=parts.saver,
                count=parts.train_set_size,
            ),
        ),
        "trimmer": Trimmer(parts.model, parts.gradient_computer.modelout_fn, (*layout,)),
    }
    if isinstance(parts.projector, KernelProjector):
        return KernelMaker(**common, saver=parts.saver, dtype=parts.dtype)
    if _are_narrow(parts, layout):
        sample = drawn(parts.train_set_size)
        sketch = _whole_or_sketched(shapes, WIDE, WIDE, _WIDE_SEED, parts.device)
        return SamplingMaker(**common, saver=parts.saver, sketch=sketch, sample=sample)
    return RowMaker(**common)


def _are_narrow(parts: Parts, layout: Mapping[str, int]) -> bool:
    # the ridge of narrow random rows asks for wider ones; whitened rows have others
    columns = parts.projector.random_dim
    wide = min(WIDE, sum(layout.values()))
    automatic = isinstance(parts.score_computer, RidgeScoreComputer)
    return (
        automatic
        and not parts.whitening
        and bool(columns)
        and by_blocks(parts.projector)
        and _NARROW * columns <= wide
    )


def _whole_or_sketched(
    shapes: Mapping[str, Sequence[int]],
    whole_up_to: int,
    columns: int,
    seed: int,
    device: torch.device,
) -> AbstractProjector:
    # gradients as they are where they are short, else the cheapest projection
    if sum(math.prod(shape) for shape in shapes.values()) <= whole_up_to:
        return NoOpProjector(device=device)
    costs = projection_costs(shapes, columns)
    kind = min(costs, key=lambda name: costs[name])
    return make_projector(shapes, columns, seed, device, kind)


def _make_sketch(parts: Parts, shapes: Mapping[str, Sequence[int]]) -> AbstractProjector:
    # of unwhitened rows: the rows' own projection, where it takes blocks and is narrow
    leading = isinstance(parts.projector, LeadingProjector)
    if by_blocks(parts.projector) and not leading and parts.proj_dim <= _WIDEST_SKETCH:
        return parts.projector
    return _whole_or_sketched(shapes, _WIDEST_SKETCH, WIDE, 0, parts.device)


def _settings(parts: Parts, layout: Mapping[str, int]) -> RunSettings:
    return describe_run(
        model=parts.model,
        task=parts.task,
        layout=layout,
        projector=parts.projector,
        proj_dim=parts.proj_dim,
        train_set_size=parts.train_set_size,
        dtype=parts.dtype,
        whitening=parts.whitening,
    )
