"""Random projections of gradients, `[b, p]` to `[b, k]`.

Every projection is unscaled: entries have variance 1, so that inner products grow by `k`
on average. `TRAKer` divides rows by the square root of the number of parameters.
"""

from trak.projectors.abstract import (
    AbstractProjector,
    BlockProjector,
    ProjectionType,
    resolve_device,
)
from trak.projectors.choice import make_projector, projection_costs
from trak.projectors.chunked import ChunkedCudaProjector
from trak.projectors.dense import (
    BasicProjector,
    BasicSingleBlockProjector,
    CudaProjector,
)
from trak.projectors.dimension import is_exact, projector_of_width, width_of_rows
from trak.projectors.factored import FactoredProjector
from trak.projectors.hadamard import HadamardProjector
from trak.projectors.kernel import KernelProjector
from trak.projectors.leading import LeadingProjector
from trak.projectors.masked import MaskedProjector
from trak.projectors.noop import NoOpProjector
from trak.projectors.sparse import SparseProjector

__all__ = [
    "AbstractProjector",
    "BasicProjector",
    "BasicSingleBlockProjector",
    "BlockProjector",
    "ChunkedCudaProjector",
    "CudaProjector",
    "FactoredProjector",
    "HadamardProjector",
    "KernelProjector",
    "LeadingProjector",
    "MaskedProjector",
    "NoOpProjector",
    "ProjectionType",
    "SparseProjector",
    "is_exact",
    "make_projector",
    "projection_costs",
    "projector_of_width",
    "resolve_device",
    "width_of_rows",
]
