"""What is loaded, and what for."""

from dataclasses import dataclass
from typing import Literal

from trak.errors import PhaseError
from trak.gradient_computers.coverage import Coverage
from trak.pipeline.model_state import WeightWatch


@dataclass
class Phase:
    """What is loaded, and what for.

    Attributes:
        kind: whether training examples or targets are expected.
        model_id: the checkpoint.
        exp_name: the experiment, while scoring.
        digest: content hash of the checkpoint.
        watch: notices changes of the weights.
        cursor: the next row for `num_samples`.
        coverage: what the store knows of how gradients are computed.
        began: whether a batch came.
    """

    kind: Literal["featurize", "score"]
    model_id: int
    exp_name: str
    digest: str
    watch: WeightWatch
    cursor: int = 0
    coverage: Coverage | None = None
    began: bool = False


class OvertakenError(PhaseError):
    """Another process stored some of the rows meanwhile; others are still to be made."""
