"""Judges: which completion of a prompt is better, as probabilities `[B, K, K]`."""

from paxo.judges.checks import CheckedJudge, JudgeError, checked_preferences, wanted_pairs
from paxo.judges.ensembles import JudgeEnsemble, RewardEnsemble
from paxo.judges.matrices import MatrixJudge, cyclic_matrix
from paxo.judges.rewards import RewardJudge, bradley_terry
from paxo.judges.rules import RuleJudge, preferences_from_scores

__all__ = [
    "CheckedJudge",
    "JudgeEnsemble",
    "JudgeError",
    "MatrixJudge",
    "RewardEnsemble",
    "RewardJudge",
    "RuleJudge",
    "bradley_terry",
    "checked_preferences",
    "cyclic_matrix",
    "preferences_from_scores",
    "wanted_pairs",
]
