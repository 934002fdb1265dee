"""Per-sample gradients from one batched forward and one activation-only backward pass."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trak.batches import Batch, batch_size, normalize, select
from trak.blocks import Block, Sink
from trak.errors import InputError
from trak.gradient_computers.abstract import SelectingGradientComputer
from trak.gradient_computers.capture import Capture, InputChangedError, frozen
from trak.gradient_computers.functional import FunctionalGradientComputer
from trak.gradient_computers.rules import LayerCall, Rule, rule_for
from trak.modelout_functions import batch_output_function

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-2  # of a parameter's gradient norm, on samples that are computed twice


class HookGradientComputer(SelectingGradientComputer):
    """Gradients layer by layer, while the backward pass runs.

    Needs a task with a batched output (all built-in ones). Each layer with a rule emits
    its blocks and is forgotten; weight gradients are never formed. Parameters that no
    rule covers (used outside a layer's `forward`, or of an unknown layer type) are
    computed exactly by `FunctionalGradientComputer`; a log line names their share.

    With every new set of weights the first two samples are computed by both ways, and a
    parameter on which they differ is left to the exact one. So a layer whose weight is
    also used elsewhere, or a model that mixes samples, costs time and not correctness.

    Arguments as for `SelectingGradientComputer`.

    Raises:
        InputError: if the task has no batched output.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
        parameters = dict(model.named_parameters())
        self._parameters = {name: parameters[name] for name in self.selected}
        names = {id(p): name for name, p in self._parameters.items()}
        self._layers: dict[str, nn.Module] = {}
        self._rules: dict[str, Rule] = {}
        self._names: dict[str, dict[str, str]] = {}
        for path, layer in model.named_modules():
            rule = rule_for(layer)
            own = {
                key: names[id(p)]
                for key, p in layer.named_parameters(recurse=False)
                if id(p) in names
            }
            if rule is not None and own:
                self._layers[path], self._rules[path], self._names[path] = layer, rule, own
        self._distrusted: set[str] = set()
        self._exact: dict[tuple[str, ...], FunctionalGradientComputer] = {}
        self._keep_copies = False
        self._checked = False
        self._told: set[str] = set()

    def compute_per_sample_grad(self, batch: Any) -> dict[str, Tensor]:
        """Computes df(z_i)/dtheta for every sample of a batch, multiplied out.

        Args:
            batch: tuple or dict of tensors whose first axis is the sample axis.

        Returns:
            Name of each selected parameter to its gradients, `[b, *parameter.shape]`.
        """
        rows: dict[str, Tensor] = {}

        def add(block: Block) -> None:
            gradient = block.dense().gradient
            known = rows.get(block.name)
            rows[block.name] = gradient if known is None else known + gradient

        self.run(batch, add, {})
        size = batch_size(normalize(batch))
        return {
            name: rows[name].reshape(size, *self._parameters[name].shape)
            for name in self.selected
        }

    def compute_loss_grad(self, batch: Any) -> Tensor:
        """Computes the loss weight Q of every sample of a batch.

        Args:
            batch: tuple or dict of tensors whose first axis is the sample axis.

        Returns:
            `[b]` or `[b, 1]`, as the task gives it.
        """
        computer = self._functional(self.selected)
        return computer.compute_loss_grad(batch)

    def run(self, batch: Any, sink: Sink, layout: Mapping[str, int]) -> None:
        """Emits the batch's gradients as blocks, several for a parameter used twice.

        Args:
            batch: tensors whose first axis is the sample axis.
            sink: consumes the blocks.
            layout: not needed here.
        """
        del layout
        normal = normalize(batch)
        if not self._checked:
            self._keep_copies = self._inputs_change(normal)
            self._check(select(normal, slice(0, 2)))
            self._checked = True
        self._emit(normal, sink)

    def _emit(self, batch: Batch, sink: Sink) -> None:
        left = self._hooked(batch, sink, keep_copies=self._keep_copies)
        if left:
            self._tell(left)
            self._functional(left).run(batch, sink, {})

    def _inputs_change(self, batch: Batch) -> bool:
        # whether the model changes a layer's input in place, tried on one sample
        try:
            self._hooked(select(batch, slice(0, 1)), lambda _: None, keep_copies=False)
        except InputChangedError as error:
            logger.info("%s Inputs are copied, which takes memory.", error)
            return True
        return False

    def _hooked(self, batch: Batch, sink: Sink, *, keep_copies: bool) -> tuple[str, ...]:
        # emits what the rules cover; returns the names of the other parameters
        size = batch_size(batch)

        def listen(path: str, inputs: tuple[Any, ...], backprops: Tensor) -> None:
            wanted = {
                key: name
                for key, name in self._names[path].items()
                if name not in self._distrusted
            }
            layer = self._layers[path]
            if wanted:
                with torch.no_grad():
                    call = LayerCall(layer, inputs, backprops, wanted, size)
                    for block in self._rules[path](call):
                        emitted.add(block.name)
                        sink(block)

        emitted: set[str] = set()
        capture = Capture(self._layers, listen, size, keep_copies=keep_copies)
        with (
            torch.enable_grad(),
            frozen(self.model.parameters()),
            capture.watching(),
        ):
            outputs = self._outputs(batch)
            capture.backward(outputs)
        return tuple(name for name in self.selected if name not in emitted)

    def _outputs(self, batch: Batch) -> Tensor:
        function = batch_output_function(self.modelout_fn)
        assert function is not None  # noqa: S101 - checked when the computer was made
        outputs = function(self.model, batch)
        if outputs.shape != (batch_size(batch),):
            raise InputError(
                "get_batch_output must return one number a sample, "
                f"[{batch_size(batch)}]; got {tuple(outputs.shape)}."
            )
        return outputs

    def _check(self, samples: Batch) -> None:
        """Distrusts parameters whose gradients differ from the exact ones."""
        found: dict[str, Tensor] = {}

        def keep(block: Block) -> None:
            gradient = block.dense().gradient.detach()
            found[block.name] = found.get(block.name, 0) + gradient

        self._emit(samples, keep)
        expected: dict[str, Tensor] = {}

        def compare(block: Block) -> None:
            expected[block.name] = block.dense().gradient

        self._functional(self.selected).run(samples, compare, {})
        scale = max(float(g.norm()) for g in expected.values())
        for name, exact in expected.items():
            error = float((found[name] - exact).norm())
            if not error <= _TOLERANCE * float(exact.norm()) + 1e-4 * scale:
                self._distrusted.add(name)

    def _functional(self, names: tuple[str, ...]) -> FunctionalGradientComputer:
        if names not in self._exact:
            self._exact[names] = FunctionalGradientComputer(
                self.model, self.modelout_fn, grad_wrt=names
            )
        return self._exact[names]

    def _tell(self, left: tuple[str, ...]) -> None:
        new = [name for name in left if name not in self._told]
        if not new:
            return
        self._told.update(new)
        total = sum(p.numel() for p in self._parameters.values())
        slow = sum(self._parameters[name].numel() for name in self._told)
        logger.info(
            "%.1f %% of the parameters are covered by layer rules; the others, such as "
            "%s, are computed exactly with one backward pass a sample, which is slower.",
            100 * (1 - slow / total),
            new[:3],
        )
