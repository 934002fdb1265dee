"""Is an attribution right? Measures against retraining, with their uncertainty.

Inputs are plain arrays: NumPy's, or tensors on any device. Nothing here needs a store.
"""

from trak.evaluation.bank_files import load_bank, save_bank
from trak.evaluation.banks import Bank
from trak.evaluation.builder import build_bank
from trak.evaluation.ceiling import noise_ceiling
from trak.evaluation.datamodeling import (
    LDSDifference,
    LinearDatamodelingScore,
    group_scores,
    lds,
    lds_difference,
)
from trak.evaluation.detection import Detection, mislabelled
from trak.evaluation.hashes import checkpoint_hash, data_hash, example_hashes
from trak.evaluation.indices import masks_from_indices
from trak.evaluation.intervals import Interval
from trak.evaluation.omission import CorrelationOverTargets, LeaveOneOut, leave_one_out
from trak.evaluation.plan import BankPlan
from trak.evaluation.readers import bank_from_indices, read_trak_bank
from trak.evaluation.removal import (
    RemovalCurve,
    RemovalEffect,
    removal_curve,
    removal_curve_from_outputs,
    removed_indices,
)
from trak.evaluation.weights import load_checkpoints

__all__ = [
    "Bank",
    "BankPlan",
    "CorrelationOverTargets",
    "Detection",
    "Interval",
    "LDSDifference",
    "LeaveOneOut",
    "LinearDatamodelingScore",
    "RemovalCurve",
    "RemovalEffect",
    "bank_from_indices",
    "build_bank",
    "checkpoint_hash",
    "data_hash",
    "example_hashes",
    "group_scores",
    "lds",
    "lds_difference",
    "leave_one_out",
    "load_bank",
    "load_checkpoints",
    "masks_from_indices",
    "mislabelled",
    "noise_ceiling",
    "read_trak_bank",
    "removal_curve",
    "removal_curve_from_outputs",
    "removed_indices",
    "save_bank",
]
