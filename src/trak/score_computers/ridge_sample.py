"""Examples that the automatic ridge is told from, and what else it depends on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trak.encodings import RowSource, row_encoding
from trak.errors import NotEnoughMemoryError
from trak.score_computers.curvature import roots as roots_of
from trak.score_computers.decay import Spectrum
from trak.score_computers.losses import Losses, losses_of
from trak.score_computers.pulls import Stationarity, stationarity_of
from trak.score_computers.stationarity import margins
from trak.score_computers.stream import home, rows_per_block, stream
from trak.score_computers.unwhitened import Unwhitened, inner_products

SAMPLE = 600
"""Rows that are played with; of whitened ones `trak.score_computers.unwhitened.SAMPLE`."""
FEWEST = 40
"""Rows that something can be told from."""
_SAMPLE_BYTES = 1 << 29  # of the rows that are drawn


class Wide(NamedTuple):
    """Some examples in a wider projection than the rows.

    Attributes:
        numbers: their row numbers, ascending, `[s]`.
        rows: `[s, w]`.
    """

    numbers: NDArray[np.int64]
    rows: NDArray[np.float32]


class Outputs(NamedTuple):
    """Model outputs of some examples of a squared loss.

    Attributes:
        numbers: their row numbers, ascending, `[s]`.
        values: `[s]`.
        slope: of Q in the output.
    """

    numbers: NDArray[np.int64]
    values: NDArray[np.float64]
    slope: float


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the automatic ridge depends on, beside the rows.

    Attributes:
        checkpoints: over how many the scores will be averaged.
        strength: of whitening, 0 to 1.
        columns: projection dimension; None if the rows are not projected.
        loss: Q, `[n]` or `[n, 1]`; None if unknown.
        counts: how much each example counts in training, `[n]` or `[n, 1]`; None if all
            count once.
        logistic: whether Q is that of a logistic loss of the output; None if unknown.
        curvature: the rows are weighted by the loss's curvature.
        unwhitened: some of the examples without whitening, for rows that are whitened.
        plain: takes whitening off rows, `[m, k]` to `[m, k]`, up to a rotation; None where
            nothing does.
        wide: some of the examples in a wider projection, for rows that are not whitened.
        outputs: of some of the examples, for rows that are not whitened.
        words: Q is a mean over the words of a text.
        normalizes_batches: the model has batch normalization.
        multiple: the ridge that was chosen already, in mean squared row norms.
        power: the exponent of Q that was chosen with it.
        path: the share of what Q added up to along the way that was chosen with them.
    """

    checkpoints: int = 1
    strength: float = 0.0
    columns: int | None = None
    loss: Any = None
    counts: Any = None
    logistic: bool | None = None
    curvature: bool = False
    unwhitened: Sequence[Unwhitened] = ()
    plain: Callable[[Tensor], Tensor] | None = None
    wide: Wide | None = None
    outputs: Outputs | None = None
    words: bool = False
    normalizes_batches: bool = False
    multiple: float | None = None
    power: float = 1.0
    path: float = 0.0

    @property
    def losses(self) -> Losses | None:
        """Q without the signs that a logistic loss may have; None if unknown."""
        if self.loss is None:
            return None
        return losses_of(self.loss, self.counts).sized(self.logistic)


@dataclass(frozen=True)
class Sample:
    """Some training examples, with what is known of all of them.

    Attributes:
        kernel: their rows' inner products, in units of the mean squared row norm and
            without weights, `[s, s]`, float64.
        pull: their rows times `Phi^T Q` of all examples, in the same units, `[s]`.
        loss: their loss weights, not counting how much they count, `[s]`.
        counts: how much they count, `[s]`.
        roots: what their rows are weighted by, `[s]`.
        signs: what their rows were multiplied by, where Q of a logistic loss had signs,
            `[s]`.
        share: of the training set.
        curved: the rows are weighted by the loss's curvature, too.
        outputs: of the model, in units of Q, where the loss is a squared one, `[s]`.
    """

    kernel: Tensor
    pull: Tensor
    loss: Tensor
    counts: Tensor
    roots: Tensor
    signs: Tensor
    share: float
    curved: bool
    outputs: Tensor | None = None

    @property
    def are_probable(self) -> bool:
        """Whether loss weights lie between 0 and 1."""
        return Losses(self.loss).are_probable

    def of(self, places: Tensor) -> "Sample":
        """A part of the sample.

        Args:
            places: which of its examples, int64, `[c]`.

        Returns:
            A sample of the same training set.
        """
        outputs = None if self.outputs is None else self.outputs[places]
        return replace(
            self,
            kernel=self.kernel[places][:, places],
            pull=self.pull[places],
            loss=self.loss[places],
            counts=self.counts[places],
            roots=self.roots[places],
            signs=self.signs[places],
            share=self.share * len(places) / len(self.loss),
            outputs=outputs,
        )


def is_curved(situation: Situation) -> bool:
    """Whether rows are weighted by curvature, which losses of constant one have none of.

    Args:
        situation: knows the loss weights.

    Returns:
        False also if nobody asked for it.
    """
    losses = situation.losses
    return situation.curvature and losses is not None and losses.are_probable


def sample_of(
    examples: Unwhitened, count: int, situation: Situation, *, curvature: bool
) -> Sample | None:
    """What unwhitened examples say of the training set.

    Args:
        examples: some of it.
        count: `n`.
        situation: knows whether the loss is logistic.
        curvature: weigh rows by it.

    Returns:
        The sample; None if there is nothing to tell from: rows or loss weights are 0.
    """
    every = losses_of(examples.loss, examples.counts)
    losses, signs = _canonical(every, situation)
    kernel = examples.kernel.double() * torch.outer(signs, signs)
    unit = kernel.diagonal().mean()
    if not bool(unit > 0) or not bool(losses.own.any()):
        return None
    return Sample(
        kernel / unit,
        signs * examples.pull * count / unit,
        losses.own.flatten(),
        _counts(losses),
        _factors(losses, curvature=curvature),
        signs,
        min(1.0, len(signs) / count),
        curvature and losses.are_probable,
    )


def _canonical(losses: Losses, situation: Situation) -> tuple[Losses, Tensor]:
    # Q of a logistic loss as if outputs were margins, and what rows are multiplied by then
    found, own = losses.sized(situation.logistic), losses.own.flatten()
    if found.own is losses.own:
        return found, torch.ones_like(own)
    return found, torch.where(own < 0, -1.0, 1.0).to(own)


def _counts(losses: Losses) -> Tensor:
    found = losses.counts
    return (torch.ones_like(losses.own) if found is None else found).flatten()


def _factors(losses: Losses, *, curvature: bool) -> Tensor:
    found = roots_of(losses, curved=curvature)
    return (torch.ones_like(losses.own) if found is None else found).flatten()


def drawn(count: int, most: int = SAMPLE) -> NDArray[np.int64]:
    """Which examples the ridge is told from.

    Args:
        count: examples that there are, `n`.
        most: how many at most.

    Returns:
        Row numbers, ascending.

    Raises:
        NotEnoughMemoryError: if so many cannot be numbered in memory.
    """
    seeded = torch.Generator().manual_seed(0)
    try:
        lots = torch.randperm(count, generator=seeded, device="cpu")
    except RuntimeError as error:
        raise NotEnoughMemoryError(
            f"There is no memory for the numbers of {count:,} training examples (8 bytes "
            "each). Is train_set_size right?"
        ) from error
    return lots[:most].sort().values.numpy()


def sampled(rows: RowSource, situation: Situation) -> Sample | None:
    """Draws rows, in one pass that also multiplies all by `Phi^T q`.

    Args:
        rows: Phi, `[n, k]`.
        situation: knows the loss weights, and what takes whitening off rows.

    Returns:
        The sample; None if there is nothing to tell from: rows or loss weights are 0.
    """
    count = rows.shape[0]
    every = losses_of(situation.loss, situation.counts)
    losses, signs = _canonical(every, situation)
    factors = _factors(losses, curvature=situation.curvature)
    if situation.wide is None:
        numbers = _drawn(rows)
    else:
        numbers = torch.from_numpy(situation.wide.numbers)
    kept, total = _gathered(rows, numbers, every.total.flatten()[None] / factors)
    if situation.plain is not None:
        kept, total = situation.plain(kept), situation.plain(total)
    kept.mul_((signs / factors)[numbers].to(kept)[:, None])
    kernel = inner_products(kept).double()
    unit = kernel.diagonal().mean()
    pull = kept.double() @ total[0] / unit
    tells = torch.isfinite(kernel).all() and torch.isfinite(pull).all() and unit > 0
    if not bool(tells) or not bool(losses.own.any()):
        return None
    device = kernel.device
    columns = (losses.own.flatten(), _counts(losses), factors, signs)
    loss, counts, factors, signs = (each[numbers].to(device) for each in columns)
    outputs = _outputs(situation.outputs, numbers.numpy())
    return Sample(
        kernel / unit,
        pull,
        loss,
        counts,
        factors,
        signs,
        len(numbers) / count,
        is_curved(situation),
        None if outputs is None else outputs.to(device),
    )


def stationarity_of_all(rows: RowSource, situation: Situation) -> Stationarity | None:
    """What pulls at outputs says, over the whole training set.

    Examples that a whitening was fitted to may be a small part of it, and what pulls at
    outputs in a small part is mostly chance; sums over all rows, without whitening, tell
    it.

    Args:
        rows: Phi, `[n, k]`, whitened.
        situation: knows the loss weights, and what takes whitening off rows.

    Returns:
        By up to 600 rows drawn by lot, and growth by all; None if rows cannot tell, or no
        more than the examples that were kept without whitening.
    """
    known = sum(len(examples.loss) for examples in situation.unwhitened)
    if situation.plain is None or situation.logistic is False:
        return None
    if not 0 < known < rows.shape[0]:
        return None
    every = losses_of(situation.loss, situation.counts)
    losses, signs = _canonical(every, situation)
    own = losses.own.flatten()
    steep = float((own * (1 - own) * _counts(losses)).mean())
    if not losses.are_probable or not steep > 0:
        return None
    outputs, factors = margins(own), _factors(losses, curvature=situation.curvature)
    columns = torch.stack([signs * outputs, every.total.flatten()])
    numbers = _drawn(rows)
    kept, total = _gathered(rows, numbers, columns / factors)
    along, pull = situation.plain(total)
    kept = situation.plain(kept).mul_((signs / factors)[numbers].to(kept)[:, None])
    kernel = inner_products(kept).double()
    unit = kernel.diagonal().mean()
    tells = torch.isfinite(kernel).all() and torch.isfinite(pull).all() and unit > 0
    if not bool(tells) or not bool(outputs.any()):
        return None
    pulls, some = kept.double() @ pull / unit, outputs[numbers].to(unit)
    growing = float(along @ pull / unit) / float(outputs.square().sum()) / steep
    spectrum = Spectrum.of(kernel / unit)
    return stationarity_of(spectrum, pulls, some, steep, growing=growing)


def _drawn(rows: RowSource) -> Tensor:
    # which rows are looked at, fewer of wide ones
    count, width = rows.shape
    most = max(FEWEST, _SAMPLE_BYTES // (4 * width))
    return torch.from_numpy(drawn(count, min(SAMPLE, most)))


def _outputs(known: Outputs | None, numbers: NDArray[np.int64]) -> Tensor | None:
    # of all of the sample, or of nothing
    if known is None or not np.isin(numbers, known.numbers).all():
        return None
    places = np.searchsorted(known.numbers, numbers)
    return torch.from_numpy(-known.slope * known.values[places])


def _gathered(rows: RowSource, numbers: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    # some rows, and sums of all by weights [c, n], [c, k]
    double = row_encoding(rows).name == "float64"
    dtype = torch.float64 if double else torch.float32
    device = home(rows)
    shape = (len(weights), rows.shape[1])
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    kept: list[Tensor] = []
    block_rows = rows_per_block(rows.shape[1], dtype)
    for _, start, block in stream([rows], dtype, device, block_rows):
        part = weights[:, start : start + len(block)].to(block)
        for place, each in enumerate(part):  # few, of which a product of matrices is slow
            total[place] += each @ block
        own = numbers[(numbers >= start) & (numbers < start + len(block))] - start
        kept.append(block[own.to(device)])
    return torch.cat(kept), total
