"""Which training examples made a model predict this?

TRAK (Park et al. 2023, arXiv:2303.14186) under the reference implementation's names,
with nothing to compile.
"""

from trak import evaluation as evaluation
from trak import utils
from trak.attribution import attribute
from trak.installation import test_install
from trak.pipeline import CheckpointInfo, ExperimentInfo, Ranked, ScoresWithError
from trak.settings import LIBRARY_VERSION
from trak.traker import TRAKer

__version__ = LIBRARY_VERSION
VERSION = LIBRARY_VERSION

__all__ = [
    "VERSION",
    "CheckpointInfo",
    "ExperimentInfo",
    "Ranked",
    "ScoresWithError",
    "TRAKer",
    "__version__",
    "attribute",
    "test_install",
]

utils.test_install = test_install  # pyright: ignore[reportAttributeAccessIssue]
