"""Which share of the selected parameters is computed in which way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trak.gradient_computers.plan import Plan


@dataclass(frozen=True, slots=True)
class Coverage:
    """Numbers of scalars among the selected parameters, by the way to their gradients.

    Attributes:
        by_rules: those whose gradients come from one pass over the batch.
        exactly: those that are computed one sample at a time.
        unsupported: those that cannot be computed at all.
        names_exactly: parameters computed one sample at a time.
        names_unsupported: parameters that cannot be computed.
    """

    by_rules: int
    exactly: int
    unsupported: int
    names_exactly: tuple[str, ...] = ()
    names_unsupported: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share that comes from one pass over the batch, from 0 to 1."""
        total = self.by_rules + self.exactly + self.unsupported
        return self.by_rules / total if total else 1.0

    def describe(self) -> dict[str, Any]:
        """The numbers, for a store's records.

        Returns:
            JSON values.
        """
        return {
            "by_rules": self.by_rules,
            "exactly": self.exactly,
            "unsupported": self.unsupported,
            "share_by_rules": self.share,
        }


def cover(
    plan: Plan, sizes: Mapping[str, int], unsupported: tuple[str, ...] = ()
) -> Coverage:
    """Counts what a plan covers.

    Args:
        plan: name to way.
        sizes: name to number of scalars.
        unsupported: parameters that the exact computer cannot do either.

    Returns:
        The coverage.
    """
    exact = tuple(
        name
        for name, way in plan.items()
        if way.kind == "exact" and name not in unsupported
    )
    slow = sum(sizes[name] for name in exact)
    never = sum(sizes[name] for name in unsupported)
    return Coverage(sum(sizes.values()) - slow - never, slow, never, exact, unsupported)
