"""Sums that differ by their rounding errors only are equal."""

import numpy as np

from trak.evaluation.arrays import Floats

_ROUNDING = 64 * float(np.finfo(np.float64).eps)


def without_rounding(sums: Floats, scale: Floats) -> Floats:
    """Makes sums equal that differ by no more than rounding.

    The same terms give another sum in another order. In a column's ascending order, sums
    that differ from the one before by at most `64 eps` times the larger of both scales,
    with float64's `eps`, take the value of the first of them. Where they are more than that
    from the first, all of them stay as they are: so close together are numbers that differ.

    Args:
        sums: `[rows, m]`.
        scale: sums of the magnitudes of the same terms, `[rows, m]`.

    Returns:
        `[rows, m]`.
    """
    order = np.argsort(sums, axis=0, kind="stable")
    ordered = np.take_along_axis(sums, order, axis=0)
    noise = _ROUNDING * np.take_along_axis(scale, order, axis=0)
    apart = np.diff(ordered, axis=0) > np.maximum(noise[1:], noise[:-1])
    if apart.all():
        return sums
    first = np.zeros_like(order)
    first[1:] = np.where(apart, np.arange(1, len(sums))[:, None], 0)
    first = np.maximum.accumulate(first, axis=0)
    levels = np.take_along_axis(ordered, first, axis=0)
    # a chain of small steps may lead far
    far = ordered - levels > np.maximum(noise, np.take_along_axis(noise, first, axis=0))
    for column in np.flatnonzero(far.any(axis=0)):
        chains = np.isin(first[:, column], first[far[:, column], column])
        levels[chains, column] = ordered[chains, column]
    levelled = np.empty_like(sums)
    np.put_along_axis(levelled, order, levels, axis=0)
    return levelled


def mean_over_seeds(outputs: Floats) -> Floats:
    """The mean output, equal where only the order of the seeds differs.

    Args:
        outputs: `[rows, seeds, m]`.

    Returns:
        `[rows, m]`; as given where there is one seed.
    """
    if outputs.shape[1] == 1:
        return outputs[:, 0]
    return without_rounding(outputs.mean(axis=1), np.abs(outputs).mean(axis=1))
