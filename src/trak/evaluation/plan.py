"""What the outputs of a bank follow from: its subsets, its seeds and its recipe."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from trak.arguments import as_integer, as_number
from trak.errors import InputError
from trak.evaluation.arrays import Booleans
from trak.evaluation.described import as_json, check_described

SEED_RULE = "repetition * subsets + subset"
MASK_RULE = "numpy.random.default_rng(mask_seed), permutation(n)[:subset_size] a subset"


class Job(NamedTuple):
    """A model to train.

    Attributes:
        subset: on which subset.
        repetition: how many were trained on it before.
        seed: the seed it gets.
    """

    subset: int
    repetition: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class BankPlan:
    """What the outputs of a bank follow from; two plans that differ make two banks.

    Attributes:
        n: number of training examples.
        recipe: how models are trained, as JSON values. Code cannot be compared, so this is
            what tells one build from another: change it when you change the training.
        data: `data_hash` of what is trained on and evaluated.
        subsets: how many.
        seeds: trainings a subset. Two or more give the noise ceiling. Repetition `r` of
            subset `j` has the seed `r * subsets + j`.
        fraction: of the training examples in each subset.
        mask_seed: of the subsets.

    Raises:
        InputError: if one of them cannot be used.
    """

    n: int
    recipe: Mapping[str, Any] = field(hash=False)
    data: str | None = None
    subsets: int = 100
    seeds: int = 1
    fraction: float = 0.5
    mask_seed: int = 0

    def __post_init__(self) -> None:
        least = {"n": 2, "subsets": 3, "seeds": 1, "mask_seed": 0}
        given: dict[str, Any] = {
            name: as_integer(name, getattr(self, name), least=value)
            for name, value in least.items()
        }
        given["fraction"] = as_number("fraction", self.fraction, zero=False)
        check_described(self.recipe, self.data, {})
        given["recipe"] = json.loads(as_json("recipe", dict(self.recipe)))
        for name, value in given.items():
            object.__setattr__(self, name, value)
        if not 0 < self.subset_size < self.n:
            raise InputError(
                f"fraction={self.fraction} of {self.n} examples is {self.subset_size}; a "
                "subset must hold some and leave out some."
            )

    @property
    def subset_size(self) -> int:
        """Number of training examples in each subset."""
        return round(self.fraction * self.n)

    @property
    def key(self) -> str:
        """A hash of the plan, 16 hexadecimal digits."""
        rules = {"mask_rule": MASK_RULE, "seed_rule": SEED_RULE}
        text = json.dumps({**asdict(self), **rules}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def masks(self) -> Booleans:
        """Draws the subsets.

        Returns:
            `[subsets, n]`.
        """
        rng = np.random.default_rng(self.mask_seed)
        masks = np.zeros((self.subsets, self.n), dtype=np.bool_)
        for row in masks:
            row[rng.permutation(self.n)[: self.subset_size]] = True
        return masks

    def jobs(self) -> list[Job]:
        """Lists the models; every subset's first before any subset's second.

        Returns:
            The models.
        """
        return [
            Job(subset, repetition, repetition * self.subsets + subset)
            for repetition in range(self.seeds)
            for subset in range(self.subsets)
        ]
