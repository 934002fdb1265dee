"""Is an attribution right? Measures against retraining, with their uncertainty.

Inputs are plain arrays: NumPy's, or tensors on any device. Nothing here needs a store.
"""

from trak.evaluation.ceiling import noise_ceiling
from trak.evaluation.datamodeling import (
    LDSDifference,
    LinearDatamodelingScore,
    group_scores,
    lds,
    lds_difference,
)
from trak.evaluation.detection import Detection, mislabelled
from trak.evaluation.intervals import Interval
from trak.evaluation.omission import CorrelationOverTargets, LeaveOneOut, leave_one_out
from trak.evaluation.removal import (
    RemovalCurve,
    RemovalEffect,
    removal_curve,
    removal_curve_from_outputs,
    removed_indices,
)

__all__ = [
    "CorrelationOverTargets",
    "Detection",
    "Interval",
    "LDSDifference",
    "LeaveOneOut",
    "LinearDatamodelingScore",
    "RemovalCurve",
    "RemovalEffect",
    "group_scores",
    "lds",
    "lds_difference",
    "leave_one_out",
    "mislabelled",
    "noise_ceiling",
    "removal_curve",
    "removal_curve_from_outputs",
    "removed_indices",
]
