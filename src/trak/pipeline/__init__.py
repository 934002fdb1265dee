"""Wires gradient computer, projector, store and scoring together."""

from trak.pipeline.assembly import make_computer, make_pipeline, make_saver
from trak.pipeline.checks import as_folder, as_names, check_model, check_parts
from trak.pipeline.choices import make_scorer, storage_dtype, tables_of, usual_projector
from trak.pipeline.describe import describe_run, store_metadata
from trak.pipeline.errors_of_scores import ScoresWithError, error_pass
from trak.pipeline.first_batch import try_first_batches
from trak.pipeline.inventory import (
    CheckpointInfo,
    ExperimentInfo,
    list_checkpoints,
    list_experiments,
)
from trak.pipeline.methods import group_matrix, is_trak, method_named, method_pass
from trak.pipeline.model_state import validate_state
from trak.pipeline.pipeline import Pipeline
from trak.pipeline.project import RowMaker
from trak.pipeline.ranks_of_scores import Ranked
from trak.pipeline.task_state import prepare_task
from trak.pipeline.whiten import Whitener, as_strength

__all__ = [
    "CheckpointInfo",
    "ExperimentInfo",
    "Pipeline",
    "Ranked",
    "RowMaker",
    "ScoresWithError",
    "Whitener",
    "as_folder",
    "as_names",
    "as_strength",
    "check_model",
    "check_parts",
    "describe_run",
    "error_pass",
    "group_matrix",
    "is_trak",
    "list_checkpoints",
    "list_experiments",
    "make_computer",
    "make_pipeline",
    "make_saver",
    "make_scorer",
    "method_named",
    "method_pass",
    "prepare_task",
    "storage_dtype",
    "store_metadata",
    "tables_of",
    "try_first_batches",
    "usual_projector",
    "validate_state",
]
