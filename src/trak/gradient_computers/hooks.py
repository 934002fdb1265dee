"""Per-sample gradients from one batched forward and one activation-only backward pass."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import Batch, batch_size, normalize, select
from trak.blocks import Block, Sink
from trak.errors import AttributionError, InputError, PhaseError, UnsupportedModuleError
from trak.gradient_computers.abstract import (
    AbstractGradientComputer,
    SelectingGradientComputer,
)
from trak.gradient_computers.capture import InputChangedError
from trak.gradient_computers.coverage import Coverage, cover
from trak.gradient_computers.echo import Echo
from trak.gradient_computers.functional import FunctionalGradientComputer
from trak.gradient_computers.memory import is_out_of_memory
from trak.gradient_computers.plan import EXACT, Anatomy, Plan
from trak.gradient_computers.surroundings import forget_kept, undisturbed, without_graph
from trak.gradient_computers.sweep import Sweep
from trak.gradient_computers.trial import Rows
from trak.gradient_computers.ways import Findings, Ways, different_samples
from trak.gradient_computers.whole import reached
from trak.modelout_functions import batch_output_function
from trak.modelout_functions.margin import OwnTensors

logger = logging.getLogger(__name__)


class HookGradientComputer(SelectingGradientComputer):
    """Gradients layer by layer, while the backward pass runs.

    Needs a task with a batched output (all built-in ones). Layers with a rule emit their
    blocks and are forgotten; weight gradients are never formed. Parameters outside such
    layers are followed where they are handed to `linear` or `embedding`, or given out once
    a sample. What is left is computed exactly by `FunctionalGradientComputer`; a log line
    names its share, and `coverage()` tells it.

    With every new set of weights a few samples are computed by both ways, and a parameter
    on which they differ is left to the exact one. So a layer whose weight is also used
    elsewhere, or a model that mixes samples, costs time and not correctness. (The loss
    weights Q of a model that mixes samples are those of the batch at hand.) The same holds
    for layers that are called with some of the samples or tokens only, such as experts.

    `run` may raise after the sink received blocks; these are void then.

    Arguments as for `SelectingGradientComputer`.

    Args:
        fallback: compute exactly what the rules do not cover; an error if False.

    Attributes:
        known: digest of weights to ways that were found with them.

    Raises:
        InputError: if the task has no batched output.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        grad_dim: int | None = None,
        dtype: torch.dtype | None = torch.float16,
        device: str | torch.device | None = None,
        grad_wrt: Iterable[str] | None = None,
        *,
        fallback: bool = True,
    ) -> None:
        self.known: dict[str, Ways] = {}
        super().__init__(model, task, grad_dim, dtype, device, grad_wrt)
        self._fallback = fallback
        if batch_output_function(self.modelout_fn) is None:
            raise InputError(
                f"{type(self.modelout_fn).__name__} has no get_batch_output(model, batch) "
                "that returns one output a sample. Define it beside get_output, or use "
                "FunctionalGradientComputer."
            )

    def load_model_params(self, model: nn.Module) -> None:
        """Takes over the model's present weights.

        Args:
            model: the model.
        """
        self.model = model
        forget_kept(model)
        self._anatomy = Anatomy(model, self.selected)
        self._ways = self._going_on(Findings())
        self._exact: dict[tuple[str, ...], FunctionalGradientComputer] = {}
        self._told: set[str] = set()
        self._echo = Echo()
        self._coverage: Coverage | None = None

    def recall(self, weights: str) -> None:
        """Goes on with the ways that were found when these weights were loaded before.

        They are compared with an ordinary backward pass all the same, on the next batch.

        Args:
            weights: a digest of those that were loaded just now.
        """
        own = self._anatomy
        self.known = {d: w for d, w in self.known.items() if w.anatomy.is_like(own)}
        if weights in self.known:
            self._ways = self._going_on(self.known[weights].found)
        self.known[weights] = self._ways

    def _going_on(self, found: Findings) -> Ways:
        return Ways(self._anatomy, self._outputs, self._exact_rows, found)

    def learn_from(self, other: AbstractGradientComputer) -> None:
        """Takes over the ways that another one found, for `recall`.

        Args:
            other: of the same model and task.
        """
        if isinstance(other, HookGradientComputer):
            self.known.update(other.known)

    def compute_per_sample_grad(self, batch: Any) -> dict[str, Tensor]:
        """Computes df(z_i)/dtheta for every sample of a batch, multiplied out.

        Args:
            batch: tuple or dict of tensors whose first axis is the sample axis.

        Returns:
            Name of each selected parameter to its gradients, `[b, *parameter.shape]`.
        """
        normal = normalize(batch)
        rows = self._collect(normal)
        size = batch_size(normal)
        parameters = self._anatomy.parameters
        return {
            name: rows[name].reshape(size, *p.shape)
            if name in rows
            else p.detach().new_zeros(size, *p.shape)
            for name, p in parameters.items()
        }

    def copy_inputs(self) -> bool:
        """Copies layer inputs from now on, for models that change them in place.

        Returns:
            False if they are copied already.
        """
        before, self._ways.found.keep_copies = self._ways.found.keep_copies, True
        return not before

    def _collect(self, batch: Batch) -> Rows:
        try:
            return self._collect_once(batch)
        except InputChangedError as error:
            if not self.copy_inputs():
                raise
            logger.info("%s Inputs are copied, which takes memory.", error)
            return self._collect_once(batch)

    def _collect_once(self, batch: Batch) -> Rows:
        rows: Rows = {}

        def add(block: Block) -> None:
            gradient = block.dense().gradient
            known = rows.get(block.name)
            rows[block.name] = gradient if known is None else known + gradient

        self.run(batch, add, {})
        return rows

    def compute_loss_grad(self, batch: Any) -> Tensor:
        """Computes the loss weight Q of every sample of a batch.

        Args:
            batch: tuple or dict of tensors whose first axis is the sample axis.

        Returns:
            `[b]` or `[b, 1]`, as the task gives it.
        """
        with self._echo.answering(self.model):
            weights = self._functional(self.selected).compute_loss_grad(batch)
        self._echo.forget()
        return weights

    def compute_outputs(self, batch: Any, most: int) -> Tensor:
        """Computes a batch's outputs, from its gradients' forward pass where that is known.

        Args:
            batch: tuple or dict of tensors whose first axis is the sample axis.
            most: not used.

        Returns:
            Of all samples, `[b]`.
        """
        del most
        function = batch_output_function(self.modelout_fn)
        assert function is not None  # noqa: S101 - checked when the computer was made
        normal = normalize(batch)
        with undisturbed(self.model), self._echo.answering(self.model):
            return without_graph(self.model, lambda: function(self.model, normal))

    @property
    def remembers_outputs(self) -> bool:
        """The gradients' forward pass answers, if the task calls the model alike."""
        return True

    @property
    def disproved(self) -> frozenset[str]:
        """Parameters whose gradients turned out not to come from their layers' rows."""
        return frozenset(self._ways.found.disproved)

    def coverage(self) -> Coverage:
        """Tells how the selected parameters' gradients are computed.

        Returns:
            Numbers of scalars by rules, exactly, and not at all.

        Raises:
            PhaseError: before the first batch.
        """
        if self._coverage is None:
            raise PhaseError("The coverage is known after the first batch.")
        return self._coverage

    def scalars_at_once(self, layout: Mapping[str, int], *, formed: bool = True) -> int:
        """How many gradient entries of one sample exist at once while `run` emits blocks.

        Args:
            layout: name to number of scalars of the selected parameters, in order.
            formed: whether the sink multiplies factors out.

        Returns:
            The largest parameter's size, or that of all that are computed exactly.
        """
        if self._coverage is None:
            return sum(layout.values())
        exact = sum(layout[name] for name in self._coverage.names_exactly)
        return max(exact, *layout.values()) if formed else exact

    def run(self, batch: Any, sink: Sink, layout: Mapping[str, int]) -> None:
        """Emits the batch's gradients as blocks, several for a parameter used twice.

        Args:
            batch: tensors whose first axis is the sample axis.
            sink: consumes the blocks; nothing is emitted where all gradients are zero.
            layout: not needed here.
        """
        del layout
        normal = normalize(batch)
        if not batch_size(normal):
            return
        with undisturbed(self.model):
            self._emit(normal, self._plan(normal), sink)

    def _plan(self, batch: Batch) -> Plan:
        many = batch_size(batch) > 1
        plans = self._ways.found.plans
        if many not in plans:
            try:
                self._ways.begin(batch)
                certain = self._check(select(batch, different_samples(batch)[:2]))
                self._ways.look_again(batch)
            except BaseException:
                plans.pop(many, None)  # what was not checked is not kept
                raise
            if certain is False:  # not finite: nothing was learnt
                plan = plans.pop(many)
                return dict.fromkeys(plan, EXACT) if self._fallback else plan
            self._tell(plans[many])
        elif self._ways.look_again(batch) or self._coverage is None:
            self._tell(plans[many])
        return plans[many]

    def _check(self, samples: Batch) -> bool:
        return self._ways.find(samples)

    def _emit(self, batch: Batch, plan: Plan, sink: Sink) -> None:
        left = self._swept(batch, plan, sink)
        self._exactly(tuple(n for n in self.selected if n in left), batch, sink)

    def _swept(self, batch: Batch, plan: Plan, sink: Sink) -> set[str]:
        # emits what the plan covers; returns the names that are still to be computed
        sweep = self._sweep(batch, plan, sink)
        try:
            sweep.run(lambda: self._outputs(batch))
        except Exception as error:
            changed = {n for n, way in plan.items() if way.changes_shapes}
            own = isinstance(error, AttributionError) or is_out_of_memory(error)
            if own or sweep.in_backward or not changed:
                raise
            logger.info(
                "%s cannot be given out once a sample in this batch and are computed "
                "exactly. Reason: %s",
                sorted(changed)[:3],
                error,
            )
            plan = {n: EXACT if n in changed else way for n, way in plan.items()}
            sweep = self._sweep(batch, plan, sink)
            sweep.run(lambda: self._outputs(batch))
        used = sweep.used | reached(
            self._anatomy,
            sweep.balanced,
            lambda: self._outputs(batch),
            batch_size(batch),
        )
        self._ways.found.to_prove |= used
        if sweep.refused:
            self._ways.give_up(sweep.refused)
            logger.info(
                "The samples of %s cannot be told apart in every batch, since it is called "
                "with some of them only; it is computed exactly from now on.",
                sorted(sweep.refused)[:3],
            )
            kept = self._ways.found.plans.get(batch_size(batch) > 1)
            if kept is not None:
                self._tell(kept)
        exact = {n for n, way in plan.items() if way.kind == "exact"}
        return exact | sweep.refused | used

    def _sweep(self, batch: Batch, plan: Plan, sink: Sink) -> Sweep:
        return Sweep(
            self._anatomy,
            plan,
            batch_size(batch),
            sink,
            keep_copies=self._ways.found.keep_copies,
            alone=self._ways.alone(batch, plan),
        )

    def _outputs(self, batch: Batch) -> Tensor:
        function = batch_output_function(self.modelout_fn)
        assert function is not None  # noqa: S101 - checked when the computer was made
        with self._echo.recording(self.model):
            return function(self.model, batch)

    def _exact_rows(self, names: tuple[str, ...], samples: Batch) -> Rows:
        # sketches of one sample after the other: no more is in memory than one gradient
        found: dict[str, list[Tensor]] = {name: [] for name in names}

        def keep(block: Block) -> None:
            found[block.name].append(self._ways.sketch(block))

        for j in range(batch_size(samples)):
            self._functionally(names, select(samples, slice(j, j + 1)), keep)
        return {name: torch.cat(rows) for name, rows in found.items()}

    def _exactly(self, names: tuple[str, ...], batch: Batch, sink: Sink) -> None:
        if not names:
            return
        if not self._fallback:
            raise UnsupportedModuleError(self._complaint(names, "no layer rule covers"))
        self._functionally(names, batch, sink)

    def _functionally(self, names: tuple[str, ...], batch: Batch, sink: Sink) -> None:
        try:
            self._functional(names).run(batch, sink, {})
        except (RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, AttributionError) or is_out_of_memory(error):
                raise
            bad = self._failing(names, select(batch, slice(0, 1)))
            self._coverage = cover(self._anatomy.default_plan(), self._sizes(), bad)
            reason = f"FunctionalGradientComputer fails ({error}) on"
            raise UnsupportedModuleError(self._complaint(bad, reason)) from error

    def _failing(self, names: tuple[str, ...], sample: Batch) -> tuple[str, ...]:
        # the parameters to blame, or all if each works alone
        bad: list[str] = []
        for name in names:
            try:
                self._functional((name,)).run(sample, lambda _: None, {})
            except (RuntimeError, TypeError, ValueError):  # noqa: PERF203
                bad.append(name)
        return tuple(bad) or names

    def _sizes(self) -> dict[str, int]:
        return {name: p.numel() for name, p in self._anatomy.parameters.items()}

    def _complaint(self, names: tuple[str, ...], reason: str) -> str:
        owners = [
            f"{name!r} of {type(self._anatomy.places[name][0][0]).__name__}"
            for name in names[:3]
        ]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"Gradients of {len(self.selected)} parameters were asked for, but {reason} "
            f"{', '.join(owners)}{more}. Leave these out with grad_wrt=[...], or register "
            "a rule for their layer (trak.gradient_computers.rules.register). Without "
            "fallback=False they are computed exactly where torch.func can follow."
        )

    def _functional(self, names: tuple[str, ...]) -> FunctionalGradientComputer:
        if names not in self._exact:
            made = FunctionalGradientComputer(self.model, self.modelout_fn, grad_wrt=names)
            made.func_weights = OwnTensors(made.func_weights)  # swapping them takes time
            self._exact[names] = made
        return self._exact[names]

    def _tell(self, plan: Plan) -> None:
        first = self._coverage is None
        self._coverage = cover(plan, self._sizes())
        slow = self._coverage.names_exactly
        if not self._fallback and slow:
            raise UnsupportedModuleError(self._complaint(slow, "no layer rule covers"))
        if not first and set(slow) <= self._told:
            return
        self._told.update(slow)
        logger.info(
            "%.1f %% of the parameters are covered by layer rules%s",
            100 * self._coverage.share,
            f"; the others, such as {list(slow)[:3]}, are computed exactly with one "
            "backward pass a sample, which is slower."
            if slow
            else ".",
        )
