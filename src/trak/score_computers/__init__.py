"""From projected gradients to scores: Gram matrix, ridge, solve, ensemble.

A score has a sign and a unit: positive means that adding the training example raises
the target's model output (the margin, for classification).
"""

from trak.score_computers.abstract import AbstractScoreComputer
from trak.score_computers.basic import BasicScoreComputer, BasicSingleBlockScoreComputer
from trak.score_computers.linear import LinearScoreComputer
from trak.score_computers.ridge import RidgeScoreComputer
from trak.score_computers.running import RunningTop
from trak.score_computers.topk import TopScores, top_scores

__all__ = [
    "AbstractScoreComputer",
    "BasicScoreComputer",
    "BasicSingleBlockScoreComputer",
    "LinearScoreComputer",
    "RidgeScoreComputer",
    "RunningTop",
    "TopScores",
    "top_scores",
]
