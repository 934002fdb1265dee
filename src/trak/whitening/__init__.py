"""Second moments of layers' gradients, and the features that they whiten."""

from trak.whitening.moments import Moments
from trak.whitening.whitening import Whitening

__all__ = ["Moments", "Whitening"]
