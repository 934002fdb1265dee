"""Per-sample gradients from one batched forward and one activation-only backward pass."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import Batch, batch_size, leaves, normalize, select
from trak.blocks import Block, Sink
from trak.errors import AttributionError, InputError, PhaseError, UnsupportedModuleError
from trak.gradient_computers.abstract import SelectingGradientComputer
from trak.gradient_computers.capture import InputChangedError
from trak.gradient_computers.coverage import Coverage, cover
from trak.gradient_computers.echo import Echo
from trak.gradient_computers.functional import FunctionalGradientComputer
from trak.gradient_computers.memory import is_out_of_memory
from trak.gradient_computers.plan import EXACT, UNSEEN, Anatomy, Plan
from trak.gradient_computers.surroundings import undisturbed
from trak.gradient_computers.sweep import Sweep
from trak.gradient_computers.trial import Rows, Trial
from trak.modelout_functions import batch_output_function

logger = logging.getLogger(__name__)

_PROOFS = 8  # batches on which an unseen parameter's way is looked for


class HookGradientComputer(SelectingGradientComputer):
    """Gradients layer by layer, while the backward pass runs.

    Needs a task with a batched output (all built-in ones). Layers with a rule emit their
    blocks and are forgotten; weight gradients are never formed. Parameters outside such
    layers are followed where they are handed to `linear` or `embedding`, or given out once
    a sample. What is left is computed exactly by `FunctionalGradientComputer`; a log line
    names its share, and `coverage()` tells it.

    With every new set of weights a few samples are computed by both ways, and a parameter
    on which they differ is left to the exact one. So a layer whose weight is also used
    elsewhere, or a model that mixes samples, costs time and not correctness.

    `run` may raise after the sink received blocks; these are void then.

    Arguments as for `SelectingGradientComputer`.

    Args:
        fallback: compute exactly what the rules do not cover; an error if False.

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
        self._anatomy = Anatomy(model, self.selected)
        self._plans: dict[bool, Plan] = {}  # for single samples, and for more
        self._exact: dict[tuple[str, ...], FunctionalGradientComputer] = {}
        self._keep_copies = False
        self._unconfirmed = False
        self._to_prove: set[str] = set()
        self._proofs = _PROOFS
        self._told: set[str] = set()
        self._echo = Echo()
        self._coverage: Coverage | None = None

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

    def _collect(self, batch: Batch) -> Rows:
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
            certain = self._prepare(normal)
            plan = self._plans[batch_size(normal) > 1]
            if not certain:  # nothing was learnt from samples that are not finite
                del self._plans[batch_size(normal) > 1]
            self._emit(normal, plan, sink)

    def _prepare(self, batch: Batch) -> bool:
        # makes the plan; whether it may be kept
        size = batch_size(batch)
        many = size > 1
        if many in self._plans:
            if self._unconfirmed and size > 2:
                self._confirm(select(batch, _different(batch)))
            if self._to_prove and self._proofs:
                self._proofs -= 1
                self._prove(select(batch, _different(batch)[:2]), many=many)
            return True
        self._keep_copies = self._keep_copies or self._inputs_change(batch)
        self._plans[many] = self._anatomy.default_plan()
        chosen = _different(batch)
        certain = self._check(select(batch, chosen[:2]))
        if certain is False:
            return False
        if many:
            self._unconfirmed = True
            self._confirm(select(batch, chosen))
        self._tell(self._plans[many])
        return True

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
        self._to_prove |= sweep.used
        exact = {n for n, way in plan.items() if way.kind == "exact"}
        return exact | sweep.refused | sweep.used

    def _sweep(self, batch: Batch, plan: Plan, sink: Sink) -> Sweep:
        return Sweep(
            self._anatomy, plan, batch_size(batch), sink, keep_copies=self._keep_copies
        )

    def _outputs(self, batch: Batch) -> Tensor:
        function = batch_output_function(self.modelout_fn)
        assert function is not None  # noqa: S101 - checked when the computer was made
        with self._echo.recording(self.model):
            return function(self.model, batch)

    def _inputs_change(self, batch: Batch) -> bool:
        # whether the model changes a layer's input in place, tried on one sample
        one = select(batch, slice(0, 1))
        plan = self._anatomy.default_plan()
        sweep = Sweep(self._anatomy, plan, 1, lambda _: None, strict=False)
        try:
            sweep.run(lambda: self._outputs(one))
        except InputChangedError as error:
            logger.info("%s Inputs are copied, which takes memory.", error)
            return True
        return False

    def _check(self, samples: Batch) -> bool:
        """Finds a way for every parameter, by comparison with the exact gradients.

        Args:
            samples: one sample, or two that differ.

        Returns:
            False if gradients are not finite, so that all must be computed exactly.
        """
        many = batch_size(samples) > 1
        exact = self._exact_rows(self.selected, samples)
        if not all(bool(torch.isfinite(rows).all()) for rows in exact.values()):
            self._plans[many] = dict.fromkeys(self.selected, EXACT)
            return False
        self._plans[many] = self._trial(samples, exact).plan()
        return True

    def _confirm(self, samples: Batch) -> None:
        # with three samples, so that no axis of length two is taken for the sample axis
        if batch_size(samples) < 3:
            return
        plan = self._plans[True]
        self._unconfirmed = False
        risky = {
            n: way
            for n, way in plan.items()
            if way.changes_shapes or way.samples != "first"
        }
        if not risky:
            return
        exact = self._exact_rows(tuple(risky), samples)
        agreed = self._trial(samples, exact).agreeing(risky)
        for name in set(risky) - agreed:
            if bool(exact[name].any()):
                plan[name] = EXACT

    def _prove(self, samples: Batch, *, many: bool) -> None:
        # parameters whose gradient was zero in the samples seen so far
        names = tuple(n for n in self.selected if n in self._to_prove)
        exact = self._exact_rows(names, samples)
        if not all(bool(torch.isfinite(rows).all()) for rows in exact.values()):
            return
        found = self._trial(samples, exact).plan()
        for name, way in found.items():
            if way is not UNSEEN:
                self._plans[many][name] = way
                self._to_prove.discard(name)
        self._tell(self._plans[many])

    def _trial(self, samples: Batch, exact: Rows) -> Trial:
        return Trial(
            self._anatomy,
            lambda: self._outputs(samples),
            exact,
            keep_copies=self._keep_copies,
        )

    def _exact_rows(self, names: tuple[str, ...], samples: Batch) -> Rows:
        rows: Rows = {}

        def keep(block: Block) -> None:
            rows[block.name] = block.dense().gradient

        self._functionally(names, samples, keep)
        return rows

    def _exactly(self, names: tuple[str, ...], batch: Batch, sink: Sink) -> None:
        if not names:
            return
        if not self._fallback:
            raise UnsupportedModuleError(self._complaint(names, "no layer rule covers"))
        self._functionally(names, batch, sink)

    def _functionally(self, names: tuple[str, ...], batch: Batch, sink: Sink) -> None:
        try:
            self._functional(names).run(batch, sink, {})
        except (RuntimeError, TypeError) as error:
            if isinstance(error, AttributionError) or is_out_of_memory(error):
                raise
            self._coverage = cover(
                self._anatomy.default_plan(),
                {n: p.numel() for n, p in self._anatomy.parameters.items()},
                names,
            )
            reason = f"FunctionalGradientComputer fails ({error}) on"
            raise UnsupportedModuleError(self._complaint(names, reason)) from error

    def _complaint(self, names: tuple[str, ...], reason: str) -> str:
        owners = [
            f"{name} of {type(self._anatomy.places[name][0][0]).__name__}"
            for name in names[:3]
        ]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"Per-sample gradients were expected for {len(self.selected)} parameters, but "
            f"{reason} {', '.join(owners)}{more}. Leave these out with grad_wrt=[...], or "
            "register a rule for the layer (trak.gradient_computers.rules.register); "
            "without fallback=False, or with FunctionalGradientComputer, they are "
            "computed exactly where torch.func can follow the model."
        )

    def _functional(self, names: tuple[str, ...]) -> FunctionalGradientComputer:
        if names not in self._exact:
            self._exact[names] = FunctionalGradientComputer(
                self.model, self.modelout_fn, grad_wrt=names
            )
        return self._exact[names]

    def _tell(self, plan: Plan) -> None:
        sizes = {name: p.numel() for name, p in self._anatomy.parameters.items()}
        first = self._coverage is None
        self._coverage = cover(plan, sizes)
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


def _different(batch: Batch) -> list[int]:
    # the first sample, the next that is not the same, and one more
    size = batch_size(batch)
    if size < 2:
        return list(range(size))
    parts = [part.reshape(size, -1) for part in leaves(batch)]
    same = torch.stack([(part == part[:1]).all(1).cpu() for part in parts]).all(0)
    others = (~same).nonzero().flatten().tolist() or [1]
    second = others[0]
    third = next((j for j in (*others[1:], *range(1, size)) if j != second), None)
    return [0, second] if third is None else [0, second, third]
