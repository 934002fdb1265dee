"""Wires gradient computer, projector, store and scoring together."""

from trak.pipeline.pipeline import (
    Pipeline,
    as_model_id,
    describe_run,
    store_metadata,
)
from trak.pipeline.project import RowMaker

__all__ = [
    "Pipeline",
    "RowMaker",
    "as_model_id",
    "describe_run",
    "store_metadata",
]
