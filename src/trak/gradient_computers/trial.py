"""Each parameter's way is found by trying; it is kept if it gives the exact gradients."""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from trak.blocks import Block
from trak.errors import AttributionError
from trak.gradient_computers.capture import HALVES, InputChangedError
from trak.gradient_computers.lengths import Shapes
from trak.gradient_computers.memory import is_out_of_memory
from trak.gradient_computers.plan import EXACT, PLACEMENTS, UNSEEN, Anatomy, Plan, Way
from trak.gradient_computers.surroundings import without_graph
from trak.gradient_computers.sweep import Sweep

# per sample, of the parameter's gradient norm and of the largest parameter's
_TOLERANCES = {torch.float64: (1e-6, 1e-10), torch.float32: (5e-3, 1e-5)}
_COARSE = (0.15, 1e-2)  # half precision, and autocast
_LEAF_SCALARS = 1 << 22  # larger parameters are not given out once a sample

Rows = dict[str, Tensor]


class Trial:
    """Runs a few samples in different ways.

    Args:
        anatomy: the model's parameters.
        outputs: runs the model on the samples, `[b]`.
        exact: sketches of the samples' exact gradients, name to `[b, q]`.
        sketch: makes the gradients of a block small in the same way.
        keep_copies: copy layer inputs.
        alone: the lengths that one sample gives.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        outputs: Callable[[], Tensor],
        exact: Rows,
        sketch: Callable[[Block], Tensor],
        *,
        keep_copies: bool,
        alone: Shapes | None,
    ) -> None:
        self._anatomy = anatomy
        self._outputs = outputs
        self._exact = exact
        self._sketch = sketch
        self._keep_copies = keep_copies
        self._alone = alone
        # half precision, in which equal gradients differ by more
        self._coarse = any(rows.dtype in HALVES for rows in exact.values())
        self._size = len(next(iter(exact.values())))
        norms = [rows.norm(dim=1) for rows in exact.values()]
        self._scale = torch.stack([n.double() for n in norms]).amax(0)  # [b]
        self._plain: Tensor | None = None

    def plan(self) -> Plan:
        """Looks for a way for every parameter.

        Returns:
            Name to way; `exact` where none was found, `unseen` where the samples' gradient
            is zero, so that nothing can be told from it.
        """
        plan: Plan = {
            name: EXACT if bool(rows.any()) else UNSEEN
            for name, rows in self._exact.items()
        }
        for stage in self._stages():
            trying: Plan = {}
            for name, way in plan.items():
                candidate = stage(name) if way is EXACT else None
                if candidate is not None:
                    trying[name] = candidate
            plan.update(self._attempt(trying))
        chosen = {name: way for name, way in plan.items() if way.kind != "exact"}
        if len(set(chosen.values()) - {UNSEEN}) > 1:  # do they agree together, too?
            agreed = self._attempt(chosen)
            plan = {
                n: way if n in agreed or way is UNSEEN else EXACT for n, way in plan.items()
            }
        return plan

    def agreeing(self, plan: Plan) -> set[str]:
        """Tries a whole plan.

        Args:
            plan: name to way.

        Returns:
            The names whose gradients are the exact ones.
        """
        return set(self._attempt(plan))

    def _stages(self) -> Iterator[Callable[[str], Way | None]]:
        ruled, anatomy = self._anatomy.ruled, self._anatomy

        def by_layer(way: Way) -> Callable[[str], Way | None]:
            return lambda name: way if name in ruled else None

        def by_table(name: str) -> Way | None:
            owner = anatomy.places[name][0][0]
            found = name in ruled and isinstance(owner, nn.Embedding)
            return Way("layer", "added") if found else None

        yield by_layer(Way("layer"))
        if self._size > 1:
            yield by_layer(Way("layer", "shared"))
            yield by_table
            yield by_layer(Way("layer", "second"))
        yield lambda _: Way("function")
        if self._size > 1:
            yield lambda _: Way("function", "second")
        for placement in PLACEMENTS:
            way = Way("leaf", placement=placement)
            yield lambda name, way=way: way if self._may_be_leaf(name, way) else None

    def _may_be_leaf(self, name: str, way: Way) -> bool:
        parameter = self._anatomy.parameters[name]
        return (
            way.placement is not None
            and way.placement.fits(tuple(parameter.shape))
            and parameter.numel() <= _LEAF_SCALARS
            and not any(k in m.__dict__ for m, k in self._anatomy.places[name])
            and not (name in self._anatomy.ruled and parameter.ndim > 1)
        )

    def _attempt(self, trying: Plan) -> Plan:
        # the part of a plan that gives the exact gradients
        if all(way.kind in {"exact", "unseen"} for way in trying.values()):
            return {}
        found = self._found(trying)
        if found is not None:
            return {n: w for n, w in trying.items() if n in found and self._agree(n, found)}
        # it failed as a whole: find the parameters that are to blame
        groups: dict[object, Plan] = defaultdict(dict)
        for name, way in trying.items():
            groups[self._anatomy.kind_of(name)][name] = way
        parts = list(groups.values())
        if len(parts) < 2:
            return {}
        half = len(parts) // 2
        first = {name: way for part in parts[:half] for name, way in part.items()}
        second = {name: way for part in parts[half:] for name, way in part.items()}
        return {**self._attempt(first), **self._attempt(second)}

    def _found(self, trying: Plan) -> Rows | None:
        # what a plan emits; None if the model fails or computes something else
        found: Rows = {}

        def keep(block: Block) -> None:
            rows = self._sketch(block)
            known = found.get(block.name)
            found[block.name] = rows if known is None else known + rows

        sweep = Sweep(
            self._anatomy,
            trying,
            self._size,
            keep,
            keep_copies=self._keep_copies,
            strict=False,
            alone=self._alone,
        )
        changed = any(way.changes_shapes for way in trying.values())
        try:
            outputs = sweep.run(self._outputs)
        except (InputChangedError, MemoryError):
            raise
        except Exception as error:
            if is_out_of_memory(error) or not (changed or _is_ours(error)):
                raise
            return None
        self._coarse |= sweep.tape.met_halves
        if changed and not self._same(outputs):
            return None
        return {name: rows for name, rows in found.items() if name not in sweep.refused}

    def _same(self, outputs: Tensor) -> bool:
        if self._plain is None:
            self._plain = without_graph(self._anatomy.model, self._outputs).detach()
        relative = _COARSE[0] if self._coarse else 1e-4
        bound = relative * float(self._plain.abs().max().double()) + 1e-12
        return float((outputs - self._plain).abs().max().double()) <= bound

    def _agree(self, name: str, found: Rows) -> bool:
        exact, rows = self._exact[name], found[name]
        if rows.shape != exact.shape:
            return False
        relative, floor = _TOLERANCES.get(exact.dtype, _COARSE)
        if self._coarse:
            relative, floor = _COARSE
        error = (rows - exact).norm(dim=1).double()
        bound = relative * exact.norm(dim=1).double() + floor * self._scale
        return bool((error <= bound).all())


def _is_ours(error: Exception) -> bool:
    # a rule that does not fit its layer after all
    return isinstance(error, AttributionError | RuntimeError | IndexError | ValueError)
