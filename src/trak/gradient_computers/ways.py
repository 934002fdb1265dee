"""The plans of a set of weights: found on a few samples, confirmed and proved on more."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trak.batches import Batch, batch_size, leaves, select
from trak.gradient_computers.capture import InputChangedError
from trak.gradient_computers.lengths import Known, Lengths, Shapes
from trak.gradient_computers.memory import is_out_of_memory
from trak.gradient_computers.plan import EXACT, UNSEEN, Anatomy, Plan, Way
from trak.gradient_computers.sketch import Sketcher
from trak.gradient_computers.sweep import Sweep
from trak.gradient_computers.trial import Rows, Trial
from trak.gradient_computers.whole import disagreeing, spread
from trak.precision import autocast_is_on, exact_float32, without_autocast

logger = logging.getLogger(__name__)

_PROOFS = 8  # batches on which an unseen parameter's way is looked for
_COMPARED, _COMPARED_AGAIN = 32, 8  # samples, at first and of later batches
_COMPARED_NUMBERS = 1 << 26  # of their sketches, 256 MiB
_ALONE = 8  # batches of one sample


@dataclass
class Findings:
    """What was found out about one set of weights.

    Attributes:
        plans: by whether the batch has more than one sample.
        keep_copies: whether layer inputs must be copied.
        to_prove: parameters that got their first gradient since.
        disproved: parameters whose way was wrong for some samples.
        compared: samples that were held against an ordinary backward pass, with others.
        unconfirmed: whether a plan waits for a batch of three samples.
        proofs: batches on which an unseen parameter's way will be looked for.
        lengths: what samples alone give.
    """

    plans: dict[bool, Plan] = field(default_factory=dict[bool, Plan])
    keep_copies: bool = False
    to_prove: set[str] = field(default_factory=set[str])
    disproved: set[str] = field(default_factory=set[str])
    compared: int = 0
    unconfirmed: bool = False
    proofs: int = _PROOFS
    lengths: Known = field(default_factory=Known)


class Ways:
    """One plan for batches of one sample, and one for larger ones.

    Args:
        anatomy: the model's parameters.
        outputs: runs the model on a batch, `[b]`.
        exact: sketches of the exact gradients of named parameters, name to `[b, q]`.
        found: what is known of the weights, which is added to. The first batch is compared
            all the same.

    Attributes:
        anatomy: as given.
        found: as given.
        sketch: makes gradients small before they are compared.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        outputs: Callable[[Batch], Tensor],
        exact: Callable[[tuple[str, ...], Batch], Rows],
        found: Findings,
    ) -> None:
        self.anatomy = anatomy
        self.found = found
        self._outputs = outputs
        self._exact = exact
        shapes = {name: tuple(p.shape) for name, p in anatomy.parameters.items()}
        self.sketch = Sketcher(shapes)
        fitting = _COMPARED_NUMBERS // max(1, self.sketch.numbers)
        self._most = max(_COMPARED_AGAIN, min(_COMPARED, fitting))
        self._lengths = Lengths(self._look, found.lengths)
        self._met = {True: 0, False: 0}
        # a first single sample is proved by `find`, unless its plan is known
        self._next = {True: 1, False: 1 if False in found.plans else 2}

    def begin(self, batch: Batch) -> None:
        """Starts with the rules, and looks whether the model changes inputs in place.

        Args:
            batch: a batch, of which one sample is tried.
        """
        plan = self.anatomy.default_plan()
        self.found.plans[batch_size(batch) > 1] = plan
        one = select(batch, slice(0, 1))
        sweep = Sweep(self.anatomy, plan, 1, lambda _: None, strict=False)
        try:
            sweep.run(lambda: self._outputs(one))
        except InputChangedError as error:
            logger.info("%s Inputs are copied, which takes memory.", error)
            self.found.keep_copies = True
        self.alone(batch, plan)

    def give_up(self, names: Iterable[str]) -> None:
        """Leaves parameters to the exact computer, whatever the batch.

        A layer that is called with as many rows as the data wants may be called with as
        many as there are samples, in another order.

        Args:
            names: of these.
        """
        for plan in self.found.plans.values():
            plan.update(dict.fromkeys(names, EXACT))

    def alone(self, batch: Batch, plan: Plan) -> Shapes | None:
        """What lengths a sample of a batch gives by itself.

        Args:
            batch: the batch.
            plan: what is to be taken from layers and functions.

        Returns:
            Place to lengths; None if it need not be known.
        """
        return self._lengths.alone(batch, self._places(plan))

    def _places(self, plan: Plan) -> list[tuple[str, int]]:
        axes = {"first": 0, "second": 1}
        places: set[tuple[str, int]] = set()
        for path, layer in self.anatomy.layers.items():
            ways = [plan[name] for name in layer.names.values()]
            places |= {
                (path, axes[w.samples])
                for w in ways
                if w.kind == "layer" and w.samples in axes
            }
        for name, way in plan.items():
            if way.kind == "function":
                places.add((f"function of {name}", axes.get(way.samples, 0)))
        return sorted(places)

    def _look(self, one: Batch) -> Shapes:
        found: Shapes = {}
        names = self.anatomy.parameters
        for plan in (self.anatomy.default_plan(), dict.fromkeys(names, Way("function"))):
            sweep = Sweep(self.anatomy, plan, 1, lambda _: None, strict=False)
            found.update(sweep.look(lambda: self._outputs(one)).seen)
        return found

    @exact_float32()  # rounding to TF32 would hide which way is right
    def find(self, samples: Batch) -> bool:
        """Finds a way for every parameter, by comparison with the exact gradients.

        Args:
            samples: one sample, or two that differ.

        Returns:
            False if gradients are not finite, so that nothing can be told.
        """
        try:
            with without_autocast():  # in which differences are told apart by less
                return self._find(samples)
        except Exception as error:
            if is_out_of_memory(error) or not autocast_is_on():
                raise
        return self._find(samples)  # of a model that does not run without

    def _find(self, samples: Batch) -> bool:
        many = batch_size(samples) > 1
        exact = self._exact(tuple(self.anatomy.parameters), samples)
        if not _finite(exact):
            return False
        found = self._trial(samples, exact).plan()
        self.found.plans[many] = found | dict.fromkeys(self.found.disproved, EXACT)
        self.found.unconfirmed |= many
        return True

    @exact_float32()
    def look_again(self, batch: Batch) -> bool:
        """Confirms and proves what the first samples could not.

        Args:
            batch: a later batch, or the whole first one.

        Returns:
            Whether a plan changed.
        """
        many = batch_size(batch) > 1
        before = dict(self.found.plans[many])
        if self.found.unconfirmed and batch_size(batch) > 2:
            self._confirm(select(batch, different_samples(batch)))
        if self.found.to_prove and self.found.proofs:
            self.found.proofs -= 1
            self._prove(select(batch, different_samples(batch)[:2]), self.found.plans[many])
        self._compare(batch, self.found.plans[many])
        return before != self.found.plans[many]

    def _confirm(self, samples: Batch) -> None:
        # with three samples, so that no axis of length two is taken for the sample axis
        plan = self.found.plans[True]
        risky = {
            n: way
            for n, way in plan.items()
            if way.changes_shapes or way.samples != "first"
        }
        if risky:
            exact = self._exact(tuple(risky), samples)
            agreed = self._trial(samples, exact).agreeing(risky)
            for name in set(risky) - agreed:
                if bool(exact[name].any()):
                    plan[name] = EXACT
        self.found.unconfirmed = False

    def _compare(self, batch: Batch, plan: Plan) -> None:
        # on the first batch, the fourth, the sixteenth ...; of batches of one sample, which
        # show less each, on the second to eighth, the sixteenth ...; and until there were
        # as many samples as show what few of them do
        many = batch_size(batch) > 1
        self._met[many] += 1
        due = self._met[many] == self._next[many]
        if due and many:
            self._next[many] *= 4
        elif due:
            self._next[many] += self._next[many] if self._next[many] >= _ALONE else 1
        more = _COMPARED - self.found.compared if many else 0
        if not due and more <= 0:
            return
        samples = spread(batch, min(max(more, _COMPARED_AGAIN), self._most))
        self.found.compared += batch_size(samples) if many else 0
        lengths = self._lengths.known(samples)
        if lengths is None:  # what is learned here is for these samples
            lengths = Lengths(self._look, Known()).alone(samples, self._places(plan))
        try:
            wrong = disagreeing(
                self.anatomy,
                plan,
                self._outputs,
                samples,
                self.sketch,
                keep_copies=self.found.keep_copies,
                alone=lengths,
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.info("Too little memory to compare more samples with a backward pass.")
            return
        if not wrong:
            return
        first = sum(self._met.values()) == 1
        logger.log(
            logging.INFO if first else logging.WARNING,
            "The model picks or reorders samples inside, reads weights around their "
            "layers for some, or answers at random: gradients of %s are computed exactly "
            "from now on.%s",
            sorted(wrong)[:3],
            "" if first else " Those of earlier batches may be wrong.",
        )
        self.found.disproved |= wrong
        self.give_up(wrong)

    def _prove(self, samples: Batch, plan: Plan) -> None:
        # parameters whose gradient was zero in the samples seen so far
        names = tuple(n for n in self.anatomy.parameters if n in self.found.to_prove)
        exact = self._exact(names, samples)
        if not _finite(exact):
            return
        for name, way in self._trial(samples, exact).plan().items():
            if way is not UNSEEN:
                plan[name] = way
                self.found.to_prove.discard(name)

    def _trial(self, samples: Batch, exact: Rows) -> Trial:
        return Trial(
            self.anatomy,
            lambda: self._outputs(samples),
            exact,
            self.sketch,
            keep_copies=self.found.keep_copies,
            alone=self.alone(samples, self.anatomy.default_plan()),
        )


def different_samples(batch: Batch) -> list[int]:
    """Chooses samples to try: equal ones would hide that a model mixes them.

    Args:
        batch: a batch of at least one sample.

    Returns:
        The first, the next that is not the same, and one more, as far as there are any.
    """
    size = batch_size(batch)
    if size < 2:
        return list(range(size))
    parts = [part.reshape(size, -1) for part in leaves(batch)]
    same = torch.stack([(part == part[:1]).all(1).cpu() for part in parts]).all(0)
    others = (~same).nonzero().flatten().tolist() or [1]
    second = others[0]
    third = next((j for j in (*others[1:], *range(1, size)) if j != second), None)
    return [0, second] if third is None else [0, second, third]


def _finite(rows: Rows) -> bool:
    return all(bool(torch.isfinite(gradient).all()) for gradient in rows.values())
