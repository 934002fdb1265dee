"""Eigenvectors of a second moment, and what whitening leaves along them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Basis:
    """The eigendecomposition of one side's factor, with its damped power.

    Attributes:
        vectors: eigenvectors as columns, `[o, o]`; None for the standard basis.
        values: eigenvalues, without damping, `[o]`.
        powers: what whitening multiplies by, `(values + damping)^(-alpha / 2)`, `[o]`.
        damping: what is added to the eigenvalues; None where nothing is whitened.
    """

    vectors: Tensor | None
    values: Tensor
    powers: Tensor
    damping: float | None

    @classmethod
    def of(
        cls, vectors: Tensor | None, values: Tensor, damping: float, strength: float
    ) -> "Basis":
        """That of an eigendecomposition.

        Args:
            vectors: as columns, `[o, o]`; None for the standard basis.
            values: eigenvalues, `[o]`.
            damping: is added to them.
            strength: alpha.

        Returns:
            With its powers.
        """
        powers = (values.clamp(min=0) + damping) ** (-strength / 2)
        return cls(vectors, values, powers, damping)

    def at(self, strength: float) -> "Basis":
        """The same with powers of another strength.

        Args:
            strength: alpha.

        Returns:
            Itself where nothing is whitened.
        """
        if self.damping is None:
            return self
        return Basis.of(self.vectors, self.values, self.damping, strength)

    @property
    def size(self) -> int:
        """Rows of the factor, `o`."""
        return len(self.values)

    def to(self, dtype: torch.dtype) -> "Basis":
        """The same with vectors of another dtype, which fill memory.

        Args:
            dtype: theirs.

        Returns:
            Values and powers stay as they are.
        """
        if self.vectors is None:
            return self
        return replace(self, vectors=self.vectors.to(dtype))

    def power(self) -> Tensor:
        """`(factor + damping)^(-alpha / 2)`.

        Returns:
            Symmetric `[o, o]`, or its diagonal `[o]`.
        """
        if self.vectors is None:
            return self.powers
        return (self.vectors * self.powers) @ self.vectors.T

    def columns(self, numbers: Tensor) -> Tensor:
        """Eigenvectors times what whitening multiplies them by.

        Args:
            numbers: which, `[a]`.

        Returns:
            `[o, a]`, on the CPU.
        """
        numbers = numbers.to(self.powers.device)
        if self.vectors is not None:
            powers = self.powers[numbers].to(self.vectors)
            return (self.vectors[:, numbers] * powers).cpu()
        found = torch.zeros(self.size, len(numbers), dtype=self.powers.dtype, device="cpu")
        found[numbers.cpu(), torch.arange(len(numbers), device="cpu")] = self.powers[
            numbers
        ].cpu()
        return found

    def variances(self) -> Tensor:
        """The eigenvalues after whitening.

        Returns:
            `[o]`, float32, on the CPU.
        """
        return (self.values.clamp(min=0) * self.powers.square()).float().cpu()
